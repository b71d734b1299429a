"""Runs of people who evaluate elsewhere: `ask` decides what to merge, `tell` records scores.

Both work on the same ledger as `evolve`, which goes on from whatever they left.
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelkin.config import RunConfig
from modelkin.errors import ConfigError, LedgerError, MergeError
from modelkin.evaluating import make_evaluator
from modelkin.ledger import LEDGER_FILE, open_ledger
from modelkin.progress import Bars
from modelkin.records import Failed, Score, Scorecard, Scored
from modelkin.report import check_report, write_report
from modelkin.run.family import Family
from modelkin.run.folder import REPORT_FILE, RUN_FILE, Run, read_run, read_settings
from modelkin.run.planning import begun_with, evaluations_folder, open_models
from modelkin.state import Member, RunState, fold

# What an average may differ by from that of the scores beside it, which may be rounded.
_AVERAGE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Asked:
    """What a run needs next.

    Attributes:
        waiting: the members without scores.
        recipes: name of a child among them -> mergekit's configuration, with real paths.
        stopped: why there is nothing to do, if so.
        absent: name of a parent that the recipes need -> the folder that its weights are not in.
    """

    waiting: tuple[Member, ...]
    recipes: Mapping[str, dict[str, Any]]
    stopped: str | None
    absent: Mapping[str, Path]


def ask(folder: Path, config: RunConfig | None = None, *, bars: Bars | None = None) -> Asked:
    """Decide on the next generation, unless there are members without scores, and say what it is.

    Args:
        folder: the run folder.
        config: what to begin a run with, or other limits and stop rules for one that was begun;
            default: what it was last called with.
        bars: where to show progress.

    Raises:
        ConfigError: a setting is wrong, or the run is new and there is none.
        CheckpointError: a model is not readable.
        LedgerError: the run folder belongs to other settings or models, or is in use.
        MissingExtraError: the report cannot be written; nothing was done.
    """
    check_report()
    bars = bars or Bars()
    folder = folder.resolve()
    pinned = begun_with(folder)
    if config is None:
        if not (folder / RUN_FILE).is_file():
            raise ConfigError(
                f"{folder}: is no run folder: expected {RUN_FILE} in it, or a run file to begin "
                "with"
            )
        config = read_settings(folder)
    elif pinned and (folder / RUN_FILE).is_file():
        _check_tasks(folder, config)
    base, foundations = open_models(config, pinned)
    with open_ledger(folder) as ledger:
        family = Family(config, folder, ledger, base, foundations, bars)
        started = family.state.started
        if started:
            # Nothing is evaluated here: the protocol is that of the scores so far.
            family.begin(str(started.settings["evaluation"]), started.evaluations)
        else:
            evaluator = make_evaluator(
                config.evaluation,
                folder=config.folder,
                trust_remote_code=config.trust_remote_code,
            )
            family.begin(evaluator.protocol, evaluations_folder(config, folder))
        _fail_unmakeable(family)
        while not _waiting(family.state) and family.advance() is None:
            _fail_unmakeable(family)
        family.report()
        state = family.state
        waiting = _waiting(state)
        recipes = {
            member.name: family.direct_recipe(member)
            if all(family.weights(parent).is_dir() for parent in state.parents_of(member))
            else family.recipe(member)
            for member in waiting
            if member.recipe
        }
        absent = {
            parent.name: family.weights(parent)
            for member in waiting
            for parent in state.parents_of(member)
            if family.not_flat and not family.weights(parent).is_dir()
        }
        return Asked(waiting, recipes, state.stopped, absent)


def _check_tasks(folder: Path, config: RunConfig) -> None:
    """See that a run goes on with the tasks that its scores are of."""
    then, now = _asked(read_settings(folder)), _asked(config)
    if set(then) != set(now):
        raise LedgerError(
            f"{folder}: was started with the tasks {', '.join(then)}, found {', '.join(now)}; set "
            "them back, or give the run another folder"
        )


def _fail_unmakeable(family: Family) -> None:
    """Nobody can tell the scores of a child that its method cannot make of these weights."""
    if family.not_flat:
        return
    for member in _waiting(family.state):
        if member.recipe:
            try:
                family.recipe(member)
            except MergeError as error:
                family.record(Failed(member.id, "merge", str(error)))


def _waiting(state: RunState) -> tuple[Member, ...]:
    return tuple(member for member in state.members.values() if not member.settled)


def tell(folder: Path, model: str, scores: Any) -> Run:
    """Record the scores of a member, which was evaluated elsewhere.

    Args:
        folder: the run folder.
        model: its name or id.
        scores: task -> score, or task -> {"value": ..., "stderr": ..., "n": ...}; an "average"
            beside them must be theirs.

    Returns:
        The run with these scores in it.

    Raises:
        ConfigError: there is no such member, or the scores are not those of the run's tasks.
        LedgerError: `folder` is no run folder, or in use; or the member has scores already.
        MissingExtraError: the report cannot be written; nothing was done.
    """
    check_report()
    folder = folder.resolve()
    if not (folder / LEDGER_FILE).is_file():
        raise LedgerError(f"{folder}: is no run folder: expected {LEDGER_FILE} in it")
    with open_ledger(folder) as ledger:
        state = fold(ledger.events())
        member = Run(folder, state).member(model)
        found = _scores(scores, _tasks(folder, state), model)
        if member.failure:
            raise LedgerError(
                f"{folder}: {member.name}: expected a model that waits for scores, found one that "
                f"failed to {member.failure.stage}"
            )
        if member.scorecard:
            raise LedgerError(
                f"{folder}: {member.name}: expected a model that waits for scores, found one that "
                f"has them, with an average of {member.scorecard.average:.4f}"
            )
        assert state.started is not None
        card = Scorecard(found, str(state.started.settings["evaluation"]))
        ledger.append(Scored(member.id, card, None, 0.0))
    run = read_run(folder)
    write_report(folder / REPORT_FILE, [run.source()])
    return run


def read_scores(path: Path) -> Any:
    """The content of a file of scores.

    Raises:
        ConfigError: it cannot be read, is no JSON, or has a key twice.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"distinct keys, found {', '.join(key for key, _ in pairs)}")
    return found


def _tasks(folder: Path, state: RunState) -> tuple[str, ...]:
    """The run's tasks: those of earlier scores, or of the settings."""
    for member in state.members.values():
        if member.scorecard:
            return tuple(member.scorecard.scores)
    return _asked(read_settings(folder))


def _asked(config: RunConfig) -> tuple[str, ...]:
    tasks = config.evaluation.tasks
    return tuple(task if isinstance(task, str) else task.task for task in tasks)


def _scores(given: Any, tasks: tuple[str, ...], model: str) -> dict[str, Score]:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"scores of {model}: expected tasks with their scores, found {type(given).__name__}"
        )
    named = {key: value for key, value in given.items() if key != "average" or key in tasks}
    if set(named) != set(tasks):
        raise ConfigError(
            f"scores of {model}: expected those of {', '.join(tasks)}, "
            f"found {', '.join(map(str, named)) or 'none'}"
        )
    scores = {task: _score(named[task], f"scores of {model}: {task}") for task in tasks}
    average = sum(score.value for score in scores.values()) / len(scores)
    if not math.isfinite(average):
        raise ConfigError(f"scores of {model}: expected numbers with a mean, found none")
    told = given.get("average") if "average" not in tasks else None
    scale = max(1.0, abs(average))
    if told is not None and abs(_number(told, f"scores of {model}: average") - average) > (
        _AVERAGE_TOLERANCE * scale
    ):
        raise ConfigError(
            f"scores of {model}: average: expected {average:.4f}, the mean of the others, "
            f"found {told}"
        )
    return scores


def _score(given: Any, where: str) -> Score:
    if not isinstance(given, Mapping):
        return Score(_number(given, where))
    unknown = set(given) - {"value", "stderr", "n"}
    if "value" not in given or unknown:
        raise ConfigError(
            f"{where}: expected a number, or value with stderr and n, found {', '.join(given)}"
        )
    stderr, n = given.get("stderr"), given.get("n")
    if n is not None and (type(n) is not int or n < 1):
        raise ConfigError(f"{where}: n: expected a number of items, found {n}")
    if stderr is not None and _number(stderr, f"{where}: stderr") < 0:
        raise ConfigError(f"{where}: stderr: expected none below 0, found {stderr}")
    return Score(
        _number(given["value"], where), stderr=None if stderr is None else float(stderr), n=n
    )


def _number(given: Any, where: str) -> float:
    if isinstance(given, int | float) and not isinstance(given, bool):
        # JSON's numbers may be of any length.
        with suppress(OverflowError):
            if math.isfinite(given):
                return float(given)
    raise ConfigError(f"{where}: expected a number, found {given!r:.100}")
