"""What is in a child's folder: weights in the layout of its donor, and the files beside them.

The donor is the parent whose config and tokenizer the child gets. Knows no merge method.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkin.checkpoint import (
    DTYPES,
    INDEX_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
    Checkpoint,
    open_checkpoint,
    whole_folder,
)
from modelkin.errors import DiskFullError, MergeError, ModelkinError, is_disk_full, one_line

# What a child takes from its donor beside the config. Patterns, within the folder itself.
COPIED = (
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("*processor_config.json", "*.py", *TOKENIZER_FILES, TEMPLATE_FOLDER),
)
# Formats -> how a config names them.
DTYPE_NAMES: Mapping[str, str] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
# The second is the older name of the first.
_DTYPE_KEYS = ("dtype", "torch_dtype")

_CARD = """\
---
{front}---
# {name}

A merge of pre-trained language models, made by modelkin with the method `{method}`.

## Models

{models}

## Recipe

The same in `mergekit_config.yml`, which mergekit reads too:

```yaml
{recipe}```
"""


def write_child(
    run: Callable[[Path], None], config: Mapping[str, Any], out: Path, *, seed: int
) -> None:
    """Let `run` fill a folder that becomes `out` if it is then a readable model.

    Raises:
        MergeError: `run` raised, or left something that is no model.
    """
    record = {"recipe": dict(config), "seed": seed}
    with whole_folder(out, record=record) as folder:
        try:
            run(folder)
            open_checkpoint(folder)
        except Exception as error:
            if is_disk_full(error):
                raise DiskFullError(f"{out}: the disk filled up while merging") from error
            said = str(error) if isinstance(error, ModelkinError) else one_line(error)
            method = str(config.get("merge_method", "merge"))
            # Some messages begin with it already.
            said = said if said.startswith(f"{method}: ") else f"{method}: {said}"
            raise MergeError(said) from error


@dataclass(frozen=True)
class Place:
    """Where a tensor of a child lies: `offset` bytes into a file of that name."""

    file: str
    offset: int
    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All files of weights of a child, known before the first weight.

    Attributes:
        places: tensor -> its place.
        headers: file -> its first bytes.
        sizes: file -> all its bytes.
        index: the content of the index, where the donor has one.
    """

    places: Mapping[str, Place]
    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    index: Mapping[str, Any] | None


def lay_out(donor: Checkpoint, formats: Mapping[str, str]) -> Layout:
    """The donor's files and order of tensors, with the tensors in these formats."""
    files: dict[str, list[str]] = {}
    for name in sorted(donor.tensors, key=lambda name: donor.tensors[name].offset):
        files.setdefault(donor.tensors[name].file.name, []).append(name)
    places: dict[str, Place] = {}
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    total = 0
    for file, names in sorted(files.items()):
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            tensor = donor.tensors[name]
            width = np.dtype(DTYPES[formats[name]]).itemsize
            begin, end = end, end + tensor.count * width
            entries[name] = {
                "dtype": formats[name],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        spelled = json.dumps(entries, separators=(",", ":")).encode()
        # Numbers begin at multiples of their width, as far as the header decides.
        spelled += b" " * (-len(spelled) % 8)
        headers[file] = len(spelled).to_bytes(8, "little") + spelled
        for name in names:
            entry = entries[name]
            offset = len(headers[file]) + entry["data_offsets"][0]
            places[name] = Place(file, offset, formats[name], donor.tensors[name].shape)
        sizes[file] = len(headers[file]) + end
        total += end
    index = None
    if (donor.folder / INDEX_FILE).is_file():
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: places[name].file for name in sorted(places)},
        }
    return Layout(places, headers, sizes, index)


class WeightFiles:
    """A child's files of weights, written in any order by any number of threads."""

    def __init__(self, layout: Layout, descriptors: Mapping[str, int]) -> None:
        self._layout = layout
        self._descriptors = descriptors

    def write(self, tensor: str, start: int, stored_B: NDArray[Any]) -> None:
        """Put elements of a tensor, from element `start` on, where they belong."""
        place = self._layout.places[tensor]
        at = place.offset + start * stored_B.itemsize
        _write_all(self._descriptors[place.file], stored_B.view(np.uint8).data, at)


@contextmanager
def weight_files(folder: Path, layout: Layout) -> Iterator[WeightFiles]:
    """Files of their whole sizes, with their headers, open for the weights."""
    descriptors: dict[str, int] = {}
    try:
        for file, header in layout.headers.items():
            # As safetensors and everyone else leave them: readable by all whom the umask lets.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            descriptors[file] = os.open(folder / file, flags, 0o666)
            os.ftruncate(descriptors[file], layout.sizes[file])
            _write_all(descriptors[file], memoryview(header), 0)
        if layout.index is not None:
            _write_json(folder / INDEX_FILE, layout.index)
        yield WeightFiles(layout, descriptors)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def write_beside(
    folder: Path,
    donor: Checkpoint,
    config: Mapping[str, Any],
    models: Sequence[str],
    *,
    name: str,
    dtype: str | None,
) -> None:
    """Everything that is no weight: config, tokenizer, code, model card, recipe.

    Args:
        folder: the child's.
        donor: whose config and tokenizer it gets.
        config: the recipe.
        models: the parents, as the recipe names them.
        name: the child's.
        dtype: the format of all its weights, or `None` where each tensor has the donor's.
    """
    import yaml

    _write_json(folder / "config.json", _with_dtype(donor.config, dtype))
    for file in sorted({file for pattern in COPIED for file in donor.folder.glob(pattern)}):
        if file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            # Its content: in the Hub's cache files are links.
            shutil.copyfile(file, folder / file.name)
    recipe = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    front = {
        # Of a path nobody else could tell what it is, and the Hub refuses it; revisions too.
        "base_model": [
            model.partition("@")[0] for model in models if not Path(model).expanduser().is_dir()
        ],
        "library_name": "transformers",
        "tags": ["merge", "modelkin"],
    }
    card = _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        name=name,
        method=config["merge_method"],
        models="\n".join(f"* {model}" for model in models),
        recipe=recipe,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "mergekit_config.yml").write_text(recipe, encoding="utf-8")


def _with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config that says so, and so do those of its parts that say anything."""
    found = dict(config)
    if dtype is None:
        return found
    present = [key for key in _DTYPE_KEYS if key in found]
    found |= dict.fromkeys(present or _DTYPE_KEYS[:1], DTYPE_NAMES[dtype])
    for key, part in found.items():
        if isinstance(part, dict) and any(name in part for name in _DTYPE_KEYS):
            found[key] = _with_dtype(part, dtype)
    return found


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _write_all(descriptor: int, content: memoryview, at: int) -> None:
    while content:
        # It may take a part only, as when the disk fills up.
        written = os.pwrite(descriptor, content, at)
        content, at = content[written:], at + written
