"""Files that appear whole: written under another name, then renamed. Knows nothing of meaning."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from modelkin.errors import ConfigError, DiskFullError, is_disk_full


def cache_folder(kind: str) -> Path:
    """Where things of one kind are kept that can be made again; it need not exist.

    `MODELKIN_CACHE` names the folder of all kinds; default: the user's cache folder.
    """
    home = os.environ.get("MODELKIN_CACHE")
    if home:
        return Path(home) / kind
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "modelkin" / kind


def check_target(file: str | os.PathLike[str]) -> None:
    """See, before the work, that a file can be made there.

    Raises:
        ConfigError: there is no such folder, or it is a folder itself.
    """
    path = Path(file)
    if path.is_dir():
        raise ConfigError(f"{file}: expected the name of a file, found a folder")
    if not path.parent.is_dir():
        raise ConfigError(f"{file}: No such file or directory: {path.parent}")


@contextmanager
def whole_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which becomes `file` at the end: a file that exists is whole.

    After an error an older file is untouched and nothing else is left. What is no plain file, such
    as a pipe, is written to directly.

    Raises:
        DiskFullError: the disk filled up.
    """
    # A link stays one: what it points to is replaced.
    path = Path(os.path.realpath(file))
    if path.exists() and not path.is_file():
        yield path
        return
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        partial.replace(path)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(f"{file}: the disk filled up while writing it") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(value: object, file: str) -> None:
    """Write one line of JSON to a file that appears whole, or to standard output for `-`.

    Raises:
        DiskFullError: the disk filled up.
    """
    import json

    with _text(file) as stream:
        stream.write(json.dumps(value, allow_nan=False) + "\n")


def write_csv(fields: Sequence[str], rows: Iterable[Sequence[object]], file: str) -> None:
    """Write a table as CSV, floats with all their digits and `None` as nothing.

    Raises:
        DiskFullError: the disk filled up.
    """
    import csv

    with _text(file) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows(rows)


@contextmanager
def _text(file: str) -> Iterator[TextIO]:
    if file == "-":
        yield sys.stdout
        return
    # Ends of lines are the writer's, on every system.
    with whole_file(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        yield stream
