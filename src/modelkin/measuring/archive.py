"""Statistics in a file of their own, where a run keeps what it has measured.

Unlike the cache of `stored` it is bound to no files of weights: whose the statistics are, the
reader must know.
"""

import os
from dataclasses import fields
from pathlib import Path

import numpy as np

from modelkin.files import whole_file
from modelkin.gram import GramStats


def write_statistics(path: Path, stats: GramStats) -> None:
    """Write `stats`; an older file is replaced in one step.

    Raises:
        DiskFullError: the disk filled up; the older file is untouched.
    """
    arrays = {field.name: np.asarray(getattr(stats, field.name)) for field in fields(stats)}
    with whole_file(path) as partial:
        np.savez(partial, allow_pickle=False, **arrays)
        # A ledger that is on disk may rely on statistics that are.
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())


def read_statistics(path: Path) -> GramStats | None:
    """What `write_statistics` wrote; `None` where there is no such file, or a damaged one."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = {field.name: arrays[field.name] for field in fields(GramStats)}
        models, tensors = (tuple(map(str, found.pop(name))) for name in ("models", "tensors"))
        stats = GramStats(models, tensors, **found)
    except Exception:  # zip, NumPy and the file system each raise their own
        return None
    t, n = len(stats.tensors), len(stats.models)
    shapes = {
        **dict.fromkeys(("count_T", "base_T", "base_sum_T"), (t,)),
        **dict.fromkeys(("sum_TN", "cross_TN"), (t, n)),
        **dict.fromkeys(("gram_TNN", "distance_TNN"), (t, n, n)),
    }
    fits = all(getattr(stats, name).shape == shape for name, shape in shapes.items())
    return stats if fits else None
