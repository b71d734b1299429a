"""What can be compared, decided from headers before any weight is read.

Axes: none; names, shapes and counts only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelkin.checkpoint import Checkpoint
from modelkin.errors import IncomparableError
from modelkin.tensor_names import kind, select

# Below this share of the base's parameters the comparison says little about the models.
MIN_COVERAGE = 0.9


@dataclass(frozen=True)
class Comparison:
    """What can be compared, decided from headers alone.

    Attributes:
        counts: compared tensor -> how many of its elements, from the first on. Less than all of
            them where vocabularies differ: then only the rows that all models have.
        left_out: names of tensors that are not compared, although no pattern excludes them.
        rows_left_out: embedding or head -> how many rows of the largest vocabulary are not
            compared.
        reasons: tensor in `left_out` or `rows_left_out` -> the shapes that differ, in words.
        total_parameters: number of elements of the base, excluded tensors not counted.
    """

    counts: Mapping[str, int]
    left_out: tuple[str, ...]
    rows_left_out: Mapping[str, int]
    reasons: Mapping[str, str]
    total_parameters: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the compared tensors."""
        return tuple(self.counts)

    @property
    def compared_parameters(self) -> int:
        """Number of compared elements."""
        return sum(self.counts.values())

    @property
    def coverage(self) -> float:
        """Share of the base's parameters that can be compared, 0 to 1."""
        return self.compared_parameters / max(self.total_parameters, 1)


def compare(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_coverage: float = MIN_COVERAGE,
) -> Comparison:
    """Decide which tensors can be compared.

    Tensors count where base and all models have them in one shape; an embedding or head whose
    vocabularies differ counts with the rows that all have. (A longer vocabulary is taken to be
    the same one with tokens added at its end.)

    Args:
        base: the common base.
        models: the models.
        include: only tensors whose names match one of these patterns.
        exclude: no tensors whose names match one of these patterns.
        min_coverage: least share of the base's parameters, 0 to 1.

    Raises:
        ConfigError: a pattern matches no tensor of the base, or none is left.
        IncomparableError: another architecture, or too little of the base can be compared.
    """
    for model in models:
        if model.architecture != base.architecture:
            raise IncomparableError(
                f"{model.folder}: expected the base's architecture {base.architecture}, "
                f"found {model.architecture}"
            )
    found = overlap(base, models, include=include, exclude=exclude)
    if found.coverage < min_coverage or found.compared_parameters == 0:
        first = next(iter(found.reasons.values()), "the base holds no weights")
        raise IncomparableError(
            f"expected at least {min_coverage:.0%} of the parameters of {base.folder} to be in "
            f"all models with the same shape, found {found.coverage:.1%}; "
            f"first difference: {first}"
        )
    return found


def overlap(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Comparison:
    """What `compare` compares, however little it is."""
    everyone = (base, *models)
    everything = sorted(set().union(*(one.tensors for one in everyone)))
    wanted = set(select(everything, include, exclude))
    counts: dict[str, int] = {}
    left_out: list[str] = []
    rows_left_out: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for name in everything:
        if name not in wanted:
            continue
        shapes = [one.tensors[name].shape if name in one.tensors else None for one in everyone]
        present = [shape for shape in shapes if shape is not None]
        rows = {shape[0] for shape in present if shape}
        if len(present) == len(shapes) and len(set(present)) == 1:
            counts[name] = base.tensors[name].count
            continue
        reasons[name] = _difference(name, everyone)
        if (
            len(present) == len(shapes)
            and len({shape[1:] for shape in present}) == 1
            and all(len(shape) == 2 for shape in present)
            and kind(name) in ("embeddings", "head")
        ):
            counts[name] = min(rows) * present[0][1]
            rows_left_out[name] = max(rows) - min(rows)
        else:
            left_out.append(name)
    total = sum(tensor.count for name, tensor in base.tensors.items() if name in wanted)
    return Comparison(counts, tuple(left_out), rows_left_out, reasons, total)


def _difference(name: str, everyone: Sequence[Checkpoint]) -> str:
    shapes = (
        f"{one.name} {list(one.tensors[name].shape)}" if name in one.tensors else f"{one.name} none"
        for one in everyone
    )
    return f"{name}: {', '.join(shapes)}"
