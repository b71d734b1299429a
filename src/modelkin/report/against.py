"""What goes with kinship: gains, and how differently the parents do their tasks."""

from collections.abc import Callable, Mapping
from itertools import combinations
from statistics import mean
from typing import Any

from modelkin.analyse import Correlation, correlate, fit_line, task_difference
from modelkin.heatmap import LABELS
from modelkin.pages import Cell, figure, listing, paragraph, plain, table
from modelkin.records import METRICS, Metric
from modelkin.report.family import Family
from modelkin.state import Member

_TRACES = 4  # of `_traces`

Point = tuple[Member, float, float]
"""A merge, the kinship of its parents, and what is held against it."""


def gain_against_kinship(family: Family) -> str:
    """Each merge as a point, the fit with its interval, and the correlations as a table."""
    return paragraph(
        "Each point is a merge: its parents' kinship and what the child gained over their mean."
    ) + _against(
        family,
        family.gain,
        "gain",
        {"gain": float, "|gain|": abs},
        name="correlations",
        label="Gain of each merge against the kinship of its parents",
    )


def difference_against_kinship(family: Family) -> str:
    """The same of the parents' mean difference over tasks (paper App. E)."""
    return paragraph(
        "Each point is a merge: its parents' kinship, and how differently they do their tasks, "
        "the mean over tasks of the difference of their scores, whichever is ahead."
    ) + _against(
        family,
        lambda member: _difference(family, member),
        "task difference",
        {"task difference": float},
        name="task-differences",
        label="Task difference of each merge's parents against their kinship",
    )


def _difference(family: Family, member: Member) -> float | None:
    """The mean over the pairs of a merge's parents, on the report's scale."""
    cards = [parent.scorecard for parent in family.state.parents_of(member)]
    scores = [{task: one.value for task, one in card.scores.items()} for card in cards if card]
    if len(scores) < len(cards) or any(set(one) != set(scores[0]) for one in scores):
        return None
    return family.factor * mean(task_difference(*pair) for pair in combinations(scores, 2))


def _against(
    family: Family,
    value_of: Callable[[Member], float | None],
    axis: str,
    measures: Mapping[str, Callable[[float], float]],
    *,
    name: str,
    label: str,
) -> str:
    """Figure, table and warnings of a value of merges; `measures` are what is correlated of it."""
    metrics = sorted(METRICS, key=lambda metric: metric != family.metric)
    points = {metric: _points(family, metric, value_of) for metric in metrics}
    points = {metric: own for metric, own in points.items() if own}
    if not points:
        return paragraph("There is no merge of which both are known.")
    traces = [trace for metric, own in points.items() for trace in _traces(metric, axis, own)]
    lines: list[list[Cell]] = []
    warnings: list[str] = []
    for metric, own in points.items():
        for of, measure in measures.items():
            x = [kinship for _, kinship, _ in own]
            y = [measure(value) for *_, value in own]
            for kind in ("pearson", "spearman"):
                found = correlate(x, y, kind)
                if found is None:
                    continue
                lines.append(_correlation(metric, of, found))
                if found.decisive is not None:
                    merge = own[found.decisive][0].name
                    warnings.append(
                        f"The {kind} correlation of {metric} with {of} hangs on one merge, "
                        f"{merge}: with any one merge left out it lies between "
                        f"{found.leave_one_out[0]:.2f} and {found.leave_one_out[1]:.2f}."
                    )
    drawn = figure(
        traces,
        {
            "xaxis": {"title": {"text": "kinship of the parents"}},
            "yaxis": {"title": {"text": axis}, "zeroline": True},
            "hovermode": "closest",
        },
        label=label,
        choices={
            LABELS[metric]: range(_TRACES * n, _TRACES * (n + 1)) for n, metric in enumerate(points)
        },
    )
    if not lines:
        return drawn + paragraph("No correlation: fewer than three merges, or all alike.")
    heads = ["similarity", "with", "kind", "n", "r", "low", "high", "p", "least", "most"]
    return "".join(
        (
            drawn,
            table(heads, lines, name=name),
            paragraph(
                "The line is a least-squares fit with the 95 % interval of its mean. Low and high "
                "are the ends of the 95 % bootstrap interval of r; least and most are r when any "
                "one merge is left out. Merges of one run share parents, so p values are too "
                "small: they assume that the points are independent."
            ),
            listing(warnings),
        )
    )


def _correlation(metric: Metric, of: str, found: Correlation) -> list[Cell]:
    return [
        metric,
        of,
        found.kind,
        found.n,
        found.r,
        found.low,
        found.high,
        found.p,
        *found.leave_one_out,
    ]


def _points(
    family: Family, metric: Metric, value_of: Callable[[Member], float | None]
) -> list[Point]:
    found = []
    for member in family.path:
        kinship, value = family.kinship(member, metric), value_of(member)
        if kinship is not None and value is not None:
            found.append((member, kinship, value))
    return found


def _traces(metric: Metric, axis: str, points: list[Point]) -> list[dict[str, Any]]:
    fit = fit_line([kinship for _, kinship, _ in points], [value for *_, value in points])
    x = fit.x_X.tolist() if fit else []
    band: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "x": [*x, *x[::-1]],
        "y": [*fit.high_X.tolist(), *fit.low_X.tolist()[::-1]] if fit else [],
        "fill": "toself",
        "fillcolor": "@band",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "name": "95 % interval of the fit",
    }
    line: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": fit.y_X.tolist() if fit else [],
        "line": {"color": "@accent", "width": 2},
        "hoverinfo": "skip",
        "name": "fit",
    }
    marks = []
    for name, explored, symbol, colour in (
        ("greedy merge", False, "circle", "@accent"),
        ("exploration merge", True, "diamond", "@exploration"),
    ):
        own = [point for point in points if point[0].exploration == explored]
        marks.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [kinship for _, kinship, _ in own],
                "y": [value for *_, value in own],
                "hovertext": [plain(member.name) for member, *_ in own],
                "hovertemplate": (
                    f"%{{hovertext}}<br>{metric} %{{x:.3f}}, {axis} %{{y:+.2f}}<extra></extra>"
                ),
                "marker": {"symbol": symbol, "color": colour, "size": 8},
                "name": name,
                "showlegend": bool(own),
            }
        )
    return [band, line, *marks]
