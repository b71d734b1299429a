"""Parts of a page: figures, tables, text. Each is a string of HTML.

Knows nothing of the page around them, but for the classes that `page.css` and `page.js` look for.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

Cell = str | float | int | None
# So many significant digits has the largest number of a column.
_DIGITS = 4
_MOST_DECIMALS = 6


def plain(text: str) -> str:
    """A text for a Plotly figure, which takes <b> and the like for markup, but not entities.

    >>> plain("<b>")
    '&lt;b&gt;'
    """
    return escape(text, quote=False)


def paragraph(text: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def facts(found: Mapping[str, str]) -> str:
    """What a thing is called and what it is, side by side and large."""
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in found.items()
    )
    return f'<dl class="facts">{pairs}</dl>'


def listing(lines: Sequence[str]) -> str:
    """Plain lines as a list; nothing where there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def preformatted(text: str) -> str:
    """A file's text as it is, in a box of its own that scrolls."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def section(title: str, *html: str) -> str:
    """A part of the page under a heading; no two of a page are called alike."""
    return (
        f'<section id="{escape(_anchor(title))}"><h2>{escape(title)}</h2>{"".join(html)}</section>'
    )


def contents(titles: Sequence[str]) -> str:
    """Links to sections of the same page, by their titles."""
    links = " ".join(
        f'<a href="#{escape(quote(_anchor(title)))}">{escape(title)}</a>' for title in titles
    )
    return f"<nav>{links}</nav>"


def _anchor(title: str) -> str:
    """An id has no spaces, and must not be that of a figure."""
    return "part-" + "-".join(title.split())


def folded(title: str, *html: str) -> str:
    """What is shown when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{''.join(html)}</details>"


def figure(
    data: Sequence[Mapping[str, Any]],
    layout: Mapping[str, Any],
    *,
    label: str,
    height: int = 420,
    width: int = 0,
    choices: Mapping[str, Sequence[int]] | None = None,
    name: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """A Plotly figure that takes the page's theme and width.

    A colour `@ink`, `@muted`, `@line`, `@accent`, `@best`, `@exploration`, `@foundation`,
    `@failed`, `@band` or `@series1` to `@series6` is the theme's. Texts in it are Plotly's:
    see `plain`.

    Args:
        data: traces; numpy arrays are fine, NaN is a gap.
        layout: without colours and fonts, which are the theme's.
        label: what it shows, for who cannot see it.
        height: in pixels.
        width: in pixels; a narrower page scrolls the figure in a box of its own.
        choices: label to the positions of the traces that are shown when it is chosen; traces in
            none of them always are. The first is chosen at the start.
        name: an id, for a page's own script.
        extra: what else that script needs, beside "data" and "layout".
    """
    spec = {"data": list(data), "layout": dict(layout), **(extra or {})}
    menu = ""
    if choices:
        spec["choices"] = [list(shown) for shown in choices.values()]
        options = "".join(
            f'<option value="{position}">{escape(choice)}</option>'
            for position, choice in enumerate(choices)
        )
        menu = f'<label class="choice">Show <select>{options}</select></label>'
    identity = f' id="{escape(name)}"' if name else ""
    return (
        f'<div class="figure"{identity}>{menu}'
        f'<div class="wide"><div class="plot" role="img" aria-label="{escape(label)}" '
        f'style="height:{height}px;min-width:{width}px"></div></div>'
        f'<script type="application/json">{_json(spec)}</script></div>'
    )


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    name: str,
    marks: Mapping[int, str] | None = None,
) -> str:
    """A table that is sorted by a click on its heads and saved as `name`.csv.

    Numbers of a column have the same decimals; the CSV file has all their digits. `None` is
    nothing, and last in every order.

    Args:
        heads: of the columns.
        rows: cells; texts are escaped.
        name: of the file, without its ending.
        marks: position of a row to its CSS class: "best", "failed", "exploration".
    """
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(heads)
    decimals = [_decimals(column) for column in columns]
    numeric = [any(isinstance(cell, int | float) for cell in column) for column in columns]
    head = "".join(
        f'<th scope="col"{_NUMBER if number else ""}><button type="button">{escape(text)}'
        "</button></th>"
        for text, number in zip(heads, numeric, strict=True)
    )
    body = []
    for position, row in enumerate(rows):
        mark = (marks or {}).get(position)
        cells = "".join(
            _cell(cell, places, number)
            for cell, places, number in zip(row, decimals, numeric, strict=True)
        )
        kind = f' class="{escape(mark)}"' if mark else ""
        body.append(f"<tr{kind}>{cells}</tr>")
    return (
        f'<div class="table" data-name="{escape(name)}"><div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        '<button type="button" class="csv">Save as CSV</button></div>'
    )


_NUMBER = ' class="number"'


def _cell(cell: Cell, decimals: int, number: bool) -> str:
    kind = _NUMBER if number else ""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return f"<td{kind}></td>"
    if isinstance(cell, str):
        return f"<td{kind}>{escape(cell)}</td>"
    text = f"{cell:.{decimals}f}" if isinstance(cell, float) else str(cell)
    if cell and not float(text):
        text = f"{cell:.0e}"  # small is not nothing
    return f'<td{kind} data-value="{cell!r}">{text}</td>'


def _decimals(column: Sequence[Cell]) -> int:
    """Decimals that show the largest number of a column with four digits, but no idle zeros."""
    numbers = [cell for cell in column if isinstance(cell, float) and math.isfinite(cell)]
    largest = max(map(abs, numbers), default=0.0)
    if largest == 0:
        return 0
    most = min(max(_DIGITS - 1 - math.floor(math.log10(largest)), 0), _MOST_DECIMALS)
    return next(
        places
        for places in range(most + 1)
        if all(round(number, places) == round(number, most) for number in numbers)
    )


def _json(value: object) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(_plain_values(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _plain_values(value: Any) -> Any:
    """Arrays as lists, and what is no number as nothing: JSON knows neither."""
    if isinstance(value, Mapping):
        return {str(key): _plain_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_values(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain_values(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
