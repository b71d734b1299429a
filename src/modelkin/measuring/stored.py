"""Statistics of earlier calls, kept under the fingerprints of the files that they came from.

A fingerprint here is what the file system says of a file (place, size, times of change), not a
hash of its content: reading a file takes as long as measuring it. Every change of a file changes
the time of its inode, which cannot be set by hand.

Knows nothing of how statistics are computed.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modelkin.checkpoint import Checkpoint
from modelkin.errors import DiskFullError
from modelkin.files import cache_folder, whole_file
from modelkin.gram import GramStats
from modelkin.measuring.comparing import Comparison
from modelkin.records import canonical_json

# Changes whenever other numbers would come out of the same files.
VERSION = 1
# A file system's clock ticks: of two changes within a tick the second leaves no trace. Files that
# were changed this short a time ago, in seconds, are measured but not remembered.
SETTLED = 2.0
# When the folder has grown beyond this many bytes, what was used longest ago goes.
ROOM = 2_000_000_000

_ARRAYS = ("base_T", "base_sum_T", "sum_TN", "cross_TN", "gram_TNN", "distance_TNN")


class StoredStatistics:
    """The statistics of some models against one base that are already known.

    Everything that is wrong with the cache, unreadable or unwritable, means that nothing is known.
    """

    def __init__(
        self, base: Checkpoint, models: Sequence[Checkpoint], comparison: Comparison
    ) -> None:
        """Take the files' fingerprints as they are now, before anything is read."""
        self._names = tuple(model.name for model in models)
        self._comparison = comparison
        self._base, self._models = base, models
        self._now = time.time()
        self._known = False
        try:
            self._prints = self._fingerprints()
        except OSError:  # a file went away: whoever reads it will say so
            self._prints = []
            return
        about = {
            "version": VERSION,
            "base": self._prints[0],
            "counts": dict(comparison.counts),
        }
        self._folder = cache_folder("statistics") / _hash(about)

    def load(self) -> GramStats | None:
        """Statistics of as many of the models as one earlier call knew, or `None`."""
        if not self._prints:
            return None
        wanted = self._prints[1:]
        entries: list[tuple[Path, list[str]]] = []
        with suppress(OSError):
            entries = [(file, _models(file)) for file in self._folder.glob("*.json")]
        # The most first; one that cannot be read leaves it to the next.
        entries.sort(key=lambda entry: len(set(wanted) & set(entry[1])), reverse=True)
        for file, models in entries:
            if set(wanted).isdisjoint(models):
                return None
            stats = self._read(file, models)
            if stats is None:
                continue
            # A place that may be read only is as good.
            with suppress(OSError):
                os.utime(file)
            # One model may go by several names.
            called = [
                (name, models.index(model))
                for name, model in zip(self._names, wanted, strict=True)
                if model in models
            ]
            self._known = len(called) == len(wanted)
            found = stats.select([stats.models[n] for _, n in called])
            return replace(found, models=tuple(name for name, _ in called))
        return None

    def _read(self, file: Path, models: Sequence[str]) -> GramStats | None:
        """The statistics of an entry, its models named by their numbers."""
        try:
            with (
                file.with_suffix(".npz").open("rb") as stream,
                np.load(stream, allow_pickle=False) as arrays,
            ):
                stats = GramStats(
                    models=tuple(str(n) for n in range(len(models))),
                    tensors=self._comparison.tensors,
                    count_T=np.array(list(self._comparison.counts.values()), np.int64),
                    **{name: arrays[name] for name in _ARRAYS},
                )
        except Exception:  # a damaged file of any kind is as good as none
            return None
        return stats if _fits(stats) else None

    def save(self, stats: GramStats) -> None:
        """Keep `stats` of all models, unless a file changed lately or meanwhile."""
        if self._known or not self._prints:
            return
        try:
            newest = max(
                entry.stat().st_ctime
                for checkpoint in (self._base, *self._models)
                for entry in checkpoint.files
            )
            if newest > self._now - SETTLED or self._fingerprints() != self._prints:
                return
            identity = _hash(self._prints[1:])
            self._folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self._folder / f"{identity}.npz") as partial:
                np.savez(partial, **{name: getattr(stats, name) for name in _ARRAYS})
            # Written last: statistics without it are not looked at.
            with whole_file(self._folder / f"{identity}.json") as partial:
                partial.write_text(json.dumps({"models": self._prints[1:]}), encoding="utf-8")
            _make_room(self._folder.parent)
        except (OSError, DiskFullError):
            pass

    def _fingerprints(self) -> list[str]:
        """The base's, then each model's."""
        return [_fingerprint(one) for one in (self._base, *self._models)]


def _fingerprint(checkpoint: Checkpoint) -> str:
    files = []
    for file in checkpoint.files:
        found = file.stat()
        files.append(
            [
                str(file.resolve()),
                found.st_dev,
                found.st_ino,
                found.st_size,
                found.st_mtime_ns,
                found.st_ctime_ns,
            ]
        )
    return _hash(sorted(files))


def _hash(value: Any) -> str:
    # Names of files need not be text.
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _models(file: Path) -> list[str]:
    """The fingerprints of the models of an entry, in the order of its axis N."""
    try:
        models = list(json.loads(file.read_bytes())["models"])
        return models if all(isinstance(model, str) for model in models) else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _fits(stats: GramStats) -> bool:
    t, n = len(stats.tensors), len(stats.models)
    shapes = [(t,), (t,), (t, n), (t, n), (t, n, n), (t, n, n)]
    return all(
        getattr(stats, name).shape == shape and getattr(stats, name).dtype == np.float64
        for name, shape in zip(_ARRAYS, shapes, strict=True)
    )


def _make_room(folder: Path) -> None:
    entries = []
    for file in folder.glob("*/*.npz"):
        # Another process may be writing here, or deleting, or may have been killed in between.
        with suppress(OSError):
            found = file.stat()
            used = found.st_mtime
            with suppress(OSError):
                used = file.with_suffix(".json").stat().st_mtime
            entries.append((used, str(file), found.st_size))
    entries.sort()
    total = sum(size for _, _, size in entries)
    for _, name, size in entries[:-1]:
        if total <= ROOM:
            return
        total -= size
        Path(name).with_suffix(".json").unlink(missing_ok=True)
        Path(name).unlink(missing_ok=True)
