"""The course of a run: the best so far, convergence, and what stopping early would have meant."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from modelkin.analyse import convergence, early_stopping, stages
from modelkin.pages import Cell, figure, paragraph, plain, table
from modelkin.report.family import Family

_THRESHOLDS = (0.8, 0.85, 0.9, 0.95, 0.98)
_PATIENCES = (1, 2, 3)
_SERIES = 6
_DASHES = ("solid", "dash", "dot")


def best_so_far(families: Sequence[tuple[str, Family]]) -> str:
    """Best average against number of evaluations; runs of one strategy share a colour."""
    traces: list[dict[str, Any]] = []
    strategies = list(dict.fromkeys(str(f.setting("strategy", "")) for _, f in families))
    for name, family in families:
        scored = [member for member in family.state.members.values() if member.scorecard]
        averages = [family.average(member) or 0.0 for member in scored]
        strategy = str(family.setting("strategy", ""))
        kind = strategies.index(strategy)
        label = name if strategy in ("", name) else f"{name} ({strategy})"
        count = list(range(1, len(scored) + 1))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": count,
                "y": list(accumulate(averages, max)),
                "line": {
                    "shape": "hv",
                    "color": f"@series{kind % _SERIES + 1}",
                    # Runs that begin alike lie upon each other.
                    "dash": _DASHES[kind % len(_DASHES)],
                    "width": 2.5,
                },
                "name": plain(label) if len(families) > 1 else "best so far",
                "hovertemplate": "best of %{x} evaluations: %{y:.2f}<extra></extra>",
            }
        )
        if len(families) == 1:
            traces += _each_model(family, averages)
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": "evaluations"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "average score"}},
        "hovermode": "closest",
    }
    said = ""
    if len(families) == 1:
        said = _stages(families[0][1], layout)
    return said + figure(
        traces, layout, label="Best average so far against the number of evaluations"
    )


def _each_model(family: Family, averages: Sequence[float]) -> list[dict[str, Any]]:
    scored = [member for member in family.state.members.values() if member.scorecard]
    traces = []
    for name, explored, marker in (
        ("each model", False, {"color": "@muted", "size": 6}),
        ("by exploration", True, {"color": "@exploration", "size": 7, "symbol": "diamond"}),
    ):
        own = [n for n, member in enumerate(scored) if member.exploration == explored]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [n + 1 for n in own],
                "y": [averages[n] for n in own],
                "marker": marker,
                "hovertext": [plain(scored[n].name) for n in own],
                "hovertemplate": "%{hovertext}: %{y:.2f}<extra></extra>",
                "name": name,
                "showlegend": bool(own),
            }
        )
    return traces


def _stages(family: Family, layout: dict[str, Any]) -> str:
    path = [family.average(member) or 0.0 for member in family.path]
    if not path:
        return ""
    found = stages(path)
    if found.saturation is None:
        return paragraph(f"No saturation stage in these {len(path)} merges ({found.rule}).")
    scored = [member for member in family.state.members.values() if member.scorecard]
    first = family.path[found.saturation]
    layout["shapes"] = [
        {
            "type": "line",
            "x0": scored.index(first) + 1,
            "x1": scored.index(first) + 1,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": "@muted", "dash": "dot", "width": 1.5},
        }
    ]
    return paragraph(
        f"The improving stage ends and saturation begins with merge {found.saturation + 1} of "
        f"{len(path)}, {first.name} (the dotted line; {found.rule})."
    )


def converging(family: Family) -> str:
    """Mean kinship among the k best after each generation."""
    state, k = family.state, int(family.setting("k", 3))
    ranked = [[m.id for m in state.ranked(g)[:k]] for g in range(state.generation + 1)]
    means = convergence(ranked, lambda one, other: state.similarity(one, other, family.metric))
    if not any(mean is not None for mean in means):
        return paragraph("The kinship of the best models is not known.")
    return paragraph(
        f"Mean kinship ({family.metric}) among the {k} best models after each generation. When "
        "it nears that of equal models, merging them changes little."
    ) + figure(
        [
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": list(range(len(means))),
                "y": means,
                "hovertemplate": "generation %{x}: %{y:.3f}<extra></extra>",
                "showlegend": False,
            }
        ],
        {
            "xaxis": {"title": {"text": "generation"}, "dtick": max(1, len(means) // 12)},
            "yaxis": {"title": {"text": f"kinship of the {k} best"}},
        },
        label="Kinship among the best models, generation by generation",
        height=320,
    )


def stopping_early(family: Family) -> str:
    """What thresholds of the parents' kinship would have saved, and lost."""
    kinship = [family.kinship(member) for member in family.path]
    scores = [family.average(member) or 0.0 for member in family.path]
    known = sorted(value for value in kinship if value is not None)
    if not known:
        return paragraph("The kinship of the parents is not known.")
    distance = family.metric == "ed"
    # Distances have no scale of their own: thresholds are where this path's lie.
    thresholds = (
        [known[int(share * (len(known) - 1))] for share in (0.05, 0.1, 0.2, 0.3, 0.5)]
        if distance
        else _THRESHOLDS
    )
    found = early_stopping(kinship, scores, thresholds, _PATIENCES, distance=distance)
    lines: list[list[Cell]] = [
        [
            one.threshold,
            one.patience,
            "never" if one.stops_after is None else family.path[one.stops_after].name,
            one.saved,
            100 * one.saved_share,
            one.lost,
        ]
        for one in found
    ]
    return paragraph(
        f"Had the run stopped once the kinship ({family.metric}) of the parents was "
        f"{'below' if distance else 'above'} a threshold for so many merges in a row: the merges "
        "that would have been saved, and what the best average would have lost."
    ) + table(
        ["threshold", "patience", "stops after", "merges saved", "saved %", "average lost"],
        lines,
        name="early-stopping",
    )
