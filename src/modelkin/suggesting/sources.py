"""What is known of models, from a run's state or from CSV tables.

A table of pairs has the columns model_1, model_2 and pcc, as `modelkin kinship --csv` writes them;
of a table with a column level, the rows of the whole models count. An empty pcc is undefined.

A table of scores has the column model and one column a task, higher is better. A column average is
passed over. With the columns parent_1 and parent_2 it says which pairs were merged.
"""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from modelkin.errors import ConfigError
from modelkin.gram import GramStats
from modelkin.merging import MergeSettings
from modelkin.previewing import Crossing
from modelkin.records import Metric
from modelkin.state import RunState
from modelkin.suggesting.ranking import Evidence

_PAIR_COLUMNS = ("model_1", "model_2", "pcc")
_PARENT_COLUMNS = ("parent_1", "parent_2")


def from_run(state: RunState, statistics: GramStats | None) -> Evidence:
    """What a run knows of its members that have scores and did not fail.

    Args:
        state: the run's.
        statistics: of members, by id; `None` leaves predictions out.
    """
    members = [member for member in state.members.values() if member.scorecard]
    failed = [member.name for member in state.members.values() if member.failure]
    waiting = [member.name for member in state.members.values() if not member.settled]
    settings = state.started.settings if state.started else {}
    # Distances have no threshold of their own.
    metric: Metric = "cs" if settings.get("metric") == "cs" else "pcc"
    names = {member.id: member.name for member in members}
    crossing, why_not = _crossing(settings.get("merge"), statistics, names)
    notes = {
        "left out, as they failed": failed,
        "left out, as they have no scores yet": waiting,
    }
    return Evidence(
        models=tuple(names.values()),
        scores={
            member.name: {task: score.value for task, score in member.scorecard.scores.items()}
            for member in members
            if member.scorecard
        },
        kinship={
            frozenset((names[one], names[other])): value
            for one, other in combinations(names, 2)
            if (value := state.similarity(one, other, metric)) is not None
        },
        metric=metric,
        merged=frozenset(
            frozenset(names[parent] for parent in pair)
            for pair in state.merged_pairs()
            if pair <= set(names)
        ),
        crossing=crossing,
        notes=(
            *(f"{reason}: {', '.join(which)}" for reason, which in notes.items() if which),
            *([f"no child is predicted: {why_not}"] if why_not else []),
        ),
    )


def _crossing(
    merge: Mapping[str, Any] | None, statistics: GramStats | None, names: Mapping[str, str]
) -> tuple[Crossing | None, str]:
    """What predicts a run's children, or why nothing does."""
    if statistics is None or merge is None:
        return None, "the run has kept no statistics of the weights"
    known = [model for model in names if model in statistics.models]
    if len(known) < 2:
        return None, "the run has kept statistics of fewer than two of these models"
    stats = replace(statistics.select(known), models=tuple(names[model] for model in known))
    try:
        return Crossing(MergeSettings.model_validate(merge).config(), stats), ""
    except ConfigError as error:
        return None, str(error)


def from_tables(
    table: str | os.PathLike[str], scores: str | os.PathLike[str] | None = None
) -> Evidence:
    """What CSV tables say of models.

    Args:
        table: a table of pairs, or one of scores.
        scores: a table of scores, beside a table of pairs.

    Raises:
        ConfigError: a file is no such table; names the file, the row and the column.
    """
    first = _read(Path(table))
    if "model_1" in first.columns:
        pairs, scored = first, None if scores is None else _read(Path(scores))
    elif "model" in first.columns:
        if scores is not None:
            raise ConfigError(
                f"{table}: expected a table of pairs beside --scores, with the columns "
                f"{', '.join(_PAIR_COLUMNS)}, found one of scores"
            )
        pairs, scored = None, first
    else:
        raise ConfigError(
            f"{table}: expected the columns {', '.join(_PAIR_COLUMNS)} of a table of pairs, or "
            f"the column model of one of scores, found {_listed(first.columns)}"
        )
    kinship, related = _kinship_of(pairs) if pairs else ({}, {})
    by_model, merged = _scores_of(scored) if scored else ({}, frozenset())
    if pairs and scored and not related.keys() & by_model.keys():
        raise ConfigError(
            f"{scored.path}, column model: expected models of {pairs.path}, such as "
            f"{next(iter(related))}, found {next(iter(by_model))}"
        )
    return Evidence(
        models=tuple({**by_model, **related}), scores=by_model, kinship=kinship, merged=merged
    )


class _Table(NamedTuple):
    """A CSV file: its heads, and its rows with the number of the line that each ends at."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[tuple[int, Mapping[str, str]]]

    def wrong(self, row: int, column: str, expected: str, found: str) -> ConfigError:
        shown = repr(found) if found else "nothing"
        return ConfigError(
            f"{self.path}, row {row}, column {column}: expected {expected}, found {shown}"
        )

    def name(self, row: int, cells: Mapping[str, str], column: str) -> str:
        if not cells[column]:
            raise self.wrong(row, column, "the name of a model", "")
        return cells[column]

    def number(self, row: int, cells: Mapping[str, str], column: str) -> float:
        try:
            value = float(cells[column])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.wrong(row, column, "a number", cells[column])
        return value


def _read(path: Path) -> _Table:
    try:
        # Spreadsheets begin a file with a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            columns = [head.strip() for head in next(reader, [])]
            rows = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: is no CSV table: {error}") from error
    for head in columns:
        if columns.count(head) > 1:
            raise ConfigError(f"{path}: expected distinct columns, found {head!r} twice")
    for row, cells in rows:
        if len(cells) != len(columns):
            raise ConfigError(
                f"{path}, row {row}: expected {len(columns)} columns, found {len(cells)}"
            )
    if not rows:
        raise ConfigError(f"{path}: expected a table with rows, found none")
    stripped = [(row, [cell.strip() for cell in cells]) for row, cells in rows]
    return _Table(
        path, columns, [(row, dict(zip(columns, cells, strict=True))) for row, cells in stripped]
    )


def _kinship_of(table: _Table) -> tuple[dict[frozenset[str], float], dict[str, None]]:
    """The kinship of each pair where it is defined, and the models in the order of the table."""
    for column in _PAIR_COLUMNS:
        if column not in table.columns:
            raise ConfigError(
                f"{table.path}: expected the column {column}, found {_listed(table.columns)}"
            )
    found: dict[frozenset[str], float] = {}
    models: dict[str, None] = {}
    seen: set[frozenset[str]] = set()
    for row, cells in table.rows:
        if cells.get("level", "model") != "model":
            continue
        one, other = (table.name(row, cells, column) for column in _PAIR_COLUMNS[:2])
        pair = frozenset((one, other))
        if one == other:
            raise table.wrong(row, "model_2", f"another model than {one}", other)
        if pair in seen:
            raise table.wrong(row, "model_2", f"each pair once, {one} with another model", other)
        seen.add(pair)
        models |= {one: None, other: None}
        if cells["pcc"]:
            found[pair] = table.number(row, cells, "pcc")
            if not -1 <= found[pair] <= 1:
                raise table.wrong(row, "pcc", "a number from -1 to 1", cells["pcc"])
    if not models:
        levels = _listed(sorted({cells["level"] for _, cells in table.rows}))
        raise ConfigError(
            f"{table.path}, column level: expected rows of the level model, found {levels}"
        )
    return found, models


def _scores_of(
    table: _Table,
) -> tuple[dict[str, dict[str, float]], frozenset[frozenset[str]]]:
    """Model -> task -> score, and the pairs that were merged."""
    if "model" not in table.columns:
        raise ConfigError(
            f"{table.path}: expected the column model, found {_listed(table.columns)}"
        )
    apart = ("model", "average", *_PARENT_COLUMNS)
    tasks = [column for column in table.columns if column not in apart]
    if not tasks:
        raise ConfigError(
            f"{table.path}: expected a column for each task, found {_listed(table.columns)}"
        )
    found: dict[str, dict[str, float]] = {}
    for row, cells in table.rows:
        name = table.name(row, cells, "model")
        if name in found:
            raise table.wrong(row, "model", "each model once", name)
        found[name] = {task: table.number(row, cells, task) for task in tasks}
    merged: set[frozenset[str]] = set()
    for row, cells in table.rows:
        given = [cells.get(column, "") for column in _PARENT_COLUMNS]
        if not any(given):
            continue
        for column, parent in zip(_PARENT_COLUMNS, given, strict=True):
            if parent not in found:
                raise table.wrong(row, column, "a model of this table", parent)
        merged.add(frozenset(given))
    return found, frozenset(merged)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
