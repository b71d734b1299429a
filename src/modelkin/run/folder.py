"""A run folder, read: its state, its samples, where its weights are. Changes nothing."""

from dataclasses import dataclass
from pathlib import Path

from modelkin.analyse import Samples
from modelkin.errors import EvaluationError, LedgerError
from modelkin.evaluating.cache import read_evaluation
from modelkin.ledger import read_events
from modelkin.state import Member, RunState, fold


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
        return weights_folder(self.folder, member)

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
