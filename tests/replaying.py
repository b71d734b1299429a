"""The paper's data for tests: the package's own, and copies of them that a test may change."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

from modelkin.replay import Paper
from modelkin.replay.disagreements import disagreements

SHIPPED = Path(__file__).parents[1] / "src" / "modelkin" / "replay" / "data"

Change = Callable[[dict[str, str]], None]


def copied(folder: Path) -> Path:
    """A copy of the package's data in a folder."""
    return Path(shutil.copytree(SHIPPED, folder / "data"))


def rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def edit(file: Path, change: Change, **where: str) -> None:
    """Change the one row of a CSV file that has certain values."""
    found = rows(file)
    (row,) = (row for row in found if all(row[key] == value for key, value in where.items()))
    change(row)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def put(column: str, value: str) -> Change:
    """Put a value into a column."""
    return lambda row: row.update({column: value})


def listed(paper: Paper) -> set[str]:
    """All disagreements as lines."""
    return {" | ".join((d.kind, d.where, d.printed, d.found, d.why)) for d in disagreements(paper)}
