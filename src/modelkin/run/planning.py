"""Before a run: the models it would start from, and what it would do at most. Writes nothing."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modelkin.checkpoint import Checkpoint, open_checkpoint
from modelkin.config import RunConfig
from modelkin.errors import CheckpointError
from modelkin.evaluating import make_evaluator
from modelkin.evolution import most_children
from modelkin.ledger import LEDGER_FILE, read_events
from modelkin.measuring import compare
from modelkin.records import Founded

_DTYPE_BYTES = {"float32": 4, "float64": 8}  # everything else that mergekit writes has 2


@dataclass(frozen=True)
class Plan:
    """What a run would do at most.

    Attributes:
        models: the base and the foundation models found.
        merges: number of children at most.
        evaluations: number of models evaluated at most.
        bytes: size at most of the weights of children that are still to be kept at one time.
        free: room on the disk of the run folder, in bytes.
    """

    models: tuple[Checkpoint, ...]
    merges: int
    evaluations: int
    bytes: int
    free: int

    @property
    def fits(self) -> bool:
        """Whether the disk has room for all children."""
        return self.bytes <= self.free


def plan(config: RunConfig, folder: Path) -> Plan:
    """What `evolve` would do; reads headers and writes nothing.

    Raises:
        CheckpointError: a model is not readable, or not comparable with the base.
        ConfigError: a setting is wrong.
        MissingExtraError: what would evaluate is not installed.
    """
    base, foundations = open_models(config, {})
    make_evaluator(config.evaluation, folder=config.folder)
    merges = most_children(config.rules, len(foundations))
    template = config.merge.config()
    dtype = template.get("out_dtype") or template.get("dtype")
    largest = max(
        model.parameters * _DTYPE_BYTES.get(str(dtype), 2)
        if dtype
        else sum(tensor.bytes for tensor in model.tensors.values())
        for model in foundations
    )
    # Those that stay, and the one that is being made.
    most = {"all": merges, "top-k": config.k + 1, "none": 1}[config.storage.keep]
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    made = sum(path.is_dir() for path in (folder / "models").glob("[!.]*"))
    return Plan(
        models=(base, *foundations),
        merges=merges,
        evaluations=merges + len(foundations),
        bytes=max(min(merges, most) - made, 0) * largest,
        free=shutil.disk_usage(existing).free,
    )


def open_models(
    config: RunConfig, pinned: Mapping[tuple[str, str], str | None]
) -> tuple[Checkpoint, tuple[Checkpoint, ...]]:
    """The base and the foundations; all of them are looked at before any work starts."""

    def opened(key: str, role: str, name: str, given: str) -> Checkpoint:
        revision = pinned.get((role, name))
        try:
            return open_checkpoint(config.source(given), name=name, revision=revision)
        except CheckpointError as error:
            raise type(error)(f"{key}: {error}") from error

    base = opened("base", "base", "base", config.base)
    models = tuple(
        opened(f"models.{name}", "foundation", name, given) for name, given in config.models.items()
    )
    compare(base, models)
    return base, models


def begun_with(folder: Path) -> dict[tuple[str, str], str | None]:
    """Role and name of each model that a run began from -> its commit on the Hub, if from there.

    A model on the Hub may have moved on since; the run has not.
    """
    if not (folder / LEDGER_FILE).exists():
        return {}
    return {
        (event.role, event.name): event.revision
        for event in read_events(folder)
        if isinstance(event, Founded)
    }


def cache_folder(config: RunConfig, default: Path) -> Path:
    """Where evaluations are kept: where the settings say, or in `default`."""
    given = config.evaluation.cache
    return (config.folder / given if given else default).resolve()


def evaluations_folder(config: RunConfig, folder: Path) -> str:
    """The same as the ledger of the run in `folder` has it: relative if within the run folder."""
    cache = cache_folder(config, folder / "evaluations")
    return str(cache.relative_to(folder) if cache.is_relative_to(folder) else cache)
