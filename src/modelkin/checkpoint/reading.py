"""What all formats read beside weights: JSON, indexes of shards, and errors of the file system.

Everything that can be wrong becomes a CheckpointError of one line. Knows no tensors.
"""

import json
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from modelkin.errors import CheckpointError

# The longest document that is read; no configuration and no index comes near it.
MAX_JSON_BYTES = 100_000_000
# Names of tensors go into messages and tables.
_LONGEST_NAME = 500


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the file system refuses within the block is a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{str(path)[:200]}: cannot be read: {error.strerror or error}"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A file's bytes. What is no file is refused: a pipe would be waited for, without end."""
    with readable(path):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
            raise CheckpointError(f"{path}: expected a file, found a {kind}")
        with path.open("rb") as stream:
            yield stream


def is_file(path: Path) -> bool:
    """Whether `path` is a file; raises CheckpointError where that cannot be said."""
    with readable(path):
        return path.is_file()


def listing(folder: Path) -> str:
    """The first names in `folder`, for messages."""
    with readable(folder):
        names = sorted(printable(path.name) for path in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "an empty folder"


def printable(text: str) -> str:
    """The text in one line, without what a terminal would act on; as it is where it can be."""
    return text if text.isprintable() else repr(text)[1:-1]


def shown(value: Any) -> str:
    """A value that was found where another was expected, for messages."""
    try:
        return repr(value)[:100]
    # Lists within lists, and integers of thousands of digits, cannot be written down.
    except (RecursionError, ValueError):
        return f"an unreadable {type(value).__name__}"


def check_path(path: Path) -> None:
    """Refuse a path with a line break in it: messages that quote it are one line."""
    if len(str(path).splitlines()) > 1:
        raise CheckpointError(
            f"{printable(str(path))}: expected a path of one line, found a line break in it"
        )


def check_name(what: str, name: Any) -> None:
    """Refuse what is no name of a tensor; `what` begins the message."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise CheckpointError(
            f"{what}: expected names of tensors of at most {_LONGEST_NAME} printable characters, "
            f"found {shown(name)}"
        )


class _DuplicateKeyError(Exception):
    pass


def _each_key_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(repr(key)[:100])
            seen.add(key)
    return found


def parse_json(raw: bytes, what: str, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in `raw`; `what` begins the message if it is none.

    Args:
        raw: the text.
        what: names the file, or a part of it.
        strict: refuse a key that stands twice, of which readers take one or the other.
    """
    try:
        content = json.loads(raw, object_pairs_hook=_each_key_once if strict else None)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{what}: expected each key once, found {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what}: expected a JSON object, found {type(content).__name__}")
    return content


def read_json(path: Path, *, strict: bool = True) -> dict[str, Any]:
    """The JSON object in a file of a model's folder; see `parse_json`."""
    if not is_file(path):
        found = listing(path.parent)
        if path.is_symlink() or path.exists():
            found = f"something of that name that is no file among {found}"
        raise CheckpointError(f"{path.parent}: is no model: expected {path.name}, found {found}")
    with opened(path) as stream:
        size = stream.seek(0, 2)
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes, found {size}")
        stream.seek(0)
        raw = stream.read(size)
    return parse_json(raw, str(path), strict=strict)


def read_index(index: Path) -> dict[Path, list[str]]:
    """The shards that an index names, and the tensors to take from each."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a non-empty object under 'weight_map'")
    shards: dict[Path, list[str]] = {}
    for tensor, shard in weight_map.items():
        check_name(str(index), tensor)
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or shard in ("", ".", "..")
            or not shard.isprintable()
            or len(shard) > 255  # what file systems allow
        ):
            raise CheckpointError(
                f"{index}: tensor {tensor!r}: expected the name of a file in the same folder, "
                f"found {repr(shard)[:200] if isinstance(shard, str) else shown(shard)}"
            )
        file = index.parent / shard
        if file not in shards and not is_file(file):
            raise CheckpointError(f"{index}: names the shard {shard!r}, which is missing")
        shards.setdefault(file, []).append(tensor)
    return shards
