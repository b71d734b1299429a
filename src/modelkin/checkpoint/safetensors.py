"""Safetensors: headers to tensors. Reads no weights.

The package of that name is not used: its NumPy reader has no bfloat16, and it maps a file for
each tensor. Knows one file, or a folder's file or shards; not what else is in the folder.
"""

import math
from pathlib import Path
from typing import Any

from modelkin.checkpoint.reading import (
    MAX_JSON_BYTES,
    check_name,
    is_file,
    opened,
    parse_json,
    read_index,
    shown,
)
from modelkin.checkpoint.tensors import (
    DTYPES,
    MappedTensor,
    WeightFile,
    itemsize,
    refuse_overlaps,
)
from modelkin.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# The largest header that the format allows.
MAX_HEADER_BYTES = MAX_JSON_BYTES
# NumPy's limit. Sizes beyond 64 bits, and thousands of them, are no sizes but a way to waste time.
_MOST_DIMENSIONS = 64
_LARGEST = (1 << 64) - 1


def holds_safetensors(folder: Path) -> bool:
    """Whether a folder holds a full model in this format."""
    return is_file(folder / INDEX_FILE) or is_file(folder / SINGLE_FILE)


def open_safetensors(folder: Path) -> dict[str, MappedTensor]:
    """The tensors of a folder's `model.safetensors`, or of the shards of its index."""
    index = folder / INDEX_FILE
    if not is_file(index):
        return read_header(folder / SINGLE_FILE)
    tensors: dict[str, MappedTensor] = {}
    for file, names in read_index(index).items():
        header = read_header(file)
        for name in names:
            if name not in header:
                raise CheckpointError(
                    f"{index}: tensor {name!r} should be in {file.name}, which does not hold it"
                )
            tensors[name] = header[name]
    return tensors


def read_header(file: Path) -> dict[str, MappedTensor]:
    """The tensors of one file; every claim of the header is checked."""
    with opened(file) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: is truncated or no safetensors file: the header should be {length} "
                f"bytes, the file has {size}"
            )
        raw = stream.read(length)
    header = parse_json(raw, f"{file}: the header")
    header.pop("__metadata__", None)
    weights = WeightFile(file, size)
    tensors = {name: _tensor(weights, name, entry, 8 + length) for name, entry in header.items()}
    refuse_overlaps(
        file, ((one.offset, one.offset + one.bytes, name) for name, one in tensors.items())
    )
    return tensors


def _tensor(weights: WeightFile, name: str, entry: Any, data: int) -> MappedTensor:
    file, size = weights.path, weights.size
    check_name(str(file), name)
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = isinstance(dtype, str) and isinstance(entry["shape"], list)
        whole &= len(shape) <= _MOST_DIMENSIONS and all(
            type(number) is int and 0 <= number <= _LARGEST for number in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected dtype, shape and data_offsets, found {shown(entry)}"
        )
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected one of the dtypes {', '.join(DTYPES)}, "
            f"found {shown(dtype)}"
        )
    expected = math.prod(shape) * itemsize(dtype)
    if end - begin != expected:
        raise CheckpointError(
            f"{file}: tensor {name!r}: shape {shown(list(shape))} of {dtype} needs {expected} "
            f"bytes, the header gives it {end - begin}"
        )
    if data + end > size:
        raise CheckpointError(
            f"{file}: is truncated: tensor {name!r} ends at byte {data + end}, the file has {size}"
        )
    return MappedTensor(weights=weights, dtype=dtype, shape=shape, offset=data + begin)
