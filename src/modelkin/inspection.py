"""What models are and what they share, told from their headers alone: no weight is read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from modelkin.checkpoint import Checkpoint, open_checkpoint
from modelkin.errors import IncomparableError
from modelkin.measuring import compare, overlap


@dataclass(frozen=True)
class Summary:
    """One model.

    Attributes:
        name: its name.
        architecture: what its config says.
        dtypes: how its weights are stored -> number of elements, the most frequent first.
        parameters: number of elements.
        tensors: number of tensors.
        bytes: size of the stored weights.
        files: kind of file, such as "safetensors" -> number of such files.
    """

    name: str
    architecture: str
    dtypes: Mapping[str, int]
    parameters: int
    tensors: int
    bytes: int
    files: Mapping[str, int]


@dataclass(frozen=True)
class Difference:
    """One model against the base.

    Attributes:
        name: the model's name.
        architecture: whether it is the base's.
        compared_parameters: number of elements that both have in the same place.
        coverage: share of the base's parameters that these are, 0 to 1.
        reshaped: tensors that both have, in other shapes -> the shapes, in words.
        rows_left_out: embedding or head -> rows of the larger vocabulary that the other lacks.
        missing: tensors of the base that the model lacks.
        extra: tensors of the model that the base lacks.
    """

    name: str
    architecture: bool
    compared_parameters: int
    coverage: float
    reshaped: Mapping[str, str]
    rows_left_out: Mapping[str, int]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """Models, and how they differ from the first of them or from a base.

    Attributes:
        base: the name of the model that the others are held against.
        summaries: of all models, the base first.
        differences: of each other model from the base.
        obstacle: why the kinship of all of them cannot be measured, `None` where it can.
    """

    base: str
    summaries: tuple[Summary, ...]
    differences: tuple[Difference, ...]
    obstacle: str | None

    def as_dict(self) -> dict[str, Any]:
        """What `modelkin inspect --json` prints."""
        return asdict(self)


def inspect_models(
    models: Sequence[str], *, base: str | None = None, allow_pickle: bool = False
) -> Inspection:
    """Open models and compare their headers.

    Args:
        models: folders, files or Hub ids of at least one model.
        base: what to hold them against; default: the first of them.
        allow_pickle: also open pickled weights.

    Raises:
        CheckpointError: one of them is no readable model.
    """
    first, *others = models if base is None else [base, *models]
    opened_base = open_checkpoint(first, allow_pickle=allow_pickle)
    opened = [open_checkpoint(one, base=opened_base, allow_pickle=allow_pickle) for one in others]
    obstacle = None
    if opened:
        try:
            compare(opened_base, opened)
        except IncomparableError as error:
            obstacle = str(error)
    return Inspection(
        base=opened_base.name,
        summaries=tuple(_summary(one) for one in (opened_base, *opened)),
        differences=tuple(_difference(opened_base, one) for one in opened),
        obstacle=obstacle,
    )


def _summary(model: Checkpoint) -> Summary:
    dtypes: Counter[str] = Counter()
    for tensor in model.tensors.values():
        dtypes[tensor.dtype] += tensor.count
    kinds = Counter(file.suffix.lstrip(".") for file in model.files if file.suffix != ".json")
    return Summary(
        name=model.name,
        architecture=model.architecture,
        dtypes=dict(dtypes.most_common()),
        parameters=model.parameters,
        tensors=len(model.tensors),
        bytes=sum(tensor.bytes for tensor in model.tensors.values()),
        files=dict(kinds),
    )


def _difference(base: Checkpoint, model: Checkpoint) -> Difference:
    shared = overlap(base, [model])
    return Difference(
        name=model.name,
        architecture=model.architecture == base.architecture,
        compared_parameters=shared.compared_parameters,
        coverage=shared.coverage,
        reshaped={
            name: reason
            for name, reason in shared.reasons.items()
            if name in base.tensors and name in model.tensors and name not in shared.rows_left_out
        },
        rows_left_out=dict(shared.rows_left_out),
        missing=tuple(name for name in base.tensors if name not in model.tensors),
        extra=tuple(name for name in model.tensors if name not in base.tensors),
    )
