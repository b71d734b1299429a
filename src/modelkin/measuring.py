"""Checkpoints to Gram statistics: which tensors can be compared, and the pass over them.

Knows formats only through `checkpoint`, and nothing of what the statistics are used for.

Axes: T tensors, N models, B elements of a block.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.progress import Progress

from modelkin.checkpoint import Checkpoint, as_float64, open_checkpoint
from modelkin.errors import CheckpointError, ConfigError, IncomparableError
from modelkin.gram import GramStats, TensorSums
from modelkin.similarity import Kinship, kinship_from

# Elements handled at once: the deltas of a few models stay in a core's cache.
BLOCK = 1 << 15
# Below this share of the base's parameters the comparison says little about the models.
MIN_COVERAGE = 0.9


@dataclass(frozen=True)
class Comparison:
    """What can be compared, decided from headers alone.

    Attributes:
        tensors: names of tensors that the base and all models have in one shape.
        left_out: names of the other tensors of the base or of a model.
        compared_parameters: number of elements of `tensors`.
        total_parameters: number of elements of the base.
    """

    tensors: tuple[str, ...]
    left_out: tuple[str, ...]
    compared_parameters: int
    total_parameters: int


def compare(base: Checkpoint, models: Sequence[Checkpoint]) -> Comparison:
    """Decide which tensors can be compared.

    Raises:
        IncomparableError: another architecture, or less than 0.9 of the base can be compared.
    """
    for model in models:
        if model.architecture != base.architecture:
            raise IncomparableError(
                f"{model.folder}: expected the base's architecture {base.architecture}, "
                f"found {model.architecture}"
            )
    common = [
        name
        for name, tensor in base.tensors.items()
        if all(
            name in model.tensors and model.tensors[name].shape == tensor.shape for model in models
        )
    ]
    everything = set(base.tensors).union(*(model.tensors for model in models))
    left_out = sorted(everything - set(common))
    compared = sum(base.tensors[name].count for name in common)
    if compared < MIN_COVERAGE * base.parameters or compared == 0:
        raise IncomparableError(
            f"expected at least {MIN_COVERAGE:.0%} of the parameters of {base.folder} to be in "
            f"all models with the same shape, found {compared / max(base.parameters, 1):.1%}; "
            f"first difference: {_difference(left_out[:1], base, models)}"
        )
    return Comparison(tuple(common), tuple(left_out), compared, base.parameters)


def _difference(names: Sequence[str], base: Checkpoint, models: Sequence[Checkpoint]) -> str:
    for name in names:
        shapes = (
            f"{model.name} {list(model.tensors[name].shape)}"
            if name in model.tensors
            else f"{model.name} none"
            for model in (base, *models)
        )
        return f"{name}: {', '.join(shapes)}"
    return "the base holds no weights"


def measure(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    known: GramStats | None = None,
    progress: Progress | None = None,
) -> GramStats:
    """The Gram statistics of the models' deltas, in one pass that reads each file once.

    Args:
        base: the common base.
        models: N models with distinct names.
        known: statistics of the first of these models, from an earlier call with the same base;
            only the pairs that they lack are computed.
        progress: where to show a bar, in bytes.

    Raises:
        IncomparableError: see `compare`.
        CheckpointError: a tensor holds NaN or infinity.
    """
    names = tuple(model.name for model in models)
    if len(set(names)) < len(names):
        raise ConfigError(f"expected models with distinct names, found {', '.join(names)}")
    comparison = compare(base, models)
    if known is not None and (
        known.models != names[: len(known.models)] or known.tensors != comparison.tensors
    ):
        known = None
    if known is not None and known.models == names:
        return known
    new = len(models) - (len(known.models) if known else 0)
    everyone = (base, *models)
    total = sum(one.tensors[name].bytes for one in everyone for name in comparison.tensors)
    task = progress.add_task("kinship", total=total) if progress else None
    sums_T: list[TensorSums] = []
    for name in comparison.tensors:
        refs = [one.tensors[name] for one in everyone]
        sums = TensorSums(len(models), new)
        mapped = [ref.map() for ref in refs]
        for start in range(0, refs[0].count, BLOCK):
            weights_B, *thetas = (
                as_float64(stored[start : start + BLOCK], ref.dtype)
                for stored, ref in zip(mapped, refs, strict=True)
            )
            # What is not finite is named by `_check_finite`.
            with np.errstate(over="ignore", invalid="ignore"):
                sums.add(weights_B, np.stack(thetas) - weights_B)  # paper eq. 3
        _check_finite(sums, name, everyone)
        sums_T.append(sums)
        if progress is not None and task is not None:
            progress.advance(task, sum(ref.bytes for ref in refs))
    if progress is not None and task is not None:
        progress.remove_task(task)
    return _assemble(names, comparison.tensors, sums_T, known)


def _check_finite(sums: TensorSums, tensor: str, everyone: Sequence[Checkpoint]) -> None:
    # One NaN or infinity anywhere makes its sum NaN or infinite; a square can overflow alone.
    finite = np.isfinite([sums.base, *sums.cross_N])
    finite[1 + sums.first_new :] &= np.isfinite(sums.gram_RN.diagonal(sums.first_new))
    if not finite.all():
        # A base that is not finite spoils every delta: it is named first.
        guilty = everyone[int(np.argmin(finite))]
        ref = guilty.tensors[tensor]
        stored = ref.map()
        for start in range(0, ref.count, BLOCK):
            bad = np.flatnonzero(~np.isfinite(as_float64(stored[start : start + BLOCK], ref.dtype)))
            if bad.size:
                raise CheckpointError(
                    f"{ref.file}: tensor {tensor!r}: expected finite numbers, found "
                    f"{as_float64(stored[start : start + BLOCK], ref.dtype)[bad[0]]} "
                    f"at element {start + bad[0]}"
                )
        raise CheckpointError(f"{ref.file}: tensor {tensor!r}: its square overflows float64")


def _assemble(
    names: tuple[str, ...],
    tensors: tuple[str, ...],
    sums_T: Sequence[TensorSums],
    known: GramStats | None,
) -> GramStats:
    old = len(known.models) if known else 0
    gram_TNN = np.zeros((len(tensors), len(names), len(names)))
    distance_TNN = np.zeros_like(gram_TNN)
    if known is not None:
        gram_TNN[:, :old, :old] = known.gram_TNN
        distance_TNN[:, :old, :old] = known.distance_TNN
    for t, sums in enumerate(sums_T):
        gram_TNN[t, old:, :] = sums.gram_RN
        gram_TNN[t, :, old:] = sums.gram_RN.T
        distance_TNN[t, old:, :] = sums.distance_RN
        distance_TNN[t, :, old:] = sums.distance_RN.T
    return GramStats(
        models=names,
        tensors=tensors,
        count_T=np.array([sums.count for sums in sums_T]),
        base_T=np.array([sums.base for sums in sums_T]),
        base_sum_T=np.array([sums.base_sum for sums in sums_T]),
        sum_TN=np.array([sums.sum_N for sums in sums_T]),
        cross_TN=np.array([sums.cross_N for sums in sums_T]),
        gram_TNN=gram_TNN,
        distance_TNN=distance_TNN,
    )


def kinship(
    base: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    *,
    progress: Progress | None = None,
) -> Kinship:
    """How closely models are related: the similarity of their weight changes from `base`.

    Implements equations 3 and 4 of arXiv 2410.12613 exactly, in float64, for any number of
    models, holding no model in memory.

    Args:
        base: folder or Hub id of the common pre-trained model.
        models: folders or Hub ids of at least two models that were made from it.
        progress: where to show a bar.

    Returns:
        Pearson correlation, cosine and Euclidean distance, each as an N x N array.

    Raises:
        ConfigError: fewer than two models.
        CheckpointError: a path is no readable model, or a tensor holds NaN or infinity.
        IncomparableError: the models share less than 0.9 of the base's parameters.
    """
    if len(models) < 2:
        raise ConfigError(f"kinship: expected at least 2 models, found {len(models)}")
    opened_base = open_checkpoint(base)
    opened = _distinct([open_checkpoint(model) for model in models])
    comparison = compare(opened_base, opened)
    return kinship_from(
        measure(opened_base, opened, progress=progress),
        base=opened_base.name,
        total_parameters=comparison.total_parameters,
        left_out=comparison.left_out,
    )


def _distinct(models: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
    """The same models; where two would share a name, their position is part of it."""
    names = [model.name for model in models]
    return [
        replace(model, name=f"{model.name} ({position})") if names.count(model.name) > 1 else model
        for position, model in enumerate(models, start=1)
    ]
