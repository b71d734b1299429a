"""What was found, as tables for a terminal: kinship, and what models are. Computes nothing.

Axes: N models.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.style import Style
from rich.table import Table
from rich.text import Text

from modelkin.records import METRICS, Metric
from modelkin.similarity import Kinship
from modelkin.tensor_names import Level

if TYPE_CHECKING:
    from modelkin.inspection import Difference, Inspection, Summary

# A matrix of more models is no longer something to read on a terminal.
MOST_MODELS = 20
# So many of the closest and of the most distant pairs are shown instead.
PAIRS = 10
# So many names of tensors that were not compared are shown.
NAMES = 10

Color = tuple[int, int, int]
# Distant to close, both told apart by the colour-blind: RdBu of ColorBrewer for -1 to 1, and
# viridis for distances.
DIVERGING: tuple[Color, ...] = (
    (33, 102, 172),
    (103, 169, 207),
    (209, 229, 240),
    (247, 247, 247),
    (253, 219, 199),
    (239, 138, 98),
    (178, 24, 43),
)
SEQUENTIAL: tuple[Color, ...] = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)


def print_kinship(
    found: Kinship, console: Console, *, level: Level = "model", metric: Metric | None = None
) -> None:
    """Print what was compared, what to beware of, and the tables.

    Args:
        found: of N models; above `MOST_MODELS` pairs are shown instead of the matrices.
        console: where to; its width decides how much of names and digits is shown.
        level: other than "model", one row for each group instead of the matrices.
        metric: show this one only; the pairs are sorted by it (else by "pcc").
    """
    _say(
        console,
        f"compared {found.compared_parameters:,} of {found.total_parameters:,} parameters "
        f"({found.coverage:.1%}) with the base {found.base}",
    )
    if found.left_out:
        _say(console, f"left out: {_first_names(found.left_out)}")
    for tensor, rows in found.rows_left_out.items():
        _say(console, f"{tensor}: left out {rows:,} rows that not all models have")
    for name in found.undefined:
        _say(console, f"{name} equals the base: its kinship is undefined", "yellow")
    for name in found.strangers:
        _say(
            console,
            f"{name} does not look like a descendant of {found.base}: its weights differ from the "
            "base's as much as unrelated ones do, so these similarities may mean nothing",
            "yellow",
        )
    metrics = METRICS if metric is None else (metric,)
    if level != "model":
        console.print(_groups_table(found, level, metrics, console))
    elif len(found.models) > MOST_MODELS:
        _print_pairs(found, metric or "pcc", console)
    else:
        _print_matrices(found, metrics, console)


def shortened(name: str, width: int) -> str:
    """A name of at most `width` characters; what tells names apart is at their ends.

    >>> shortened("mistral-7b-instruct-v0.2", 13)
    'mistra…t-v0.2'
    """
    if len(name) <= width:
        return name
    keep = max(width - 1, 0)
    return name[: keep - keep // 2] + "…" + name[len(name) - keep // 2 :]


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(Text(text, style=style or ""), highlight=False, soft_wrap=True)


def _value_text(value: float | None, metric: Metric, digits: int = 4) -> str:
    if value is None or np.isnan(value):
        return "undef"
    # Distances have no scale of their own: what counts are the leading digits.
    return f"{value:.{digits}g}" if metric == "ed" else f"{value:.{digits}f}"


def _mean_text(found: Kinship, metric: Metric) -> str:
    mean = found.mean(metric)
    return "undefined" if mean is None else _value_text(mean, metric)


def _first_names(names: Sequence[str]) -> str:
    more = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f" and {more:,} more" if more > 0 else "")


# Colours


def _has_colours(console: Console) -> bool:
    # Sixteen colours are the user's own choice, and say nothing of far and near.
    return not console.no_color and console.color_system in ("256", "truecolor")


def _style(value: float | None, metric: Metric, farthest: float) -> Style:
    """Background and foreground, from distant to close; both, so that any terminal will do."""
    if value is None or np.isnan(value):
        return Style(dim=True)
    if metric == "ed":
        background = _between(SEQUENTIAL, 1 - value / farthest if farthest > 0 else 1.0)
    else:
        background = _between(DIVERGING, (value + 1) / 2)
    red, green, blue = background
    foreground = "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#ffffff"
    return Style(color=foreground, bgcolor=f"#{red:02x}{green:02x}{blue:02x}")


def _between(colors: Sequence[Color], position: float) -> Color:
    """The colour at a position from 0 to 1 along the anchors."""
    place = min(max(position, 0.0), 1.0) * (len(colors) - 1)
    first = min(int(place), len(colors) - 2)
    share = place - first
    red, green, blue = (
        round(one + share * (other - one))
        for one, other in zip(colors[first], colors[first + 1], strict=True)
    )
    return (red, green, blue)


# Matrices


def _print_matrices(found: Kinship, metrics: Sequence[Metric], console: Console) -> None:
    short = False
    for metric in metrics:
        matrix_NN = found.matrix(metric)
        width = max(map(cell_len, found.models))
        cells = _cells(matrix_NN, metric, 4)
        heads: Sequence[str] = found.models
        labels: Sequence[str] = found.models
        if width + sum(max(len(cells[0][0]), cell_len(head)) + 2 for head in heads) > console.width:
            # Numbers stand for the names, and fewer digits if that is not enough.
            heads = [str(n) for n in range(1, len(found.models) + 1)]
            label_width = min(width, max(console.width // 3, 12))
            labels = [
                f"{head:>{len(heads[-1])}} {shortened(name, label_width)}"
                for head, name in zip(heads, found.models, strict=True)
            ]
            short = short or label_width < width
            if max(map(cell_len, labels)) + len(heads) * (len(cells[0][0]) + 2) > console.width:
                cells = _cells(matrix_NN, metric, 2)
        room = console.width - max(map(cell_len, labels))
        cell_widths = [max(len(cells[0][0]), cell_len(head)) + 2 for head in heads]
        # What still does not fit is continued below.
        step = len(heads) if sum(cell_widths) <= room else max(room // max(cell_widths), 1)
        for start in range(0, len(heads), step):
            title = f"{metric}, mean {_mean_text(found, metric)}"
            shown = slice(start, start + step)
            console.print()
            console.print(
                _matrix_table(
                    title if start == 0 else f"{metric}, continued",
                    labels,
                    heads[shown],
                    [row[shown] for row in cells],
                    matrix_NN[:, shown],
                    metric,
                    float(matrix_NN.max()) if _has_colours(console) else None,
                )
            )
    if short:
        console.print()
        for n, name in enumerate(found.models, start=1):
            _say(console, f"{n} = {name}")


def _cells(matrix_NN: NDArray[np.float64], metric: Metric, digits: int) -> list[list[str]]:
    """The values as text, all of one width."""
    texts = [[_value_text(value, metric, digits) for value in row] for row in matrix_NN]
    width = max(len(text) for row in texts for text in row)
    return [[text.rjust(width) for text in row] for row in texts]


def _matrix_table(
    title: str,
    labels: Sequence[str],
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
    values: NDArray[np.float64],
    metric: Metric,
    farthest: float | None,
) -> Table:
    """A table without lines, so that colours touch; uncoloured where `farthest` is None."""
    table = Table(box=None, padding=0, pad_edge=False, title=title, title_justify="left")
    table.add_column(no_wrap=True)
    for head in heads:
        table.add_column(Text(f" {head} "), justify="right", no_wrap=True)
    for label, texts, row in zip(labels, cells, values, strict=True):
        table.add_row(
            Text(label),
            *(
                Text(
                    f" {text} ".rjust(cell_len(head) + 2),
                    style="" if farthest is None else _style(float(value), metric, farthest),
                )
                for head, text, value in zip(heads, texts, row, strict=True)
            ),
        )
    return table


# Many models, many groups


def _print_pairs(found: Kinship, metric: Metric, console: Console) -> None:
    matrix_NN = found.matrix(metric)
    one_P, other_P = np.triu_indices(len(found.models), k=1)
    value_P = matrix_NN[one_P, other_P]
    known_P = np.flatnonzero(~np.isnan(value_P))
    sign = 1 if metric == "ed" else -1
    closest_P = known_P[np.argsort(sign * value_P[known_P], kind="stable")]
    _say(
        console,
        f"{len(found.models)} models are too many for a matrix here: --csv writes every pair, "
        "--plot draws them",
    )
    means = ", ".join(f"{name} {_mean_text(found, name)}" for name in METRICS)
    _say(console, f"mean over {len(value_P):,} pairs: {means}")
    for title, chosen_P in (
        (f"closest by {metric}", closest_P[:PAIRS]),
        (f"most distant by {metric}", closest_P[::-1][:PAIRS]),
    ):
        table = Table(title=title, title_justify="left")
        # Names as whole as they are: what is cut may be all that tells them apart.
        table.add_column("model", overflow="fold")
        table.add_column("model", overflow="fold")
        for name in METRICS:
            table.add_column(name, justify="right", no_wrap=True)
        for p in chosen_P:
            i, j = int(one_P[p]), int(other_P[p])
            table.add_row(
                Text(found.models[i]),
                Text(found.models[j]),
                *(
                    _coloured(float(found.matrix(name)[i, j]), name, found, console)
                    for name in METRICS
                ),
            )
        console.print()
        console.print(table)


def _coloured(value: float, metric: Metric, found: Kinship, console: Console) -> Text:
    style = _style(value, metric, float(found.ed_NN.max())) if _has_colours(console) else ""
    return Text(_value_text(value, metric), style=style)


def _groups_table(
    found: Kinship, level: Level, metrics: Sequence[Metric], console: Console
) -> Table:
    groups = found.per(level)
    farthest = max((group.mean("ed") or 0.0 for group in groups.values()), default=0.0)
    colours = _has_colours(console)
    table = Table()
    table.add_column(level, overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    for metric in metrics:
        # Two models have one pair, and its value needs no mean.
        head = metric if len(found.models) == 2 else f"mean {metric}"
        table.add_column(head, justify="right", no_wrap=True)

    def add(name: str, group: Kinship, coloured: bool) -> None:
        cells = []
        for metric in metrics:
            mean = group.mean(metric)
            style = _style(mean, metric, farthest) if coloured else ""
            cells.append(Text(_mean_text(group, metric), style=style))
        table.add_row(Text(name), f"{group.compared_parameters:,}", *cells)

    for name, group in groups.items():
        add(name, group, colours)
    table.add_section()
    add("whole model", found, False)
    return table


# Models, from their headers


def print_inspection(found: "Inspection", console: Console) -> None:
    """Print what each model is, and how each differs from the base."""
    width = max(cell_len(summary.name) for summary in found.summaries)
    for summary in found.summaries:
        _say(console, f"{summary.name.ljust(width)}  {_summary_text(summary)}")
    for difference in found.differences:
        for line in _difference_lines(found.base, difference):
            _say(console, line)
    if found.obstacle:
        _say(console, f"cannot be compared: {found.obstacle}", "yellow")
    elif found.differences:
        _say(console, "their kinship can be measured")


def _summary_text(summary: "Summary") -> str:
    total = max(summary.parameters, 1)
    dtypes = " ".join(
        dtype if len(summary.dtypes) == 1 else f"{dtype} {count / total:.1%}"
        for dtype, count in summary.dtypes.items()
    )
    files = " and ".join(
        f"{count} {kind} {'file' if count == 1 else 'files'}"
        for kind, count in summary.files.items()
    )
    return (
        f"{summary.architecture}, {dtypes}, {summary.parameters:,} parameters, "
        f"{summary.tensors:,} tensors, {decimal(summary.bytes)} in {files}"
    )


def _difference_lines(base: str, found: "Difference") -> list[str]:
    lines = [
        f"{found.name}: has {found.coverage:.1%} of the parameters of {base} in the same shapes, "
        f"{found.compared_parameters:,}"
    ]
    if not found.architecture:
        lines.append("  another architecture")
    for reason in [*found.reshaped.values()][:NAMES]:
        lines.append(f"  other shape: {reason}")
    if len(found.reshaped) > NAMES:
        lines.append(f"  other shape: {len(found.reshaped) - NAMES:,} more")
    lines += [
        f"  left out: {rows:,} rows of {name}, a larger vocabulary"
        for name, rows in found.rows_left_out.items()
    ]
    if found.missing:
        lines.append(f"  missing: {_first_names(found.missing)}")
    if found.extra:
        lines.append(f"  not in {base}: {_first_names(found.extra)}")
    return lines
