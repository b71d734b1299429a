"""Facts about correlations, their uncertainty, and fitted lines."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from modelkin.analyse import correlate, fit_line
from modelkin.analyse.correlation import Kind

# Table 6 and 7 of the paper: PCC, cosine, Euclidean distance of the parents, and merge gain.
PATH_1 = np.array([
    (0.82, 0.76, 5.15, 0.55), (0.81, 0.79, 6.43, 1.01), (0.93, 0.89, 4.66, 0.45),
    (0.90, 0.84, 4.70, -0.69), (0.59, 0.59, 9.43, 0.59), (0.87, 0.86, 5.31, 0.045),
    (0.84, 0.85, 4.82, 0.6), (0.85, 0.89, 4.28, 0.38), (0.96, 0.94, 2.83, 0.065),
    (0.97, 0.97, 2.21, -0.02), (0.99, 0.99, 0.62, 0.11), (0.93, 0.94, 2.49, -0.02),
    (0.97, 0.97, 2.19, -0.02), (0.98, 0.98, 1.61, 0.25),
])  # fmt: skip
PATH_2 = np.array([
    (0.02, 0.01, 20.41, 2.89), (0.88, 0.83, 6.16, 0.35), (0.79, 0.70, 6.47, 0.64),
    (0.87, 0.83, 4.81, 0.33), (0.79, 0.77, 6.01, 0.15), (0.90, 0.86, 4.59, 0.32),
    (0.87, 0.87, 4.17, 0.67), (0.96, 0.96, 2.90, 0.11), (0.83, 0.84, 5.38, 0.29),
    (0.93, 0.94, 2.49, -0.02), (0.97, 0.97, 2.19, -0.02), (0.98, 0.98, 1.61, 0.25),
])  # fmt: skip
KINDS: tuple[Kind, ...] = ("pearson", "spearman")
# Ties among few values, and no spread below rounding.
SERIES = st.lists(st.integers(-5, 5).map(float), min_size=3, max_size=12)


def scipy_correlation(x: np.ndarray, y: np.ndarray, kind: Kind) -> tuple[float, float]:
    """SciPy's own coefficient and p value."""
    found = (stats.pearsonr if kind == "pearson" else stats.spearmanr)(x, y)
    return float(found.statistic), float(found.pvalue)


@pytest.mark.parametrize(
    ("column", "signed", "p_signed", "absolute", "p_absolute"),
    [(0, -0.51, 0.062, -0.60, 0.024),
     (1, -0.45, 0.106, -0.67, 0.009),
     (2, 0.47, 0.091, 0.68, 0.008)],
    ids=["pcc", "cs", "ed"],
)  # fmt: skip
def test_correlations_of_the_paper(
    column: int, signed: float, p_signed: float, absolute: float, p_absolute: float
) -> None:
    """Path 1 gives the paper's Table 2 within 0.01, with 14 points, and no merge carries it."""
    gain = PATH_1[:, 3]
    for y, r, p in ((gain, signed, p_signed), (np.abs(gain), absolute, p_absolute)):
        found = correlate(PATH_1[:, column], y)
        assert found is not None
        assert found.n == 14
        assert found.r == pytest.approx(r, abs=0.005)
        assert found.p == pytest.approx(p, abs=0.0005)
        assert found.decisive is None


@pytest.mark.parametrize("column", [0, 1, 2], ids=["pcc", "cs", "ed"])
def test_one_merge_carries_the_second_path(column: int) -> None:
    """In path 2 the strong correlation is CatPPT's alone, and the ranks know nothing of it."""
    x, gain = PATH_2[:, column], PATH_2[:, 3]
    found = correlate(x, gain)
    assert found is not None
    assert abs(found.r) > 0.95
    assert found.decisive == 0
    without = scipy_correlation(x[1:], gain[1:], "pearson")[0]
    assert min(map(abs, found.leave_one_out)) == pytest.approx(abs(without))
    assert abs(without) < 0.65
    by_ranks = correlate(x, gain, "spearman")
    assert by_ranks is not None
    assert by_ranks.decisive is None


@settings(deadline=None)
@given(SERIES.flatmap(lambda x: st.tuples(st.just(x), st.permutations(x))))
def test_r_and_p_are_scipys(series: tuple[list[float], list[float]]) -> None:
    """Pearson's and Spearman's r and p are SciPy's, ties included."""
    x, y = map(np.array, series)
    for kind in KINDS:
        found = correlate(x, y, kind, draws=20)
        if np.ptp(x) == 0:
            assert found is None
            continue
        assert found is not None
        r, p = scipy_correlation(x, y, kind)
        assert found.r == pytest.approx(r, abs=1e-12)
        # At |r| = 1 p is all rounding.
        assert found.p == pytest.approx(p, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_one_out_is_leaving_one_out(kind: Kind) -> None:
    """The range holds the r of all points but one, for every one."""
    x, y = np.random.default_rng(5).normal(size=(2, 15))
    found = correlate(x, y, kind)
    assert found is not None
    left = [scipy_correlation(np.delete(x, i), np.delete(y, i), kind)[0] for i in range(15)]
    assert found.leave_one_out == pytest.approx((min(left), max(left)))


@pytest.mark.parametrize("kind", KINDS)
def test_interval_agrees_with_scipys_bootstrap(kind: Kind) -> None:
    """The interval is the percentile bootstrap over points, but for the luck of the draws."""
    random = np.random.default_rng(1)
    x = random.normal(size=60)
    y = x + random.normal(size=60)
    found = correlate(x, y, kind, draws=10_000)
    reference = stats.bootstrap(
        (x, y),
        lambda x, y: scipy_correlation(x, y, kind)[0],
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        random_state=2,
    ).confidence_interval
    assert found is not None
    assert found.low == pytest.approx(reference.low, abs=0.03)
    assert found.high == pytest.approx(reference.high, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_no_correlation_without_spread_or_points(kind: Kind) -> None:
    """Two points, or a series of equal values, have no correlation."""
    assert correlate([1, 2], [2, 1], kind) is None
    assert correlate([0.1 + 0.2, 0.3, 0.3], [1, 2, 3], kind) is None
    assert correlate([1, 2, 3], [0, 0, 0], kind) is None
    assert correlate([], [], kind) is None


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scale_is_immaterial(scale: float) -> None:
    """Tiny and huge numbers correlate as plain ones do."""
    x, y = np.random.default_rng(0).normal(size=(2, 10))
    one, other = correlate(x, y), correlate(scale * x, scale * y)
    assert one is not None
    assert other is not None
    assert other.r == pytest.approx(one.r)
    assert (other.low, other.high) == pytest.approx((one.low, one.high))


def test_a_point_that_turns_the_sign_is_decisive() -> None:
    """Ten points that fall, and one far away by which they rise."""
    x = [*range(10), 100]
    y = [*range(10, 0, -1), 100]
    found = correlate(x, y)
    assert found is not None
    assert found.r > 0.9
    assert found.leave_one_out[0] == pytest.approx(-1)
    assert found.decisive == 10


def test_what_is_no_result_is_carried_by_nobody() -> None:
    """Without a significant correlation there is no decisive point."""
    found = correlate([1, 2, 3, 4, 5], [0, 1, -1, 0.5, 0.1])
    assert found is not None
    assert found.p > 0.05
    assert found.decisive is None


def test_numbers_have_to_be_finite_and_paired() -> None:
    """NaN, infinity and series of unlike lengths are mistakes of the caller."""
    with pytest.raises(ValueError, match="finite"):
        correlate([1, 2, float("nan")], [1, 2, 3])
    with pytest.raises(ValueError, match="found 3 and 2"):
        correlate([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        fit_line([1, 2, float("inf")], [1, 2, 3])


def test_the_line_is_least_squares() -> None:
    """Slope and intercept are SciPy's; the band is the standard error of the mean there."""
    random = np.random.default_rng(3)
    x = random.uniform(0, 10, 25)
    y = 2 * x - 1 + random.normal(size=25)
    found, reference = fit_line(x, y), stats.linregress(x, y)
    assert found is not None
    assert (found.slope, found.intercept) == pytest.approx((reference.slope, reference.intercept))
    assert (found.x_X[0], found.x_X[-1]) == (x.min(), x.max())
    np.testing.assert_allclose(found.y_X, reference.intercept + reference.slope * found.x_X)
    # At the place of the mean the slope's error does not matter, elsewhere both do.
    residual = y - reference.intercept - reference.slope * x
    variance = residual @ residual / 23
    deviation_X = found.x_X - x.mean()
    error_X = np.sqrt(variance / 25 + (reference.stderr * deviation_X) ** 2)
    half = stats.t.ppf(0.975, 23) * error_X
    np.testing.assert_allclose(found.high_X - found.y_X, half)
    np.testing.assert_allclose(found.y_X - found.low_X, half)


def test_no_line_through_one_place() -> None:
    """Points above each other, or two of them, have no line with a band."""
    assert fit_line([1, 1, 1], [1, 2, 3]) is None
    assert fit_line([1, 2], [1, 2]) is None


def test_a_line_through_equal_values_is_flat() -> None:
    """Without spread in y the line is flat and certain."""
    found = fit_line([1, 2, 3], [5, 5, 5])
    assert found is not None
    assert (found.slope, found.intercept) == (0, 5)
    np.testing.assert_array_equal(found.low_X, found.high_X)
