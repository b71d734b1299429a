"""What can be shown, on a terminal and on a page alike: parts of texts and tables.

Knows neither terminals nor HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from modelkin.analyse import Correlation

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """A table; `wordy` if its last columns are sentences, `marks` as of `pages.table`."""

    name: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    wordy: bool = False
    marks: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A heading, paragraphs and tables; `key` names it."""

    key: str
    title: str
    texts: Sequence[str]
    tables: Sequence[Table]


R_HEADS = ("r", "p", "n", "95 % interval", "one left out")


def r_cells(found: Correlation) -> list[Cell]:
    """The cells of `R_HEADS`."""
    one, other = found.leave_one_out
    return [
        r_text(found.r),
        p_text(found.p),
        found.n,
        f"{r_text(found.low)}, {r_text(found.high)}",
        f"{r_text(one)}, {r_text(other)}",
    ]


def r_text(r: float) -> str:
    """A correlation with two digits."""
    # Adding zero makes -0.0 positive.
    return f"{round(r, 2) + 0.0:.2f}"


def p_text(p: float) -> str:
    """A p value with three decimals."""
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"
