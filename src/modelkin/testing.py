"""Fakes for the three seams, each made from a plain function, for tests without real models.

They keep the contracts of `Merger`, `Evaluator` and `Workers`, and know nothing of any test
framework.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modelkin.errors import EvaluationError
from modelkin.merging import write_child
from modelkin.records import Evaluation, Score, Scorecard, Subject
from modelkin.workers import Job, Result


class FunctionMerger:
    """Makes a child with a function that fills a folder."""

    def __init__(self, fill: Callable[[Mapping[str, Any], Path], None]) -> None:
        """`fill(config, folder)` writes a model; what it raises becomes a MergeError."""
        self._fill = fill

    def merge(self, config: Mapping[str, Any], out: Path, *, seed: int = 0) -> None:
        """See `merging.Merger.merge`."""
        write_child(lambda folder: self._fill(config, folder), config, out, seed=seed)


class FunctionEvaluator:
    """Scores a model with a function."""

    def __init__(
        self,
        score: Callable[[Subject], Mapping[str, float | Mapping[str, float]]],
        *,
        protocol: str = "function",
    ) -> None:
        """`score` gives each task a number, or item ids with outcomes whose mean is the score."""
        self._score = score
        self._protocol = protocol

    @property
    def protocol(self) -> str:
        """What was given; a fake cannot tell what its function asks."""
        return self._protocol

    def evaluate(self, subject: Subject) -> Evaluation:
        """See `evaluating.Evaluator.evaluate`."""
        scores: dict[str, Score] = {}
        samples: dict[str, Mapping[str, float]] = {}
        for task, found in self._score(subject).items():
            if isinstance(found, Mapping):
                samples[task] = dict(found)
                value, n = math.fsum(found.values()) / len(found), len(found)
            else:
                value, n = found, None
            if not math.isfinite(value):
                raise EvaluationError(
                    f"{subject.name}: task {task!r}: expected a finite number, found {value}"
                )
            scores[task] = Score(value, n=n)
        return Evaluation(Scorecard(scores, self._protocol), samples)


class ShuffledWorkers:
    """Does jobs in a random order and yields them in another, neither the one given.

    All work is done before the first result is seen: a crash then loses as much as it can.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def perform(
        self, task: Callable[[Job], Result], jobs: Iterable[Job]
    ) -> Iterator[tuple[Job, Result]]:
        """See `workers.Workers.perform`."""
        given = list(jobs)
        done = {i: (given[i], task(given[i])) for i in self._disorder(len(given))}
        for i in self._disorder(len(given)):
            yield done[i]

    def _disorder(self, count: int) -> list[int]:
        order = list(range(count))
        while count > 1 and order == sorted(order):
            self._random.shuffle(order)
        return order
