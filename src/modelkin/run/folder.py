"""A run folder, read: its state, its samples, its statistics, where its weights are.

Changes nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelkin.analyse import Samples
from modelkin.blend import Lineage
from modelkin.config import RunConfig, load_yaml, parse_config
from modelkin.errors import ConfigError, EvaluationError, LedgerError, MergeError
from modelkin.evaluating.cache import read_evaluation
from modelkin.gram import GramStats
from modelkin.ledger import read_events
from modelkin.measuring.archive import read_statistics
from modelkin.merging import fill
from modelkin.records import Recipe
from modelkin.report import Source
from modelkin.state import Member, RunState, fold

RUN_FILE = "run.yaml"
# How it begins: what it was written from may lie elsewhere.
ORIGIN = "# Relative paths are taken from "
STATISTICS_FILE = "statistics.npz"
REPORT_FILE = "report.html"


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

    @property
    def run_file(self) -> str:
        """What the run was last called with, as YAML; empty where it was never written."""
        try:
            return (self.folder / RUN_FILE).read_text(encoding="utf-8")
        except OSError:
            return ""

    def member(self, name: str) -> Member:
        """A member by its name or id.

        Raises:
            ConfigError: there is none.
        """
        members = self.state.members
        for member in members.values():
            if name == member.name:
                return member
        if name in members:
            return members[name]
        known = ", ".join(member.name for member in members.values())
        raise ConfigError(f"{self.folder}: expected one of the models {known}, found {name}")

    def weights(self, member: Member) -> Path:
        """The folder of a member's weights, which may have been given up."""
        return weights_folder(self.folder, member)

    def samples(self, member: Member) -> Samples:
        """Per-sample outcomes of a member; empty where none were kept."""
        return read_samples(self.folder, self.state, member)

    def statistics(self) -> GramStats | None:
        """The statistics of all members by id, of children as predicted where recipes allow it.

        `None` where the run has kept none.
        """
        stats = read_statistics(self.folder / STATISTICS_FILE)
        lineage = lineage_of(self.state, stats)
        return lineage.statistics() if lineage else stats

    def source(self) -> Source:
        """What a report is made of."""
        return Source(
            name=self.folder.name,
            state=self.state,
            samples_of=self.samples,
            statistics=self.statistics,
            run_file=self.run_file,
        )


def read_run(folder: Path) -> Run:
    """The run in a folder, whether or not it is going on.

    Raises:
        LedgerError: `folder` is no run folder.
    """
    return Run(folder, fold(read_events(folder)))


def read_settings(folder: Path) -> RunConfig:
    """What a run was last called with; relative paths are taken from where they were then.

    Raises:
        ConfigError: there is no run file, or it is none.
    """
    path = folder / RUN_FILE
    content = load_yaml(path)
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    origin = Path(first.removeprefix(ORIGIN)) if first.startswith(ORIGIN) else folder
    return parse_config(content, folder=origin, origin=str(path))


def read_samples(folder: Path, state: RunState, member: Member) -> Samples:
    """Per-sample outcomes of a member; empty where none were kept or can be read."""
    if state.started is None or member.evaluation is None:
        return {}
    try:
        path = folder / state.started.evaluations / f"{member.evaluation}.jsonl.gz"
        return read_evaluation(path).samples
    except EvaluationError:
        return {}


def weights_folder(folder: Path, member: Member) -> Path:
    return Path(member.source) if member.source else folder / "models" / member.id


def by_id(recipe: Recipe) -> dict[str, Any]:
    """A recipe with members' ids for its models."""
    names = {f"parent_{n}": parent for n, parent in enumerate(recipe.parents, start=1)}
    found: dict[str, Any] = fill(recipe.config, {**names, "base": recipe.base})
    return found


def lineage_of(state: RunState, stats: GramStats | None) -> Lineage | None:
    """The family as factors over its foundations; `None` where its recipes do not allow that."""
    foundations = [member.id for member in state.members.values() if not member.parents]
    if not state.predictions or stats is None or not set(foundations) <= set(stats.models):
        return None
    lineage = Lineage(stats.select(foundations))
    for member in state.members.values():
        add_child(lineage, state, member)
    return lineage


def add_child(lineage: Lineage, state: RunState, member: Member) -> None:
    """Take a child into the lineage, unless its method has no answer for its parents' weights."""
    if member.recipe is None or state.base is None:
        return
    try:
        lineage.add(member.id, by_id(member.recipe), base=state.base.model)
    except (MergeError, ConfigError):
        return
