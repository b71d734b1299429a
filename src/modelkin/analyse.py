"""What the data support: uncertainty of differences between models. Pure; no files.

Axes: D bootstrap draws, I items of one task.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Draws held in memory at once: large tasks have more than ten thousand items.
CHUNK = 200

Samples = Mapping[str, Mapping[str, float]]
"""For each task, item id to outcome."""


@dataclass(frozen=True)
class Difference:
    """A difference of two averages with its 95 % confidence interval, in the scores' units."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `cannot tell` where the interval holds zero."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "cannot tell"


def paired_difference(
    child: Samples, others: Sequence[Samples], *, draws: int = 2000, seed: int = 0
) -> Difference | None:
    """The child's average minus the mean of the others', by a paired bootstrap over items.

    Items are drawn within each task, the same ones for every model, and the average is the mean
    over tasks (paper eq. 5 and 6); the interval is the percentile interval.

    Returns:
        The difference, or `None` where a model kept no samples or the items do not match.

    >>> paired_difference({"task": {"1": 1.0, "2": 0.0}}, [{"task": {"1": 0.5, "2": -0.5}}])
    Difference(value=0.5, low=0.5, high=0.5)
    """
    if not child or any(set(other) != set(child) for other in others):
        return None
    random = np.random.default_rng(seed)
    value, difference_D = 0.0, np.zeros(draws)
    for task in sorted(child):
        items = sorted(child[task])
        if not items or any(sorted(other[task]) != items for other in others):
            return None
        difference_I = np.array([child[task][item] for item in items]) - np.mean(
            [[other[task][item] for item in items] for other in others], axis=0
        )
        value += difference_I.mean()
        for start in range(0, draws, CHUNK):
            chunk_D = difference_D[start : start + CHUNK]
            drawn_DI = random.integers(len(items), size=(len(chunk_D), len(items)))
            chunk_D += difference_I[drawn_DI].mean(axis=1)
    low, high = np.percentile(difference_D / len(child), [2.5, 97.5])
    return Difference(float(value) / len(child), float(low), float(high))
