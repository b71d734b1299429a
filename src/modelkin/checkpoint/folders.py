"""Model folders as wholes: their fingerprints, and folders that appear whole or not at all.

Knows which files decide how a model answers, and nothing of what is in them.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modelkin.checkpoint.model import Checkpoint
from modelkin.checkpoint.reading import opened, printable, readable
from modelkin.checkpoint.safetensors import INDEX_FILE
from modelkin.errors import ConfigError, DiskFullError, is_disk_full
from modelkin.records import ID_LENGTH, canonical_json

# What decides how a model answers, beside weights, JSON and code: patterns of names.
TOKENIZER_FILES = (
    *("tokenizer*", "vocab.*", "merges.txt", "*.tiktoken", "*sentencepiece*.model"),
    *("spiece.model", "chat_template*"),
)
# Templates beside the chat template, by their names.
TEMPLATE_FOLDER = "additional_chat_templates"
# Written by modelkin or by training tools; says nothing about the weights.
RECIPE_FILE = "modelkin.json"
_NOT_FINGERPRINTED = {RECIPE_FILE, INDEX_FILE, "trainer_state.json", "training_args.json"}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of the files that decide how the model answers: weights, config, tokenizer.

    Reads them whole; those of an adapter's base too. Notes and recipes beside them do not count.
    """
    base = checkpoint.base
    files = set(checkpoint.files) - set(base.files if base is not None else ())
    with readable(checkpoint.folder):
        if checkpoint.folder.is_dir():
            files |= {
                path
                for path in checkpoint.folder.iterdir()
                if path.suffix in (".json", ".py")
                or (any(map(path.match, TOKENIZER_FILES)) and not path.is_dir())
            }
    digests: dict[str, str] = {}
    for file in sorted(files):
        if file.name in _NOT_FINGERPRINTED:
            continue
        with opened(file) as stream:
            digests[printable(file.name)] = hashlib.file_digest(stream, "sha256").hexdigest()
    if base is not None:
        # The slash: no file has this name.
        digests["/base"] = fingerprint(base)
    return hashlib.sha256(canonical_json(digests).encode()).hexdigest()[: 2 * ID_LENGTH]


@contextmanager
def whole_folder(folder: Path, *, record: Mapping[str, Any]) -> Iterator[Path]:
    """A folder of the same name elsewhere, that becomes `folder` when the block ends well.

    `record` is written last, as `modelkin.json`, all files are flushed to disk, and the folder is
    renamed: a folder that exists is whole. After an error nothing is left. What killed processes
    left behind is taken away: of this folder everything, of finished ones beside it the empty rest.

    Raises:
        ConfigError: `folder` exists.
        DiskFullError: the disk filled up.
    """
    _sweep(folder.parent)
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


def _sweep(parent: Path) -> None:
    """Remove what is left where a process was killed between renaming a folder and tidying up.

    Nobody is writing a folder that exists, and what is not empty is not removed.
    """
    for remains in parent.glob(".*.????????.partial"):
        name = remains.name.removeprefix(".").removesuffix(".partial")[: -len(".????????")]
        if (parent / name).exists():
            with suppress(OSError):
                remains.rmdir()


def delete_folder(folder: Path) -> None:
    """Delete a folder, if it is there, so that what is left of it after a crash looks like none."""
    # Its new name begins with a dot, and goes first: a folder that exists is whole.
    doomed = folder.with_name(f".{folder.name}.deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
