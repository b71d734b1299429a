"""Checkpoints to Gram statistics and kinship.

`comparing` decides what can be compared, `streaming` reads the weights, `stored` remembers the
statistics. Knows formats only through `checkpoint`, and nothing of what the statistics are for.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from modelkin.checkpoint import Checkpoint, open_checkpoint
from modelkin.errors import ConfigError
from modelkin.gram import GramStats
from modelkin.measuring.comparing import MIN_COVERAGE, Comparison, compare, overlap
from modelkin.measuring.stored import StoredStatistics
from modelkin.measuring.streaming import stream
from modelkin.similarity import Kinship, kinship_from

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["MIN_COVERAGE", "Comparison", "compare", "kinship", "measure", "overlap"]


def kinship(
    base: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_coverage: float = MIN_COVERAGE,
    threads: int | None = None,
    cache: bool = True,
    allow_pickle: bool = False,
    progress: "Progress | None" = None,
) -> Kinship:
    """How closely models are related: the similarity of their weight changes from `base`.

    Implements equations 3 and 4 of arXiv 2410.12613 exactly, for any number of models, in one
    pass over the files, holding no model in memory.

    Args:
        base: folder, GGUF file or Hub id of the common pre-trained model.
        models: folders, GGUF files or Hub ids of at least two models that were made from it, or
            of LoRA adapters to it.
        include: compare only tensors whose names match one of these patterns.
        exclude: compare no tensors whose names match one of these patterns.
        min_coverage: least share of the base's parameters that must be comparable, 0 to 1.
        threads: how many cores to use; default: all that this process may.
        cache: keep the statistics, and use those of earlier calls on the same files.
        allow_pickle: also read pickled weights, through PyTorch's weights-only loader.
        progress: where to show a bar, in bytes.

    Returns:
        Pearson correlation, cosine and Euclidean distance, each as an N x N array.

    Raises:
        ConfigError: fewer than two models, or an option that is none.
        CheckpointError: a path is no readable model, or a tensor holds NaN or infinity.
        IncomparableError: the models share too little of the base's parameters.
    """
    if len(models) < 2:
        raise ConfigError(f"kinship: expected at least 2 models, found {len(models)}")
    if not 0 <= min_coverage <= 1:
        raise ConfigError(f"min_coverage: expected a share from 0 to 1, found {min_coverage}")
    opened_base = open_checkpoint(base, allow_pickle=allow_pickle)
    opened = _distinct(
        [open_checkpoint(one, base=opened_base, allow_pickle=allow_pickle) for one in models]
    )
    comparison = compare(
        opened_base, opened, include=include, exclude=exclude, min_coverage=min_coverage
    )
    stats = measure(
        opened_base,
        opened,
        comparison=comparison,
        cache=cache,
        threads=threads,
        progress=progress,
    )
    return kinship_from(
        stats,
        base=opened_base.name,
        total_parameters=comparison.total_parameters,
        left_out=comparison.left_out,
        rows_left_out=comparison.rows_left_out,
    )


def measure(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    comparison: Comparison | None = None,
    known: GramStats | None = None,
    cache: bool = False,
    threads: int | None = None,
    progress: "Progress | None" = None,
    label: str = "kinship",
    double: bool = False,
) -> GramStats:
    """The Gram statistics of the models' deltas, in one pass that reads each file once.

    Args:
        base: the common base.
        models: N models with distinct names.
        comparison: what to compare; default: `compare(base, models)`.
        known: statistics of some of these models from an earlier call with the same base; pairs
            of two of those are not computed again.
        cache: keep the statistics, and use those of earlier calls on the same files.
        threads: how many cores to use; default: all that this process may.
        progress: where to show a bar, in bytes.
        label: what the bar is called.
        double: compute in float64 throughout, for nine digits and more; needs `cache` to be off,
            whose statistics have eight.

    Raises:
        ConfigError: models that share a name, or fewer than one thread.
        IncomparableError: see `compare`.
        CheckpointError: a tensor holds NaN or infinity.
    """
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"expected models with distinct names, found {', '.join(names)}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads: expected at least 1, found {threads}")
    comparison = comparison or compare(base, models)
    stored = StoredStatistics(base, models, comparison) if cache else None
    if stored and known is None:
        known = stored.load()
    stats = stream(
        base,
        models,
        comparison,
        known=known,
        threads=threads,
        progress=progress,
        label=label,
        double=double,
    )
    if stored:
        stored.save(stats)
    return stats


def _distinct(models: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
    """The same models; where two would share a name, their position is part of it."""
    names = [model.name for model in models]
    return [
        replace(model, name=f"{model.name} ({position})") if names.count(model.name) > 1 else model
        for position, model in enumerate(models, start=1)
    ]
