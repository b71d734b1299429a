"""Scores from any program that gets a model's folder and prints `{"task": score}` as JSON."""

import hashlib
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from modelkin.errors import EvaluationError
from modelkin.records import Evaluation, Score, Scorecard, Subject, content_id


class CommandSettings(BaseModel):
    """An evaluator of one's own.

    Attributes:
        command: the program and its arguments; `{model}` stands for the model's folder.
        tasks: the tasks that it prints scores for.
        cache: folder for evaluations, shared between runs; default: in the run folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    evaluator: Literal["command"]
    command: Annotated[list[str], Field(min_length=1)]
    tasks: Annotated[list[str], Field(min_length=1)]
    cache: Path | None = None

    @field_validator("command")
    @classmethod
    def _names_the_model(cls, command: list[str]) -> list[str]:
        if not any("{model}" in word for word in command):
            raise ValueError("expected the placeholder {model}, found none")
        return command


class Command:
    """Runs a program for each model."""

    def __init__(self, settings: CommandSettings, *, folder: Path) -> None:
        """The program runs in `folder`."""
        self._command, self._tasks, self._folder = settings.command, settings.tasks, folder
        self._protocol = content_id(
            {
                "evaluator": "command",
                "command": self._command,
                "tasks": self._tasks,
                # A changed script asks something else.
                "files": [_digest(folder / word) for word in self._command],
            }
        )

    @property
    def protocol(self) -> str:
        """Fingerprint of the command, of the files it names, and of the tasks."""
        return self._protocol

    def evaluate(self, subject: Subject) -> Evaluation:
        """Run the program and read its scores."""
        argv = [word.replace("{model}", subject.folder) for word in self._command]
        try:
            done = subprocess.run(
                argv,
                cwd=self._folder,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise EvaluationError(f"{argv[0]}: cannot be run: {error}") from error
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["it printed no error"]
            raise EvaluationError(f"{argv[0]}: exit status {done.returncode}: {said[-1]}")
        return Evaluation(Scorecard(self._scores(argv[0], done.stdout), self._protocol))

    def _scores(self, program: str, output: str) -> dict[str, Score]:
        found = _last_json(output.strip())
        if not isinstance(found, dict):
            raise EvaluationError(
                f'{program}: expected {{"task": score}} as JSON, found {output.strip()[-100:]!r}'
            )
        scores: dict[str, Score] = {}
        for task in self._tasks:
            value = found.get(task)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise EvaluationError(
                    f"{program}: task {task!r}: expected a number, found {value!r}"
                )
            try:
                number = float(value)
            except OverflowError:  # JSON's numbers may be of any length
                number = math.inf
            if not math.isfinite(number):
                raise EvaluationError(f"{program}: task {task!r}: expected a finite number")
            scores[task] = Score(number)
        return scores


def _last_json(output: str) -> object:
    """The whole output as JSON, or its last line, for programs that log before."""
    candidates: Sequence[str] = (output, output.rpartition("\n")[2])
    for text in candidates:
        try:
            return json.loads(text)
        except ValueError:
            continue
    return None


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError:  # a word too long to be a file's name, such as a program given as text
        return None
