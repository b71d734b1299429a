"""Pickled PyTorch weights, through torch's own loader for nothing but weights.

A pickle can run code when it is loaded. torch.load with `weights_only` refuses whatever is not a
tensor; nothing here loads in another way. Knows one file, or a folder's file or shards; imports
torch only when it is needed.
"""

import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modelkin.checkpoint.model import HEAD
from modelkin.checkpoint.reading import check_name, is_file, opened, read_index
from modelkin.checkpoint.tensors import DTYPES, itemsize, within
from modelkin.errors import CheckpointError, MissingExtraError, one_line

PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SINGLE = "pytorch_model.bin"

_ARCHIVE = b"PK\3\4"
# A tensor may have more elements than are stored, by repeating them: as many as fit in memory.
_MOST_REPEATED = 1 << 24

# torch's names -> ours, and the integers as which torch hands bits to NumPy.
_FORMATS: Mapping[str, tuple[str, str | None]] = {
    "torch.bfloat16": ("BF16", "int16"),
    "torch.float16": ("F16", None),
    "torch.float32": ("F32", None),
    "torch.float64": ("F64", None),
    "torch.float8_e4m3fn": ("F8_E4M3", "uint8"),
    "torch.float8_e5m2": ("F8_E5M2", "uint8"),
}


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """A tensor that torch keeps, mapped from its file."""

    file: Path
    values: Any = field(repr=False)  # torch.Tensor
    offset: int = 0  # torch does not tell

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.values.shape)

    @property
    def format(self) -> str:
        """The stored format itself."""
        return _FORMATS[str(self.values.dtype)][0]

    @property
    def dtype(self) -> str:
        """The stored format, by safetensors' name."""
        return self.format

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return self.count * itemsize(self.format)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The flat elements [start, stop); of a tensor that is not contiguous, a copy."""
        import torch

        start, stop = within(start, stop, self.count)
        values = self.values
        if values.is_contiguous():
            part = values.view(-1)[start:stop]
        else:
            # Only the rows that are needed: a flat view of the whole would be a copy of it.
            row = self.count // self.shape[0]
            first, last = start // row, -(-stop // row)
            part = values[first:last].reshape(-1)[start - first * row : stop - first * row]
        part = part.contiguous()
        bits = _FORMATS[str(values.dtype)][1]
        if bits is not None:
            part = part.view(getattr(torch, bits))
        stored_B: NDArray[Any] = part.numpy().view(DTYPES[self.format])
        stored_B.flags.writeable = False
        return stored_B


def open_pickled(folder: Path) -> dict[str, PickledTensor]:
    """The tensors of a folder's `pytorch_model.bin`, or of the shards of its index."""
    index = folder / PICKLE_INDEX
    tensors: dict[str, PickledTensor] = {}
    if is_file(index):
        for file, names in read_index(index).items():
            found = read_pickle(file)
            for name in names:
                if name not in found:
                    raise CheckpointError(
                        f"{index}: tensor {name!r} should be in {file.name}, which does not hold it"
                    )
                tensors[name] = found[name]
    else:
        tensors = read_pickle(folder / PICKLE_SINGLE)
    return _once(tensors)


def read_pickle(file: Path) -> dict[str, PickledTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: torch refuses it, or it holds something else.
        MissingExtraError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "evolve") from error
    _check_archive(file)
    try:
        # It warns of odd bytes before it refuses them: the refusal is enough.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    # Whatever unpickling hostile or broken bytes raises.
    except Exception as error:
        raise CheckpointError(f"{file}: torch refuses to load it: {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file}: expected tensors by their names, found {type(content).__name__}"
        )
    return {name: _tensor(file, name, value) for name, value in content.items()}


def _check_archive(file: Path) -> None:
    """Refuse what torch.save does not write, before torch looks at it."""
    with opened(file) as stream:
        # Older files are bare pickles, which torch cannot map.
        if stream.read(len(_ARCHIVE)) != _ARCHIVE:
            raise CheckpointError(
                f"{file}: expected an archive as torch.save writes them since PyTorch 1.6, found "
                "another kind of file"
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                records = archive.infolist()
        # Whatever reading broken bytes raises.
        except Exception as error:
            raise CheckpointError(
                f"{file}: is truncated or no archive of torch's: {one_line(error)[:200]}"
            ) from error
        size = stream.seek(0, 2)
    # A compressed record can be a thousand times as large as the file.
    packed = any(one.compress_type != zipfile.ZIP_STORED for one in records)
    if packed or sum(one.file_size for one in records) > size:
        raise CheckpointError(
            f"{file}: expected an archive of records as they are, as torch.save writes them, "
            "found compressed ones"
        )


def _tensor(file: Path, name: str, value: Any) -> PickledTensor:
    import torch

    check_name(str(file), name)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(
            f"{file}: {name!r:.200}: expected a dense tensor, found {type(value).__name__}"
        )
    if str(value.dtype) not in _FORMATS or value.device.type != "cpu":
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected one of the dtypes {', '.join(DTYPES)}, "
            f"found {value.dtype} on {value.device}"
        )
    value = value.detach()
    held = value.untyped_storage().nbytes() // value.element_size()
    if value.is_neg() or value.is_conj() or not _lies_within(value, held):
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected elements that lie in the file as they are, found "
            f"a view of the shape {list(value.shape)} of {held} elements"
        )
    return PickledTensor(file, value)


def _lies_within(value: Any, held: int) -> bool:
    """Whether no element lies outside of what is held, and none stands for many others.

    torch checks the former, with integers that can overflow.
    """
    if math.prod(value.shape) > max(held, _MOST_REPEATED) or min(value.stride(), default=0) < 0:
        return False
    steps = zip(value.shape, value.stride(), strict=True)
    last = value.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return 0 in value.shape or 0 <= value.storage_offset() <= last < held


def _reason(error: Exception) -> str:
    text = one_line(error)
    named = re.search(r"GLOBAL (\S+)", text)
    if named is not None:
        return f"it holds more than weights, {named.group(1)[:100]}, which could run code"
    return text[:200]


def _once(tensors: Mapping[str, PickledTensor]) -> dict[str, PickledTensor]:
    """Each stored tensor under one name: tied ones are pickled under all their names.

    The head gives way to the embedding, as in safetensors; otherwise the first name stays.
    """
    kept: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors, key=lambda name: name == HEAD):  # stable: the order of the file
        values = tensors[name].values
        place = (values.data_ptr(), values.dtype, tuple(values.shape), values.stride())
        kept.setdefault(place if values.numel() else (name,), name)
    names = set(kept.values())
    return {name: tensor for name, tensor in tensors.items() if name in names}
