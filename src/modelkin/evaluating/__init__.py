"""Models to scores: the seam to evaluators, and the cache that no evaluation is paid for twice.

Knows nothing of families or merging. Each evaluator has a module of its own: `harness`
(lm-evaluation-harness), `command` (any program), `table` (recorded scores), `told` (people).
"""

from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Discriminator, Tag

from modelkin.evaluating.cache import Cached
from modelkin.evaluating.command import Command, CommandSettings
from modelkin.evaluating.harness import Harness, HarnessSettings
from modelkin.evaluating.table import Table, TableSettings
from modelkin.evaluating.told import Told, ToldSettings
from modelkin.progress import OnProgress
from modelkin.records import Evaluation, Subject

__all__ = [
    "Cached",
    "Command",
    "EvaluationSettings",
    "Evaluator",
    "Harness",
    "Table",
    "Told",
    "ToldSettings",
    "make_evaluator",
]


class Evaluator(Protocol):
    """Scores models."""

    @property
    def protocol(self) -> str:
        """Fingerprint of everything that is asked of a model; equal ones compare."""
        ...

    def evaluate(self, subject: Subject) -> Evaluation:
        """Score one model on every task of the protocol.

        Raises:
            EvaluationError: it gave no scores.
            ConfigError: what is asked cannot be asked of any model.
        """
        ...


def _kind(settings: Any) -> str:
    given = settings.get("evaluator") if isinstance(settings, dict) else settings.evaluator
    return str(given or "lm-eval")


EvaluationSettings = Annotated[
    Annotated[HarnessSettings, Tag("lm-eval")]
    | Annotated[CommandSettings, Tag("command")]
    | Annotated[TableSettings, Tag("table")]
    | Annotated[ToldSettings, Tag("told")],
    Discriminator(_kind),
]


def make_evaluator(
    settings: HarnessSettings | CommandSettings | TableSettings | ToldSettings,
    *,
    folder: Path,
    trust_remote_code: bool = False,
    on_progress: OnProgress | None = None,
    load: bool = False,
) -> Evaluator:
    """The evaluator that `settings` describe; relative paths are taken from `folder`.

    `on_progress` is called with the number of prompts answered and their total. With `load`,
    what the first evaluation would load is loaded now, so that its mistakes show before any work.
    """
    match settings:
        case HarnessSettings():
            harness = Harness(
                settings,
                folder=folder,
                trust_remote_code=trust_remote_code,
                on_progress=on_progress,
            )
            if load:
                harness.load_tasks()
            return harness
        case CommandSettings():
            return Command(settings, folder=folder)
        case TableSettings():
            return Table(settings, folder=folder)
        case ToldSettings():
            return Told(settings)
