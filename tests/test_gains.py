"""Facts about gains, differences between models, and their uncertainty."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, norm, ttest_rel

from modelkin.analyse import Difference, Gain, Samples, gains, holm, paired_difference

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
    assert paired_difference(child, [child], draws=20) == Difference(0.0, 0.0, 0.0, p=1.0)


def test_a_constant_advantage_has_no_uncertainty() -> None:
    """Items are paired: a child better by the same amount on each is better for certain."""
    parent = random_samples(0)
    child = {"task": {item: value + 0.25 for item, value in parent["task"].items()}}
    assert paired_difference(child, [parent]) == Difference(0.25, 0.25, 0.25, p=0.0)


def test_rounding_is_no_uncertainty() -> None:
    """A constant advantage is certain, and none is none, whatever the outcomes round to."""
    outcomes = np.random.default_rng(0).uniform(size=50)
    parent = {"task": {str(item): float(value) for item, value in enumerate(outcomes)}}
    child = {"task": {item: value + 0.1 for item, value in parent["task"].items()}}
    found = paired_difference(child, [parent] * 3)
    assert found is not None
    assert found.low == found.value == found.high == pytest.approx(0.1)
    assert found.p == 0
    same = paired_difference(parent, [parent] * 3)
    assert same is not None
    assert same.value == pytest.approx(0, abs=1e-12)
    assert same.p == 1
    assert same.low == same.high


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
        ({"task": {"0": float("nan")}}, {"task": {"0": 1.0}}),
        ({"task": {"0": 1.0}}, {"task": {"0": float("inf")}}),
    ],
)
def test_items_that_do_not_match_cannot_be_compared(child: Samples, other: Samples) -> None:
    """There is no difference where samples are missing, of other items, or no numbers."""
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
    assert paired_difference(child, [other]) == Difference(0.5, 0.5, 0.5, p=0.0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.3, "better"), (-0.3, -0.1, "worse"), (-0.1, 0.1, "cannot tell"),
     (0.0, 0.1, "cannot tell"), (-0.1, 0.0, "cannot tell")],
)  # fmt: skip
def test_an_interval_with_zero_in_it_is_no_improvement(
    low: float, high: float, verdict: str
) -> None:
    """`better` and `worse` are said only where the interval excludes zero."""
    assert Difference((low + high) / 2, low, high, p=0.5).verdict == verdict


def related(seed: int, shift: float = 0.0, size: int = 300) -> Samples:
    """Outcomes on the items of two tasks that are hard for all models or for none."""
    random = np.random.default_rng(seed)
    hard = np.random.default_rng(99).uniform(size=(2, size))
    right = random.normal(scale=0.2, size=(2, size)) + shift > hard - 0.5
    return {
        task: {str(item): float(value) for item, value in enumerate(row)}
        for task, row in zip("ab", right, strict=True)
    }


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    """Of 2,000 synthetic cases 93 to 97 % have the true difference in their 95 % interval."""
    random = np.random.default_rng(20)
    sizes, cases, inside = {"a": 60, "b": 120}, 2000, 0
    for case in range(cases):
        # A child and two parents with a true rate each; half of the outcome is the item's own.
        rate_3T = random.uniform(0.3, 0.7, size=(3, len(sizes)))
        truth = np.mean(rate_3T[0] - rate_3T[1:].mean(axis=0))
        models: list[dict[str, dict[str, float]]] = [{}, {}, {}]
        for t, (task, size) in enumerate(sizes.items()):
            shared_I = random.uniform(size=size)
            for model, rate in zip(models, rate_3T[:, t], strict=True):
                luck_I = np.where(
                    random.uniform(size=size) < 0.5, shared_I, random.uniform(size=size)
                )
                model[task] = {str(i): float(value) for i, value in enumerate(luck_I < rate)}
        found = paired_difference(models[0], models[1:], draws=600, seed=case)
        assert found is not None
        inside += found.low <= truth <= found.high
    assert 0.93 <= inside / cases <= 0.97


def test_p_is_that_of_a_paired_z_test() -> None:
    """On one task p comes near the paired t test's, which needs no draws."""
    one, other = random_samples(0), random_samples(6)
    found = paired_difference(one, [other], draws=20_000)
    assert found is not None
    reference = ttest_rel(list(one["task"].values()), list(other["task"].values())).pvalue
    assert found.p == pytest.approx(reference, rel=0.1)
    assert 0.05 < found.p < 0.95


def test_p_goes_far_below_one_over_the_draws() -> None:
    """A large difference is still told from a larger one, beyond what draws could count."""
    base = related(0)
    large = paired_difference(related(1, 0.2), [base], draws=500)
    larger = paired_difference(related(1, 0.3), [base], draws=500)
    assert large is not None
    assert larger is not None
    assert larger.p < large.p < 1 / 500 / 200


def test_without_a_difference_p_is_uniform() -> None:
    """Of equal models one in twenty seems different at p < 0.05, and half have p < 0.5."""
    found = [paired_difference(related(2 * s), [related(2 * s + 1)], draws=300) for s in range(400)]
    p_values = np.array([one.p for one in found if one is not None])
    assert len(p_values) == 400
    # Four standard errors either side.
    assert abs(np.mean(p_values < 0.05) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 400)
    assert abs(np.mean(p_values < 0.5) - 0.5) < 4 * np.sqrt(0.25 / 400)


@PATIENT
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_the_closed_form(p_values: list[float]) -> None:
    """Each adjusted p is the largest (m - rank) p among those that are not larger than its own."""
    order = sorted(p_values)
    count = len(p_values)
    expected = [
        min(1.0, max((count - k) * order[k] for k in range(count) if order[k] <= p))
        for p in p_values
    ]
    # Equal values have several ranks; the first of them counts most.
    assert holm(p_values) == pytest.approx(expected)


def test_holm_by_hand() -> None:
    """The smallest of four is multiplied by four, the next by three; they never fall."""
    assert holm([0.04, 0.01, 0.9, 0.011]) == pytest.approx([0.08, 0.04, 0.9, 0.04])


FAMILY = {"child": ("one", "two"), "grandchild": ("child", "two"), "twin": ("one", "two")}
SCORED = {
    "one": related(1),
    "two": related(2, 0.01),
    "child": related(3, 0.2),
    "grandchild": related(4, 0.2),
    "twin": related(5, -0.15),
}


def test_gains_are_the_paired_differences() -> None:
    """Comparing all merges at once gives what comparing each by itself does."""
    found = gains(FAMILY, SCORED, "two", draws=500, seed=3)
    assert list(found) == list(FAMILY)
    for child, parents in FAMILY.items():

        def alone(*others: str, child: str = child) -> Difference:
            difference = paired_difference(
                SCORED[child], [SCORED[other] for other in others], draws=500, seed=3
            )
            assert difference is not None
            return difference

        expected = [alone(*parents), *(alone(parent) for parent in parents), alone("two")]
        gain = found[child]
        assert gain.over_best is not None
        for one, other in zip(
            [gain.over_mean, *gain.over_parents, gain.over_best], expected, strict=True
        ):
            assert vars(one) == pytest.approx(vars(other), rel=1e-9, abs=1e-12)
    adjusted = holm([gain.over_mean.p for gain in found.values()])
    assert [gain.adjusted_p for gain in found.values()] == adjusted


def test_gains_of_what_can_be_compared() -> None:
    """A merge without samples, or with a parent without, has no gain and is not counted."""
    samples = {name: own for name, own in SCORED.items() if name != "child"}
    found = gains(FAMILY, samples, "missing")
    assert list(found) == ["twin"]
    assert found["twin"].over_best is None
    assert found["twin"].adjusted_p == found["twin"].over_mean.p


def test_gains_of_other_items_do_not_mix() -> None:
    """Merges that were evaluated on other items are compared among themselves."""
    small = {f"{name} small": related(seed, size=50) for seed, name in enumerate("abc")}
    parents = {**FAMILY, "a small": ("b small", "c small")}
    found = gains(parents, {**SCORED, **small}, "two")
    assert list(found) == list(parents)
    assert found["a small"].over_best is None
    assert found["child"].over_mean == gains(FAMILY, SCORED, "two")["child"].over_mean


def test_the_verdict_is_by_the_adjusted_p() -> None:
    """A gain whose own interval excludes zero is none among many merges."""
    difference = Difference(0.1, 0.01, 0.19, p=0.03)
    assert difference.verdict == "better"
    assert Gain(difference, (), None, adjusted_p=0.04).verdict == "better"
    assert Gain(difference, (), None, adjusted_p=0.3).verdict == "cannot tell"
    loss = Difference(-0.1, -0.19, -0.01, p=0.03)
    assert Gain(loss, (), None, adjusted_p=0.03).verdict == "worse"


def test_of_many_merges_without_a_gain_none_is_called_better() -> None:
    """Holm's method lets fewer than one run in twenty call any of its merges better or worse."""
    wrong = 0
    for run in range(60):
        samples = {f"m{n}": related(1000 * run + n, size=100) for n in range(22)}
        parents = {f"m{n}": ("m0", "m1") for n in range(2, 22)}
        found = gains(parents, samples, None, draws=300)
        wrong += any(gain.verdict != "cannot tell" for gain in found.values())
    # At a true rate of 5 % more than 9 of 60 come once in 600.
    assert wrong <= 9


def test_p_matches_the_interval_where_it_is_normal() -> None:
    """With many items p < 0.05 and an interval without zero are nearly the same."""
    found = paired_difference(related(7, size=2000), [related(8, 0.012, size=2000)], draws=20_000)
    assert found is not None
    spread = (found.high - found.low) / (2 * norm.ppf(0.975))
    assert found.p == pytest.approx(2 * norm.sf(abs(found.value) / spread), rel=0.15)
