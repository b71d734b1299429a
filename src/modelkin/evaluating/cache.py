"""Evaluations on disk, one file each, so that none is paid for twice.

A file is keyed by what was asked (the protocol) and of whom (the weights' fingerprint), never by
a model's name or path, so runs and strategies can share a folder.
"""

import gzip
import json
import os
import uuid
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from modelkin.errors import DiskFullError, EvaluationError, is_disk_full
from modelkin.records import Evaluation, Score, Scorecard, Subject, content_id

if TYPE_CHECKING:
    from modelkin.evaluating import Evaluator


# What gzip, JSON and the records raise on files that are damaged or of something else.
_UNREADABLE = (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError)


def evaluation_id(fingerprint: str, protocol: str) -> str:
    """The name of an evaluation's file, without its suffix."""
    return content_id({"weights": fingerprint, "protocol": protocol})


class Cached:
    """An evaluator that looks into `folder` first and keeps there what it learns."""

    def __init__(self, evaluator: "Evaluator", folder: Path) -> None:
        self._evaluator = evaluator
        self._folder = folder

    @property
    def protocol(self) -> str:
        """The wrapped evaluator's protocol."""
        return self._evaluator.protocol

    def evaluate(self, subject: Subject) -> Evaluation:
        """The stored evaluation of these weights, or a new one."""
        key = evaluation_id(subject.fingerprint, self.protocol)
        path = self._folder / f"{key}.jsonl.gz"
        if path.exists():
            with suppress(EvaluationError):  # a damaged file is as good as none
                return read_evaluation(path)
        evaluation = self._evaluator.evaluate(subject)
        write_evaluation(path, subject, evaluation)
        return evaluation


def write_evaluation(path: Path, subject: Subject, evaluation: Evaluation) -> None:
    """Write an evaluation as gzipped JSON lines: the scorecard, then one line an item."""
    card = evaluation.scorecard
    head = {
        "model": subject.name,
        "weights": subject.fingerprint,
        "protocol": card.protocol,
        "scores": {
            task: {"value": score.value, "stderr": score.stderr, "n": score.n}
            for task, score in card.scores.items()
        },
    }
    rows = [
        {"task": task, "item": item, "value": value}
        for task, items in evaluation.samples.items()
        for item, value in items.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose files nobody else may read: a team can share the folder.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as stream:
            # No time stamp, so that equal evaluations are equal files.
            with gzip.GzipFile(fileobj=stream, mode="wb", mtime=0, filename="") as packed:
                for row in (head, *rows):
                    packed.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFullError(f"{path}: the disk filled up while writing it") from error
        raise


def read_evaluation(path: Path) -> Evaluation:
    """Read what `write_evaluation` wrote.

    Raises:
        EvaluationError: the file is not readable.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            head = json.loads(stream.readline())
            samples: dict[str, dict[str, float]] = {}
            for line in stream:
                row = json.loads(line)
                samples.setdefault(row["task"], {})[row["item"]] = row["value"]
        scores = {task: Score(**score) for task, score in head["scores"].items()}
        return Evaluation(Scorecard(scores, head["protocol"]), samples)
    except _UNREADABLE as error:
        raise EvaluationError(f"{path}: is no readable evaluation: {error}") from error
