"""Statistics to similarity: the kinship of models. Pure; knows no files and no weights.

Axes: T tensors, N models.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelkin.gram import Float64Array, GramStats
from modelkin.records import METRICS, Metric, Similarity
from modelkin.tensor_names import Level, group

# Of a model's weights with its base's: fine-tunes have above 0.9, strangers about 0.
RELATED_COSINE = 0.3


class PairRow(NamedTuple):
    """The kinship of one pair of models in one group of tensors, a line of the long table.

    `parameters` is the number of elements that were compared, `ed` in units of the weights;
    `None` where a similarity is undefined.
    """

    level: Level
    group: str
    model_1: str
    model_2: str
    parameters: int
    pcc: float | None
    cs: float | None
    ed: float


@dataclass(frozen=True)
class Kinship:
    """Similarity of the weight changes of N models from their base (paper eq. 4).

    Attributes:
        base: the base's name.
        models: the models' names, the axis N.
        compared_parameters: number of elements that all models and the base share.
        total_parameters: number of elements of the base.
        pcc_NN: Pearson correlation of the deltas, -1 to 1; NaN where undefined.
        cs_NN: cosine of the deltas, signed, -1 to 1; NaN where undefined.
        ed_NN: Euclidean distance of the deltas, in units of the weights.
        left_out: names of tensors that were not compared.
        rows_left_out: embedding or head -> rows of the largest vocabulary that were not compared,
            because not all models have them.
        stats: the statistics that all this follows from, which `per` groups anew.
    """

    base: str
    models: tuple[str, ...]
    compared_parameters: int
    total_parameters: int
    pcc_NN: NDArray[np.float64]
    cs_NN: NDArray[np.float64]
    ed_NN: NDArray[np.float64]
    left_out: tuple[str, ...] = ()
    rows_left_out: Mapping[str, int] = field(default_factory=dict)
    stats: GramStats | None = field(default=None, repr=False, compare=False)

    @property
    def coverage(self) -> float:
        """Share of the base's parameters that was compared, 0 to 1."""
        return self.compared_parameters / self.total_parameters

    @property
    def undefined(self) -> tuple[str, ...]:
        """Models equal to the base: their delta is zero and has no direction."""
        return tuple(
            name
            for name, own in zip(self.models, np.diag(self.cs_NN), strict=True)
            if np.isnan(own)
        )

    @property
    def strangers(self) -> tuple[str, ...]:
        """Models that were hardly made from this base: their weights do not resemble its own.

        Fine-tuning moves weights by a small part of their size. Weights of two trainings from
        scratch have a cosine near 0, and a difference larger than themselves. Judged by the
        median element's tensor, since a few large norms would make any two models alike.
        """
        if self.stats is None:
            return ()
        return tuple(
            name
            for name, cosine, change in zip(self.models, *_resemblance(self.stats), strict=True)
            if cosine < RELATED_COSINE or change > 1
        )

    def matrix(self, metric: Metric) -> NDArray[np.float64]:
        """The N x N matrix of one metric."""
        return {"pcc": self.pcc_NN, "cs": self.cs_NN, "ed": self.ed_NN}[metric]

    def mean(self, metric: Metric) -> float | None:
        """Kinship of all models together: the mean over unordered pairs (paper eq. 4).

        `None` where there is no pair, or where one of them is undefined.

        >>> pairs = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 1.0]])
        >>> Kinship("base", ("a", "b", "c"), 9, 9, pairs, pairs, pairs).mean("pcc")
        0.25
        """
        pairs = self.matrix(metric)[np.triu_indices(len(self.models), k=1)]
        return _number(float(pairs.mean())) if pairs.size else None

    def similarity(self, one: str, other: str) -> Similarity:
        """The three similarities of one pair."""
        return self._values(self.models.index(one), self.models.index(other))

    def per(self, level: Level) -> dict[str, "Kinship"]:
        """The kinship within each layer, module or tensor, in the order of the model.

        Nothing is read again: the statistics are sums over tensors, here grouped otherwise. A
        group's `compared_parameters` are its own; its `coverage` is of the whole base. A model
        that is equal to the base within a group is undefined there, and only there.

        Args:
            level: "layer" ("0", "1", ..., and "embeddings", "norm", "head", "other" for what is
                in no layer), "module" ("q_proj", "mlp", ...), "tensor" (their names), or "model"
                (all of it, as "model").

        Raises:
            ValueError: this kinship was made without its statistics.
        """
        if self.stats is None:
            raise ValueError("kinship per level: expected a Kinship with stats, found None")
        return {
            name: kinship_from(
                _subset(self.stats, positions),
                base=self.base,
                total_parameters=self.total_parameters,
            )
            for name, positions in group(self.stats.tensors, level).items()
        }

    def rows(self, level: Level = "model") -> Iterator[PairRow]:
        """The long table: one row for each group and unordered pair of models."""
        for name, found in self.per(level).items() if level != "model" else [("model", self)]:
            for one, other in combinations(range(len(self.models)), 2):
                yield PairRow(
                    level,
                    name,
                    self.models[one],
                    self.models[other],
                    found.compared_parameters,
                    *found._values(one, other),
                )

    def as_dict(self, level: Level = "model") -> dict[str, Any]:
        """What `modelkin kinship --json` prints; undefined values are `None`.

        With a `level` other than "model", "groups" holds the matrices of each group.
        """
        said: dict[str, Any] = {
            "base": self.base,
            "models": list(self.models),
            "compared_parameters": self.compared_parameters,
            "total_parameters": self.total_parameters,
            "left_out": list(self.left_out),
            "rows_left_out": dict(self.rows_left_out),
            "strangers": list(self.strangers),
            **self._lists(),
            "mean": {metric: self.mean(metric) for metric in METRICS},
        }
        if level != "model":
            said["level"] = level
            said["groups"] = [
                {
                    "name": name,
                    "compared_parameters": found.compared_parameters,
                    **found._lists(),
                }
                for name, found in self.per(level).items()
            ]
        return said

    def _lists(self) -> dict[str, Any]:
        return {
            metric: [[_number(value) for value in row] for row in self.matrix(metric)]
            for metric in METRICS
        }

    def _values(self, i: int, j: int) -> Similarity:
        return Similarity(
            pcc=_number(self.pcc_NN[i, j]),
            cs=_number(self.cs_NN[i, j]),
            ed=float(self.ed_NN[i, j]),
        )


def _number(value: float) -> float | None:
    """A float, or `None` for the NaN that stands for 'undefined' in an array."""
    return None if math.isnan(value) else float(value)


def kinship_from(
    stats: GramStats,
    *,
    base: str,
    total_parameters: int,
    left_out: tuple[str, ...] = (),
    rows_left_out: Mapping[str, int] | None = None,
) -> Kinship:
    """The whole-model kinship: sums over all tensors first, then the similarity of the sums.

    (The mean of per-tensor similarities is another number, and not the kinship of the models.)

    Args:
        stats: of T tensors and N models; the result keeps them, for `Kinship.per`.
        base: the base's name.
        total_parameters: number of elements of the base.
        left_out: names of tensors that are not in `stats`.
        rows_left_out: embedding or head -> rows that are not in `stats`.
    """
    count = int(stats.count_T.sum())
    sum_N = stats.sum_TN.sum(axis=0)
    gram_NN = stats.gram_TNN.sum(axis=0)
    # cov(d_i, d_j) * n = d_i . d_j - sum(d_i) sum(d_j) / n
    covariance_NN = gram_NN - np.outer(sum_N, sum_N) / max(count, 1)
    variation_N = _variation(np.diag(covariance_NN), np.diag(gram_NN))
    square_N = _variation(np.diag(gram_NN), np.diag(gram_NN))
    return Kinship(
        base=base,
        models=stats.models,
        compared_parameters=count,
        total_parameters=total_parameters,
        pcc_NN=_normalised(covariance_NN, variation_N, variation_N),
        cs_NN=_normalised(gram_NN, square_N, square_N),
        ed_NN=np.sqrt(stats.distance_TNN.sum(axis=0)),
        left_out=left_out,
        rows_left_out=rows_left_out or {},
        stats=stats,
    )


def similarities(
    stats: GramStats,
    *,
    total: float,
    square: float,
    gram_N: Float64Array,
    distance_N: Float64Array,
) -> dict[str, Similarity]:
    """One more model's similarity to each of the N, as `kinship_from` has it of all to all.

    Args:
        stats: of the N models.
        total: sum of the elements of its delta, over all tensors.
        square: sum of their squares.
        gram_N: sum of its delta times each model's.
        distance_N: sum of the squares of their differences.
    """
    count = max(int(stats.count_T.sum()), 1)
    sum_N = stats.sum_TN.sum(axis=0)
    square_N = np.diagonal(stats.gram_TNN, axis1=1, axis2=2).sum(axis=0)
    own_1 = np.array([square])
    pcc_1N = _normalised(
        (gram_N - total * sum_N / count)[None],
        _variation(own_1 - total**2 / count, own_1),
        _variation(square_N - sum_N**2 / count, square_N),
    )
    cs_1N = _normalised(gram_N[None], _variation(own_1, own_1), _variation(square_N, square_N))
    found = zip(pcc_1N[0].tolist(), cs_1N[0].tolist(), np.sqrt(distance_N).tolist(), strict=True)
    return {
        name: Similarity(_number(pcc), _number(cs), ed)
        for name, (pcc, cs, ed) in zip(stats.models, found, strict=True)
    }


def _resemblance(stats: GramStats) -> tuple[Float64Array, Float64Array]:
    """Cosine of each model's weights with the base's, and the delta's norm over the base's.

    Both as medians over tensors, weighted by their number of elements.
    """
    base_T1 = stats.base_T[:, None]
    square_TN = np.diagonal(stats.gram_TNN, axis1=1, axis2=2)
    theta_TN = base_T1 + 2 * stats.cross_TN + square_TN
    with np.errstate(divide="ignore", invalid="ignore"):
        # A tensor of zeros resembles nothing and differs from nothing.
        cosine_TN = np.nan_to_num((base_T1 + stats.cross_TN) / np.sqrt(base_T1 * theta_TN), nan=1.0)
        change_TN = np.nan_to_num(np.sqrt(square_TN / base_T1), nan=0.0, posinf=0.0)
    return (
        _weighted_median(cosine_TN, stats.count_T),
        _weighted_median(change_TN, stats.count_T),
    )


def _weighted_median(values_TN: Float64Array, weights_T: NDArray[np.int64]) -> Float64Array:
    order_TN = np.argsort(values_TN, axis=0, kind="stable")
    reached_TN = np.cumsum(weights_T[order_TN], axis=0)
    middle_N = np.argmax(2 * reached_TN >= weights_T.sum(), axis=0)
    columns_N = np.arange(values_TN.shape[1])
    medians_N: Float64Array = values_TN[order_TN[middle_N, columns_N], columns_N]
    return medians_N


def _subset(stats: GramStats, positions: list[int]) -> GramStats:
    """The statistics of some of the tensors."""
    return GramStats(
        models=stats.models,
        tensors=tuple(stats.tensors[position] for position in positions),
        count_T=stats.count_T[positions],
        base_T=stats.base_T[positions],
        base_sum_T=stats.base_sum_T[positions],
        sum_TN=stats.sum_TN[positions],
        cross_TN=stats.cross_TN[positions],
        gram_TNN=stats.gram_TNN[positions],
        distance_TNN=stats.distance_TNN[positions],
    )


def _variation(own_N: Float64Array, square_N: Float64Array) -> Float64Array:
    """The models' own products; NaN where one has no variation.

    A variance that is pure rounding error of the delta's square counts as none.
    """
    return np.where(own_N > 1e-14 * square_N, own_N, np.nan)


def _normalised(
    products_MN: Float64Array, own_M: Float64Array, own_N: Float64Array
) -> Float64Array:
    """products_ij / sqrt(own_i * own_j), -1 to 1."""
    # Each model is scaled by a power of two, which changes no digit: the product of two squares
    # may be beyond float64.
    scale_M, scale_N = (
        -(np.frexp(np.where(np.isnan(own), 1.0, own))[1] // 2) for own in (own_M, own_N)
    )
    products_MN = np.ldexp(np.ldexp(products_MN, scale_M[:, None]), scale_N)
    own_MN = np.outer(np.ldexp(own_M, 2 * scale_M), np.ldexp(own_N, 2 * scale_N))
    return np.clip(products_MN / np.sqrt(own_MN), -1.0, 1.0)
