"""One tensor's weights: the interface that every format keeps, and tensors in mapped files.

Knows numeric formats and flat slices. Does not know where names and shapes come from, or what
the weights are for.
"""

import math
import mmap
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modelkin.checkpoint.reading import opened
from modelkin.errors import CheckpointError

# The formats in which weights are handed out, by safetensors' names -> NumPy dtype of the stored
# bits. NumPy has neither bfloat16 nor 8-bit floats: their bits are widened by `as_float64`.
DTYPES: Mapping[str, str] = {
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
}


class Tensor(Protocol):
    """One tensor of a model, read in slices, from any number of threads at once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, as in Hugging Face's state dict."""
        ...

    @property
    def dtype(self) -> str:
        """How it is stored, for people: `BF16`, `Q4_K`."""
        ...

    @property
    def count(self) -> int:
        """Number of elements."""
        ...

    @property
    def bytes(self) -> int:
        """Number of stored bytes."""
        ...

    @property
    def format(self) -> str:
        """A key of `DTYPES`: in what `read` hands the weights out."""
        ...

    @property
    def file(self) -> Path:
        """The file that it comes from."""
        ...

    @property
    def offset(self) -> int:
        """Where it begins in the file, in bytes; 0 where that says nothing."""
        ...

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The flat elements [start, stop), contiguous, as `DTYPES[format]`; not to be written."""
        ...


class Releasable(Protocol):
    """Something that holds memory which it can get again."""

    def release(self) -> None:
        """Give the memory back."""
        ...


class WeightFile:
    """A file of weights, mapped whole at the first read and shared by all its tensors.

    `size` is what it was when its header was read: it must not have become smaller since.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None

    def view(self, offset: int, dtype: str, count: int) -> NDArray[Any]:
        """`count` elements from byte `offset` on, as a view of the mapping, aligned or not.

        Raises:
            CheckpointError: the file cannot be opened, or has shrunk.
        """
        if count == 0:
            return np.empty(0, dtype)
        return np.frombuffer(self._mapped(), dtype, count, offset)

    def release(self) -> None:
        """Drop the pages that were read from resident memory; the next read gets them again.

        Views stay valid: the mapping itself stays.
        """
        with self._lock:
            if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
                self._map.madvise(mmap.MADV_DONTNEED)

    def _mapped(self) -> mmap.mmap:
        if self._map is not None:  # as it is for all reads but one
            return self._map
        with self._lock:
            if self._map is None:
                with opened(self.path) as stream:
                    found = stream.seek(0, 2)
                    if found < self.size:
                        raise CheckpointError(
                            f"{self.path}: has shrunk since its header was read: "
                            f"expected {self.size} bytes, found {found}"
                        )
                    self._map = mmap.mmap(stream.fileno(), self.size, access=mmap.ACCESS_READ)
            return self._map


@dataclass(frozen=True)
class MappedTensor:
    """A tensor that lies as it is in a file: `offset` bytes into `weights`."""

    weights: WeightFile
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def file(self) -> Path:
        """The file it lies in."""
        return self.weights.path

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of stored bytes."""
        return self.count * itemsize(self.dtype)

    @property
    def format(self) -> str:
        """The stored format itself."""
        return self.dtype

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The flat elements [start, stop), as a view of the mapped file."""
        start, stop = within(start, stop, self.count)
        place = self.offset + start * _ITEMSIZES[self.dtype]
        return self.weights.view(place, DTYPES[self.dtype], stop - start)


_ITEMSIZES = {kind: np.dtype(bits).itemsize for kind, bits in DTYPES.items()}


def itemsize(kind: str) -> int:
    """Bytes of one element of a format of `DTYPES`."""
    return _ITEMSIZES[kind]


def within(start: int, stop: int, count: int) -> tuple[int, int]:
    """The part of [start, stop) that lies in [0, count): no read leaves its tensor."""
    stop = max(min(stop, count), 0)
    return max(min(start, stop), 0), stop


def refuse_overlaps(file: Path, ranges: Iterable[tuple[int, int, str]]) -> None:
    """Refuse two tensors of one file that share bytes; each is (begin, end, name).

    Raises:
        CheckpointError: names both.
    """
    before: tuple[int, int, str] | None = None
    for this in sorted(one for one in ranges if one[1] > one[0]):
        if before is not None and this[0] < before[1]:
            raise CheckpointError(
                f"{file}: expected tensors that share no bytes, found {before[2]!r} in bytes "
                f"{before[0]} to {before[1]} and {this[2]!r} in bytes {this[0]} to {this[1]}"
            )
        before = this


def _e4m3_values() -> NDArray[np.float64]:
    """What each byte means as E4M3: four exponent bits of bias 7, three mantissa bits.

    It has no infinities: only the two bytes of all ones beside the sign are NaN.
    """
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    size = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10)
    )
    size[(bits & 127) == 127] = np.nan
    return np.where(bits & 128, -size, size)


_E4M3_VALUES = _e4m3_values()


def as_float64(stored_B: NDArray[Any], format: str) -> NDArray[np.float64]:
    """Elements of one of the `DTYPES` as float64, exactly.

    >>> as_float64(np.array([0x3F80, 0xC000], "<u2"), "BF16")
    array([ 1., -2.])
    >>> as_float64(np.array([0x38, 0x7E], "u1"), "F8_E4M3")
    array([  1., 448.])
    """
    if format == "F8_E4M3":
        return np.take(_E4M3_VALUES, stored_B)
    if format == "BF16":
        # bfloat16 is the upper half of float32.
        stored_B = (stored_B.astype(np.uint32) << 16).view(np.float32)
    elif format == "F8_E5M2":
        # E5M2 is the upper half of float16.
        stored_B = (stored_B.astype(np.uint16) << 8).view(np.float16)
    # Some bits of NaN are "signalling", of which NumPy warns; what is not finite is for the
    # reader to find.
    with np.errstate(invalid="ignore"):
        return stored_B.astype(np.float64)
