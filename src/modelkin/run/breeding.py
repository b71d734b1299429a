"""The loop, for one call of `evolve`: does what the state says is next, and records it."""

import os
import platform
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from modelkin.checkpoint import Checkpoint, fingerprint, open_checkpoint
from modelkin.config import RunConfig
from modelkin.errors import CheckpointError, ConfigError, LedgerError
from modelkin.evaluating import Evaluator
from modelkin.evolution import Stop, propose
from modelkin.gram import GramStats
from modelkin.ledger import Ledger
from modelkin.measuring import measure
from modelkin.merging import Merger, fill, resolve_models
from modelkin.progress import Bars
from modelkin.records import (
    ID_LENGTH,
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
)
from modelkin.report import write_report
from modelkin.run.folder import read_samples, weights_folder
from modelkin.similarity import kinship_from
from modelkin.state import Member, RunState, fold
from modelkin.trial import Trial, conduct
from modelkin.workers import Workers


class Breeding:
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
        self._foundations: dict[str, Path] = {}

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
        ids = [event.model for event in founded[1:]]
        self._foundations = {
            model: checkpoint.folder for model, checkpoint in zip(ids, foundations, strict=True)
        }
        within = cache.is_relative_to(self._folder)
        evaluations = str(cache.relative_to(self._folder) if within else cache)
        if not self._events:
            # Before anything is recorded: a run cannot begin with what cannot be measured.
            self._known = measure(
                self._base,
                [
                    replace(checkpoint, name=model)
                    for model, checkpoint in zip(ids, foundations, strict=True)
                ],
                cache=True,
                progress=self._bars.progress,
            )
            self._record(Started(settings, _environment(), evaluations), *founded)
        self._check_unchanged(settings, founded, evaluations)
        self._write_run_file()

    def _write_run_file(self) -> None:
        """What the run was last called with, for people; nothing reads it."""
        content = self._config.model_dump(mode="json", exclude_none=True)
        content["base"] = str(self._base.folder)
        content["models"] = {
            member.name: str(self._foundations[member.id])
            for member in self.state.members.values()
            if not member.parents
        }
        partial = self._folder / ".run.yaml"
        partial.write_text(
            f"# Relative paths are taken from {self._config.folder}\n"
            + yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        partial.replace(self._folder / "run.yaml")

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the course of the run. Limits and stop rules may change."""
        settings = self._config.model_dump(
            mode="json", include={"strategy", "k", "metric", "seed", "explore", "merge"}
        )
        return {**settings, "evaluation": self._evaluator.protocol}

    def _check_unchanged(
        self, settings: dict[str, Any], founded: Sequence[Founded], evaluations: str
    ) -> None:
        before = [event for event in self._events if isinstance(event, Founded)]
        started = self.state.started
        if started is None:
            raise LedgerError(f"{self._folder}: the ledger does not begin with a start")
        if started.settings.get("evaluation") != settings["evaluation"]:
            raise LedgerError(
                f"{self._folder}: was started with another evaluation: its settings, its task "
                "files or lm-eval's version have changed; set them back, or give the run another "
                "folder"
            )
        for key, then, value in (
            *((key, started.settings.get(key), value) for key, value in settings.items()),
            ("evaluation.cache", started.evaluations, evaluations),
        ):
            if then != value:
                raise LedgerError(
                    f"{self._folder}: was started with {key} = {then}, "
                    f"found {value}; set it back, or give the run another folder"
                )
        for first, now in zip(before, founded, strict=False):
            if (first.name, first.fingerprint) != (now.name, now.fingerprint):
                raise LedgerError(
                    f"{self._folder}: was started with the model {first.name} of fingerprint "
                    f"{first.fingerprint}, found {now.name} of {now.fingerprint} in {now.source}"
                )
        if len(before) != len(founded):
            raise LedgerError(
                f"{self._folder}: was started with {len(before) - 1} foundation models, "
                f"found {len(founded) - 1}"
            )

    def breed(self) -> None:
        """Do what is left to do, generation after generation, until a rule says stop."""
        rules = self._config.rules
        self._measure()
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
                f"parent_{number}": str(self._weights(parent))
                for number, parent in enumerate(state.parents_of(member), start=1)
            }
            config = resolve_models(
                fill(member.recipe.config, {**models, "base": str(self._base.folder)}),
                self._config.folder,
            )
        return Trial(
            model=member.id,
            name=member.name,
            pedigree=member.pedigree,
            folder=self._weights(member),
            fingerprint=member.fingerprint,
            config=config,
            seed=member.recipe.seed if member.recipe else 0,
        )

    def _remake(self, state: RunState, members: Iterable[Member]) -> None:
        """Make settled children again whose weights somebody deleted, from their recipes."""
        for member in members:
            folder = self._weights(member)
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
        """Measure, in one pass, the kinship of every member that was made and not measured."""
        state = self.state
        measured = {event.model for event in self._events if isinstance(event, Measured)}
        present = [m for m in state.members.values() if m.fingerprint and not m.failure]
        new = [member for member in present if member.id not in measured]
        if not new:
            return
        self._remake(state, present)
        began = time.monotonic()
        old = [member for member in present if member.id in measured]
        try:
            stats = measure(
                self._base,
                [self._open(member) for member in (*old, *new)],
                known=self._known,
                cache=True,
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
                if not member.parents:
                    raise
                failures.append(Failed(member.id, "measure", str(error)))
        self._record(*failures)
        return bool(failures)

    def _weights(self, member: Member) -> Path:
        # Not where the ledger says: foundation models may have moved since.
        return self._foundations.get(member.id) or weights_folder(self._folder, member)

    def _open(self, member: Member) -> Checkpoint:
        # The id as its name: those of the family may repeat a folder's.
        return open_checkpoint(self._weights(member), name=member.id)


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
