"""Where two branches of a family part: change vectors of weights, by layer (paper section 5.2).

Pure; knows the statistics, and neither weights nor how the models were made.

Axes: T tensors, N models, L groups of tensors.
"""

from dataclasses import dataclass

import numpy as np

from modelkin.gram import Float64Array, GramStats
from modelkin.tensor_names import group


@dataclass(frozen=True)
class Bifurcation:
    """What two children changed of their common ancestor, in each layer.

    The change vectors are explored - ancestor, greedy - ancestor and, where a model before the
    ancestor is given, ancestor - before. Norms are in units of the weights, cosines from -1 to 1,
    and NaN where one of the two changed nothing.

    Attributes:
        groups: the axis L: "0", "1", ..., and "embeddings", "norm", "head", "other" for what is
            in no layer.
        parameters_L: number of elements.
        explored_norm_L: length of explored - ancestor.
        greedy_norm_L: length of greedy - ancestor.
        before_norm_L: length of ancestor - before, or `None`.
        cosine_L: between explored - ancestor and greedy - ancestor.
        explored_before_cosine_L: between explored - ancestor and ancestor - before: above zero
            it goes on in the old direction, below it turns back.
        greedy_before_cosine_L: the same of greedy - ancestor.
    """

    groups: tuple[str, ...]
    parameters_L: Float64Array
    explored_norm_L: Float64Array
    greedy_norm_L: Float64Array
    before_norm_L: Float64Array | None
    cosine_L: Float64Array
    explored_before_cosine_L: Float64Array | None
    greedy_before_cosine_L: Float64Array | None


def bifurcation(
    stats: GramStats, ancestor: str, explored: str, greedy: str, before: str | None = None
) -> Bifurcation:
    """Compare the branch that exploration took with the greedy one, from statistics alone.

    All follows from the squared distances of the models, which keep their digits where models are
    nearly the same: 2 (x - a) . (g - a) = |x - a|² + |g - a|² - |x - g|².

    Args:
        stats: of T tensors and N models.
        ancestor: name of the model that both branches come from.
        explored: its descendant by exploration.
        greedy: its descendant by greedy choice.
        before: the model that the ancestor itself came from, if wanted.

    Raises:
        ValueError: one of them is not in `stats`.
    """
    for name in (ancestor, explored, greedy, *([before] if before is not None else [])):
        if name not in stats.models:
            raise ValueError(
                f"bifurcation: expected one of {', '.join(stats.models)}, found {name!r}"
            )
    groups = group(stats.tensors, "layer")

    def square(one: str, other: str) -> Float64Array:
        between_T = stats.distance_TNN[:, stats.models.index(one), stats.models.index(other)]
        return np.array([between_T[positions].sum() for positions in groups.values()])

    explored_L, greedy_L = square(explored, ancestor), square(greedy, ancestor)
    before_norm_L = explored_before_L = greedy_before_L = None
    if before is not None:
        before_L = square(ancestor, before)
        before_norm_L = np.sqrt(before_L)
        # |x - b|² = |(x - a) + (a - b)|²
        explored_before_L = -_cosine(explored_L, before_L, square(explored, before))
        greedy_before_L = -_cosine(greedy_L, before_L, square(greedy, before))
    return Bifurcation(
        groups=tuple(groups),
        parameters_L=np.array([float(stats.count_T[at].sum()) for at in groups.values()]),
        explored_norm_L=np.sqrt(explored_L),
        greedy_norm_L=np.sqrt(greedy_L),
        before_norm_L=before_norm_L,
        cosine_L=_cosine(explored_L, greedy_L, square(explored, greedy)),
        explored_before_cosine_L=explored_before_L,
        greedy_before_cosine_L=greedy_before_L,
    )


def _cosine(one_L: Float64Array, other_L: Float64Array, between_L: Float64Array) -> Float64Array:
    """Cosine of two vectors by their squared lengths and that of their difference."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # Square roots first: the product of two tiny squares may be below float64.
        cosine_L = (one_L + other_L - between_L) / (2 * np.sqrt(one_L) * np.sqrt(other_L))
    defined_L = (one_L > 0) & (other_L > 0)
    return np.where(defined_L, np.clip(cosine_L, -1.0, 1.0), np.nan)
