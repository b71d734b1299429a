"""What a run found, for people: rows of a table, a family tree, one self-contained page.

Knows the state and the samples; decides nothing and computes no statistics of its own.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rich.table import Table

from modelkin.analyse import Difference, Samples, paired_difference
from modelkin.errors import DiskFullError, is_disk_full
from modelkin.records import Metric
from modelkin.state import Member, RunState

SamplesOf = Callable[[Member], Samples]


@dataclass(frozen=True)
class Row:
    """One model of the family, ready to be shown; scores on the scale of `scale`."""

    name: str
    generation: int
    parents: tuple[str, ...]
    exploration: bool
    tasks: tuple[float | None, ...]
    average: float | None
    gain: float | None
    interval: Difference | None
    kinship: str
    failed: bool


def scale(state: RunState) -> float:
    """100 where all scores lie between 0 and 1, so that gains read in points; else 1."""
    values = [
        score.value
        for member in state.members.values()
        if member.scorecard
        for score in member.scorecard.scores.values()
    ]
    return 100.0 if values and all(0 <= value <= 1 for value in values) else 1.0


def tasks(state: RunState) -> tuple[str, ...]:
    """The tasks of the run's protocol, in its order."""
    for member in state.members.values():
        if member.scorecard:
            return tuple(member.scorecard.scores)
    return ()


def rows(state: RunState, samples_of: SamplesOf) -> list[Row]:
    """The family in the order in which it grew; gains have intervals where samples are."""
    factor, columns = scale(state), tasks(state)
    samples = {member.id: samples_of(member) for member in state.members.values()}
    metric: Metric = state.started.settings["metric"] if state.started else "pcc"

    def scaled(value: float | None) -> float | None:
        return None if value is None else factor * value

    table: list[Row] = []
    for member in state.members.values():
        parents = state.parents_of(member)
        gain = state.gain(member)
        card = member.scorecard
        table.append(
            Row(
                name=member.name,
                generation=member.generation,
                parents=tuple(parent.name for parent in parents),
                exploration=member.exploration,
                tasks=tuple(scaled(card.scores[t].value) if card else None for t in columns),
                average=scaled(member.average),
                gain=scaled(gain),
                interval=difference(samples, member, parents, factor) if gain is not None else None,
                kinship=_kinship(state, parents, metric),
                failed=member.failure is not None,
            )
        )
    return table


def _kinship(state: RunState, parents: Sequence[Member], metric: Metric) -> str:
    """The kinship of a child's parents; where one equals the base it is undefined."""
    if not parents:
        return ""
    if frozenset(parent.id for parent in parents) not in state.kinship:
        return ""
    value = state.similarity(parents[0].id, parents[1].id, metric)
    return "undefined" if value is None else f"{value:.2f}"


def difference(
    samples: dict[str, Samples], member: Member, others: Sequence[Member], factor: float
) -> Difference | None:
    """The member's average minus the others' mean, in the table's units."""
    found = paired_difference(samples[member.id], [samples[other.id] for other in others])
    return found and Difference(factor * found.value, factor * found.low, factor * found.high)


def terminal_table(
    state: RunState, samples_of: SamplesOf, *, width: int, title: str | None = None
) -> Table:
    """The family as a table for a terminal of `width` columns, after the paper's Table 3.

    The tasks' scores are shown where there is room for them.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("parents", no_wrap=True)
    shown = tasks(state)
    if width < 72 + sum(max(len(task), 6) + 3 for task in shown):
        shown = ()
    for task in shown:
        table.add_column(task, justify="right", no_wrap=True)
    for column in ("average", "gain", "kinship", "gen"):
        table.add_column(column, justify="right", no_wrap=True)
    ranked = state.ranked()
    best = ranked[0].name if ranked else None
    for row in rows(state, samples_of):
        if row.failed:
            blank = [""] * len(shown)
            table.add_row(row.name, " × ".join(row.parents), *blank, "failed", style="red")
            continue
        table.add_row(
            row.name,
            " × ".join(row.parents),
            *(_number(value) for value in row.tasks[: len(shown)]),
            _number(row.average),
            gain_text(row),
            row.kinship,
            str(row.generation),
            style="bold green" if row.name == best else None,
        )
    return table


def gain_text(row: Row) -> str:
    """A gain with half the width of its interval: `+0.42 ± 0.90`."""
    if row.gain is None:
        return ""
    if row.interval is None:
        return f"{row.gain:+.2f}"
    return f"{row.gain:+.2f} ± {(row.interval.high - row.interval.low) / 2:.2f}"


def failure_lines(state: RunState) -> list[str]:
    """What failed, where and why, a line each."""
    return [
        f"{member.name} failed to {member.failure.stage}: {member.failure.message}"
        for member in state.members.values()
        if member.failure
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def lead_sentence(state: RunState, samples_of: SamplesOf) -> str:
    """Which child is best and how far it leads the best foundation model."""
    ranked = state.ranked()
    children = [member for member in ranked if member.parents]
    foundations = [member for member in ranked if not member.parents]
    if not children or not foundations:
        return "No child has scores yet."
    child, foundation = children[0], foundations[0]
    assert child.average is not None
    assert foundation.average is not None
    parents = " × ".join(parent.name for parent in state.parents_of(child))
    factor = scale(state)
    samples = {member.id: samples_of(member) for member in (child, foundation)}
    found = difference(samples, child, [foundation], factor)
    lead = factor * (child.average - foundation.average)
    sure = (
        f"95 % interval {found.low:+.2f} to {found.high:+.2f}: {found.verdict}"
        if found
        else "no interval, as no samples were kept"
    )
    return (
        f"Best child: {child.name} ({parents}), average {factor * child.average:.2f}, "
        f"{lead:+.2f} over the best foundation model {foundation.name} ({sure})."
    )


# The page. Sizes are in pixels.
_COLUMN, _LINE, _RADIUS = 150, 34, 7


def family_tree(state: RunState) -> str:
    """The family as an SVG: generations from left to right, lines from parents to children."""
    places: dict[str, tuple[int, int]] = {}
    generations = range(state.generation + 1)
    for generation in generations:
        members = [m for m in state.members.values() if m.generation == generation]
        for line, member in enumerate(members):
            places[member.id] = (20 + _COLUMN * generation, 46 + _LINE * line)
    best = next((member.id for member in state.ranked()), None)
    lines, marks = [], []
    for member in state.members.values():
        x, y = places[member.id]
        for parent in member.parents:
            px, py = places[parent]
            middle = (px + x) // 2
            lines.append(
                f'<path d="M{px},{py} C{middle},{py} {middle},{y} {x},{y}" class="line'
                f'{" exploration" if member.exploration else ""}"/>'
            )
        kind = "foundation" if not member.parents else "child"
        kind += " failed" if member.failure else ""
        kind += " best" if member.id == best else ""
        average = "" if member.average is None else f" {scale(state) * member.average:.1f}"
        marks.append(
            f'<circle cx="{x}" cy="{y}" r="{_RADIUS}" class="{kind}"/>'
            f'<text x="{x + _RADIUS + 4}" y="{y + 4}">{escape(member.name)}{average}</text>'
        )
    heads = [
        f'<text x="{20 + _COLUMN * g}" y="18" class="head">'
        f"{'foundations' if g == 0 else f'generation {g}'}</text>"
        for g in generations
    ]
    width = _COLUMN * (state.generation + 1) + 20
    height = max((y for _, y in places.values()), default=46) + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" role="img"><title>Family tree</title><style>{_TREE_STYLE}</style>'
        '<rect width="100%" height="100%"/>'
        f"{''.join(heads)}{''.join(lines)}{''.join(marks)}</svg>"
    )


_TREE_STYLE = """
rect { fill: #fff; }
text { font: 13px system-ui, sans-serif; fill: #444; paint-order: stroke; stroke: #fff;
  stroke-width: 4px; }
text.head { fill: #888; }
path.line { fill: none; stroke: #b9c2cc; stroke-width: 1.3; }
path.exploration { stroke: #d08700; stroke-dasharray: 4 3; }
circle { fill: #4a90c2; }
circle.foundation { fill: #777; }
circle.failed { fill: #c0392b; }
circle.best { fill: #2e9e5b; stroke: #1c6b3c; stroke-width: 3; }
"""

_PAGE_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #222; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.best { font-weight: bold; color: #1c6b3c; }
tr.failed { color: #c0392b; }
"""


def write_report(path: Path, state: RunState, samples_of: SamplesOf) -> None:
    """Write the page; an older one is replaced in one step.

    Raises:
        DiskFullError: the older page, if any, is untouched.
    """
    page = _page(state, samples_of)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(page)
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except OSError as error:
        Path(partial).unlink(missing_ok=True)
        if is_disk_full(error):
            raise DiskFullError(f"{path}: the disk filled up while writing it") from error
        raise


def _page(state: RunState, samples_of: SamplesOf) -> str:
    heads = ["model", "parents", *tasks(state), "average", "gain", "kinship", "generation"]
    ranked = state.ranked()
    best = ranked[0].name if ranked else None
    body = []
    for row in rows(state, samples_of):
        cells = [row.name, " × ".join(row.parents)]
        if row.failed:
            cells += [""] * len(row.tasks) + ["failed", "", "", str(row.generation)]
        else:
            cells += [_number(value) for value in (*row.tasks, row.average)]
            cells += [gain_text(row), row.kinship, str(row.generation)]
        kind = "failed" if row.failed else "best" if row.name == best else ""
        body.append(
            f'<tr class="{kind}">' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
        )
    environment = state.started.environment if state.started else {}
    stopped = state.stopped or "it is still going on"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>modelkin: a family of models</title><style>{_PAGE_STYLE}</style></head><body>
<h1>A family of models</h1>
<p>{escape(lead_sentence(state, samples_of))}</p>
<p>{len(state.members)} models in {state.generation} generations,
{state.seconds / 60:.1f} minutes of merging, evaluating and measuring. Stopped because:
{escape(stopped)}.</p>
<p>The best child is chosen by the same scores that are shown, so its own are optimistic: score it
on items that were not used here before you believe them.</p>
<h2>Family tree</h2>
<div class="wide">{family_tree(state)}</div>
<h2>Models</h2>
<p>Gains are over the mean of the parents, with half the width of the 95 % interval of a paired
bootstrap over the evaluation items. Kinship is that of the parents.</p>
<div class="wide"><table><thead><tr>{"".join(f"<th>{escape(h)}</th>" for h in heads)}</tr></thead>
<tbody>{"".join(body)}</tbody></table></div>
{"".join(f"<p>{escape(line)}</p>" for line in failure_lines(state))}
<h2>Made with</h2>
<p>{escape(", ".join(f"{name} {found}" for name, found in environment.items()))}</p>
</body></html>
"""
