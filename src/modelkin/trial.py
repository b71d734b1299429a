"""One model's way from recipe to scores: merge it, fingerprint it, evaluate it.

Knows nothing of families, generations or the ledger: it returns what happened as events. A
failure of the model is an event too; a full disk is not the model's failure and is raised.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelkin.checkpoint import fingerprint, open_checkpoint
from modelkin.errors import CheckpointError, EvaluationError, MergeError
from modelkin.evaluating import Evaluator
from modelkin.evaluating.cache import evaluation_id
from modelkin.merging import Merger
from modelkin.records import Event, Failed, Merged, Scored, Subject


@dataclass(frozen=True)
class Trial:
    """What is to be done for one model.

    Attributes:
        model: its id.
        name: its name in the family.
        pedigree: see `records.Subject`.
        folder: where its weights are, or are to be.
        fingerprint: of its weights, if they were made and recorded before.
        config: the mergekit configuration that makes it, with real paths; for foundations, none.
        seed: for merge methods that draw random numbers.
    """

    model: str
    name: str
    pedigree: str
    folder: Path
    fingerprint: str | None = None
    config: Mapping[str, Any] | None = None
    seed: int = 0


def conduct(trial: Trial, merger: Merger, evaluator: Evaluator | None) -> tuple[Event, ...]:
    """Carry out a trial; returns its events, the last of which settles the model.

    Without an evaluator the model is made only, and waits for scores.
    """
    events: list[Event] = []
    weights = trial.fingerprint
    if weights is None or not trial.folder.exists():
        began = time.monotonic()
        try:
            # A folder that exists is whole: it was made before the last crash.
            if trial.config is not None and not trial.folder.exists():
                merger.merge(trial.config, trial.folder, seed=trial.seed)
            checkpoint = open_checkpoint(trial.folder)
        except (MergeError, CheckpointError) as error:
            return (Failed(trial.model, "merge", str(error)),)
        weights = fingerprint(checkpoint)
        size = sum(tensor.bytes for tensor in checkpoint.tensors.values())
        events.append(Merged(trial.model, weights, size, time.monotonic() - began))
    if evaluator is None:
        return tuple(events)
    subject = Subject(trial.name, trial.pedigree, str(trial.folder), weights)
    began = time.monotonic()
    try:
        scorecard = evaluator.evaluate(subject).scorecard
    except EvaluationError as error:
        return (*events, Failed(trial.model, "evaluate", str(error)))
    key = evaluation_id(weights, evaluator.protocol)
    return (*events, Scored(trial.model, scorecard, key, time.monotonic() - began))
