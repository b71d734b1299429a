"""Kinship against merge gain (Table 2) and against task difference (Table 14), recomputed.

Knows the numbers, and neither how they are shown nor what else is wrong with them.

Axes: D draws, P merges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal

import numpy as np

from modelkin.analyse import Correlation, correlate, task_difference
from modelkin.errors import ConfigError
from modelkin.replay.records import Listed, Pair, Paper, Step, unit

METRICS = ("pcc", "cs", "ed")
# Numbers of merges among which the one is looked for that the printed p values are of.
MOST_MERGES = 100
# Draws of what was rounded to the printed numbers.
DRAWS = 2000


@dataclass(frozen=True)
class GainCorrelation:
    """Kinship against the gains of some merges.

    Attributes:
        sample: which merges.
        metric: which kinship.
        signed: whether gains keep their sign.
        found: the correlation.
        decisive: the merged model that carries it alone, if there is one.
        printed: r and p of Table 2.
        rounding: how far r moves, in 95 of 100 cases, if each printed number is off by less than
            half of its last digit.
    """

    sample: str
    metric: str
    signed: bool
    found: Correlation
    decisive: str
    printed: tuple[Decimal, Decimal]
    rounding: float

    @property
    def equal(self) -> bool:
        """Whether r is the printed one, up to one in its last digit."""
        return abs(round(Decimal(self.found.r), 2) - self.printed[0]) <= unit(self.printed[0])

    @property
    def why(self) -> str:
        """What lies between r and the printed one."""
        found, printed = Decimal(self.found.r), self.printed[0]
        if found.quantize(unit(printed), ROUND_HALF_UP) == printed:
            return "as printed"
        if found.quantize(unit(printed), ROUND_DOWN) == printed:
            return "as printed, which is cut off"
        if abs(self.found.r - float(printed)) <= self.rounding:
            return f"rounding of the printed kinship and gains moves r by {self.rounding:.2f}"
        return "differs by more than rounding can"


@dataclass(frozen=True)
class TaskCorrelation:
    """Kinship against the mean difference of task scores over pairs of Llama models.

    Attributes:
        printed: r of Table 14, where it is known.
        found: from the mean differences that Table 15 prints.
        ranks: the same by ranks (Spearman).
        rescored: from the scores of Table 11 instead.
    """

    metric: str
    printed: Decimal | None
    found: Correlation
    ranks: Correlation
    rescored: Correlation


def samples(paper: Paper) -> dict[str, list[Step]]:
    """The merges that kinship and gain are known of: each path, both, both without an outlier."""
    both = paper.without(frozenset())
    found = {"path 1": paper.path(1), "path 2": paper.path(2), "both paths": both}
    alone = _correlate(both, "pcc", signed=True, where="both paths").decisive
    if alone is not None:
        outlier = both[alone].model
        found[f"both without {outlier}"] = paper.without(frozenset({outlier}))
    return found


def gain_correlations(paper: Paper) -> list[GainCorrelation]:
    """Table 2 for every sample; the first one is what the paper printed."""
    return [
        _gain_correlation(paper, sample, steps, metric, signed)
        for sample, steps in samples(paper).items()
        for metric in METRICS
        for signed in (True, False)
        if metric in paper.correlations
    ]


def _gain_correlation(
    paper: Paper, sample: str, steps: Sequence[Step], metric: str, signed: bool
) -> GainCorrelation:
    row = paper.correlations[metric]
    printed = (row.signed_r, row.signed_p) if signed else (row.absolute_r, row.absolute_p)
    found = _correlate(steps, metric, signed=signed, where=sample)
    return GainCorrelation(
        sample,
        metric,
        signed,
        found,
        "" if found.decisive is None else steps[found.decisive].model,
        printed,
        _rounding(steps, metric, signed=signed),
    )


def gains(steps: Sequence[Step], *, signed: bool) -> list[float]:
    """The printed gains, or their sizes."""
    return [float(step.gain if signed else abs(step.gain)) for step in steps]


def _correlate(steps: Sequence[Step], metric: str, *, signed: bool, where: str) -> Correlation:
    kinship = [float(step.kinship[metric]) for step in steps]
    return _needed(correlate(kinship, gains(steps, signed=signed)), f"{where}, {metric}")


def _needed(found: Correlation | None, where: str) -> Correlation:
    if found is None:
        raise ConfigError(
            f"{where}: expected at least 3 rows whose kinship and gain or difference vary, "
            "found fewer"
        )
    return found


def _rounding(steps: Sequence[Step], metric: str, *, signed: bool) -> float:
    """Half the width of the 95 % interval of r over what was rounded to the printed numbers."""
    draw_DP = np.random.default_rng(0).uniform(-0.5, 0.5, (2, DRAWS, len(steps)))
    x_DP, y_DP = (
        np.array([float(value) for value in values])
        + noise_DP * np.array([float(unit(value)) for value in values])
        for values, noise_DP in (
            ([step.kinship[metric] for step in steps], draw_DP[0]),
            ([step.gain for step in steps], draw_DP[1]),
        )
    )
    if not signed:
        y_DP = np.abs(y_DP)
    x_DP = x_DP - x_DP.mean(axis=1, keepdims=True)
    y_DP = y_DP - y_DP.mean(axis=1, keepdims=True)
    r_D = (x_DP * y_DP).sum(axis=1) / np.sqrt((x_DP**2).sum(axis=1) * (y_DP**2).sum(axis=1))
    low, high = np.percentile(r_D, [2.5, 97.5])
    return float(high - low) / 2


def merges_by_p(paper: Paper) -> list[int]:
    """The numbers of merges that the printed p values of Table 2 can be of.

    By the printed r, which are taken as cut off, and p, which are taken as cut off or rounded.
    """
    return [
        n
        for n in range(3, MOST_MERGES)
        if all(
            _p(abs(r) + unit(r), n) < p + unit(p) and _p(abs(r), n) >= p - unit(p) / 2
            for row in paper.correlations.values()
            for r, p in ((row.signed_r, row.signed_p), (row.absolute_r, row.absolute_p))
        )
    ]


def _p(r: Decimal, n: int) -> Decimal:
    """Two-sided p of a correlation of n points, by Student's t."""
    from scipy import special

    size = min(float(r), 1.0)
    if size == 1:
        return Decimal(0)
    t = size * ((n - 2) / (1 - size**2)) ** 0.5
    return Decimal(2 * float(special.stdtr(n - 2, -t)))


def task_correlations(paper: Paper) -> list[TaskCorrelation]:
    """Table 14 from Table 15's differences, and from Table 11's scores."""
    printed = [float(pair.mean) for pair in paper.pairs]
    scores = paper.table("Table 11")
    rescored = [difference_by_scores(pair, scores) for pair in paper.pairs]
    found = []
    for metric in METRICS:
        kinship = [float(pair.kinship[metric]) for pair in paper.pairs]
        claim = paper.claims.get(f"task_difference_{metric}")
        where = f"Table 15, {metric}"
        found.append(
            TaskCorrelation(
                metric,
                claim.value if claim else None,
                _needed(correlate(kinship, printed), where),
                _needed(correlate(kinship, printed, "spearman"), where),
                _needed(correlate(kinship, rescored), f"{where}, by Table 11"),
            )
        )
    return found


def difference_by_scores(pair: Pair, scores: Mapping[str, Listed]) -> float:
    """Mean absolute difference of two models' scores (paper App. E)."""
    one, other = (
        {task: float(value) for task, value in scores[name].scores.items()} for name in pair.models
    )
    return task_difference(one, other)
