"""The family tree: generations from left to right, lines from parents to children."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from modelkin.pages import figure, paragraph, plain
from modelkin.report.family import Family, recipe_text
from modelkin.state import Member
from modelkin.tables import shortened

# In pixels: of a generation, and of a model in it.
_COLUMN, _LINE, _LEAST = 110, 30, 320
# More models than this are not all named: hovering names them.
_NAMED, _NAME_WIDTH = 70, 16
_TALLEST = 1000
# Points of a line between parent and child.
_BEND = 9
# How far a line bows for each generation that it skips, and at most: it passes beside the models
# there, and lines of one parent do not hide each other.
_BOW, _MOST_BOW = 0.13, 0.75

Place = tuple[float, float]


def family_tree(family: Family) -> str:
    """Foundation models are squares, children circles, exploration diamonds; the best is a star."""
    places = _places(family)
    tallest = max(
        (sum(m.generation == g for m in family.state.members.values()))
        for g in range(family.state.generation + 1)
    )
    last = family.state.generation
    layout = {
        "xaxis": {
            "tickvals": list(range(last + 1)),
            "ticktext": ["foundations", *(f"generation {g}" for g in range(1, last + 1))],
            "side": "top",
            "showgrid": False,
            "zeroline": False,
            "range": [-0.5, last + 0.5],
        },
        "yaxis": {"visible": False, "range": [-1.0, tallest - 0.2], "autorange": False},
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": -0.02, "yanchor": "top"},
    }
    return paragraph(
        "Generations from left to right. Dotted lines are exploration merges; strong lines lead "
        "to the best child. Hovering shows a model's recipe, parents, kinship and scores."
    ) + figure(
        [*_lines(family, places), *_marks(family, places)],
        layout,
        label=f"Family tree of {len(places)} models in {last + 1} generations",
        height=int(min(max(_LINE * tallest + 110, _LEAST), _TALLEST)),
        width=_COLUMN * (last + 1),
        name="tree",
    )


def _places(family: Family) -> dict[str, Place]:
    """Generation and height of each model; children stand near their parents."""
    places: dict[str, Place] = {}
    columns = [
        [m for m in family.state.members.values() if m.generation == g]
        for g in range(family.state.generation + 1)
    ]
    tallest = max((len(column) for column in columns), default=1)
    for generation, column in enumerate(columns):
        # From top to bottom in the order of the parents' heights, ties in the order of birth.
        ordered = sorted(
            column, key=lambda m: -float(np.mean([places[p][1] for p in m.parents] or [0.0]))
        )
        # Columns are spread over the whole height, but for lone models.
        gap = tallest / max(len(ordered), 1)
        for line, member in enumerate(ordered):
            places[member.id] = (generation, tallest - 0.5 - gap * (line + 0.5))
    return places


def _lines(family: Family, places: dict[str, Place]) -> list[dict[str, Any]]:
    kinds: dict[str, list[tuple[Place, Place]]] = {"merge": [], "exploration": [], "best": []}
    for member in family.children:
        kind = "exploration" if member.exploration else "merge"
        for parent in member.parents:
            link = (places[parent], places[member.id])
            kinds[kind].append(link)
            if member.id in family.lineage:
                kinds["best"].append(link)
    styles = {
        "merge": ("", {"color": "@line", "width": 1.2}),
        "best": ("lineage of the best", {"color": "@best", "width": 2.2}),
        # On top, so that dashes show on the lineage too.
        "exploration": (
            "exploration merge",
            {"color": "@exploration", "width": 1.6, "dash": "dot"},
        ),
    }
    traces = []
    for kind, (label, line) in styles.items():
        x, y = _curves(kinds[kind])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": x,
                "y": y,
                "line": line,
                "hoverinfo": "skip",
                "name": label,
                "showlegend": bool(label and kinds[kind]),
            }
        )
    return traces


def _curves(links: Sequence[tuple[Place, Place]]) -> tuple[list[Any], list[Any]]:
    along = np.linspace(0, 1, _BEND)
    across = (1 - np.cos(np.pi * along)) / 2
    x: list[Any] = []
    y: list[Any] = []
    for (x0, y0), (x1, y1) in links:
        x += [*np.round(x0 + (x1 - x0) * along, 3).tolist(), None]
        bow = min(_BOW * (x1 - x0 - 1), _MOST_BOW) * np.sin(np.pi * along)
        y += [*np.round(y0 + (y1 - y0) * across - bow, 3).tolist(), None]
    return x, y


_KINDS: dict[str, dict[str, Any]] = {
    "foundation model": {"symbol": "square", "color": "@foundation", "size": 11},
    "child": {"symbol": "circle", "color": "@accent", "size": 10},
    "exploration child": {"symbol": "diamond", "color": "@exploration", "size": 11},
    "failed": {"symbol": "x", "color": "@failed", "size": 9},
    "best child": {"symbol": "star", "color": "@best", "size": 16},
}


def _kind(family: Family, member: Member) -> str:
    if member.failure:
        return "failed"
    if not member.parents:
        return "foundation model"
    if family.best_child and member.id == family.best_child.id:
        return "best child"
    return "exploration child" if member.exploration else "child"


def _marks(family: Family, places: dict[str, Place]) -> list[dict[str, Any]]:
    members = list(family.state.members.values())
    named = len(members) <= _NAMED
    traces = []
    for kind, marker in _KINDS.items():
        own = [member for member in members if _kind(family, member) == kind]
        if not own:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [places[m.id][0] for m in own],
                "y": [places[m.id][1] for m in own],
                "text": [
                    plain(shortened(m.name, _NAME_WIDTH))
                    if named or not m.parents or m.id in family.lineage
                    else ""
                    for m in own
                ],
                "textposition": "top center",
                "textfont": {"size": 11},
                "hovertext": [_hover(family, m) for m in own],
                "hoverinfo": "text",
                "marker": marker,
                "cliponaxis": False,
                "name": kind,
            }
        )
    return traces


def _hover(family: Family, member: Member) -> str:
    """All about one model, in Plotly's markup; everything that was given is plain in it."""
    said = [f"generation {member.generation}" if member.parents else "foundation model"]
    if member.recipe:
        said.append(f"recipe: {recipe_text(member.recipe)}")
        said.append(f"parents: {family.names(member.parents)}")
        measured, predicted = family.measured(member), family.predicted(member)
        for how, found in (("measured", measured), ("predicted", predicted)):
            if found:
                value = getattr(found, family.metric)
                text = "undefined" if value is None else f"{value:.3f}"
                said.append(f"kinship of the parents: {text} ({family.metric}, {how})")
    if member.exploration:
        said.append("an exploration merge")
    for task, score in zip(family.tasks, family.scores(member), strict=True):
        if score is not None:
            said.append(f"{task}: {score:.2f}")
    average, gain = family.average(member), family.gain(member)
    if average is not None:
        said.append(f"average: {average:.2f}")
    if gain is not None:
        found_gain = family.gains.get(member.id)
        verdict = f", {found_gain.verdict}" if found_gain else ""
        said.append(f"gain: {gain:+.2f}{verdict}")
    if member.failure:
        said.append(f"failed to {member.failure.stage}: {member.failure.message}")
    lines = [_folded(plain_line) for plain_line in said]
    return "<br>".join([f"<b>{plain(member.name)}</b>", *lines])


def _folded(text: str, width: int = 60) -> str:
    """Lines that are narrow enough for a phone."""
    parts = [text[start : start + width] for start in range(0, len(text), width)]
    return "<br>  ".join(plain(part) for part in parts)
