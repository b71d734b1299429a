"""Models on disk: their tensors, whatever the format, their config and their fingerprints.

A model is a folder with `config.json` and safetensors files; a Hub id `org/name[@revision]`, which
is downloaded first; a LoRA adapter with its base; a GGUF file; or, where that is allowed, pickled
PyTorch weights. Opening reads headers only; weights are handed out in slices. Knows nothing of
what the weights are for.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelkin.checkpoint.folders import (
    RECIPE_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILES,
    delete_folder,
    fingerprint,
    whole_folder,
)
from modelkin.checkpoint.hub import ADAPTER_CONFIG, locate
from modelkin.checkpoint.model import HEAD, Checkpoint
from modelkin.checkpoint.pickled import PICKLE_INDEX, PICKLE_SINGLE, open_pickled
from modelkin.checkpoint.reading import check_path, is_file, listing, printable, read_json, readable
from modelkin.checkpoint.safetensors import (
    INDEX_FILE,
    MAX_HEADER_BYTES,
    SINGLE_FILE,
    holds_safetensors,
    open_safetensors,
)
from modelkin.checkpoint.tensors import (
    DTYPES,
    MappedTensor,
    Tensor,
    WeightFile,
    as_float64,
)
from modelkin.errors import CheckpointError

__all__ = [
    "DTYPES",
    "INDEX_FILE",
    "MAX_HEADER_BYTES",
    "RECIPE_FILE",
    "SINGLE_FILE",
    "TEMPLATE_FOLDER",
    "TOKENIZER_FILES",
    "Checkpoint",
    "MappedTensor",
    "Tensor",
    "WeightFile",
    "as_float64",
    "delete_folder",
    "fingerprint",
    "open_checkpoint",
    "whole_folder",
]


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    revision: str | None = None,
    base: Checkpoint | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Open a model; reads the headers, not the weights.

    Args:
        source: a folder, a `.gguf` file, or `org/name[@revision]`.
        name: defaults to the folder's, the file's or the repository's name.
        revision: a Hub commit that takes precedence over the one in `source`.
        base: the model that `source` changes, if it is a LoRA adapter.
        allow_pickle: read PyTorch's pickled weights where there are no others; torch loads them,
            and refuses those that hold anything but weights.

    Raises:
        CheckpointError: `source` is no model, or a file of it is not what it should be.
        MissingExtraError: it needs torch or gguf, which is not installed.
    """
    path, found_revision = locate(os.fspath(source), revision, allow_pickle=allow_pickle)
    called = name or printable(str(source).rstrip("/").rsplit("/", 1)[-1])
    gguf = _gguf_file(path)
    if gguf is not None:
        from modelkin.checkpoint.gguf import open_gguf

        parts = open_gguf(gguf)
        return _full(name or printable(gguf.stem), path, parts.config, parts.tensors, [gguf], None)
    if not holds_safetensors(path) and is_file(path / ADAPTER_CONFIG):
        if base is None:
            raise CheckpointError(
                f"{source}: is a LoRA adapter: expected a full model here; an adapter is opened "
                "together with the base model that it changes"
            )
        from modelkin.checkpoint.adapter import open_adapter

        return open_adapter(
            path, base, name=called, revision=found_revision, allow_pickle=allow_pickle
        )
    config = read_json(path / "config.json", strict=False)
    tensors: Mapping[str, Tensor]
    if holds_safetensors(path):
        tensors, index = open_safetensors(path), INDEX_FILE
    elif allow_pickle and (is_file(path / PICKLE_SINGLE) or is_file(path / PICKLE_INDEX)):
        tensors, index = open_pickled(path), PICKLE_INDEX
    else:
        raise _no_weights(path, allow_pickle=allow_pickle, downloaded=found_revision is not None)
    beside = [path / file for file in ("config.json", index) if is_file(path / file)]
    return _full(called, path, config, tensors, beside, found_revision)


def _full(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    beside: Sequence[Path],
    revision: str | None,
) -> Checkpoint:
    """A model from its parts. `beside` are the files other than those that the tensors lie in."""
    # Some writers store the tied head a second time.
    tied = bool(config.get("tie_word_embeddings", False))
    tensors = {
        name: tensor for name, tensor in sorted(tensors.items()) if not (tied and name == HEAD)
    }
    # By identity: one a file.
    mapped = (getattr(tensor, "weights", None) for tensor in tensors.values())
    held = {id(weights): weights for weights in mapped if isinstance(weights, WeightFile)}
    return Checkpoint(
        name=name,
        folder=folder,
        tensors=tensors,
        config=config,
        revision=revision,
        files=tuple(sorted({*beside, *(tensor.file for tensor in tensors.values())})),
        held=tuple(held.values()),
    )


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that is a folder's only form of a model."""
    with readable(path):
        if not path.is_dir():
            return path
        if holds_safetensors(path) or is_file(path / ADAPTER_CONFIG):
            return None
        found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: expected one .gguf file, found {len(found)}: name one of them, for instance "
            f"{printable(found[0].name)}"
        )
    if not found:
        return None
    check_path(found[0])
    return found[0]


def _no_weights(folder: Path, *, allow_pickle: bool, downloaded: bool) -> CheckpointError:
    expected = [SINGLE_FILE, INDEX_FILE]
    # `.bin.index.json` is what comes of a Hub model whose weights were not downloaded.
    with readable(folder):
        pickled = any(folder.glob("*.bin*")) or any(folder.glob("*.pt"))
    if pickled and not allow_pickle:
        return CheckpointError(
            f"{folder}: holds pickled weights, which can run code when they are loaded and "
            "are refused; save them as safetensors first, for instance with transformers' "
            "save_pretrained, or let torch load nothing but their weights with --allow-pickle"
        )
    if allow_pickle:
        expected += [PICKLE_SINGLE, PICKLE_INDEX]
    hint = "; pickled weights are fetched with --allow-pickle only"
    return CheckpointError(
        f"{folder}: is no model: expected {', '.join(expected[:-1])} or {expected[-1]}, "
        f"found {listing(folder)}{hint if downloaded and not allow_pickle else ''}"
    )
