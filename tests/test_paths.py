"""Facts about evolution paths: stages, early stopping, convergence, differences of tasks."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelkin.analyse import convergence, early_stopping, stages, task_difference

# Average and PCC of the merges of the paper's Tables 6 and 7.
PATH_1 = [
    73.63,
    74.74,
    75.15,
    73.32,
    74.77,
    74.8,
    75.52,
    76.29,
    76.58,
    76.67,
    76.68,
    76.64,
    76.6,
    76.86,
]
PCC_1 = [0.82, 0.81, 0.93, 0.90, 0.59, 0.87, 0.84, 0.85, 0.96, 0.97, 0.99, 0.93, 0.97, 0.98]
PATH_2 = [72.25, 72.74, 73.11, 74.12, 74.58, 74.94, 74.75, 75.04, 76.5, 76.64, 76.6, 76.86]
SCORES = st.lists(st.floats(0, 100), min_size=1, max_size=15)


def brute_force(scores: list[float]) -> list[float]:
    """Residual sum of the best level and slope for each change point, by NumPy's solver."""
    best = np.maximum.accumulate(scores)
    errors = []
    for s in range(len(scores)):
        columns = np.stack([np.ones(len(scores)), np.minimum(np.arange(len(scores)), s)], axis=1)
        solution = np.linalg.lstsq(columns, best, rcond=None)[0]
        errors.append(float(((columns @ solution - best) ** 2).sum()))
    return errors


@pytest.mark.parametrize("path", [PATH_1, PATH_2], ids=["path 1", "path 2"])
def test_stages_of_the_papers_paths(path: list[float]) -> None:
    """By the rule both paths saturate with their tenth merge."""
    assert stages(path).saturation == 9


@given(SCORES)
def test_best_so_far_is_the_running_maximum(scores: list[float]) -> None:
    """One value for each merge, which never falls."""
    assert stages(scores).best_so_far == tuple(accumulate(scores, max))


@given(st.lists(st.integers(0, 50).map(float), min_size=3, max_size=15))
def test_change_point_is_that_of_the_least_residuals(scores: list[float]) -> None:
    """No other change point fits better, and none before it as well."""
    found, errors = stages(scores).saturation, brute_force(scores)
    point = len(scores) - 1 if found is None else found
    assert errors[point] == pytest.approx(min(errors), abs=1e-6)
    assert all(error > min(errors) - 1e-9 for error in errors[:point])
    assert not any(error < errors[point] - 1e-6 for error in errors)


@pytest.mark.parametrize("rise", range(1, 9))
def test_a_sharp_bend_is_found(rise: int) -> None:
    """A curve that rises evenly and then stays is divided where it bends."""
    scores = [60.0 + 0.5 * min(step, rise) for step in range(12)]
    assert stages(scores).saturation == rise


def test_a_curve_that_rises_to_its_end_has_no_saturation() -> None:
    """The last merge alone is no stage."""
    assert stages([1.0, 2.0, 3.0, 4.0]).saturation is None
    assert stages([1.0, 2.0]).saturation is None
    assert stages([]).saturation is None


def test_a_path_without_improvement_is_saturated_from_its_start() -> None:
    """The first merge was the best one."""
    assert stages([70.0, 69.0, 70.0, 68.0]).saturation == 0


@given(st.lists(st.integers(0, 50), min_size=3, max_size=12), st.sampled_from([0.01, 100.0]))
def test_stages_do_not_depend_on_units(scores: list[int], unit: float) -> None:
    """Points, percent and shares have the same stages."""
    plain = stages([float(score) for score in scores]).saturation
    assert stages([unit * score + 7 for score in scores]).saturation == plain


def test_early_stopping_of_the_papers_first_path() -> None:
    """Above 0.9 twice in a row: 4 of 14 merges saved, 0.19 points lost."""
    (found,) = early_stopping(PCC_1, PATH_1, [0.9], [2])
    assert (found.stops_after, found.saved) == (9, 4)
    assert found.saved_share == pytest.approx(4 / 14)
    assert found.lost == pytest.approx(76.86 - 76.67)


def test_early_stopping_replays_every_threshold_and_patience() -> None:
    """One entry each, patiences within thresholds, and no saving where it never stops."""
    found = early_stopping([0.5, 0.9, 0.9], [1, 2, 3], [0.8, 0.95], [1, 2])
    assert [(one.threshold, one.patience) for one in found] == [
        (0.8, 1), (0.8, 2), (0.95, 1), (0.95, 2),
    ]  # fmt: skip
    assert [one.stops_after for one in found] == [1, 2, None, None]
    assert [one.saved for one in found] == [1, 0, 0, 0]
    assert [one.lost for one in found] == [1, 0, 0, 0]


def test_distances_stop_when_they_are_small() -> None:
    """Kin is near in a distance."""
    (found,) = early_stopping([9, 5, 2], [1, 3, 2], [5.5], [1], distance=True)
    assert (found.stops_after, found.saved, found.lost) == (1, 1, 0)


def test_unknown_kinship_ends_a_row() -> None:
    """Merges count in a row only where each is known to be above the threshold."""
    (found,) = early_stopping([0.95, None, 0.95, 0.95], [1, 2, 3, 4], [0.9], [2])
    assert found.stops_after == 3


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=1, max_size=12))
def test_patience_never_saves_more(path: list[tuple[float, float]]) -> None:
    """A higher threshold or more patience saves no more merges and loses no more."""
    kinship, scores = zip(*path, strict=True)
    found = early_stopping(kinship, scores, [0.3, 0.7], [1, 2, 3])
    # Three patiences within each of two thresholds.
    pairs = [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]
    for softer, stricter in ((found[one], found[other]) for one, other in pairs):
        assert stricter.saved <= softer.saved
        assert 0 <= stricter.lost <= softer.lost


def test_early_stopping_needs_a_kinship_for_each_score() -> None:
    """Series of unlike lengths and no patience at all are mistakes of the caller."""
    with pytest.raises(ValueError, match="found 1 and 2"):
        early_stopping([0.5], [1, 2], [0.9], [1])
    with pytest.raises(ValueError, match="at least 1"):
        early_stopping([0.5], [1], [0.9], [0])


def test_convergence_is_the_mean_over_pairs() -> None:
    """Figure 7 of the paper: the five fine-tuned models have 0.078, the saturated ones 0.903."""
    values = {
        "initial": [.01, .10, .04, .27, .02, .06, .03, .02, .13, .10],
        "saturated": [.98, .99, .95, .82, .98, .94, .81, .95, .81, .80],
    }  # fmt: skip
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    similarity = {
        (f"{stage} {i}", f"{stage} {j}"): value
        for stage, matrix in values.items()
        for (i, j), value in zip(pairs, matrix, strict=True)
    }
    found = convergence(
        [[f"{stage} {i}" for i in range(5)] for stage in values],
        lambda one, other: similarity[(one, other)],
    )
    assert found == pytest.approx([0.078, 0.903])


def test_convergence_is_unknown_where_a_pair_is() -> None:
    """One model has no kinship, and an unknown pair leaves no mean."""
    known = {("a", "b"): 0.5}
    found = convergence([["a"], ["a", "b"], ["a", "b", "c"]], lambda *pair: known.get(pair))
    assert found == [None, 0.5, None]


def test_task_difference_of_the_papers_models() -> None:
    """MetaMath and Instruct differ by 18.4 points a task, and by 1.9 in their averages."""
    metamath = {"truthfulqa": 44.89, "winogrande": 75.77, "gsm8k": 70.51}
    instruct = {"truthfulqa": 68.26, "winogrande": 77.19, "gsm8k": 40.03}
    assert task_difference(metamath, instruct) == pytest.approx((23.37 + 1.42 + 30.48) / 3)
    assert task_difference(instruct, metamath) == task_difference(metamath, instruct)
    assert task_difference(metamath, metamath) == 0


def test_task_difference_needs_the_same_tasks() -> None:
    """Scores on other tasks are not compared."""
    with pytest.raises(ValueError, match=r"found \['a'\] and \['b'\]"):
        task_difference({"a": 1}, {"b": 1})
    with pytest.raises(ValueError, match="on the same tasks"):
        task_difference({}, {})
