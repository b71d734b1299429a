"""A run's models and what is recorded of them: begins, decides and remembers; does no work.

Where recipes are linear in each tensor, a child is known by its factors over the foundations: its
kinship is predicted when it is decided on, and it is made from the foundations in one pass.
"""

import os
import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from modelkin.blend import Lineage, NotLinear, compile_recipe
from modelkin.checkpoint import Checkpoint, fingerprint
from modelkin.config import RunConfig
from modelkin.errors import CheckpointError, ConfigError, LedgerError, MergeError
from modelkin.evolution import Stop, propose
from modelkin.gram import GramStats
from modelkin.ledger import Ledger
from modelkin.measuring import compare
from modelkin.measuring.archive import read_statistics, write_statistics
from modelkin.merging import fill, obstacle, resolve_models
from modelkin.progress import Bars
from modelkin.records import (
    ID_LENGTH,
    Event,
    Founded,
    Pairing,
    Proposal,
    Proposed,
    Recipe,
    Similarity,
    Started,
    Stopped,
)
from modelkin.report import write_report
from modelkin.run.flat import DTYPE_KEYS, flat_recipe_of, measure_foundations
from modelkin.run.folder import (
    ORIGIN,
    REPORT_FILE,
    RUN_FILE,
    STATISTICS_FILE,
    Run,
    add_child,
    by_id,
    weights_folder,
)
from modelkin.similarity import kinship_from
from modelkin.state import Member, RunState, fold


class Family:
    """The open ledger of a run, with the models that it is about."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        ledger: Ledger,
        base: Checkpoint,
        foundations: Sequence[Checkpoint],
        bars: Bars,
    ) -> None:
        self.config, self.folder, self.base = config, folder, base
        self._ledger, self._bars = ledger, bars
        self._foundations = foundations
        self._folders: dict[str, Path] = {}
        self._events = ledger.events()
        self._measured: GramStats | None = None
        self._lineage: Lineage | None = None
        self.not_flat = self._obstacle()
        """Why children are not made from the foundations in one pass; `None` if they are."""
        if self.not_flat and config.storage.keep != "all":
            raise ConfigError(
                f"storage.keep: expected 'all', as children are made again from the foundations "
                f"only by recipes that are linear in each tensor, found {config.storage.keep!r}; "
                f"this one is not: {self.not_flat}"
            )

    @property
    def state(self) -> RunState:
        """The fold of all events so far."""
        return fold(self._events)

    @property
    def events(self) -> Sequence[Event]:
        """All events so far, oldest first."""
        return self._events

    def record(self, *events: Event) -> None:
        """Add to the ledger; on disk when this returns."""
        self._ledger.append(*events)
        self._events.extend(events)

    # Beginning.

    def begin(self, protocol: str, evaluations: str) -> None:
        """Record what the run starts from, or check that it is what it was.

        Args:
            protocol: fingerprint of what is asked of each model.
            evaluations: see `records.Started`.

        Raises:
            ConfigError: two foundation models are the same.
            CheckpointError: one of them cannot be measured.
            LedgerError: the run was begun with other settings or models.
        """
        settings = {**self._settings(), "evaluation": protocol}
        founded = self._found()
        ids = [event.model for event in founded[1:]]
        self._folders = {
            model: checkpoint.folder
            for model, checkpoint in zip(ids, self._foundations, strict=True)
        }
        if not self._events:
            # Before anything is recorded: a run cannot begin with what cannot be measured.
            self._measured = self._measure_foundations(ids)
            # Whatever is there: a call that was killed may have begun with other models.
            write_statistics(self.folder / STATISTICS_FILE, self._measured)
            self.record(Started(settings, _environment(), evaluations), *founded)
        self._check_unchanged(settings, founded, evaluations)
        self._write_run_file()

    def _found(self) -> list[Founded]:
        founded: list[Founded] = []
        everyone = (self.base, *self._foundations)
        with self._bars.steps("fingerprinting the models", len(everyone)) as step:
            for model in everyone:
                weights = fingerprint(model)
                founded.append(
                    Founded(
                        model=weights[:ID_LENGTH],
                        name=model.name,
                        role="base" if model is self.base else "foundation",
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
        return founded

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the course of the run. Limits and stop rules may change."""
        return self.config.model_dump(
            mode="json", include={"strategy", "k", "metric", "seed", "explore", "merge"}
        )

    def _check_unchanged(
        self, settings: dict[str, Any], founded: Sequence[Founded], evaluations: str
    ) -> None:
        before = [event for event in self._events if isinstance(event, Founded)]
        started = self.state.started
        if started is None:
            raise LedgerError(f"{self.folder}: the ledger does not begin with a start")
        if started.settings.get("evaluation") != settings["evaluation"]:
            raise LedgerError(
                f"{self.folder}: was started with another evaluation: its settings, its task "
                "files or lm-eval's version have changed; set them back, or give the run another "
                "folder"
            )
        for key, then, value in (
            *((key, started.settings.get(key), value) for key, value in settings.items()),
            ("evaluation.cache", started.evaluations, evaluations),
        ):
            if then != value:
                raise LedgerError(
                    f"{self.folder}: was started with {key} = {then}, "
                    f"found {value}; set it back, or give the run another folder"
                )
        for first, now in zip(before, founded, strict=False):
            if (first.name, first.fingerprint) != (now.name, now.fingerprint):
                raise LedgerError(
                    f"{self.folder}: was started with the model {first.name} of fingerprint "
                    f"{first.fingerprint}, found {now.name} of {now.fingerprint} in {now.source}"
                )
        if len(before) != len(founded):
            raise LedgerError(
                f"{self.folder}: was started with {len(before) - 1} foundation models, "
                f"found {len(founded) - 1}"
            )

    def _write_run_file(self) -> None:
        """What the run was last called with: for people, and for `ask` and `materialise`."""
        content = self.config.model_dump(mode="json", exclude_none=True)
        content["base"] = str(self.base.folder)
        content["models"] = {
            member.name: str(self._folders[member.id])
            for member in self.state.members.values()
            if not member.parents
        }
        partial = self.folder / f".{RUN_FILE}"
        partial.write_text(
            f"{ORIGIN}{self.config.folder}\n"
            + yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
            encoding="utf-8",
        )
        partial.replace(self.folder / RUN_FILE)

    # What was measured, and what follows from it.

    @property
    def measured(self) -> GramStats | None:
        """The statistics of members that were measured, by id, as far as they are at hand."""
        if self._measured is None and self.not_flat:
            self._measured = read_statistics(self.folder / STATISTICS_FILE)
        return self._measured

    def keep(self, stats: GramStats) -> None:
        """Keep statistics of members that were measured.

        On disk too, where children are not known by the foundations': those are kept once, and
        never change, since every child's factors depend on all their digits.
        """
        self._measured = stats
        if self.not_flat:
            write_statistics(self.folder / STATISTICS_FILE, stats)

    def lineage(self) -> Lineage:
        """All members so far as factors over the foundations; only where recipes are flat."""
        state = self.state
        if self._lineage is None:
            path, ids = self.folder / STATISTICS_FILE, list(self._folders)
            stats = read_statistics(path)
            if stats is None or not set(ids) <= set(stats.models):
                stats = self._measure_foundations(ids)
                write_statistics(path, stats)
            self._lineage = Lineage(stats.select(ids))
            for member in state.members.values():
                add_child(self._lineage, state, member)
        return self._lineage

    def _measure_foundations(self, ids: Sequence[str]) -> GramStats:
        return measure_foundations(
            self.config.merge.config(),
            self.base,
            dict(zip(ids, self._foundations, strict=True)),
            flat=not self.not_flat,
            progress=self._bars.progress,
        )

    def _obstacle(self) -> str | None:
        template = self.config.merge.config()
        names = {"parent_1": "{parent_1}", "parent_2": "{parent_2}", "base": "{base}"}
        plan = compile_recipe(template, tensors=())
        if isinstance(plan, NotLinear):
            return plan.reason
        for model in plan.models:
            if model not in names.values():
                return f"it names {model} besides the parents and the base"
        everyone = (*self._foundations, self.base)
        try:
            reason = obstacle(
                {
                    "merge_method": "linear",
                    "models": [
                        {"model": folder, "parameters": {"weight": 1}}
                        for folder in dict.fromkeys(str(model.folder) for model in everyone)
                    ],
                    **{key: template[key] for key in DTYPE_KEYS if key in template},
                }
            )
        except MergeError as error:
            return str(error)
        if reason:
            return reason
        try:
            left_out = compare(self.base, self._foundations).left_out
        except CheckpointError as error:
            return str(error)
        return f"{left_out[0]}: is not compared with the base" if left_out else None

    # Deciding.

    def advance(self) -> Stop | None:
        """Decide on the next generation and record it; or record why there is none.

        Every member must be settled.
        """
        decision = propose(self.state, self.config.rules)
        if isinstance(decision, Stop):
            if self.state.stopped != decision.reason:
                self.record(Stopped(decision.reason))
            return decision
        state = self.state
        proposals = tuple(self._proposal(state, pair) for pair in decision)
        self.record(Proposed(state.generation + 1, proposals))
        return None

    def _proposal(self, state: RunState, pairing: Pairing) -> Proposal:
        assert state.base is not None
        recipe = Recipe(
            parents=pairing.parents,
            base=state.base.model,
            config=self.config.merge.config(),
            seed=self.config.seed,
        )
        return Proposal(
            recipe.id, pairing.name, recipe, pairing.exploration, self._predicted(recipe)
        )

    def _predicted(self, recipe: Recipe) -> dict[str, Similarity]:
        """The child's kinship with everyone so far, as its recipe alone says."""
        if self.not_flat:
            return {}
        lineage = self.lineage()
        try:
            lineage.add(recipe.id, by_id(recipe), base=recipe.base)
        except (MergeError, ConfigError):
            # The method has no answer for these weights: making the child will fail, and say why.
            return {}
        found = kinship_from(
            lineage.whole, base=self.base.name, total_parameters=self.base.parameters
        )
        *others, _ = found.models
        return {other: found.similarity(recipe.id, other) for other in others}

    # Members' places, and how they are made.

    def weights(self, member: Member) -> Path:
        """The folder of a member's weights, which may not be there."""
        # Not where the ledger says: foundation models may have moved since.
        return self._folders.get(member.id) or weights_folder(self.folder, member)

    def recipe(self, member: Member) -> dict[str, Any]:
        """The mergekit configuration that makes a child, with real paths.

        Over the foundations where that is possible, and else over its parents.

        Raises:
            MergeError: the method has no answer for these weights.
        """
        if self.not_flat:
            return self.direct_recipe(member)
        return flat_recipe_of(self.lineage(), self.state, member, self._folders, self.base.folder)

    def direct_recipe(self, member: Member) -> dict[str, Any]:
        """The mergekit configuration that makes a child of its parents, with real paths."""
        assert member.recipe is not None
        models = {
            f"parent_{number}": str(self.weights(parent))
            for number, parent in enumerate(self.state.parents_of(member), start=1)
        }
        found: dict[str, Any] = resolve_models(
            fill(member.recipe.config, {**models, "base": str(self.base.folder)}),
            self.config.folder,
        )
        return found

    def report(self) -> None:
        """Rewrite the run's report."""
        run = Run(self.folder, self.state)
        write_report(self.folder / REPORT_FILE, [run.source()])


def _environment() -> dict[str, str]:
    """Versions and hardware: what one needs to know to reproduce a run."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["processor"] = _processor()
    found["cpus"] = str(os.cpu_count())
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        found["memory"] = f"{memory / 2**30:.0f} GiB"
    if gpus := _entries(Path("/proc/driver/nvidia/gpus").glob("*/information"), "Model"):
        found["gpus"] = ", ".join(gpus)
    for package in ("modelkin", "mergekit", "lm_eval", "transformers", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    # Linux says it in a file only.
    named = _entries([Path("/proc/cpuinfo")], "model name")
    return named[0] if named else platform.processor() or platform.machine()


def _entries(files: Iterable[Path], key: str) -> list[str]:
    """The values of lines `key: value`, of those files that are there."""
    found = []
    for file in files:
        with suppress(OSError):
            lines = (line.partition(":") for line in file.read_text(errors="replace").splitlines())
            found += [value.strip() for name, _, value in lines if name.strip() == key]
    return found
