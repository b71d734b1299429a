"""Low-rank weight changes: a tensor of the base plus scale * B @ A, computed slice by slice.

The base is widened to float64; the product is taken in float32, as PEFT takes it, and added in
float64. That keeps an adapter equal to its merge in float32 within one rounding: the product's
own error is relative to the weight change, which is small against the weights. A product in
float64 would cost twice the time for digits that the factors, trained in 16 or 32 bits, lack.

Knows two factors and a base tensor; not where they come from. Axes: R rows and C columns of the
base's weight, K the rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkin.checkpoint.tensors import Tensor, as_float64, within

# Elements of a weight change that are computed at once.
TILE = 1 << 18
# Pairs of factors kept as float32: as many as there may be threads, each at its own tensor.
KEPT_FACTORS = 8

Factors = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Pair:
    """The two factors of a weight change: `left` is (R, K) and `right` (K, C), once transposed."""

    left: Tensor
    right: Tensor
    transposed: bool

    def load(self) -> Factors:
        """Both, in float32; in float64 only if they are stored so."""
        left, right = (_matrix(one) for one in (self.left, self.right))
        return (left.T, right.T) if self.transposed else (left, right)


def _matrix(tensor: Tensor) -> NDArray[Any]:
    values_B = as_float64(tensor.read(0, tensor.count), tensor.format)
    # Exact: all other formats are parts of float32.
    kind = np.float64 if tensor.format == "F64" else np.float32
    return values_B.astype(kind).reshape(tensor.shape)


class FactorCache:
    """The factors that were used last, ready to be multiplied."""

    def __init__(self) -> None:
        self.load: Callable[[Pair], Factors] = lru_cache(KEPT_FACTORS)(Pair.load)

    def release(self) -> None:
        """Forget them."""
        self.load.cache_clear()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class AdaptedTensor:
    """A tensor of the base with its weight change, computed as it is read.

    A slice's elements depend on its bounds by the rounding of a float32 sum at most.
    """

    base: Tensor
    pair: Pair
    scale: float
    cache: FactorCache = field(repr=False)
    format: str = "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """The base's, marked."""
        return f"{self.base.dtype}+LoRA"

    @property
    def count(self) -> int:
        """Number of elements."""
        return self.base.count

    @property
    def bytes(self) -> int:
        """Stored bytes of the base's tensor and of both factors."""
        return self.base.bytes + self.pair.left.bytes + self.pair.right.bytes

    @property
    def file(self) -> Path:
        """The adapter's."""
        return self.pair.left.file

    @property
    def offset(self) -> int:
        """Of its first factor."""
        return self.pair.left.offset

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The flat elements [start, stop), in float64; only their rows are computed."""
        start, stop = within(start, stop, self.count)
        theta_B = as_float64(self.base.read(start, stop), self.base.format)
        # What is not finite is for the reader to find: it is no warning here.
        with np.errstate(over="ignore", invalid="ignore"):
            self._add(theta_B, start, stop)
        return theta_B

    def _add(self, theta_B: NDArray[np.float64], start: int, stop: int) -> None:
        """Add the weight change of the elements [start, stop)."""
        left_RK, right_KC = self.cache.load(self.pair)
        columns = right_KC.shape[1]
        at = start
        while at < stop:
            row, column = divmod(at, columns)
            rows = min(max(TILE // columns, 1), -(-stop // columns) - row)
            if rows == 1:
                end = min(stop, (row + 1) * columns)
                delta_B = left_RK[row] @ right_KC[:, column : column + end - at]
            else:
                end = min(stop, (row + rows) * columns)
                delta_RC = left_RK[row : row + rows] @ right_KC
                delta_B = delta_RC.reshape(-1)[column : column + end - at]
            theta_B[at - start : end - start] += delta_B * np.float64(self.scale)
            at = end
