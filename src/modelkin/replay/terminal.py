"""A replay on a terminal, narrow or wide. Knows texts and tables, not what they mean."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from modelkin.replay.shown import Cell, Part, Table

# Sentences in columns are no longer readable on a narrower terminal.
ROOM_FOR_SENTENCES = 120
# Between columns.
GAP = 2
# Cells up to this width are kept on one line.
SHORT = 16


def print_parts(parts: Sequence[Part], console: Console) -> None:
    """Print everything in order."""
    for part in parts:
        console.print(Text(f"\n{part.title}", style="bold"))
        for text in part.texts:
            console.print(Text(text))
        for table in part.tables:
            console.print()
            _print_table(table, console)


def _print_table(table: Table, console: Console) -> None:
    widths = [
        _least_width([head, *map(_text, cells)])
        for head, cells in zip(table.heads, zip(*table.rows, strict=True), strict=True)
    ]
    least = sum(widths) + GAP * len(widths)
    if console.width < max(least, ROOM_FOR_SENTENCES if table.wordy else 0):
        for position, row in enumerate(table.rows):
            _print_lines(table.heads, row, console, table.marks.get(position))
        return
    shown = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for position, (head, width) in enumerate(zip(table.heads, widths, strict=True)):
        numbers = all(not isinstance(row[position], str) for row in table.rows)
        shown.add_column(head, justify="right" if numbers else "left", min_width=width)
    for position, row in enumerate(table.rows):
        shown.add_row(*map(_text, row), style=_style(table.marks.get(position)))
    console.print(shown)


def _least_width(texts: Sequence[str]) -> int:
    """That of the longest word, or of the whole texts if they are short ones below a head."""
    word = max((cell_len(word) for text in texts for word in text.split()), default=0)
    whole = max(map(cell_len, texts[1:]), default=0)
    return max(word, whole) if whole <= SHORT else word


def _print_lines(
    heads: Sequence[str], row: Sequence[Cell], console: Console, mark: str | None
) -> None:
    """One row as a few lines: what has no width for columns is read from top to bottom."""
    first, *rest = ((head, _text(cell)) for head, cell in zip(heads, row, strict=True))
    line = Text(f"{first[0]} {first[1]}: ", style="bold")
    line.append(
        "; ".join(f"{head} {cell}" for head, cell in rest if cell), style=_style(mark) or "none"
    )
    console.print(line)


def _style(mark: str | None) -> str | None:
    return {"failed": "red", "best": "green"}.get(mark or "")


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.2f}" if abs(cell) >= 10 else f"{cell:.3f}"
    return str(cell)
