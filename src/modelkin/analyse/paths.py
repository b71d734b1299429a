"""Evolution paths: stages, early stopping replayed, convergence. Knows scores and kinship only.

A path is its merges in the order in which they were made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

import numpy as np

RULE = (
    "least-squares fit of a line that rises and then stays flat to the best score so far; "
    "saturation begins where it becomes flat, if at least two merges are there"
)


@dataclass(frozen=True)
class Stages:
    """The improving and the saturation stage of a path.

    Attributes:
        best_so_far: the best score of all merges up to each one.
        saturation: index of the first merge of the saturation stage; `None` where there is none.
        rule: how that was decided, in words.
    """

    best_so_far: tuple[float, ...]
    saturation: int | None
    rule: str


def stages(scores: Sequence[float]) -> Stages:
    """Divide a path into improving and saturation, by a change point and not by eye.

    The best score so far, b_0 ... b_n-1, is fitted by a line that rises up to merge s and is flat
    from there on, level - slope * max(0, s - i) with a slope of at least 0, for every s; the s of
    the smallest sum of squared residuals is the first merge of the saturation stage (the earliest
    one where several are equal). There is no saturation stage if that is one of the last merge
    alone: then the curve was still rising. The paper sets its boundaries by levels of the
    score (section 4.3.2), which do not carry over to other tasks.

    >>> stages([70.0, 72.0, 74.0, 74.0, 73.0, 74.0]).saturation
    2
    """
    best_so_far = tuple(accumulate(scores, max))
    errors = [_flattened_error(best_so_far, s) for s in range(len(scores))]
    if len(scores) < 3:
        return Stages(best_so_far, None, RULE)
    # Errors that differ by rounding are equal.
    tolerance = 1e-12 * max(1.0, max(map(abs, best_so_far))) ** 2
    first = next(s for s, error in enumerate(errors) if error <= min(errors) + tolerance)
    return Stages(best_so_far, first if first < len(scores) - 1 else None, RULE)


def _flattened_error(values: Sequence[float], s: int) -> float:
    """Squared residuals of the best line that rises to index s and is flat from there."""
    value_I = np.asarray(values) - values[0]
    before_I = np.maximum(0.0, s - np.arange(len(values)))
    centred_I = before_I - before_I.mean()
    square = float(centred_I @ centred_I)
    # Best so far never falls, so the slope is never negative.
    slope = -float(centred_I @ value_I) / square if square > 0 else 0.0
    residual_I = value_I - value_I.mean() + slope * centred_I
    return float(residual_I @ residual_I)


@dataclass(frozen=True)
class EarlyStop:
    """What stopping by one threshold would have meant.

    Attributes:
        threshold: of kinship.
        patience: how many merges in a row have to reach it.
        stops_after: index of the last merge that is made; `None` where it never stops.
        saved: number of merges not made.
        saved_share: of all merges, 0 to 1.
        lost: best score of all minus best score until the stop, in the scores' units.
    """

    threshold: float
    patience: int
    stops_after: int | None
    saved: int
    saved_share: float
    lost: float


def early_stopping(
    kinship: Sequence[float | None],
    scores: Sequence[float],
    thresholds: Sequence[float],
    patiences: Sequence[int],
    *,
    distance: bool = False,
) -> list[EarlyStop]:
    """Replay a path under every threshold and patience: what would have been saved, and lost.

    Args:
        kinship: of the parents of each merge; unknown ones never reach the threshold.
        scores: of each merge's child.
        thresholds: the path stops when kinship is above one of them.
        patiences: for so many merges in a row, at least 1.
        distance: kinship is a distance, and has to be below the threshold.

    Raises:
        ValueError: not as many kinships as scores, or a patience below 1.

    >>> [stop] = early_stopping([0.1, 0.95, 0.97, 0.99], [70, 72, 71, 73], [0.9], [2])
    >>> stop.stops_after, stop.saved, stop.lost
    (2, 1, 1)
    """
    if len(kinship) != len(scores):
        raise ValueError(
            f"early stopping: expected as many kinships as scores, "
            f"found {len(kinship)} and {len(scores)}"
        )
    if any(patience < 1 for patience in patiences):
        raise ValueError(f"early stopping: expected patiences of at least 1, found {patiences}")
    return [
        _early_stop(kinship, scores, threshold, patience, distance)
        for threshold in thresholds
        for patience in patiences
    ]


def _early_stop(
    kinship: Sequence[float | None],
    scores: Sequence[float],
    threshold: float,
    patience: int,
    distance: bool,
) -> EarlyStop:
    in_a_row = 0
    for index, value in enumerate(kinship):
        reached = value is not None and (value < threshold if distance else value > threshold)
        in_a_row = in_a_row + 1 if reached else 0
        if in_a_row == patience:
            saved = len(scores) - 1 - index
            lost = max(scores) - max(scores[: index + 1])
            return EarlyStop(threshold, patience, index, saved, saved / len(scores), lost)
    return EarlyStop(threshold, patience, None, 0, 0.0, 0.0)


def convergence(
    ranked_by_generation: Sequence[Sequence[str]],
    similarity: Callable[[str, str], float | None],
) -> list[float | None]:
    """Kinship among the best of each generation: the mean over their pairs (paper eq. 4).

    Args:
        ranked_by_generation: for each generation, the k best models at its end.
        similarity: kinship of two models, by any metric.

    Returns:
        One value a generation; `None` where there is no pair or the kinship of one is unknown.

    >>> convergence([["a"], ["a", "b"]], lambda one, other: 0.5)
    [None, 0.5]
    """
    means: list[float | None] = []
    for best in ranked_by_generation:
        values = [similarity(one, other) for one, other in combinations(best, 2)]
        known = [value for value in values if value is not None]
        means.append(sum(known) / len(known) if known and len(known) == len(values) else None)
    return means
