"""Gains and how sure they are: a paired bootstrap over evaluation items. Knows outcomes only.

Axes: D bootstrap draws, I items of one task, M models, C comparisons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modelkin.gram import Float64Array

# Draws held in memory at once: large tasks have more than ten thousand items.
CHUNK = 200
# A spread below this part of the outcomes' size is rounding.
NO_SPREAD = 1e-12
SIGNIFICANT = 0.05

Samples = Mapping[str, Mapping[str, float]]
"""For each task, item id to outcome."""

# What is compared: the position of one model, and of those whose mean it is held against.
Comparison = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class Difference:
    """A difference of two averages with its uncertainty, in the scores' units.

    Attributes:
        value: the difference.
        low: lower end of its 95 % confidence interval.
        high: upper end.
        p: two-sided p value of there being no difference, 0 to 1.
    """

    value: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `cannot tell` where the interval holds zero."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "cannot tell"


@dataclass(frozen=True)
class Gain:
    """What a merge gained.

    Attributes:
        over_mean: over the mean of the parents (the merge gain, paper eq. 6).
        over_parents: over each parent, in their order.
        over_best: over the best foundation model, where that can be compared.
        adjusted_p: the p value of `over_mean`, adjusted by Holm's method for the number of merges
            that were looked at together.
    """

    over_mean: Difference
    over_parents: tuple[Difference, ...]
    over_best: Difference | None
    adjusted_p: float

    @property
    def verdict(self) -> str:
        """`better` or `worse` than the parents' mean, `cannot tell` where `adjusted_p` >= 0.05."""
        if self.adjusted_p >= SIGNIFICANT:
            return "cannot tell"
        return "better" if self.over_mean.value > 0 else "worse"


def paired_difference(
    child: Samples, others: Sequence[Samples], *, draws: int = 2000, seed: int = 0
) -> Difference | None:
    """The child's average minus the mean of the others', by a paired bootstrap over items.

    Items are drawn within each task, the same ones for every model, and the average is the mean
    over tasks (paper eq. 5 and 6). The interval is the percentile interval. The p value is that of
    a normal distribution with the draws' standard deviation: unlike the share of draws beyond
    zero, which is 0 or at least 1 / draws, it says how far beyond, so that a correction for
    hundreds of merges still has something to decide by. Where the draws have no spread, p is 0, or
    1 for no difference. With fewer than some 50 items in all, intervals are a little too narrow.

    Args:
        child: outcomes of the one model.
        others: outcomes of those that it is compared with, one or more.
        draws: number of bootstrap draws.
        seed: of the draws, which depend on it and on the numbers of items alone.

    Returns:
        The difference, or `None` where a model kept no samples, the items do not match, or an
        outcome is no finite number.

    >>> paired_difference({"task": {"1": 1.0, "2": 0.0}}, [{"task": {"1": 0.5, "2": -0.5}}])
    Difference(value=0.5, low=0.5, high=0.5, p=0.0)
    """
    models = [child, *others]
    shape = _shape(child)
    if shape is None or any(_shape(other) != shape for other in others):
        return None
    (found,) = _bootstrap(models, [(0, tuple(range(1, len(models))))], draws=draws, seed=seed)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number by Holm's step-down method, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    so_far = 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = so_far
    return adjusted


def gains(
    parents: Mapping[str, Sequence[str]],
    samples: Mapping[str, Samples],
    best_foundation: str | None,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Gain]:
    """The gain of each child over its parents and over the best foundation model.

    Every number is that of `paired_difference` with the same seed; here all comparisons share
    their draws, which makes hundreds of them cheap.

    Args:
        parents: child to its parents; who has none is no child.
        samples: model to its outcomes; models may be missing, and so is then what needs them.
        best_foundation: what `over_best` is taken over.
        draws: number of bootstrap draws.
        seed: of the draws.

    Returns:
        Child to gain, in the order of `parents`, for those whose own and whose parents' samples
        are there and of the same items. Holm's method counts these.
    """
    shapes = {name: _shape(own) for name, own in samples.items()}
    # Models that answered other items cannot share draws; one run has one group as a rule.
    groups: dict[_Shape, list[str]] = {}
    for child, own_parents in parents.items():
        shape = shapes.get(child)
        if (
            shape is not None
            and own_parents
            and all(shapes.get(parent) == shape for parent in own_parents)
        ):
            groups.setdefault(shape, []).append(child)
    found: dict[str, tuple[Difference, tuple[Difference, ...], Difference | None]] = {}
    for shape, children in groups.items():
        names = [name for name, own in shapes.items() if own == shape]
        position = {name: m for m, name in enumerate(names)}
        comparisons: list[Comparison] = []
        for child in children:
            one, others = position[child], [position[parent] for parent in parents[child]]
            comparisons += [(one, tuple(others)), *((one, (other,)) for other in others)]
            if best_foundation in position:
                comparisons.append((one, (position[best_foundation],)))
        differences = iter(
            _bootstrap([samples[name] for name in names], comparisons, draws=draws, seed=seed)
        )
        for child in children:
            found[child] = (
                next(differences),
                tuple(next(differences) for _ in parents[child]),
                next(differences) if best_foundation in position else None,
            )
    order = [child for child in parents if child in found]
    adjusted = holm([found[child][0].p for child in order])
    return {child: Gain(*found[child], p) for child, p in zip(order, adjusted, strict=True)}


# Tasks and their items, to be compared and hashed.
_Shape = frozenset[tuple[str, frozenset[str]]]


def _shape(samples: Samples) -> _Shape | None:
    """Which items were answered; `None` where that is not at least one number for each task."""
    if not samples or any(
        not items or not all(map(math.isfinite, items.values())) for items in samples.values()
    ):
        return None
    return frozenset((task, frozenset(items)) for task, items in samples.items())


def _bootstrap(
    models: Sequence[Samples], comparisons: Sequence[Comparison], *, draws: int, seed: int
) -> list[Difference]:
    """All comparisons by the same draws; the models have answered the same items."""
    random = np.random.default_rng(seed)
    tasks = sorted(models[0])
    value_C = np.zeros(len(comparisons))
    size_M = np.zeros(len(models))
    average_DM = np.zeros((draws, len(models)))
    for task in tasks:
        items = sorted(models[0][task])
        outcome_MI = np.array([[model[task][item] for item in items] for model in models])
        # Items are subtracted before the mean: a constant difference then has no rounding.
        value_C += [
            (outcome_MI[one] - outcome_MI[list(others)].mean(axis=0)).mean() / len(tasks)
            for one, others in comparisons
        ]
        size_M = np.maximum(size_M, np.abs(outcome_MI).max(axis=1))
        for start in range(0, draws, CHUNK):
            chunk_DM = average_DM[start : start + CHUNK]
            drawn_DM = _counts(random, len(chunk_DM), len(items)) @ outcome_MI.T
            chunk_DM += drawn_DM / (len(items) * len(tasks))
    return [
        _difference(
            float(value),
            average_DM[:, one] - average_DM[:, list(others)].mean(axis=1),
            float(size_M[[one, *others]].max()),
        )
        for value, (one, others) in zip(value_C, comparisons, strict=True)
    ]


def _counts(random: np.random.Generator, draws: int, items: int) -> Float64Array:
    """How often each item comes in each draw of as many as there are, D x I."""
    drawn_DI = random.integers(items, size=(draws, items))
    drawn_DI += np.arange(draws)[:, None] * items
    counts = np.bincount(drawn_DI.ravel(), minlength=draws * items)
    return counts.reshape(draws, items).astype(np.float64)


def _difference(value: float, drawn_D: Float64Array, size: float) -> Difference:
    """By the draws of a difference between outcomes of a given size."""
    spread = float(drawn_D.std())
    if spread <= NO_SPREAD * size:
        return Difference(value, value, value, 0.0 if abs(value) > NO_SPREAD * size else 1.0)
    low, high = np.percentile(drawn_D, [2.5, 97.5])
    return Difference(value, float(low), float(high), math.erfc(abs(value) / spread / math.sqrt(2)))
