"""What is ahead, for a terminal: children that could be made, and merges worth making.

Computes nothing.
"""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelkin.previewing import Child, Preview
from modelkin.records import Metric
from modelkin.suggesting import Suggestion, Suggestions

# So many children are shown; there are half as many as the square of the number of models.
CHILDREN = 30


def print_preview(found: Preview, console: Console, *, metric: Metric = "pcc") -> None:
    """Print the children, those of the least kin parents first.

    Args:
        found: the children; those above `CHILDREN` are counted only.
        console: where to.
        metric: the one to show.
    """
    parents = found.parents
    _say(
        console,
        f"compared {parents.compared_parameters:,} of {parents.total_parameters:,} parameters "
        f"({parents.coverage:.1%}) with the base {parents.base}",
    )
    for name in parents.undefined:
        _say(console, f"{name} equals the base: its kinship is undefined", "yellow")
    for name in parents.strangers:
        _say(console, f"{name} does not look like a descendant of {parents.base}", "yellow")
    for pair, reason in found.impossible.items():
        _say(console, f"{' × '.join(pair)}: no child: {reason}", "yellow")
    _say(
        console,
        f"children by {found.recipe['merge_method']}, none of them made: their kinship is "
        "predicted, as it is before weights are rounded",
    )
    console.print()
    console.print(_children_table(found, metric))
    console.print()
    more = len(found.children) - CHILDREN
    if more > 0:
        _say(console, f"and {more:,} more: --csv writes all of them, with every model")
    others = "; nearest, mean and furthest of the models that are neither"
    _say(
        console,
        f"to each: the child and its parents{others if len(parents.models) > 2 else ''}; change: "
        "the length of its delta",
    )


def print_suggestions(found: Suggestions, console: Console) -> None:
    """Print the rule, what is not known, and each pair with its reasons."""
    _say(console, found.rule)
    for note in found.notes:
        _say(console, f"{note[0].upper()}{note[1:]}.", "yellow")
    _say(console, f"{len(found.suggestions)} of {found.pairs:,} pairs that were not merged before:")
    for rank, suggestion in enumerate(found.suggestions, start=1):
        console.print()
        _print_suggestion(rank, suggestion, console)


def _print_suggestion(rank: int, found: Suggestion, console: Console) -> None:
    _say(console, f"{rank}. {' × '.join(found.parents)}", "bold")
    for warning in found.warnings:
        _say(console, f"   beware: {warning}", "yellow")
    for reason in found.reasons:
        _say(console, f"   {reason}")


def _children_table(found: Preview, metric: Metric) -> Table:
    table = Table(
        title=f"{metric}, the least kin parents first",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("child", overflow="fold")
    table.add_column("parents", justify="right", no_wrap=True)
    table.add_column("to each", justify="right", no_wrap=True)
    if len(found.parents.models) > 2:
        table.add_column("nearest", overflow="fold")
        table.add_column("mean", justify="right", no_wrap=True)
        table.add_column("furthest", overflow="fold")
    table.add_column("change", justify="right", no_wrap=True)
    for child in found.ranked(metric)[:CHILDREN]:
        table.add_row(*map(Text, _cells(child, metric, len(found.parents.models))))
    return table


def _cells(child: Child, metric: Metric, models: int) -> list[str]:
    to_each = " ".join(
        _value(getattr(child.kinship[parent], metric), metric) for parent in child.parents
    )
    cells = [
        " × ".join(child.parents),
        _value(getattr(child.of_parents, metric), metric),
        to_each,
    ]
    if models > 2:
        others = child.others(metric)
        mean = sum(value for _, value in others) / len(others) if others else None
        nearest, furthest = (
            [f"{_value(value, metric)} {name}" for name, value in (others[0], others[-1])]
            if others
            else ["undef", "undef"]
        )
        cells += [nearest, _value(mean, metric), furthest]
    return [*cells, f"{child.change:.3g}"]


def _value(value: float | None, metric: Metric) -> str:
    if value is None:
        return "undef"
    return f"{value:.3g}" if metric == "ed" else f"{value:.3f}"


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), highlight=False, soft_wrap=True)
