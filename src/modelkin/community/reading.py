"""A table of merges from a CSV file, every cell checked. Knows no statistics."""

import codecs
import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from modelkin.community.columns import Columns, recognise
from modelkin.errors import ConfigError

# What people write for nothing.
_EMPTY = {"", "-", "–", "—", "?", "...", "…", "n/a", "na", "nan", "none", "null", "removed"}
# And for a parent that there is, but nobody knows which.
_UNKNOWN = {"?", "...", "…"}
# Between the parents in one cell; the first that occurs in the column counts. None is in a name.
_SEPARATORS = (";", "|", " + ", " × ", " x ", ",")
# The leaderboard's `Model`: <a href="...">organisation/name</a> and more links
_LINK = re.compile(r"<a\b[^>]*>([^<]*)</a>")


@dataclass(frozen=True)
class MergeRow:
    """One row: a merge, or a model that merges were made from.

    Attributes:
        line: in the file, the head being line 1.
        name: the model's.
        parents: names as the table has them elsewhere, if it does.
        complete: whether there are two parents or more, all of them known.
        scores: task to score, `None` where it was not given.
        average: mean of the scores or, where one is missing, the average that the table gives.
        gain: as given.
        similarities: of the parents, as given.
        path: the evolution path that the row belongs to, "" where the table has but one.
    """

    line: int
    name: str
    parents: tuple[str, ...]
    complete: bool
    scores: Mapping[str, float | None]
    average: float | None
    gain: float | None
    similarities: Mapping[str, float | None]
    path: str


@dataclass(frozen=True)
class MergeTable:
    """All rows, in the order in which merges were made; what the columns meant; what to know."""

    rows: tuple[MergeRow, ...]
    columns: Columns
    tasks: tuple[str, ...]
    notices: tuple[str, ...]


def read_merges(path: str | os.PathLike[str]) -> MergeTable:
    """Read a table of merges; the columns are recognised by their heads.

    Needed are the parents, as `parent_1`, `parent_2` ... (or `model_1`, `model_2`), or all in a
    column `parents` with ; between them; and scores, as any columns of numbers or an average, or
    the gain itself. The model's own name is `child`, `model` or what the Open LLM Leaderboard has.

    Raises:
        ConfigError: it is no CSV file of that kind, a number is none, or a family is impossible.
        OSError: it cannot be read.
    """
    heads, cells = _cells(Path(path))
    columns = recognise(heads)
    if not columns.parents and not columns.base:
        raise ConfigError(
            f"{path}: expected columns of parents, such as parent_1 and parent_2, or parents; "
            f"found {', '.join(heads)}"
        )
    reader = _Reader(str(path), columns, cells)
    rows, notices = reader.rows()
    if not reader.tasks and columns.average is None and columns.gain is None:
        raise ConfigError(
            f"{path}: expected at least one column of scores, an average or a gain; "
            f"found {', '.join(heads)}"
        )
    rows = _resolved(rows)
    _check_descent(path, rows)
    return MergeTable(tuple(rows), columns, tuple(reader.tasks), tuple(notices))


def _cells(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Heads, and for each row its line and its cells."""
    # Excel begins its files with a byte order mark, and its "Unicode text" is UTF-16.
    with path.open("rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = path.read_text(encoding="utf-16" if wide else "utf-8-sig")
    except UnicodeError as error:
        reason = getattr(error, "reason", str(error))
        raise ConfigError(f"{path}: expected a CSV file in UTF-8, found {reason}") from error
    if not text.strip():
        raise ConfigError(f"{path}: expected a head and rows, found an empty file")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    # A cell in quotes may have several lines.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        heads = [head.strip() for head in next(reader)]
        repeated = [head for head, count in Counter(heads).items() if head and count > 1]
        if repeated:
            raise ConfigError(f"{path}: expected each column once, found {repeated[0]!r} again")
        cells = []
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(heads):
                raise ConfigError(
                    f"{path}: line {reader.line_num}: expected {len(heads)} cells as in the head, "
                    f"found {len(row)}"
                )
            stripped = [cell.strip() for cell in row]
            cells.append((reader.line_num, dict(zip(heads, stripped, strict=True))))
    except csv.Error as error:
        raise ConfigError(f"{path}: line {reader.line_num}: {error}") from error
    if not cells:
        raise ConfigError(f"{path}: expected rows below the head, found none")
    return heads, cells


def _is_empty(cell: str) -> bool:
    return cell.lower() in _EMPTY


def _parsed(cell: str) -> float | None:
    """A finite number, or `None` for what is none."""
    # Typographic minus signs come with tables copied from papers.
    text = cell.replace("\N{MINUS SIGN}", "-").removesuffix("%").strip()
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class _Reader:
    """The rows of one file, and where an error is."""

    def __init__(self, path: str, columns: Columns, cells: list[tuple[int, dict[str, str]]]):
        self._path = path
        self._columns = columns
        self._cells = cells
        self.tasks = {**columns.scores, **{head: head for head in self._other_scores()}}
        self._separator = self._found_separator()

    def rows(self) -> tuple[list[MergeRow], list[str]]:
        """Rows in order, each model once in each path; and what was left out."""
        found: dict[tuple[str, str], MergeRow] = {}
        repeated: list[MergeRow] = []
        for line, cell in self._ordered():
            row = self._row(line, cell)
            before = found.setdefault((row.path, row.name), row)
            if before is row:
                continue
            # The leaderboard scored many models in two precisions.
            if before.parents and row.parents and set(before.parents) != set(row.parents):
                raise ConfigError(
                    f"{self._path}: line {line}: expected {row.name} once, "
                    f"found it on line {before.line} too, with other parents"
                )
            repeated.append(row)
        notices = []
        if repeated:
            names = ", ".join(f"{row.name} (line {row.line})" for row in repeated[:3])
            more = f" and {len(repeated) - 3} more" if len(repeated) > 3 else ""
            notices.append(
                f"rows left out because their model comes earlier in the table: {names}{more}"
            )
        return list(found.values()), notices

    def _ordered(self) -> list[tuple[int, dict[str, str]]]:
        """Path by path, each in its order, as far as the table tells."""
        columns = self._columns
        paths = list(dict.fromkeys(cell.get(columns.path or "") for _, cell in self._cells))

        def place(entry: tuple[int, dict[str, str]]) -> tuple[int, int, float, str]:
            path = paths.index(entry[1].get(columns.path or ""))
            cell = entry[1][columns.order] if columns.order else ""
            number = _parsed(cell)
            # Dates as 2024-03-01 are in order as text; rows without any keep theirs, first.
            if _is_empty(cell):
                return (path, 0, 0.0, "")
            return (path, 1, math.inf, cell) if number is None else (path, 1, number, "")

        return sorted(self._cells, key=place)

    def _row(self, line: int, cell: Mapping[str, str]) -> MergeRow:
        columns = self._columns
        parents, complete = self._parents(cell)
        name = _name(cell[columns.name]) if columns.name else ""
        if not name:
            if len(parents) < 2:
                raise ConfigError(
                    f"{self._path}: line {line}: expected the name of a model in the column "
                    f"{columns.name or 'child'}, found nothing"
                )
            name = f"{' + '.join(parents)} (line {line})"
        scores = {task: self._number(line, cell, head) for task, head in self.tasks.items()}
        known = [score for score in scores.values() if score is not None]
        given = self._number(line, cell, columns.average)
        return MergeRow(
            line=line,
            name=name,
            parents=parents,
            complete=complete,
            scores=scores,
            average=sum(known) / len(known) if known and len(known) == len(scores) else given,
            gain=self._number(line, cell, columns.gain),
            similarities={head: self._number(line, cell, head) for head in columns.similarities},
            path=cell[columns.path] if columns.path else "",
        )

    def _parents(self, cell: Mapping[str, str]) -> tuple[tuple[str, ...], bool]:
        heads = self._columns.parents or (self._columns.base or "",)
        given = [cell[head] for head in heads]
        if len(heads) == 1:
            text = given[0].strip("[]")
            given = text.split(self._separator) if self._separator else [text]
        names = [_name(one.strip().strip("'\"")) for one in given]
        known = [name for name in names if name]
        unknown = any(one.strip() in _UNKNOWN for one in given)
        return tuple(known), len(known) > 1 and not unknown

    def _found_separator(self) -> str | None:
        heads = self._columns.parents or (self._columns.base or "",)
        if len(heads) > 1:
            return None
        counts = {
            separator: sum(separator in cell[heads[0]] for _, cell in self._cells)
            for separator in _SEPARATORS
        }
        return next((separator for separator, count in counts.items() if count), None)

    def _other_scores(self) -> list[str]:
        """Unknown columns of numbers are tasks. One with few exceptions is one with mistakes."""
        heads = []
        for head in self._columns.other:
            given = [(line, cell[head]) for line, cell in self._cells if not _is_empty(cell[head])]
            wrong = [entry for entry in given if _parsed(entry[1]) is None]
            if len(wrong) * 2 >= len(given):
                continue
            if wrong:
                raise self._no_number(wrong[0][0], head, wrong[0][1])
            heads.append(head)
        return heads

    def _number(self, line: int, cell: Mapping[str, str], head: str | None) -> float | None:
        if head is None or _is_empty(cell[head]):
            return None
        value = _parsed(cell[head])
        if value is None:
            raise self._no_number(line, head, cell[head])
        return value

    def _no_number(self, line: int, head: str, found: str) -> ConfigError:
        return ConfigError(
            f"{self._path}: line {line}, column {head}: expected a number, found {found!r}"
        )


def _name(cell: str) -> str:
    """A model's name, out of the leaderboard's link if it is one; "" for none."""
    link = _LINK.search(cell)
    name = (link[1] if link else cell).strip()
    return "" if _is_empty(name) else name


def _resolved(rows: Sequence[MergeRow]) -> list[MergeRow]:
    """The same rows, parents named as their own rows are.

    Exactly, or in another case, or without the organisation where that leaves one model only.
    """
    exact = {row.name for row in rows}
    loose: dict[str, set[str]] = {}
    for name in exact:
        for spelling in {name.lower(), name.lower().rpartition("/")[2]}:
            loose.setdefault(spelling, set()).add(name)

    def resolve(parent: str) -> str:
        if parent in exact:
            return parent
        for spelling in (parent.lower(), parent.lower().rpartition("/")[2]):
            candidates = loose.get(spelling, set())
            # Two organisations may have models of the same name.
            if len(candidates) == 1:
                (only,) = candidates
                if "/" not in parent or "/" not in only or only.lower() == parent.lower():
                    return only
        return parent

    return [replace(row, parents=tuple(map(resolve, row.parents))) for row in rows]


def _check_descent(path: str | os.PathLike[str], rows: Sequence[MergeRow]) -> None:
    """Nobody is their own ancestor."""
    parents: dict[str, set[str]] = {}
    lines: dict[str, int] = {}
    for row in rows:
        parents.setdefault(row.name, set()).update(row.parents)
        lines.setdefault(row.name, row.line)
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        # A circle begins anywhere: here with the first of its models in the table.
        circle = error.args[1][:-1]
        start = min(range(len(circle)), key=lambda place: lines[circle[place]])
        circle = [*circle[start:], *circle[:start], circle[start]]
        raise ConfigError(
            f"{path}: line {lines[circle[0]]}: expected a family, found {circle[0]} to be its own "
            f"ancestor: {' -> '.join(circle)}"
        ) from None
