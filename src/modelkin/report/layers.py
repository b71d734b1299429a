"""Kinship and change layer by layer, from the per-tensor statistics of a run.

Axes: L layers, and what is in none.
"""

from typing import Any

from modelkin.analyse import bifurcation
from modelkin.gram import GramStats
from modelkin.pages import figure, paragraph
from modelkin.report.family import Family
from modelkin.report.kin import closest_and_most_distant
from modelkin.similarity import Kinship, kinship_from
from modelkin.state import Member

# So many exploration merges are shown, the newest.
_EXPLORATIONS = 5
_NO_STATISTICS = "There are no statistics of single layers."


def layered_kinship(family: Family, stats: GramStats | None) -> str:
    """The kinship of chosen pairs within each layer."""
    if stats is None:
        return paragraph(_NO_STATISTICS)
    pairs = {
        label: pair
        for label, pair in _pairs(family).items()
        if all(member.id in stats.models for member in pair)
    }
    if not pairs:
        return paragraph(_NO_STATISTICS)
    chosen = list(dict.fromkeys(member.id for pair in pairs.values() for member in pair))
    few = stats.select(chosen)
    total = int(few.count_T.sum())
    base = family.state.base.name if family.state.base else "base"
    whole = kinship_from(few, base=base, total_parameters=total)
    layers = whole.per("layer")
    traces = []
    for one, other in pairs.values():
        traces.append(_curve(layers, one, other, family))
        traces.append(_whole(whole, list(layers), one, other, family))
    return paragraph(
        f"Kinship ({family.metric}) of two models within each layer; the dotted line is that of "
        f"the whole models.{_rounding(family)}"
    ) + figure(
        traces,
        {
            "xaxis": {"title": {"text": "layer"}, "type": "category"},
            "yaxis": {"title": {"text": f"kinship ({family.metric})"}},
        },
        label="Kinship of chosen pairs in each layer",
        height=360,
        choices={label: (2 * n, 2 * n + 1) for n, label in enumerate(pairs)},
    )


def _rounding(family: Family) -> str:
    """What statistics of children are, where the run predicts them."""
    if not family.state.predictions:
        return ""
    return " Children are as their recipes say, before their weights are rounded."


def _pairs(family: Family) -> dict[str, tuple[Member, Member]]:
    found: dict[str, tuple[Member, Member]] = {}

    def add(what: str, pair: tuple[Member, ...]) -> None:
        if len(pair) == 2:
            found[f"{what}: {pair[0].name} × {pair[1].name}"] = (pair[0], pair[1])

    if family.best_child:
        add("parents of the best child", family.state.parents_of(family.best_child))
    for what, pair in zip(
        ("closest", "most distant"), closest_and_most_distant(family), strict=False
    ):
        add(what, pair)
    for member in _explorations(family):
        add(f"exploration {member.name}", family.state.parents_of(member))
    return found


def _explorations(family: Family) -> list[Member]:
    return [member for member in family.children if member.exploration][-_EXPLORATIONS:]


def _curve(
    layers: dict[str, Kinship], one: Member, other: Member, family: Family
) -> dict[str, Any]:
    values = [
        getattr(layer.similarity(one.id, other.id), family.metric) for layer in layers.values()
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(layers),
        "y": values,
        "line": {"color": "@accent", "width": 2},
        "hovertemplate": "layer %{x}: %{y:.4f}<extra></extra>",
        "showlegend": False,
    }


def _whole(
    whole: Kinship, layers: list[str], one: Member, other: Member, family: Family
) -> dict[str, Any]:
    value = getattr(whole.similarity(one.id, other.id), family.metric)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [layers[0], layers[-1]],
        "y": [value, value],
        "line": {"color": "@muted", "dash": "dot", "width": 1.5},
        "hovertemplate": "whole models: %{y:.4f}<extra></extra>",
        "showlegend": False,
    }


def branching(family: Family, stats: GramStats | None) -> str:
    """Where exploration went and where greed went, from the model that both came from."""
    if stats is None:
        return paragraph(_NO_STATISTICS)
    traces: list[dict[str, Any]] = []
    choices: dict[str, list[int]] = {}
    for explored in _explorations(family):
        found = _branches(family, explored)
        if found is None:
            continue
        ancestor, greedy, before = found
        wanted = [m.id for m in (ancestor, explored, greedy, before) if m]
        if any(member not in stats.models for member in wanted):
            continue
        own = _traces(stats.select(wanted), ancestor, explored, greedy, before)
        label = (
            f"{explored.name} (exploration) and {greedy.name} (greedy), both from {ancestor.name}"
        )
        choices[label] = list(range(len(traces), len(traces) + len(own)))
        traces += own
    if not traces:
        return paragraph("No exploration merge has a greedy sibling with statistics.")
    return paragraph(
        "How far exploration and greedy choice moved each layer away from the better parent they "
        "share (bars, in units of the weights), and the cosine between the two changes (line): "
        f"near 1 both went the same way.{_rounding(family)}"
    ) + figure(
        traces,
        {
            "xaxis": {"title": {"text": "layer"}, "type": "category"},
            "yaxis": {"title": {"text": "length of the change"}, "rangemode": "tozero"},
            "yaxis2": {
                "title": {"text": "cosine"},
                "overlaying": "y",
                "side": "right",
                "range": [-1.05, 1.05],
                "tickvals": [-1, -0.5, 0, 0.5, 1],
                "showgrid": False,
            },
            "barmode": "group",
            "margin": {"r": 56},
        },
        label="Change of each layer by exploration and by greedy choice",
        choices=choices,
    )


def _branches(family: Family, explored: Member) -> tuple[Member, Member, Member | None] | None:
    """The shared better parent, the best greedy sibling from it, and the ancestor's own."""
    state = family.state
    ancestor = state.members[explored.parents[0]]
    siblings = [
        member
        for member in state.ranked()
        if member.generation == explored.generation
        and not member.exploration
        and ancestor.id in member.parents
    ]
    if not siblings:
        return None
    before = state.members[ancestor.parents[0]] if ancestor.parents else None
    return ancestor, siblings[0], before


def _traces(
    stats: GramStats, ancestor: Member, explored: Member, greedy: Member, before: Member | None
) -> list[dict[str, Any]]:
    found = bifurcation(stats, ancestor.id, explored.id, greedy.id, before.id if before else None)
    layers = list(found.groups)
    bars = [
        ("exploration", found.explored_norm_L, "@exploration"),
        ("greedy", found.greedy_norm_L, "@accent"),
    ]
    if found.before_norm_L is not None:
        bars.append(("the merge before", found.before_norm_L, "@muted"))
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "x": layers,
            "y": values_L,
            "name": name,
            "marker": {"color": colour},
            "hovertemplate": f"layer %{{x}}, {name}: %{{y:.4g}}<extra></extra>",
        }
        for name, values_L, colour in bars
    ]
    traces.append(
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": layers,
            "y": found.cosine_L,
            "yaxis": "y2",
            "name": "cosine of both",
            "line": {"color": "@best", "width": 2},
            "hovertemplate": "layer %{x}: cosine %{y:.3f}<extra></extra>",
        }
    )
    return traces
