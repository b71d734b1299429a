"""The kernel: blocks of weights to the Gram statistics that everything else is computed from.

Knows arrays only: no files, formats, names of architectures or similarities.

Axes: T tensors, N models, R the models whose rows are new, B elements of a block.
With base weights b, models theta_i and deltas delta_i = theta_i - b (paper eq. 3), each
statistic is a sum over the elements of one tensor, kept in float64. Sums add up: over tensors,
layers or any subset they are exact.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

# Below this share of their squares the squared distance of two deltas is summed over its elements:
# as a difference of sums it would be rounding error.
NEAR = 1e-4


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


class TensorSums:
    """Sums over one tensor, fed block by block.

    Only the pairs that contain a new model are computed: the last `new` of `models` rows.

    >>> sums = TensorSums(models=2, new=2)
    >>> sums.add(np.array([1.0, 1.0]), np.array([[1.0, 0.0], [1.0, 2.0]]))
    >>> sums.gram_RN
    array([[1., 1.],
           [1., 5.]])
    >>> sums.distance_RN
    array([[0., 4.],
           [4., 0.]])
    """

    def __init__(self, models: int, new: int) -> None:
        self.count = 0
        self.base = 0.0
        self.base_sum = 0.0
        self.first_new = models - new
        self.sum_N = np.zeros(models)
        self.cross_N = np.zeros(models)
        self.gram_RN = np.zeros((new, models))
        self.distance_RN = np.zeros((new, models))

    def add(self, base_B: Float64Array, delta_NB: Float64Array) -> None:
        """Add one block: the base's weights and every model's delta, in float64."""
        self.count += base_B.size
        self.base += _dot(base_B, base_B)
        self.base_sum += float(base_B.sum())
        self.sum_N += delta_NB.sum(axis=1)
        new_RB = delta_NB[self.first_new :]
        self.cross_N += [_dot(delta_B, base_B) for delta_B in delta_NB]
        norm_N = np.array([_dot(delta_B, delta_B) for delta_B in delta_NB])
        block_RN = np.array([[_dot(new_B, delta_B) for delta_B in delta_NB] for new_B in new_RB])
        self.gram_RN += block_RN
        norms_RN = norm_N[self.first_new :, None] + norm_N[None, :]
        distance_RN = norms_RN - 2 * block_RN
        near_RN = distance_RN < NEAR * norms_RN
        np.fill_diagonal(near_RN[:, self.first_new :], False)  # a model and itself: exactly zero
        for row, other in np.argwhere(near_RN):
            difference_B = new_RB[row] - delta_NB[other]
            distance_RN[row, other] = _dot(difference_B, difference_B)
        self.distance_RN += distance_RN


def _dot(one_B: Float64Array, other_B: Float64Array) -> float:
    """The dot product, summed in one order whatever the pair.

    Equal rows so give equal bits, and identical models a kinship of exactly one. BLAS does not
    promise that of a matrix product, and for blocks of this size its threads cost more than they
    give.
    """
    return float(np.einsum("b,b->", one_B, other_B))
