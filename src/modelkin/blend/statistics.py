"""What follows from coefficients: the child's statistics, and its share of each ancestor.

Axes: T tensors, N models; K is the base and the N models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from modelkin.errors import MergeError
from modelkin.gram import Float64Array, GramStats


@dataclass(frozen=True)
class Coefficients:
    """A child by its parts: theta_child = base_T * b + sum_i model_TN[:, i] * theta_i.

    Attributes:
        models: the models' names, the axis N.
        tensors: the tensors' names, the axis T.
        base_T: the factor of the statistics' base.
        model_TN: the factor of each model; 0 for one that is no parent.
    """

    models: tuple[str, ...]
    tensors: tuple[str, ...]
    base_T: Float64Array
    model_TN: Float64Array


@dataclass(frozen=True)
class ChildStatistics:
    """The rows of a child that was not made, against the N models of the statistics.

    Attributes:
        sum_T: sum of delta_child.
        cross_T: sum of b * delta_child.
        square_T: sum of delta_child ** 2.
        gram_TN: sum of delta_child * delta_i.
        distance_TN: sum of (delta_child - delta_i) ** 2.
    """

    sum_T: Float64Array
    cross_T: Float64Array
    square_T: Float64Array
    gram_TN: Float64Array
    distance_TN: Float64Array

    def joined(self, stats: GramStats, name: str) -> GramStats:
        """`stats`, which these rows were taken from, with the child as its last model.

        Raises:
            MergeError: `stats` has a model of that name, or other models than these rows.
        """
        if name in stats.models:
            raise MergeError(f"child statistics: expected a new name, found {name}")
        if self.gram_TN.shape != stats.sum_TN.shape:
            raise MergeError(
                "child statistics: expected as many tensors and models as they were taken from, "
                f"{self.gram_TN.shape}, found {stats.sum_TN.shape}"
            )
        return replace(
            stats,
            models=(*stats.models, name),
            sum_TN=np.column_stack([stats.sum_TN, self.sum_T]),
            cross_TN=np.column_stack([stats.cross_TN, self.cross_T]),
            gram_TNN=_bordered(stats.gram_TNN, self.gram_TN, self.square_T),
            distance_TNN=_bordered(
                stats.distance_TNN, self.distance_TN, np.zeros_like(self.square_T)
            ),
        )


def child_statistics(stats: GramStats, c: Coefficients) -> ChildStatistics:
    """The statistics of a child, without its weights: of the child before it is rounded.

    Rounding to bfloat16 moves weights by 0.0017 of their norm, which is a large part of the change
    of many fine-tunes; a measured child has that noise in its delta.

    With s = base + sum_i c_i - 1, the share of b itself that the factors leave over:

        delta_child = sum_i c_i delta_i + s b

    Distances are taken from distances, since products lose the digits of near-identical models:
    with w = c and w_0 = 1 - sum_i c_i for the delta 0 of the base, and e = sum_i c_i delta_i,

        |e - delta_j|² = sum_k w_k |delta_k - delta_j|² - 1/2 sum_kl w_k w_l |delta_k - delta_l|²

    Args:
        stats: of the base and at least the models of `c`.
        c: the child's factors.

    Raises:
        MergeError: `c` is of other tensors, or of models that `stats` has not.
    """
    # A child has few parents, and their rows are all that is looked at.
    at_P, factor_TP = _parents(stats, c)
    factor_T1P = factor_TP[:, None, :]
    sum_T = factor_TP.sum(axis=1)
    left_T = c.base_T + sum_T - 1
    crossed_T = np.sum(factor_TP * stats.cross_TN[:, at_P], axis=1)

    to_base_TN = np.diagonal(stats.gram_TNN, axis1=1, axis2=2)
    rest_T = 1 - sum_T
    from_base_T = np.sum(factor_TP * to_base_TN[:, at_P], axis=1)
    from_all_TN = (factor_T1P @ stats.distance_TNN[:, at_P])[:, 0] + rest_T[:, None] * to_base_TN
    spread_T = (rest_T * from_base_T + np.sum(factor_TP * from_all_TN[:, at_P], axis=1)) / 2
    # Of e to 0 and to each delta; rounding may take one that is 0 below it.
    apart_T = np.maximum(from_base_T - spread_T, 0)
    apart_TN = np.maximum(from_all_TN - spread_T[:, None], 0)
    leftover_T = left_T**2 * stats.base_T
    return ChildStatistics(
        sum_T=np.sum(factor_TP * stats.sum_TN[:, at_P], axis=1) + left_T * stats.base_sum_T,
        cross_T=crossed_T + left_T * stats.base_T,
        square_T=np.maximum(apart_T + 2 * left_T * crossed_T + leftover_T, 0),
        gram_TN=(factor_T1P @ stats.gram_TNN[:, at_P])[:, 0] + left_T[:, None] * stats.cross_TN,
        distance_TN=np.maximum(
            apart_TN
            + 2 * left_T[:, None] * (crossed_T[:, None] - stats.cross_TN)
            + leftover_T[:, None],
            0,
        ),
    )


def distances(stats: GramStats) -> Float64Array:
    """The squared distances of base and models, T x K x K, the base first."""
    to_base_TN = np.diagonal(stats.gram_TNN, axis1=1, axis2=2)
    zero_T1 = np.zeros((len(stats.tensors), 1))
    top_T1K = np.concatenate([zero_T1, to_base_TN], axis=1)[:, None, :]
    rest_TNK = np.concatenate([to_base_TN[:, :, None], stats.distance_TNN], axis=2)
    return np.concatenate([top_T1K, rest_TNK], axis=1)


def flatten(child: Coefficients, family: Mapping[str, Coefficients]) -> Coefficients:
    """The factors of a descendant over the models that are in no family: the foundations.

    Args:
        child: its factors over its parents.
        family: name of a model that was merged -> its factors over its own parents.

    Raises:
        MergeError: two of them are of different tensors, or a model is its own ancestor.
    """
    for _ in range(len(family) + 1):
        shares = {
            name: child.model_TN[:, position]
            for position, name in enumerate(child.models)
            if name not in family or np.any(child.model_TN[:, position])
        }
        merged = [name for name in shares if name in family]
        base_T = child.base_T
        found = {name: share_T for name, share_T in shares.items() if name not in family}
        for name in merged:
            parts, share_T = family[name], shares[name]
            if parts.tensors != child.tensors:
                raise MergeError(
                    f"flatten: expected the tensors of the child, found those of {name}"
                )
            base_T = base_T + share_T * parts.base_T
            for position, part in enumerate(parts.models):
                own_T = share_T * parts.model_TN[:, position]
                found[part] = found[part] + own_T if part in found else own_T
        columns = list(found.values()) or [np.zeros((len(child.tensors), 0))]
        child = Coefficients(tuple(found), child.tensors, base_T, np.column_stack(columns))
        if not merged:
            return child
    raise MergeError(f"flatten: expected a family tree, found that {merged[0]} is its own ancestor")


def _parents(stats: GramStats, c: Coefficients) -> tuple[NDArray[np.intp], Float64Array]:
    """Where the P models with a share in the child are in the statistics, and their factors."""
    if c.tensors != stats.tensors:
        raise MergeError(
            f"child statistics: expected coefficients of the {len(stats.tensors)} tensors of the "
            f"statistics, found {len(c.tensors)}"
        )
    unknown = [name for name in c.models if name not in stats.models]
    if unknown:
        raise MergeError(f"child statistics: expected models of the statistics, found {unknown[0]}")
    share_P = np.flatnonzero(np.any(c.model_TN, axis=0))
    at_P = np.array([stats.models.index(c.models[p]) for p in share_P], np.intp)
    return at_P, c.model_TN[:, share_P]


def _bordered(old_TNN: Float64Array, row_TN: Float64Array, corner_T: Float64Array) -> Float64Array:
    """Symmetric matrices with one more row and column."""
    wider_TNM = np.concatenate([old_TNN, row_TN[:, :, None]], axis=2)
    last_T1M = np.concatenate([row_TN, corner_T[:, None]], axis=1)[:, None, :]
    return np.concatenate([wider_TNM, last_T1M], axis=1)
