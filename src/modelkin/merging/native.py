"""Merges that are weighted sums, in one pass: read, sum, round once, write, measure.

The child is a model like any other to `measuring`, but one whose tensors are made when they are
read: what reads all parents once to measure them makes the child and measures it too.

Axes: T tensors, M inputs of the merge.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modelkin.blend import Blend, Coefficients, NotLinear, coefficients, compile_recipe
from modelkin.checkpoint import (
    DTYPES,
    Checkpoint,
    MappedTensor,
    Tensor,
    open_checkpoint,
)
from modelkin.errors import CheckpointError, ConfigError, MergeError
from modelkin.gram import GramStats
from modelkin.gram.combine import OUTPUTS, combine
from modelkin.measuring import Comparison, measure
from modelkin.merging.writing import (
    DTYPE_NAMES,
    Place,
    WeightFiles,
    lay_out,
    weight_files,
    write_beside,
    write_child,
)

if TYPE_CHECKING:
    from rich.progress import Progress

# Their factors are in the recipe alone: no weight needs to be read to know them.
_BY_RECIPE_ALONE = ("linear", "task_arithmetic")


@dataclass(frozen=True)
class _Plan:
    """A recipe that can be carried out.

    Attributes:
        blend: its parameters for each tensor of the donor.
        models: the recipe's names -> the models, the donor first.
        dtype: the format of the whole child, or `None` where each tensor has the donor's.
    """

    blend: Blend
    models: Mapping[str, Checkpoint]
    dtype: str | None

    @property
    def donor(self) -> Checkpoint:
        return next(iter(self.models.values()))

    @property
    def formats(self) -> dict[str, str]:
        """Tensor -> how it is stored in the child."""
        return {name: self.dtype or tensor.format for name, tensor in self.donor.tensors.items()}

    @property
    def comparison(self) -> Comparison:
        """All of each tensor."""
        counts = {name: tensor.count for name, tensor in self.donor.tensors.items()}
        return Comparison(counts, (), {}, {}, sum(counts.values()))


class Native:
    """Merges by the methods that give each input of a tensor one factor; needs no torch.

    Each weight is the float64 sum of the inputs' weights, rounded once, to nearest even.
    """

    def __init__(self, *, threads: int | None = None, progress: "Progress | None" = None) -> None:
        """`threads` is by default as many as there are cores; `progress` shows bytes."""
        self._threads = threads
        self._progress = progress

    def merge(self, config: Mapping[str, Any], out: Path, *, seed: int = 0) -> None:
        """See `Merger.merge`."""
        self.merge_measured(config, out, seed=seed)

    def merge_measured(
        self,
        config: Mapping[str, Any],
        out: Path,
        *,
        seed: int = 0,
        name: str | None = None,
        base: Checkpoint | None = None,
    ) -> GramStats:
        """Merge as `merge` does; the statistics of the parents and the child come with it.

        They are what `measuring.measure` would find in the child that was written.

        Args:
            config: the recipe, with real paths.
            out: the child's folder.
            seed: is recorded; nothing here is random.
            name: the child's in the statistics; default: that of its folder.
            base: of the statistics; default: the recipe's `base_model`, or else its first model.

        Returns:
            The statistics of the parents, but for one that is the base itself, in the order and
            by the names of the recipe, and of the child, which comes last.

        Raises:
            MergeError: the recipe is not linear in each tensor, or the models do not fit, or a
                weight is no finite number.
            ConfigError: `out` exists.
            DiskFullError: the disk filled up.
        """
        found: list[GramStats] = []

        def run(folder: Path) -> None:
            plan = _plan(config)
            if isinstance(plan, str):
                raise MergeError(plan)
            against = base or plan.donor
            if reason := _misfit(plan.donor, against):
                raise MergeError(f"the base of the statistics: {reason}")
            c, known = self._factors(plan)
            parents = {
                called: model
                for called, model in plan.models.items()
                if model.folder != against.folder
            }
            own = {called: _renamed(model, called) for called, model in parents.items()}
            layout = lay_out(plan.donor, plan.formats)
            write_beside(
                folder,
                plan.donor,
                config,
                list(plan.models),
                name=out.name,
                dtype=plan.dtype,
            )
            with weight_files(folder, layout) as files:
                child = _child(plan, c, layout.places, files, out, name or out.name)
                found.append(
                    measure(
                        against,
                        [*own.values(), child],
                        comparison=plan.comparison,
                        known=known if against is plan.donor else None,
                        threads=self._threads,
                        progress=self._progress,
                        label="merging",
                    )
                )

        write_child(run, config, out, seed=seed)
        return found[0]

    def _factors(self, plan: _Plan) -> tuple[Coefficients, GramStats | None]:
        """The factors of each input, and the statistics that they were taken from, if any."""
        (_, donor), *others = plan.models.items()
        names = tuple(called for called, _ in others)
        stats = None
        # The half units of bfloat16 and float16 are 10,000 times what single precision leaves open.
        digits = not {"F32", "F64"}.isdisjoint(plan.formats.values())
        # A single input has the factor 1, by whatever method.
        if others and plan.blend.method not in _BY_RECIPE_ALONE:
            stats = measure(
                donor,
                [_renamed(model, called) for called, model in others],
                comparison=plan.comparison,
                cache=not digits,
                threads=self._threads,
                progress=self._progress,
                label="measuring",
                double=digits,
            )
        meant: dict[str, str | None] = {called: called for called in names}
        meant[next(iter(plan.models))] = None
        found = stats or _nothing_known(names, plan.comparison)
        return coefficients(plan.blend, found, meant), stats


def obstacle(config: Mapping[str, Any]) -> str | None:
    """Why `Native` cannot carry out a recipe, or `None` if it can; reads headers only.

    Raises:
        MergeError: nobody could carry it out.
    """
    plan = _plan(config)
    return plan if isinstance(plan, str) else None


def _plan(config: Mapping[str, Any]) -> _Plan | str:
    """What to do, or why it cannot be done."""
    try:
        # Everything but the tensors: mistakes are found before a model is opened.
        blend = compile_recipe(config, tensors=())
        if isinstance(blend, NotLinear):
            return blend.reason
        first = config.get("base_model") or blend.models[0]
        models: dict[str, Checkpoint] = {}
        for called in (first, *(name for name in blend.models if name != first)):
            if "+" in called and not Path(called).is_dir():
                return f"{called}: is a model with an adapter to it"
            models[called] = open_checkpoint(called)
        donor = models[first]
        blend = compile_recipe(config, tensors=tuple(donor.tensors), layers=_layers(donor.config))
    except ConfigError as error:
        raise MergeError(str(error)) from error
    except CheckpointError as error:
        return str(error)
    if isinstance(blend, NotLinear):
        return blend.reason
    for model in models.values():
        if reason := _unusual(model) or _misfit(donor, model):
            return reason
    names = {name: format for format, name in DTYPE_NAMES.items()}
    asked = config.get("out_dtype") or config.get("dtype")
    dtype = names[str(asked).removeprefix("torch.")] if asked else None
    for name, tensor in donor.tensors.items():
        if dtype is None and tensor.format not in OUTPUTS:
            return f"{donor.folder}: tensor {name!r}: children are not written as {tensor.format}"
    return _Plan(blend, models, dtype)


def _layers(config: Mapping[str, Any]) -> int | None:
    count = config.get("num_hidden_layers")
    return count if type(count) is int and count > 0 else None


def _unusual(model: Checkpoint) -> str | None:
    """Why a model is none of plain weights in safetensors."""
    if "quantization_config" in model.config:
        return f"{model.folder}: is quantised"
    if not all(isinstance(tensor, MappedTensor) for tensor in model.tensors.values()):
        return f"{model.folder}: is no model in safetensors files"
    if not model.tensors:
        return f"{model.folder}: holds no weights"
    return None


def _misfit(donor: Checkpoint, model: Checkpoint) -> str | None:
    """How a model's tensors differ from the donor's."""
    if model.architecture != donor.architecture:
        return (
            f"{model.folder}: expected the architecture {donor.architecture} of {donor.folder}, "
            f"found {model.architecture}"
        )
    for name in sorted({*donor.tensors, *model.tensors}):
        shapes = [
            list(one.tensors[name].shape) if name in one.tensors else "none"
            for one in (donor, model)
        ]
        if shapes[0] != shapes[1]:
            return (
                f"{model.folder}: tensor {name!r}: expected {shapes[0]} as in {donor.folder}, "
                f"found {shapes[1]}"
            )
    return None


def _renamed(model: Checkpoint, name: str) -> Checkpoint:
    return replace(model, name=name)


def _nothing_known(names: tuple[str, ...], comparison: Comparison) -> GramStats:
    """Statistics for a method that looks at none."""
    t, n = len(comparison.tensors), len(names)
    return GramStats(
        models=names,
        tensors=comparison.tensors,
        count_T=np.array(list(comparison.counts.values()), np.int64),
        base_T=np.zeros(t),
        base_sum_T=np.zeros(t),
        sum_TN=np.zeros((t, n)),
        cross_TN=np.zeros((t, n)),
        gram_TNN=np.zeros((t, n, n)),
        distance_TNN=np.zeros((t, n, n)),
    )


def _child(
    plan: _Plan,
    c: Coefficients,
    places: Mapping[str, Place],
    files: WeightFiles,
    out: Path,
    name: str,
) -> Checkpoint:
    """The child, as a model that is made by reading it."""
    buffers = _Buffers()
    c_TM = np.column_stack([c.base_T, c.model_TN])
    tensors: dict[str, Tensor] = {
        tensor: _MadeTensor(
            name=tensor,
            place=places[tensor],
            inputs_M=tuple(model.tensors[tensor] for model in plan.models.values()),
            c_M=c_TM[t],
            files=files,
            buffers=buffers,
            file=out / places[tensor].file,
        )
        for t, tensor in enumerate(plan.blend.tensors)
    }
    return Checkpoint(name=name, folder=out, tensors=tensors, config=plan.donor.config)


class _Buffers(threading.local):
    """Each thread's room for what it makes, taken once: new memory costs more than the sums."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def take(self, count: int, dtype: str) -> NDArray[Any]:
        size = count * np.dtype(dtype).itemsize
        if self._room.size < size:
            self._room = np.empty(size, np.uint8)
        return self._room[:size].view(dtype)


@dataclass(frozen=True)
class _MadeTensor:
    """A tensor of a child: each part is made, and written to its place, when it is read.

    Unlike other tensors' parts, a part is valid until the same thread reads the next.
    """

    name: str
    place: Place
    inputs_M: tuple[Tensor, ...]
    c_M: NDArray[np.float64]
    files: WeightFiles
    buffers: _Buffers
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def dtype(self) -> str:
        return self.place.format

    @property
    def format(self) -> str:
        return self.place.format

    @property
    def offset(self) -> int:
        return self.place.offset

    @property
    def count(self) -> int:
        return self.inputs_M[0].count

    @property
    def bytes(self) -> int:
        return self.count * np.dtype(DTYPES[self.format]).itemsize

    def read(self, start: int, stop: int) -> NDArray[Any]:
        made = self.buffers.take(stop - start, DTYPES[self.format])
        combine(
            [tensor.read(start, stop) for tensor in self.inputs_M],
            [tensor.format for tensor in self.inputs_M],
            self.c_M,
            made,
            self.format,
        )
        self.files.write(self.name, start, made)
        return made
