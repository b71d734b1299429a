"""Facts about differences between models and their uncertainty."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from modelkin.analyse import Difference, Samples, paired_difference

# A busy machine is no failure.
PATIENT = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
OUTCOME = st.floats(-10, 10, allow_nan=False)


@st.composite
def families(draw: st.DrawFn) -> tuple[Samples, list[Samples]]:
    """A child and one to three others with outcomes on the same items."""
    sizes = draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 12), min_size=1))

    def model() -> Samples:
        return {
            task: {str(item): draw(OUTCOME) for item in range(size)} for task, size in sizes.items()
        }

    return model(), [model() for _ in range(draw(st.integers(1, 3)))]


def average(samples: Samples) -> float:
    """Average task performance, written down plainly."""
    return float(np.mean([np.mean(list(items.values())) for items in samples.values()]))


def random_samples(seed: int, size: int = 200) -> Samples:
    """Outcomes of 0 and 1 on the items of one task."""
    outcomes = np.random.default_rng(seed).integers(0, 2, size)
    return {"task": {str(item): float(value) for item, value in enumerate(outcomes)}}


@PATIENT
@given(families())
def test_value_is_the_difference_of_averages(family: tuple[Samples, list[Samples]]) -> None:
    """The value is the child's average minus the mean of the others' averages."""
    child, others = family
    found = paired_difference(child, others, draws=20)
    assert found is not None
    expected = average(child) - float(np.mean([average(other) for other in others]))
    assert found.value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_interval_contains_the_value(seed: int) -> None:
    """The interval has the value inside it."""
    found = paired_difference(
        random_samples(seed), [random_samples(seed + 100), random_samples(seed + 200)], seed=seed
    )
    assert found is not None
    assert found.low < found.value < found.high


@PATIENT
@given(families())
def test_a_model_does_not_differ_from_itself(family: tuple[Samples, list[Samples]]) -> None:
    """Identical outcomes give exactly zero, with an interval of no width."""
    child, _ = family
    assert paired_difference(child, [child], draws=20) == Difference(0.0, 0.0, 0.0)


def test_a_constant_advantage_has_no_uncertainty() -> None:
    """Items are paired: a child better by the same amount on each is better for certain."""
    parent = random_samples(0)
    child = {"task": {item: value + 0.25 for item, value in parent["task"].items()}}
    assert paired_difference(child, [parent]) == Difference(0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("child", "other"),
    [
        ({}, {}),
        ({"task": {}}, {"task": {}}),
        ({"task": {"0": 1.0}}, {}),
        ({"task": {"0": 1.0}}, {"task": {}}),
        ({"task": {"0": 1.0}}, {"task": {"1": 1.0}}),
        ({"task": {"0": 1.0}}, {"another": {"0": 1.0}}),
        ({"task": {"0": 1.0}}, {"task": {"0": 1.0}, "another": {"0": 1.0}}),
    ],
)
def test_items_that_do_not_match_cannot_be_compared(child: Samples, other: Samples) -> None:
    """There is no difference where samples are missing or are of other items."""
    assert paired_difference(child, [other]) is None


def test_every_other_model_needs_samples() -> None:
    """One parent without samples leaves nothing to compare with."""
    child = random_samples(0)
    assert paired_difference(child, [random_samples(1), {}]) is None


@PATIENT
@given(families())
def test_order_of_items_is_immaterial(
    family: tuple[Samples, list[Samples]],
) -> None:
    """Items are matched by id: the order in which they were answered changes nothing."""
    child, others = family
    shuffled = {
        task: dict(reversed(list(items.items()))) for task, items in reversed(list(child.items()))
    }
    assert paired_difference(shuffled, others, draws=20) == paired_difference(
        child, others, draws=20
    )


def test_the_same_seed_gives_the_same_interval() -> None:
    """The draws depend on the seed alone."""
    one, other = random_samples(0), random_samples(1)
    assert paired_difference(one, [other], seed=3) == paired_difference(one, [other], seed=3)
    assert paired_difference(one, [other], seed=3) != paired_difference(one, [other], seed=4)


def test_interval_agrees_with_scipy() -> None:
    """On one task it is SciPy's paired percentile bootstrap, but for the luck of the draws."""
    one, other = random_samples(0), random_samples(1)
    found = paired_difference(one, [other], draws=20_000)
    reference = bootstrap(
        (list(one["task"].values()), list(other["task"].values())),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        random_state=0,
    ).confidence_interval
    assert found is not None
    # Outcomes of 200 items move in steps of 0.005; the standard error is about 0.05.
    assert found.low == pytest.approx(reference.low, abs=0.006)
    assert found.high == pytest.approx(reference.high, abs=0.006)


def test_tasks_weigh_alike_whatever_their_size() -> None:
    """The average is the mean over tasks, not over items."""
    child: Samples = {"small": {"0": 1.0}, "large": {str(i): 0.0 for i in range(9)}}
    other: Samples = {"small": {"0": 0.0}, "large": {str(i): 0.0 for i in range(9)}}
    assert paired_difference(child, [other]) == Difference(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "better"), (-0.3, -0.1, "worse"), (-0.1, 0.1, "cannot tell"),
     (0.0, 0.1, "cannot tell"), (-0.1, 0.0, "cannot tell")],
)  # fmt: skip
def test_an_interval_with_zero_in_it_is_no_improvement(
    low: float, high: float, verdict: str
) -> None:
    """`better` and `worse` are said only where the interval excludes zero."""
    assert Difference((low + high) / 2, low, high).verdict == verdict
