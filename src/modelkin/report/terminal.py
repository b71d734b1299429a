"""The family as rows of a table, for terminals and for whoever makes tables of their own."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from modelkin.analyse import Gain, paired_difference
from modelkin.records import Metric, Similarity
from modelkin.report.family import Family, SamplesOf
from modelkin.state import RunState

# Columns of a terminal that all but the tasks' scores, and all but those and predictions, need.
_WIDTH, _PREDICTED_WIDTH = 86, 12


@dataclass(frozen=True)
class Row:
    """One model of the family, ready to be shown; scores in points where they are shares.

    `kinship` is that of its parents, measured, or predicted and marked with a ~; `predicted` is
    empty unless both are known. `verdict` is by Holm's method over all merges.
    """

    name: str
    generation: int
    parents: tuple[str, ...]
    exploration: bool
    tasks: tuple[float | None, ...]
    average: float | None
    gain: float | None
    gains: Gain | None
    verdict: str
    kinship: str
    predicted: str
    failed: bool


def rows(state: RunState, samples_of: SamplesOf) -> list[Row]:
    """The family in the order in which it grew; gains have intervals where samples are."""
    family = Family(state, samples_of)
    table = []
    for member in state.members.values():
        gains = family.gains.get(member.id)
        measured, predicted = family.measured(member), family.predicted(member)
        both = measured is not None and predicted is not None
        table.append(
            Row(
                name=member.name,
                generation=member.generation,
                parents=tuple(parent.name for parent in state.parents_of(member)),
                exploration=member.exploration,
                tasks=tuple(family.scores(member)),
                average=family.average(member),
                gain=family.gain(member),
                gains=gains,
                verdict=gains.verdict if gains else "",
                kinship=_kinship(measured, family.metric)
                or _kinship(predicted, family.metric, "~"),
                predicted=_kinship(predicted, family.metric) if both else "",
                failed=member.failure is not None,
            )
        )
    return table


def _kinship(found: Similarity | None, metric: Metric, mark: str = "") -> str:
    """The kinship of a child's parents; where one equals the base it is undefined."""
    if found is None:
        return ""
    value = getattr(found, metric)
    return "undefined" if value is None else f"{mark}{value:.2f}"


def terminal_table(
    state: RunState, samples_of: SamplesOf, *, width: int, title: str | None = None
) -> Table:
    """The family as a table for a terminal of `width` columns, after the paper's Table 3.

    Predicted kinship and the tasks' scores are shown where there is room for them.
    """
    family = rows(state, samples_of)
    tasks = Family(state, samples_of).tasks
    room = width - _WIDTH
    predicted = any(row.predicted for row in family) and room >= _PREDICTED_WIDTH
    room -= _PREDICTED_WIDTH if predicted else 0
    shown = tasks if room >= sum(max(len(task), 6) + 3 for task in tasks) else ()
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("parents", no_wrap=True)
    for task in shown:
        table.add_column(task, justify="right", no_wrap=True)
    for column in ("average", "gain"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for column in ("kinship", *(["predicted"] if predicted else []), "gen"):
        table.add_column(column, justify="right", no_wrap=True)
    ranked = state.ranked()
    best = ranked[0].name if ranked else None
    for row in family:
        if row.failed:
            blank = [""] * len(shown)
            table.add_row(row.name, " × ".join(row.parents), *blank, "failed", style="red")
            continue
        table.add_row(
            row.name,
            " × ".join(row.parents),
            *_numbers(row.tasks[: len(shown)]),
            *_numbers([row.average]),
            gain_text(row),
            row.verdict,
            row.kinship,
            *([row.predicted] if predicted else []),
            str(row.generation),
            style="bold green" if row.name == best else None,
        )
    return table


def gain_text(row: Row) -> str:
    """A gain with half the width of its interval: `+0.42 ± 0.90`."""
    if row.gain is None:
        return ""
    if row.gains is None:
        return f"{row.gain:+.2f}"
    interval = row.gains.over_mean
    return f"{row.gain:+.2f} ± {(interval.high - interval.low) / 2:.2f}"


def _numbers(values: Sequence[float | None]) -> list[str]:
    return ["" if value is None else f"{value:.2f}" for value in values]


def failure_lines(state: RunState) -> list[str]:
    """What failed, where and why, a line each."""
    return [
        f"{member.name} failed to {member.failure.stage}: {member.failure.message}"
        for member in state.members.values()
        if member.failure
    ]


def lead_sentence(state: RunState, samples_of: SamplesOf) -> str:
    """Which child is best and how far it leads the best foundation model."""
    family = Family(state, samples_of)
    child, foundation = family.best_child, family.best_foundation
    if child is None or foundation is None:
        return "No child has scores yet."
    average, other = family.average(child), family.average(foundation)
    assert average is not None
    assert other is not None  # only scored members are ranked
    found = paired_difference(samples_of(child), [samples_of(foundation)])
    factor = family.factor
    sure = (
        f"95 % interval {factor * found.low:+.2f} to {factor * found.high:+.2f}: {found.verdict}"
        if found
        else "no interval, as no samples were kept"
    )
    return (
        f"Best child: {child.name} ({family.names(child.parents)}), average {average:.2f}, "
        f"{average - other:+.2f} over the best foundation model {foundation.name} ({sure})."
    )
