"""What a table of merges says, as tables for a terminal. Computes nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modelkin.community.findings import Findings, MergeFinding, PathFinding

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# More merges than these are not read on a terminal; so many of the best and worst are shown.
MOST_MERGES = 40
ENDS = 10
_SHORT = {"gain": "gain", "size of gain": "|gain|", "task difference": "tasks"}


def print_findings(found: Findings, console: "Console") -> None:
    """Print what was read, the merges, and what goes with their gains."""
    for line in (*_overview(found), *found.notices):
        _say(console, line)
    if found.merges:
        for title, merges in _shown(found.merges):
            console.print()
            console.print(_merge_table(title, merges))
    if found.kinship:
        console.print()
        console.print(_kinship_table(found))
        carried = dict.fromkeys(
            (one.similarity, one.carried_by) for one in found.kinship if one.carried_by
        )
        for similarity, merge in carried:
            _say(console, f"{similarity}: one merge, {merge}, carries a correlation marked * alone")
    for path in found.paths:
        console.print()
        _print_path(path, console)
    if found.paths:
        _say(console, f"saturation: {found.paths[0].stages.rule}")


def _overview(found: Findings) -> list[str]:
    gains = [merge.gain for merge in found.merges if merge.gain is not None]
    computed = sum(merge.computed for merge in found.merges)
    inbred = [merge for merge in found.merges if merge.shared_ancestors]
    lines = [
        f"{found.models:,} models, {len(found.merges):,} of them merges; the gain is known of "
        f"{len(gains):,}, {computed:,} by the averages of child and parents and "
        f"{len(gains) - computed:,} as the table gives it",
        "the average is "
        + (f"the mean of {', '.join(found.tasks)}" if found.tasks else "as the table gives it"),
    ]
    if gains:
        lines.append(
            f"merges above the mean of their parents: {sum(gain > 0 for gain in gains):,}, below: "
            f"{sum(gain < 0 for gain in gains):,}; the mean gain is {sum(gains) / len(gains):+.2f}"
        )
    if inbred:
        lines.append(
            f"merges of parents with a common ancestor in the table: {len(inbred):,}, of parents "
            "one of which descends from the other: "
            f"{sum(bool(set(one.parents) & set(one.shared_ancestors)) for one in inbred):,}"
        )
    return lines


def _shown(merges: Sequence[MergeFinding]) -> list[tuple[str, Sequence[MergeFinding]]]:
    if len(merges) <= MOST_MERGES:
        return [("merges", merges)]
    ranked = sorted(
        (merge for merge in merges if merge.gain is not None),
        key=lambda merge: -(merge.gain or 0.0),
    )
    return [
        (f"the {ENDS} largest gains", ranked[:ENDS]),
        (f"the {ENDS} smallest gains", ranked[-ENDS:]),
    ]


def _merge_table(title: str, merges: Sequence[MergeFinding]) -> "Table":
    from rich.text import Text

    names = list(dict.fromkeys(name for merge in merges for name in merge.similarities))
    table = _table(title)
    table.add_column("merge, and its parents", overflow="fold")
    for head in ("average", "gain", *names, "shared"):
        table.add_column(Text(head), justify="right", overflow="fold")
    for merge in merges:
        gain = "" if merge.gain is None else f"{merge.gain:+.2f}"
        table.add_row(
            Text(merge.name).append("\n  " + " × ".join(merge.parents), style="dim"),
            "" if merge.average is None else f"{merge.average:.2f}",
            gain if merge.computed or not gain else f"({gain})",
            *(_number(merge.similarities.get(name)) for name in names),
            str(len(merge.shared_ancestors) or ""),
        )
    table.caption = (
        "(gain) as given; by descent: kinship expected from the family tree; "
        "shared: ancestors in common"
    )
    return table


def _kinship_table(found: Findings) -> "Table":
    from rich.text import Text

    table = _table("kinship of the parents against the gain, and against their difference by task")
    table.add_column("similarity", overflow="fold")
    table.add_column("with", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for head in ("n", "r", "p", "95 %", "one left out"):
        table.add_column(head, justify="right", no_wrap=True)
    said = ""
    for one in found.kinship:
        own = one.correlation
        table.add_row(
            Text("" if one.similarity == said else one.similarity),
            _SHORT[one.of],
            own.kind,
            str(own.n),
            f"{own.r:+.2f}{'*' if one.carried_by else ' '}",
            f"{own.p:.3f}" if own.p >= 0.001 else "<.001",
            f"{own.low:+.2f} {own.high:+.2f}",
            "{:+.2f} {:+.2f}".format(*own.leave_one_out),
        )
        said = one.similarity
    return table


def _print_path(path: PathFinding, console: "Console") -> None:
    from rich.text import Text

    own = path.stages
    named = f"path {path.name}" if path.name else "as a path, in this order"
    where = (
        "no saturation"
        if own.saturation is None
        else f"saturation begins with merge {own.saturation + 1}, {path.merges[own.saturation]}"
    )
    _say(
        console,
        f"{named}: {len(path.merges)} merges, best average {own.best_so_far[0]:.2f} to "
        f"{own.best_so_far[-1]:.2f}; {where}",
    )
    if not path.stops:
        return
    table = _table("stopping when parents are close")
    table.add_column("similarity", overflow="fold")
    for head in ("above", "in a row", "stops after", "merges saved", "best lost"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, stops in path.stops.items():
        for index, stop in enumerate(stops):
            never = stop.stops_after is None
            table.add_row(
                Text("" if index else name),
                f"{stop.threshold:g}",
                str(stop.patience),
                "never" if stop.stops_after is None else str(stop.stops_after + 1),
                "" if never else f"{stop.saved} ({stop.saved_share:.0%})",
                "" if never else f"{stop.lost:.2f}",
            )
    console.print(table)


def _say(console: "Console", line: str) -> None:
    from rich.text import Text

    # Names may look like markup.
    console.print(Text(line), soft_wrap=True)


def _table(title: str) -> "Table":
    from rich import box
    from rich.table import Table

    # Without lines between columns there is room for names.
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
