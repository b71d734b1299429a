"""The Gram statistics that everything else is computed from, and the kernel that takes them.

Knows arrays only: no files, formats, names of architectures or similarities.

Axes: T tensors, N models. With base weights b, models theta_i and deltas delta_i = theta_i - b
(paper eq. 3), each statistic is a sum over the elements of one tensor, kept in float64. Sums add
up: over tensors, layers or any subset they are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class GramStats:
    """Sufficient statistics of N models and their base, per tensor.

    Attributes:
        models: the models' names, the axis N.
        tensors: the tensors' names, the axis T.
        count_T: number of elements.
        base_T: sum of b * b.
        base_sum_T: sum of b.
        sum_TN: sum of delta_i.
        cross_TN: sum of b * delta_i.
        gram_TNN: sum of delta_i * delta_j.
        distance_TNN: sum of (delta_i - delta_j) ** 2. Kept beside the Gram matrix, which gives
            it too, because taking it from the sums loses the digits of near-identical models.
    """

    models: tuple[str, ...]
    tensors: tuple[str, ...]
    count_T: NDArray[np.int64]
    base_T: Float64Array
    base_sum_T: Float64Array
    sum_TN: Float64Array
    cross_TN: Float64Array
    gram_TNN: Float64Array
    distance_TNN: Float64Array

    def select(self, models: Sequence[str]) -> "GramStats":
        """The statistics of some of the models, in that order."""
        n = [self.models.index(name) for name in models]
        return replace(
            self,
            models=tuple(models),
            sum_TN=self.sum_TN[:, n],
            cross_TN=self.cross_TN[:, n],
            # Both axes at once: one after the other would copy rows of all models first.
            gram_TNN=self.gram_TNN[:, np.array(n, int)[:, None], n],
            distance_TNN=self.distance_TNN[:, np.array(n, int)[:, None], n],
        )
