"""The header of a GGUF file: its metadata and where its tensors lie.

The package gguf has a reader too, which believes every count that a broken file states and takes
seconds for a vocabulary; this one checks each claim against the file, and skips long lists. Knows
the layout of the bytes, and nothing of what the names mean.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

from modelkin.checkpoint.reading import check_name
from modelkin.checkpoint.tensors import WeightFile
from modelkin.errors import CheckpointError

# The metadata's scalar types, by number -> struct format.
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f"},
    **{7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}
_STRING, _ARRAY = 8, 9
# Longer lists are vocabularies and their scores, of which nothing is needed.
_LONGEST_LIST = 4096
_MOST_DIMENSIONS = 8
# Beyond these a count is no count but a way to waste time: of keys, of tensors, of texts in a
# list, and of bytes of a text.
_MOST_KEYS = 100_000
_MOST_TENSORS = 1_000_000
_MOST_TEXTS = 4_000_000
_LONGEST_TEXT = 1 << 26


@dataclass(frozen=True)
class GgufEntry:
    """One tensor's place: `shape` as stored, innermost first; `offset` from the file's start."""

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, long lists as None, and tensors by their names in the file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufEntry]


def read_gguf_header(weights: WeightFile) -> GgufHeader:
    """The header of a file.

    Raises:
        CheckpointError: it is no GGUF file of version 2 or 3, or ends within the header.
    """
    bytes_ = _Bytes(weights)
    magic = bytes_.take(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{weights.path}: is no GGUF file: it begins with {magic!r}")
    version = bytes_.scalar("<I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{weights.path}: expected GGUF version 2 or 3, little-endian, found {version}"
        )
    tensor_count, key_count = bytes_.scalar("<Q"), bytes_.scalar("<Q")
    for count, most, what in (
        (key_count, _MOST_KEYS, "keys"),
        (tensor_count, _MOST_TENSORS, "tensors"),
    ):
        if count > most:
            raise CheckpointError(
                f"{weights.path}: is truncated or no GGUF file: expected at most {most} {what}, "
                f"found {count}"
            )
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = bytes_.text()
        if key in metadata:
            raise CheckpointError(
                f"{weights.path}: expected each key once, found {key!r:.200} twice"
            )
        metadata[key] = bytes_.value(bytes_.scalar("<I"))
    entries: dict[str, GgufEntry] = {}
    for _ in range(tensor_count):
        name = bytes_.text()
        check_name(str(weights.path), name)
        if name in entries:
            raise CheckpointError(
                f"{weights.path}: expected each tensor once, found {name!r} twice"
            )
        dimensions = bytes_.scalar("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise CheckpointError(
                f"{weights.path}: tensor {name!r}: expected at most {_MOST_DIMENSIONS} "
                f"dimensions, found {dimensions}"
            )
        shape = tuple(bytes_.scalar("<Q") for _ in range(dimensions))
        entries[name] = GgufEntry(shape, bytes_.scalar("<I"), bytes_.scalar("<Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{weights.path}: general.alignment: expected a power of two, found {alignment!r:.100}"
        )
    data = -(-bytes_.at // alignment) * alignment
    return GgufHeader(
        metadata,
        {
            name: GgufEntry(entry.shape, entry.kind, data + entry.offset)
            for name, entry in entries.items()
        },
    )


class _Bytes:
    """The file's bytes, one after the other; none are taken from behind its end."""

    def __init__(self, weights: WeightFile) -> None:
        self._weights = weights
        self.at = 0

    def skip(self, count: int) -> None:
        if count > self._weights.size - self.at:
            raise CheckpointError(
                f"{self._weights.path}: is truncated or no GGUF file: the header goes on at byte "
                f"{self.at} for {count} bytes, the file has {self._weights.size}"
            )
        self.at += count

    def take(self, count: int) -> bytes:
        start = self.at
        self.skip(count)
        return self._weights.view(start, "u1", count).tobytes()

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        length = self.scalar("<Q")
        if length > _LONGEST_TEXT:
            raise CheckpointError(
                f"{self._weights.path}: is truncated or no GGUF file: expected a text of at most "
                f"{_LONGEST_TEXT} bytes before byte {self.at}, found one of {length}"
            )
        raw = self.take(length)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self._weights.path}: expected text in UTF-8 before byte {self.at}, "
                f"found {raw[:40]!r}"
            ) from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise CheckpointError(
                f"{self._weights.path}: expected a known type of metadata before byte {self.at}, "
                f"found {kind}"
            )
        return self._list()

    def _list(self) -> list[Any] | None:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _ARRAY:
            raise CheckpointError(
                f"{self._weights.path}: expected no list within a list before byte {self.at}"
            )
        if count <= _LONGEST_LIST:
            return [self.value(kind) for _ in range(count)]
        if kind in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            if count > _MOST_TEXTS:
                raise CheckpointError(
                    f"{self._weights.path}: is truncated or no GGUF file: expected at most "
                    f"{_MOST_TEXTS} texts in the list before byte {self.at}, found {count}"
                )
            for _ in range(count):
                self.skip(self.scalar("<Q"))
        else:
            self.value(kind)
        return None
