"""Models on disk: where the tensors are, their names, shapes, dtypes and fingerprints.

Reads headers only; weights are handed out as flat views of the mapped file. Knows nothing of
what the weights are for. A model is a folder with `config.json` and safetensors files, or a Hub
id `org/name[@revision]`, which is downloaded first.
"""

import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkin.errors import CheckpointError, ConfigError, DiskFullError, is_disk_full
from modelkin.records import ID_LENGTH, canonical_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# The largest header that the safetensors format allows.
MAX_HEADER_BYTES = 100_000_000

# safetensors dtype -> NumPy dtype of the stored bits. NumPy has no bfloat16: its bits are read as
# uint16 and widened by `as_float64`.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# What decides how a model answers: weights, architecture, tokenizer, generation settings.
_TOKENIZER_FILES = ("tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja")
# Not `*.safetensors`: some repositories hold the weights a second time, under another name.
_DOWNLOADS = ["model*.safetensors", "*.json", *_TOKENIZER_FILES, "*.py"]
# Written by modelkin or by training tools; says nothing about the weights.
RECIPE_FILE = "modelkin.json"
_NOT_FINGERPRINTED = {RECIPE_FILE, INDEX_FILE, "trainer_state.json", "training_args.json"}


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies: `offset` bytes into `file`, of dtype `dtype` (safetensors name)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of stored bytes."""
        return self.count * DTYPES[self.dtype].itemsize

    def map(self) -> NDArray[Any]:
        """The stored elements as a flat read-only view of the mapped file."""
        if self.count == 0:
            return np.empty(0, DTYPES[self.dtype])
        return np.memmap(
            self.file, dtype=DTYPES[self.dtype], mode="r", offset=self.offset, shape=(self.count,)
        )


@dataclass(frozen=True)
class Checkpoint:
    """A readable model folder.

    Attributes:
        name: what to call it in messages and tables.
        folder: where it is.
        tensors: tensor name to place; a tied output head that is stored twice is listed once.
        config: the content of `config.json`.
        revision: the Hub commit it was downloaded from, if it was.
    """

    name: str
    folder: Path
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any]
    revision: str | None = None

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def architecture(self) -> str:
        """The architecture's name in `config.json`, `unknown` where it names none."""
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else self.config.get("model_type")
        return str(first or "unknown")


def open_checkpoint(
    source: str | os.PathLike[str], *, name: str | None = None, revision: str | None = None
) -> Checkpoint:
    """Open a model folder or Hub id; reads the headers, not the weights.

    Args:
        source: a folder, or `org/name[@revision]`.
        name: defaults to the folder's or the repository's name.
        revision: a Hub commit that takes precedence over the one in `source`.

    Raises:
        CheckpointError: `source` is no model, or a file of it is not what it should be.
    """
    folder, found_revision = _locate(str(source), revision)
    config = _read_json(folder / "config.json", folder)
    tensors: dict[str, TensorRef] = {}
    for file, names in _weight_files(folder).items():
        header = _read_header(file)
        for tensor in header if names is None else names:
            if tensor not in header:
                raise CheckpointError(
                    f"{folder / INDEX_FILE}: tensor {tensor!r} should be in {file.name}, "
                    "which does not hold it"
                )
            tensors[tensor] = header[tensor]
    if config.get("tie_word_embeddings", False):
        # Some writers store the tied head a second time.
        tensors.pop("lm_head.weight", None)
    return Checkpoint(
        name=name or str(source).rstrip("/").rsplit("/", 1)[-1],
        folder=folder,
        tensors=dict(sorted(tensors.items())),
        config=config,
        revision=found_revision,
    )


def _locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if folder.exists():
        raise CheckpointError(f"{source}: expected a model folder, found a file")
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source}: no such folder, and not a Hub id of the form org/name[@revision]"
        )
    return _download(source, revision)


def _download(source: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, asked = source.partition("@")
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision or asked or None,
                allow_patterns=_DOWNLOADS,
                ignore_patterns=["*/*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if is_disk_full(error):
            raise DiskFullError(f"{source}: the disk filled up while downloading") from error
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{source}: no such folder here, and the Hub did not give it: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    return folder, folder.name  # the cache names a snapshot's folder after its commit


def _weight_files(folder: Path) -> Mapping[Path, list[str] | None]:
    """The safetensors files of a model and, where an index says so, the tensors to take."""
    index = folder / INDEX_FILE
    if not index.exists():
        if (folder / SINGLE_FILE).is_file():
            return {folder / SINGLE_FILE: None}
        # `.bin.index.json` is what comes of a Hub model whose weights were not downloaded.
        if any(folder.glob("*.bin*")) or any(folder.glob("*.pt")):
            raise CheckpointError(
                f"{folder}: holds pickled weights, which can run code when they are loaded and "
                "are refused; save them as safetensors first, for instance with transformers' "
                "save_pretrained"
            )
        raise CheckpointError(
            f"{folder}: is no model: expected {SINGLE_FILE} or {INDEX_FILE}, "
            f"found {_listing(folder)}"
        )
    weight_map = _read_json(index, folder).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty object under 'weight_map'")
    files: dict[Path, list[str] | None] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: tensor {tensor!r}: expected the name of a file in the same folder, "
                f"found {shard!r}"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: names the shard {shard!r}, which is missing")
        names = files.setdefault(folder / shard, [])
        assert names is not None
        names.append(tensor)
    return files


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "an empty folder"


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: is no model: expected {path.name}, found {_listing(folder)}"
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_header(file: Path) -> dict[str, TensorRef]:
    """The tensors of one safetensors file; every claim of the header is checked."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: is truncated or no safetensors file: the header should be {length} "
                f"bytes, the file has {size}"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _tensor(file, name, entry, 8 + length, size) for name, entry in header.items()}


def _tensor(file: Path, name: str, entry: Any, data: int, size: int) -> TensorRef:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = isinstance(dtype, str) and isinstance(entry["shape"], list)
        whole &= all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected dtype, shape and data_offsets, found {entry!r:.200}"
        )
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected one of the dtypes {', '.join(DTYPES)}, "
            f"found {dtype!r:.100}"
        )
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{file}: tensor {name!r}: shape {list(shape)} of {dtype} needs {expected} bytes, "
            f"the header gives it {end - begin}"
        )
    if data + end > size:
        raise CheckpointError(
            f"{file}: is truncated: tensor {name!r} ends at byte {data + end}, the file has {size}"
        )
    return TensorRef(file=file, dtype=dtype, shape=shape, offset=data + begin)


def as_float64(stored_B: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """Stored elements as float64, exactly.

    >>> as_float64(np.array([0x3F80, 0xC000], "<u2"), "BF16")
    array([ 1., -2.])
    """
    if dtype == "BF16":
        # bfloat16 is the upper half of float32.
        return (stored_B.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored_B.astype(np.float64)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of the files that decide how the model answers: weights, config, tokenizer.

    Reads them whole. Notes and recipes beside them do not count.
    """
    files = {tensor.file for tensor in checkpoint.tensors.values()}
    files |= {
        path
        for path in checkpoint.folder.iterdir()
        if (path.suffix in (".json", ".py") or path.name in _TOKENIZER_FILES)
        and path.name not in _NOT_FINGERPRINTED
    }
    digests: dict[str, str] = {}
    for file in sorted(files):
        with file.open("rb") as stream:
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(canonical_json(digests).encode()).hexdigest()[: 2 * ID_LENGTH]


@contextmanager
def whole_folder(folder: Path, *, record: Mapping[str, Any]) -> Iterator[Path]:
    """A folder of the same name elsewhere, that becomes `folder` when the block ends well.

    `record` is written last, as `modelkin.json`, all files are flushed to disk, and the folder is
    renamed: a folder that exists is whole. After an error nothing is left.

    Raises:
        ConfigError: `folder` exists.
        DiskFullError: the disk filled up.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: expected a folder that does not exist yet")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Left by a process that was killed; no two processes work on the same folder. The eight
        # characters are those that tempfile adds: `m` must not take what belongs to `m.v2`.
        for remains in folder.parent.glob(f".{glob.escape(folder.name)}.????????.partial"):
            shutil.rmtree(remains)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.",
            suffix=".partial",
            dir=folder.parent,
            ignore_cleanup_errors=True,
        ) as scratch:
            # The name is the final one because model cards quote it.
            partial = Path(scratch) / folder.name
            partial.mkdir()
            yield partial
            (partial / RECIPE_FILE).write_text(
                json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
            partial.rename(folder)
            _flush(folder.parent)
    except BaseException as error:
        if is_disk_full(error):
            raise DiskFullError(f"{folder}: the disk filled up while writing it") from error
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
