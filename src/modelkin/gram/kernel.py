"""The kernel: slices of weights to sums, as machine code made for the formats at hand.

Knows arrays only: no files, names of tensors, or similarities.

Weights are widened in registers, exactly. Within a block of `BLOCK` elements sums are kept in the
working precision, across blocks in float64. Blocks are counted from the start of a slice, and
within a block a product is summed in the same order whatever the pair and the kernel: identical
models get identical bits.

Two kernels give the same sums: `fused` for up to three models, `tiled` for more.

Axes: N models, R = N + 1 rows (the base first), P = N rounded up to whole tiles, C tiles a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkin.gram import Float64Array
from modelkin.gram.codegen import Processor, compiling, host
from modelkin.gram.fused import FUSED, fused
from modelkin.gram.precision import Precision, whole_blocks
from modelkin.gram.tiled import TILE, tiled

# Below this share of their squares the squared distance of two deltas is summed over the
# differences themselves: taken from the products it would be rounding error.
NEAR = {"single": 1 / 32, "double": 1e-8}
# Below this share of its square a delta's variance has lost the digits of single precision.
SHIFTED = 0.5
# Below this root mean square, squares fall below what single precision can hold.
TINY = 1e-15


@dataclass(frozen=True)
class Sums:
    """Sums over the elements of a slice, in float64.

    Attributes:
        moments_R3: the base's sum of b, an unused one, and of b²; each model's sums of delta, of
            b * delta and of delta².
        products_NN: sums of delta_i * delta_j, in the upper triangle.
        distances_NN: sums of (theta_i - theta_j)², above the diagonal.
    """

    moments_R3: Float64Array
    products_NN: Float64Array
    distances_NN: Float64Array

    def __add__(self, other: "Sums") -> "Sums":
        with np.errstate(invalid="ignore", over="ignore"):  # `finite` tells
            return Sums(
                self.moments_R3 + other.moments_R3,
                self.products_NN + other.products_NN,
                self.distances_NN + other.distances_NN,
            )

    @classmethod
    def zero(cls, models: int) -> "Sums":
        """The sums over no elements."""
        return cls(
            np.zeros((models + 1, 3)), np.zeros((models, models)), np.zeros((models, models))
        )

    @property
    def finite(self) -> bool:
        """Whether all weights were finite, and their squares and those of differences too."""
        return bool(np.isfinite(self.moments_R3).all() and np.isfinite(self.distances_NN).all())


def lost_digits(sums_T: Sequence[Sums], counts: Sequence[int]) -> NDArray[np.bool_]:
    """For each tensor whether single precision was too little for its sums over `counts` elements.

    It is where a delta is mostly one shift of all weights, so that its variance is the small
    difference of large sums, or where squares leave the range of float32.
    """
    count_T1 = np.array(counts)[:, None]
    moments_TR3 = np.array([sums.moments_R3 for sums in sums_T])
    # Above the diagonal, of models that are not identical.
    apart_TNN = np.triu([sums.distances_NN for sums in sums_T], 1)
    sum_TR, square_TR = moments_TR3[:, :, 0], moments_TR3[:, :, 2]
    least_T1 = TINY**2 * count_T1
    shifted_TN = (square_TR - sum_TR**2 / count_T1 < SHIFTED * square_TR)[:, 1:]
    tiny_TR = (square_TR < least_T1) & ((square_TR > 0) | (sum_TR != 0))
    tiny_TNN = (apart_TNN > 0) & (apart_TNN < least_T1[:, :, None])
    lost: NDArray[np.bool_] = shifted_TN.any(1) | tiny_TR.any(1) | tiny_TNN.any((1, 2))
    return lost


def sums(
    weights_R: Sequence[NDArray[Any]],
    formats_R: Sequence[str],
    *,
    new: int,
    precision: Precision,
    processor: Processor | None = None,
) -> Sums:
    """The sums over one slice of a tensor, of the base (first) and N models.

    Args:
        weights_R: the stored bits, contiguous, of one length above zero.
        formats_R: what the bits mean: keys of `ITEMSIZE`.
        new: pairs without one of the last `new` models may be left out.
        precision: of deltas, products and their sums within a block.
        processor: what to make code for; default: this one.
    """
    models = len(weights_R) - 1
    processor = processor or host()
    parts = whole_blocks(weights_R)
    if models <= FUSED:
        with compiling:
            call = fused(tuple(formats_R), precision, processor)
        moments_R3 = np.zeros((models + 1, 3))
        products_NN = np.zeros((models, models))
        distances_NN = np.zeros((models, models))
        for blocks, part in parts:
            call(part, blocks, moments_R3, products_NN, distances_NN)
        products_NN.reshape(-1)[:: models + 1] = moments_R3[1:, 2]
        return Sums(moments_R3, products_NN, distances_NN)
    with compiling:
        call = tiled(tuple(sorted(set(formats_R))), precision, processor)
    tiles = -(-models // TILE)
    moments_R2 = np.zeros((models + 1, 2))
    products_PP = np.zeros((TILE * tiles, TILE * tiles))
    # On the diagonal are the norms, by which near pairs are known.
    wanted_CC = np.eye(tiles, dtype=np.bool_)
    wanted_CC[:, (models - new) // TILE :] = True
    for blocks, part in parts:
        call(part, formats_R, blocks, wanted_CC, moments_R2, products_PP, differences=False)
    norm_P = np.diag(products_PP)
    moments_R3 = np.zeros((models + 1, 3))
    moments_R3[0, ::2] = moments_R2[0]
    moments_R3[1:, :2] = moments_R2[1:]
    moments_R3[1:, 2] = norm_P[:models]
    with np.errstate(invalid="ignore", over="ignore"):  # `Sums.finite` tells
        both_PP = np.add.outer(norm_P, norm_P)
        distances_PP = both_PP - 2 * products_PP
    near_PP = np.triu(distances_PP < NEAR[precision] * both_PP, 1)
    near_CC = near_PP.reshape(tiles, TILE, tiles, TILE).any(axis=(1, 3)) & wanted_CC
    if near_CC.any():
        again_PP = np.zeros_like(products_PP)
        unused = np.zeros_like(moments_R2)
        for blocks, part in parts:
            call(part, formats_R, blocks, near_CC, unused, again_PP, differences=True)
        # Whether a pair is near does not depend on what else is in its tile: nor do its digits.
        distances_PP[near_PP] = again_PP[near_PP]
    return Sums(moments_R3, products_PP[:models, :models], distances_PP[:models, :models])
