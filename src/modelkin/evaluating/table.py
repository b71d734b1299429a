"""Recorded scores from a CSV file, for replays and for people who evaluate elsewhere.

The file has a column `model`, one column a task, and optionally `parent_1` and `parent_2`, which
name other rows. A row without parents is looked up by the foundation's name; one with parents is
the child of those two, whatever it is called in the run.
"""

import csv
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from modelkin.errors import ConfigError, EvaluationError
from modelkin.records import Evaluation, Score, Scorecard, Subject, content_id, pedigree


class TableSettings(BaseModel):
    """Recorded scores.

    Attributes:
        path: the CSV file.
        tasks: its columns to read, in order.
        cache: folder for evaluations, shared between runs; default: in the run folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    evaluator: Literal["table"]
    path: Path
    tasks: Annotated[list[str], Field(min_length=1)]
    cache: Path | None = None


class Table:
    """Looks scores up."""

    def __init__(self, settings: TableSettings, *, folder: Path) -> None:
        """Read the file, relative to `folder`; raises ConfigError where it is not as described."""
        self._path = folder / settings.path
        self._tasks = settings.tasks
        try:
            content = self._path.read_bytes()
            rows = list(csv.DictReader(content.decode("utf-8").splitlines()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"evaluation.path: {self._path}: {error}") from error
        for column in ("model", *self._tasks):
            if not rows or column not in rows[0]:
                raise ConfigError(f"evaluation.path: {self._path}: expected a column {column!r}")
        by_name = {row["model"]: row for row in rows}
        self._by_pedigree = {_pedigree(row, by_name): row for row in rows}
        self._protocol = content_id(
            {
                "evaluator": "table",
                "tasks": self._tasks,
                "content": hashlib.sha256(content).hexdigest(),
            }
        )

    @property
    def protocol(self) -> str:
        """Fingerprint of the file's content and the tasks."""
        return self._protocol

    def evaluate(self, subject: Subject) -> Evaluation:
        """Look the scores up by the model's descent."""
        row = self._by_pedigree.get(subject.pedigree)
        if row is None:
            raise EvaluationError(
                f"{self._path}: has no row for {subject.name}: for a foundation model, its name; "
                "for a child, a row with the same parents"
            )
        scores: dict[str, Score] = {}
        for task in self._tasks:
            try:
                value = float(row[task])
            except (TypeError, ValueError):  # a short row has None
                value = math.nan
            if not math.isfinite(value):
                raise EvaluationError(
                    f"{self._path}: {row['model']}, column {task}: expected a number, "
                    f"found {row[task]!r}"
                )
            scores[task] = Score(value)
        return Evaluation(Scorecard(scores, self._protocol))


def _pedigree(
    row: Mapping[str, str],
    by_name: Mapping[str, Mapping[str, str]],
    below: frozenset[str] = frozenset(),
) -> str:
    name = row["model"]
    parents = [row[key] for key in ("parent_1", "parent_2") if row.get(key)]
    if name in below:
        raise ConfigError(f"evaluation.path: {name!r} is its own ancestor")
    if not parents:
        return name
    for parent in parents:
        if parent not in by_name:
            raise ConfigError(f"evaluation.path: {name!r}: its parent {parent!r} has no row")
    return pedigree(*(_pedigree(by_name[parent], by_name, below | {name}) for parent in parents))
