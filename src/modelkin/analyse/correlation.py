"""Correlation with its uncertainty, and the line through the points. Knows numbers only.

Axes: D bootstrap draws, P points, U distinct values, X places along a fitted line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelkin.errors import MissingExtraError
from modelkin.gram import Float64Array

Kind = Literal["pearson", "spearman"]
Numbers = Sequence[float] | Float64Array

SIGNIFICANT = 0.05
# Places at which a fitted line and its band are given.
PLACES = 60
# Numbers of bootstrap draws held in memory at once.
HELD = 1_000_000
# A spread below this part of the values' size is rounding.
NO_SPREAD = 1e-13


@dataclass(frozen=True)
class Correlation:
    """A correlation, how sure it is, and whether one point makes it.

    Attributes:
        kind: "pearson", or "spearman" for that of the ranks.
        n: number of points.
        r: -1 to 1.
        p: two-sided p value of there being none, by Student's t with n - 2 degrees of freedom.
        low: lower end of the 95 % interval, by a percentile bootstrap over points. With 10 to 30
            points it is too narrow: it has the truth in about 90 % of cases.
        high: upper end.
        leave_one_out: the smallest and the largest r that is left when one point is taken away.
        decisive: index of the point that carries the result alone, if there is one: r is
            significant (p < 0.05), and without this point it has the other sign or explains less
            than half of the variance that it explained (r² falls by more than half). Of several,
            the one without which r is weakest.
    """

    kind: Kind
    n: int
    r: float
    p: float
    low: float
    high: float
    leave_one_out: tuple[float, float]
    decisive: int | None


@dataclass(frozen=True)
class Fit:
    """A least-squares line with the 95 % confidence band of its mean.

    Attributes:
        slope: of the line.
        intercept: its value at 0.
        x_X: places from the smallest to the largest x.
        y_X: the line there.
        low_X: lower end of the band.
        high_X: upper end.
    """

    slope: float
    intercept: float
    x_X: Float64Array
    y_X: Float64Array
    low_X: Float64Array
    high_X: Float64Array


def correlate(
    x: Numbers,
    y: Numbers,
    kind: Kind = "pearson",
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Correlation | None:
    """Correlate two series of P finite numbers.

    Returns:
        The correlation, or `None` where there are fewer than 3 points or one series has no spread.

    Raises:
        ValueError: not as many x as y, or one of them is no finite number.
        MissingExtraError: SciPy is not installed.
    """
    points_2P = _points(x, y)
    if points_2P.shape[1] < 3 or not _spread(points_2P):
        return None
    if kind == "spearman":
        # Ranks need the order alone: each value's place among the distinct ones.
        places = [np.unique(points_P, return_inverse=True)[1] for points_P in points_2P]
        points_2P = np.array(places, dtype=np.float64)
    r = _r(points_2P, kind)
    p = _p(r, points_2P.shape[1])
    low, high = _interval(points_2P, kind, draws, seed)
    left = [_r(np.delete(points_2P, index, axis=1), kind) for index in range(points_2P.shape[1])]
    # A point without which nothing varies carries all there is.
    without = [0.0 if math.isnan(value) else value for value in left]
    return Correlation(
        kind=kind,
        n=points_2P.shape[1],
        r=r,
        p=p,
        low=low,
        high=high,
        leave_one_out=(min(without), max(without)),
        decisive=_decisive(r, p, without),
    )


def fit_line(x: Numbers, y: Numbers) -> Fit | None:
    """The least-squares line through P points, with the confidence band of the mean.

    Returns:
        The line, or `None` where there are fewer than 3 points or x has no spread.

    Raises:
        ValueError: not as many x as y, or one of them is no finite number.
        MissingExtraError: SciPy is not installed.
    """
    points_2P = _points(x, y)
    x_P, y_P = points_2P
    if len(x_P) < 3 or not _spread(points_2P[:1]):
        return None
    middle = x_P.mean()
    square = float(((x_P - middle) ** 2).sum())
    slope = float((x_P - middle) @ (y_P - y_P.mean())) / square
    residual_P = y_P - y_P.mean() - slope * (x_P - middle)
    variance = float(residual_P @ residual_P) / (len(x_P) - 2)
    x_X = np.linspace(x_P.min(), x_P.max(), PLACES)
    y_X = y_P.mean() + slope * (x_X - middle)
    half_X = _t_quantile(len(x_P) - 2) * np.sqrt(
        variance * (1 / len(x_P) + (x_X - middle) ** 2 / square)
    )
    return Fit(slope, float(y_P.mean() - slope * middle), x_X, y_X, y_X - half_X, y_X + half_X)


def _points(x: Numbers, y: Numbers) -> Float64Array:
    if len(x) != len(y):
        raise ValueError(f"correlation: expected as many x as y, found {len(x)} and {len(y)}")
    points_2P = np.array([x, y], dtype=np.float64)
    if not np.isfinite(points_2P).all():
        raise ValueError("correlation: expected finite numbers, found NaN or infinity")
    return points_2P


def _spread(points_2P: Float64Array) -> bool:
    size_2 = np.abs(points_2P).max(axis=1)
    return bool((np.ptp(points_2P, axis=1) > NO_SPREAD * size_2).all())


def _r(points_2P: Float64Array, kind: Kind) -> float:
    """NaN where one of the series has no spread."""
    (r,) = _r_of_draws(points_2P[:, None, :], kind)
    return float(r)


def _r_of_draws(points_2DP: Float64Array, kind: Kind) -> Float64Array:
    if kind == "spearman":
        points_2DP = _ranks(points_2DP)
    constant_D = (np.ptp(points_2DP, axis=2) <= NO_SPREAD * np.abs(points_2DP).max(axis=2)).any(
        axis=0
    )
    centred_2DP = points_2DP - points_2DP.mean(axis=2, keepdims=True)
    # Scaled first: squares of tiny or huge numbers may be beyond float64.
    largest_2D1 = np.abs(centred_2DP).max(axis=2, keepdims=True)
    centred_2DP /= np.where(largest_2D1 > 0, largest_2D1, 1.0)
    x_DP, y_DP = centred_2DP
    square_D = (x_DP**2).sum(axis=1) * (y_DP**2).sum(axis=1)
    product_D = (x_DP * y_DP).sum(axis=1)
    r_D = np.full(len(x_DP), np.nan)
    np.divide(product_D, np.sqrt(square_D), out=r_D, where=~constant_D)
    clipped_D: Float64Array = np.clip(r_D, -1.0, 1.0)
    return clipped_D


def _ranks(place_2DP: Float64Array) -> Float64Array:
    """Ranks within each draw, of places; equal ones share the mean of their ranks."""
    return np.array([_ranks_of_one(place_DP.astype(np.intp)) for place_DP in place_2DP])


def _ranks_of_one(place_DP: NDArray[np.intp]) -> Float64Array:
    draws, distinct = len(place_DP), int(place_DP.max()) + 1
    # A draw only counts how often each place comes.
    flat_DP = place_DP + np.arange(draws)[:, None] * distinct
    count_DU = np.bincount(flat_DP.ravel(), minlength=draws * distinct).reshape(draws, distinct)
    rank_DU = count_DU.cumsum(axis=1) - (count_DU - 1) / 2
    rank_DP: Float64Array = np.take_along_axis(rank_DU, place_DP, axis=1)
    return rank_DP


def _interval(points_2P: Float64Array, kind: Kind, draws: int, seed: int) -> tuple[float, float]:
    points = points_2P.shape[1]
    drawn_DP = np.random.default_rng(seed).integers(points, size=(draws, points))
    step = max(1, HELD // points)
    r_D = np.concatenate(
        [
            _r_of_draws(points_2P[:, drawn_DP[start : start + step]], kind)
            for start in range(0, draws, step)
        ]
    )
    # A draw in which nothing varies has no correlation, and says nothing about it.
    low, high = np.nanpercentile(r_D, [2.5, 97.5])
    return float(low), float(high)


def _decisive(r: float, p: float, without: Sequence[float]) -> int | None:
    if p >= SIGNIFICANT:
        return None
    # What is left in the direction of r.
    left = [math.copysign(1.0, r) * value for value in without]
    weakest = min(range(len(left)), key=left.__getitem__)
    return weakest if left[weakest] < abs(r) / math.sqrt(2) else None


def _p(r: float, points: int) -> float:
    special = _special()
    freedom = points - 2
    if abs(r) == 1:
        return 0.0
    t = abs(r) * math.sqrt(freedom / ((1 - r) * (1 + r)))
    return float(2 * special.stdtr(freedom, -t))


def _t_quantile(freedom: int) -> float:
    return float(_special().stdtrit(freedom, 0.975))


def _special() -> Any:
    try:
        from scipy import special
    except ImportError:
        raise MissingExtraError("scipy", "plot") from None
    return special
