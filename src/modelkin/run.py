"""A run: the only place where things happen in time.

`evolution` decides, workers do, the ledger remembers; here they are joined. The state is always
the fold of the ledger, so resuming is not a special path: the same call goes on where it was.
"""

import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress

from modelkin.analyse import Samples
from modelkin.checkpoint import Checkpoint, fingerprint, open_checkpoint
from modelkin.config import RunConfig, load_config
from modelkin.errors import CheckpointError, ConfigError, LedgerError
from modelkin.evaluating import Cached, Evaluator, make_evaluator
from modelkin.evaluating.cache import read_evaluation
from modelkin.evolution import Stop, most_children, propose
from modelkin.gram import GramStats
from modelkin.ledger import LEDGER_FILE, Ledger, open_ledger, read_events
from modelkin.measuring import compare, measure
from modelkin.merging import Mergekit, Merger, fill
from modelkin.progress import Bars
from modelkin.records import (
    ID_LENGTH,
    Evaluation,
    Event,
    Failed,
    Founded,
    Measured,
    Pairing,
    Proposal,
    Proposed,
    Recipe,
    Started,
    Stopped,
    Subject,
)
from modelkin.report import write_report
from modelkin.similarity import kinship_from
from modelkin.state import Member, RunState, fold
from modelkin.trial import Trial, conduct
from modelkin.workers import InProcess, Workers

_DTYPE_BYTES = {"float32": 4, "float64": 8}  # everything else that mergekit writes has 2


@dataclass(frozen=True)
class Run:
    """A run as it stands: its folder and its state."""

    folder: Path
    state: RunState

    @property
    def best(self) -> Member:
        """The member with the best average; raises LedgerError where none has scores."""
        ranked = self.state.ranked()
        if not ranked:
            raise LedgerError(f"{self.folder}: no model has scores")
        return ranked[0]

    def weights(self, member: Member) -> Path:
        """The folder of a member's weights."""
        return _weights(self.folder, member)

    def samples(self, member: Member) -> Samples:
        """Per-sample outcomes of a member; empty where none were kept."""
        return read_samples(self.folder, self.state, member)


def read_run(folder: Path) -> Run:
    """The run in a folder, whether or not it is going on.

    Raises:
        LedgerError: `folder` is no run folder.
    """
    return Run(folder, fold(read_events(folder)))


def read_samples(folder: Path, state: RunState, member: Member) -> Samples:
    """Per-sample outcomes of a member; empty where none were kept or the file is gone."""
    if state.started is None or member.evaluation is None:
        return {}
    path = folder / state.started.evaluations / f"{member.evaluation}.jsonl.gz"
    return read_evaluation(path).samples if path.exists() else {}


@dataclass(frozen=True)
class Plan:
    """What a run would do at most.

    Attributes:
        models: the base and the foundation models found.
        merges: number of children at most.
        evaluations: number of models evaluated at most.
        bytes: size of the children's weights at most.
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
    """
    base, foundations = _open_models(config, {})
    merges = most_children(config.rules, len(foundations))
    template = config.merge.config()
    dtype = template.get("out_dtype") or template.get("dtype")
    largest = max(
        model.parameters * _DTYPE_BYTES.get(str(dtype), 2)
        if dtype
        else sum(tensor.bytes for tensor in model.tensors.values())
        for model in foundations
    )
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return Plan(
        models=(base, *foundations),
        merges=merges,
        evaluations=merges + len(foundations),
        bytes=merges * largest,
        free=shutil.disk_usage(existing).free,
    )


def default_folder(run_file: Path) -> Path:
    """Where a run goes that was not told where: `runs/<name of the run file>` beside it."""
    return run_file.parent / "runs" / run_file.stem


def evaluate(
    model: str,
    config: RunConfig,
    *,
    cache: Path,
    progress: Progress | None = None,
) -> Evaluation:
    """Score one model as a run with these settings would.

    Args:
        model: a folder or Hub id, relative to the working directory.
        config: the settings.
        cache: where evaluations are kept, unless the settings say where.
        progress: where to show a bar.

    Raises:
        CheckpointError: `model` is no readable model.
        EvaluationError: it gave no scores.
    """
    checkpoint = open_checkpoint(model)
    evaluator = _evaluator(config, cache, Bars(progress))
    return evaluator.evaluate(
        Subject(checkpoint.name, checkpoint.name, str(checkpoint.folder), fingerprint(checkpoint))
    )


def _evaluator(
    config: RunConfig, cache: Path, bars: Bars, given: Evaluator | None = None
) -> Cached:
    evaluator = given or make_evaluator(
        config.evaluation,
        folder=config.folder,
        trust_remote_code=config.trust_remote_code,
        on_progress=bars.inner("prompts"),
    )
    return Cached(evaluator, cache_folder(config, cache))


def cache_folder(config: RunConfig, default: Path) -> Path:
    """Where evaluations are kept: where the settings say, or in `default`."""
    given = config.evaluation.cache
    return (config.folder / given if given else default).resolve()


def evolve(
    config: RunConfig | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    merger: Merger | None = None,
    evaluator: Evaluator | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Run:
    """Breed models: top-k greedy merging, with kinship-guided exploration by default.

    Implements Algorithm 1 of arXiv 2410.12613. Everything that happens is recorded in
    `out/ledger.db`; a run that was interrupted, however rudely, goes on when this is called again.

    Args:
        config: a run file, or settings (then `out` must be given).
        out: the run folder; default: `runs/<name>` beside the run file.
        merger, evaluator, workers: replace those that the settings describe.
        progress: where to show bars.

    Returns:
        The run as it ended.

    Raises:
        ConfigError: a setting is wrong; nothing was done.
        CheckpointError: a foundation model is not readable; nothing was done.
        LedgerError: the run folder belongs to other settings or models, or is in use.
        DiskFullError: the run can be resumed when there is room.
    """
    if not isinstance(config, RunConfig):
        out = out or default_folder(Path(config))
        config = load_config(Path(config))
    if out is None:
        raise ConfigError("evolve: expected 'out', the run folder, as no run file was given")
    folder = Path(out).resolve()
    bars = Bars(progress)
    # A model on the Hub may have moved on since the run began; the run has not.
    pinned: dict[tuple[str, str], str | None] = {
        (event.role, event.name): event.revision for event in _founded(folder)
    }
    base, foundations = _open_models(config, pinned)
    cached = _evaluator(config, folder / "evaluations", bars, evaluator)
    merger = merger or Mergekit(
        config.merge.options,
        trust_remote_code=config.trust_remote_code,
        on_progress=bars.inner("merging"),
    )
    with open_ledger(folder) as ledger:
        breeding = _Breeding(
            config, folder, ledger, base, merger, cached, workers or InProcess(), bars
        )
        breeding.begin(foundations, cache_folder(config, folder / "evaluations"))
        breeding.breed()
        return Run(folder, breeding.state)


def _founded(folder: Path) -> list[Founded]:
    """What a run began from, if it did."""
    if not (folder / LEDGER_FILE).exists():
        return []
    return [event for event in read_events(folder) if isinstance(event, Founded)]


def _open_models(
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


def _weights(folder: Path, member: Member) -> Path:
    return Path(member.source) if member.source else folder / "models" / member.id


def _environment() -> dict[str, str]:
    """Versions and hardware: what one needs to know to reproduce a run."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["cpus"] = str(os.cpu_count())
    for package in ("modelkin", "mergekit", "lm_eval", "transformers", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class _Breeding:
    """One call of `evolve`: holds the open ledger and does what the state says is next."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        ledger: Ledger,
        base: Checkpoint,
        merger: Merger,
        evaluator: Evaluator,
        workers: Workers,
        bars: Bars,
    ) -> None:
        self._config, self._folder, self._ledger = config, folder, ledger
        self._base, self._merger, self._evaluator = base, merger, evaluator
        self._workers, self._bars = workers, bars
        self._events = ledger.events()
        self._known: GramStats | None = None

    @property
    def state(self) -> RunState:
        return fold(self._events)

    def _record(self, *events: Event) -> None:
        self._ledger.append(*events)
        self._events.extend(events)

    def begin(self, foundations: Sequence[Checkpoint], cache: Path) -> None:
        """Record what the run starts from, or check that it is what it was."""
        settings = self._settings()
        founded: list[Founded] = []
        everyone = (self._base, *foundations)
        with self._bars.steps("fingerprinting the models", len(everyone)) as step:
            for model in everyone:
                weights = fingerprint(model)
                founded.append(
                    Founded(
                        model=weights[:ID_LENGTH],
                        name=model.name,
                        role="base" if model is self._base else "foundation",
                        source=str(model.folder),
                        revision=model.revision,
                        fingerprint=weights,
                    )
                )
                step()
        by_weights: dict[str, str] = {}
        for event in founded[1:]:
            other = by_weights.setdefault(event.model, event.name)
            if other != event.name:
                raise ConfigError(
                    f"models.{event.name}: expected distinct models, "
                    f"found the same files as models.{other}"
                )
        if not self._events:
            self._record(
                Started(
                    settings=settings,
                    environment=_environment(),
                    evaluations=str(
                        cache.relative_to(self._folder)
                        if cache.is_relative_to(self._folder)
                        else cache
                    ),
                ),
                *founded,
            )
        self._check_unchanged(settings, founded)
        # Not with the first events: a crash between them and the file would leave none.
        if not (self._folder / "run.yaml").exists():
            (self._folder / "run.yaml").write_text(
                yaml.safe_dump(
                    self._config.model_dump(mode="json", exclude_defaults=True), sort_keys=False
                ),
                encoding="utf-8",
            )

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the course of the run. Limits and stop rules may change."""
        settings = self._config.model_dump(
            mode="json", include={"strategy", "k", "metric", "seed", "explore", "merge"}
        )
        return {**settings, "evaluation": self._evaluator.protocol}

    def _check_unchanged(self, settings: dict[str, Any], founded: Sequence[Founded]) -> None:
        before = [event for event in self._events if isinstance(event, Founded)]
        started = self.state.started
        if started is None:
            raise LedgerError(f"{self._folder}: the ledger does not begin with a start")
        for key, value in settings.items():
            if started.settings.get(key) != value:
                raise LedgerError(
                    f"{self._folder}: was started with {key} = {started.settings.get(key)}, "
                    f"found {value}; set it back, or give the run another folder"
                )
        for then, now in zip(before, founded, strict=False):
            if (then.name, then.fingerprint) != (now.name, now.fingerprint):
                raise LedgerError(
                    f"{self._folder}: was started with the model {then.name} of fingerprint "
                    f"{then.fingerprint}, found {now.name} of {now.fingerprint} in {now.source}"
                )
        if len(before) != len(founded):
            raise LedgerError(
                f"{self._folder}: was started with {len(before) - 1} foundation models, "
                f"found {len(founded) - 1}"
            )

    def breed(self) -> None:
        """Do what is left to do, generation after generation, until a rule says stop."""
        rules = self._config.rules
        while True:
            self._settle()
            self._measure()
            state = self.state
            decision = propose(state, rules)
            if isinstance(decision, Stop):
                if state.stopped != decision.reason:
                    self._record(Stopped(decision.reason))
                self._report()
                return
            self._record(
                Proposed(state.generation + 1, tuple(self._proposal(pair) for pair in decision))
            )
            self._report()

    def _report(self) -> None:
        state = self.state
        write_report(
            self._folder / "report.html",
            state,
            lambda member: read_samples(self._folder, state, member),
        )

    def _proposal(self, pairing: Pairing) -> Proposal:
        state = self.state
        assert state.base is not None
        recipe = Recipe(
            parents=pairing.parents,
            base=state.base.model,
            config=self._config.merge.config(),
            seed=self._config.seed,
        )
        return Proposal(recipe.id, pairing.name, recipe, pairing.exploration)

    def _settle(self) -> None:
        """Merge and evaluate every member that is neither scored nor failed."""
        state = self.state
        unsettled = [member for member in state.members.values() if not member.settled]
        for member in unsettled:
            self._remake(state, state.parents_of(member))
        trials = [self._trial(state, member) for member in unsettled]
        label = f"generation {state.generation}: " + (
            "merging and evaluating" if state.generation else "evaluating the foundations"
        )
        with self._bars.steps(label, len(trials)) as step:
            for _, events in self._workers.perform(
                lambda trial: conduct(trial, self._merger, self._evaluator), trials
            ):
                self._record(*events)
                step()

    def _trial(self, state: RunState, member: Member) -> Trial:
        config = None
        if member.recipe is not None:
            models = {
                f"parent_{number}": str(_weights(self._folder, parent))
                for number, parent in enumerate(state.parents_of(member), start=1)
            }
            config = fill(member.recipe.config, {**models, "base": str(self._base.folder)})
        return Trial(
            model=member.id,
            name=member.name,
            pedigree=member.pedigree,
            folder=_weights(self._folder, member),
            fingerprint=member.fingerprint,
            config=config,
            seed=member.recipe.seed if member.recipe else 0,
        )

    def _remake(self, state: RunState, members: Iterable[Member]) -> None:
        """Make settled children again whose weights somebody deleted, from their recipes."""
        for member in members:
            folder = _weights(self._folder, member)
            if member.recipe is None or folder.exists():
                continue
            self._remake(state, state.parents_of(member))
            trial = self._trial(state, member)
            self._merger.merge(trial.config or {}, folder, seed=trial.seed)
            found = fingerprint(open_checkpoint(folder))
            if found != member.fingerprint:
                shutil.rmtree(folder)
                raise LedgerError(
                    f"{folder}: was deleted, and its recipe now gives other weights: expected "
                    f"the fingerprint {member.fingerprint}, found {found}"
                )

    def _measure(self) -> None:
        """Measure the kinship of every scored member that was not measured, in one pass."""
        state = self.state
        measured = {event.model for event in self._events if isinstance(event, Measured)}
        scored = [member for member in state.members.values() if member.scorecard]
        new = [member for member in scored if member.id not in measured]
        if not new:
            return
        self._remake(state, scored)
        began = time.monotonic()
        old = [member for member in scored if member.id in measured]
        try:
            stats = measure(
                self._base,
                [self._open(member) for member in (*old, *new)],
                known=self._known,
                progress=self._bars.progress,
            )
        except CheckpointError:
            # One of them is at fault: without it the others can be measured.
            if not self._fail_unmeasurable(new):
                raise
            return self._measure()
        self._known = stats
        kinship = kinship_from(stats, base=self._base.name, total_parameters=self._base.parameters)
        seconds = (time.monotonic() - began) / len(new)
        self._record(
            *(
                Measured(
                    member.id,
                    {
                        other: kinship.similarity(member.id, other)
                        for other in stats.models[: len(old) + position]
                    },
                    seconds,
                )
                for position, member in enumerate(new)
            )
        )

    def _fail_unmeasurable(self, members: Sequence[Member]) -> bool:
        """Record a failure for each member that cannot be measured; whether there was one."""
        failures: list[Failed] = []
        for member in members:
            try:
                measure(self._base, [self._open(member)])
            except CheckpointError as error:
                failures.append(Failed(member.id, "measure", str(error)))
        self._record(*failures)
        return bool(failures)

    def _open(self, member: Member) -> Checkpoint:
        # The id as its name: those of the family may repeat a folder's.
        return open_checkpoint(_weights(self._folder, member), name=member.id)
