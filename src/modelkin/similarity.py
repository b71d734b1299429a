"""Statistics to similarity: the kinship of models. Pure; knows no files and no weights.

Axes: T tensors, N models.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkin.gram import GramStats
from modelkin.records import METRICS, Metric, Similarity


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
    """

    base: str
    models: tuple[str, ...]
    compared_parameters: int
    total_parameters: int
    pcc_NN: NDArray[np.float64]
    cs_NN: NDArray[np.float64]
    ed_NN: NDArray[np.float64]
    left_out: tuple[str, ...] = ()

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
        i, j = self.models.index(one), self.models.index(other)
        return Similarity(
            pcc=_number(self.pcc_NN[i, j]),
            cs=_number(self.cs_NN[i, j]),
            ed=float(self.ed_NN[i, j]),
        )

    def as_dict(self) -> dict[str, Any]:
        """What `modelkin kinship --json` prints; undefined values are `None`."""
        matrices: Mapping[str, Any] = {
            metric: [[_number(value) for value in row] for row in self.matrix(metric)]
            for metric in METRICS
        }
        return {
            "base": self.base,
            "models": list(self.models),
            "compared_parameters": self.compared_parameters,
            "total_parameters": self.total_parameters,
            **matrices,
            "mean": {metric: self.mean(metric) for metric in METRICS},
        }


def _number(value: float) -> float | None:
    """A float, or `None` for the NaN that stands for 'undefined' in an array."""
    return None if math.isnan(value) else float(value)


def kinship_from(
    stats: GramStats, *, base: str, total_parameters: int, left_out: tuple[str, ...] = ()
) -> Kinship:
    """The whole-model kinship: sums over all tensors first, then the similarity of the sums.

    (The mean of per-tensor similarities is another number, and not the kinship of the models.)
    """
    count = int(stats.count_T.sum())
    sum_N = stats.sum_TN.sum(axis=0)
    gram_NN = stats.gram_TNN.sum(axis=0)
    # cov(d_i, d_j) * n = d_i . d_j - sum(d_i) sum(d_j) / n
    covariance_NN = gram_NN - np.outer(sum_N, sum_N) / count
    return Kinship(
        base=base,
        models=stats.models,
        compared_parameters=count,
        total_parameters=total_parameters,
        pcc_NN=_normalised(covariance_NN, np.diag(gram_NN)),
        cs_NN=_normalised(gram_NN, np.diag(gram_NN)),
        ed_NN=np.sqrt(stats.distance_TNN.sum(axis=0)),
        left_out=left_out,
    )


def _normalised(
    products_NN: NDArray[np.float64], square_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """products_ij / sqrt(products_ii * products_jj); NaN where a model has no variation.

    A variance that is pure rounding error of the delta's square counts as none.
    """
    own_N = np.diag(products_NN)
    own_N = np.where(own_N > 1e-14 * square_N, own_N, np.nan)
    return np.clip(products_NN / np.sqrt(np.outer(own_N, own_N)), -1.0, 1.0)
