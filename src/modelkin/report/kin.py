"""Kinship on the page: the map over generations, and predicted against measured.

Axes: N models, in the order of the clustering.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from modelkin.heatmap import LABELS, cluster
from modelkin.pages import figure, paragraph, plain
from modelkin.report.family import Family
from modelkin.report.predictions import prediction_lines
from modelkin.state import Member
from modelkin.tables import shortened

# More models than this are not named beside the map: hovering names them.
_NAMED, _NAME_WIDTH = 45, 22
# Pixels that a name beside another one needs.
_LABEL = 12
# More points than this are thinned out, which loses no shape.
_POINTS = 2000
# What is known of a pair: letters in the page's data, words in `report.js`.
_MEASURED, _PREDICTED, _UNKNOWN, _ITSELF = "mpui"


def kinship_map(family: Family) -> str:
    """The clustered map; its script adds the slider over generations."""
    known = {member for pair in _known_pairs(family) for member in pair}
    members = [member for member in family.state.members.values() if member.id in known]
    if len(members) < 2:
        return paragraph("The kinship of these models is not known.")
    matrix_NN, letters = _matrix(family, members)
    order_N = cluster(_filled(matrix_NN), family.metric).order_N
    members = [members[n] for n in order_N]
    matrix_NN = matrix_NN[np.ix_(order_N, order_N)]
    kinds = ["".join(letters[n][m] for m in order_N) for n in order_N]
    apart = matrix_NN[~np.eye(len(members), dtype=bool)]
    apart = apart[~np.isnan(apart)]
    distance = family.metric == "ed"
    trace = {
        "type": "heatmap",
        "z": _rounded(matrix_NN),
        "zmin": 0.0 if distance else float(apart.min()) if len(apart) else 0.0,
        "zmax": (float(apart.max()) if len(apart) else 1.0) if distance else 1.0,
        "colorscale": "Viridis",
        "reversescale": distance,
        "colorbar": {"title": {"text": family.metric}, "thickness": 12},
        "hoverongaps": True,
    }
    predicted = sum(row.count(_PREDICTED) for row in kinds) // 2
    measured = sum(row.count(_MEASURED) for row in kinds) // 2
    labels = [plain(shortened(member.name, _NAME_WIDTH)) for member in members]
    return paragraph(
        f"{LABELS[family.metric]} of the models' changes from their base, close kin beside each "
        f"other (average linkage). {measured:,} pairs are measured and {predicted:,} predicted "
        "from their recipes; hovering says which."
    ) + figure(
        [trace],
        {"margin": {"t": 8}},
        label=f"Kinship of {len(members)} models as a clustered map",
        height=int(np.clip(22 * len(members) + 140, 320, 720)),
        # Where models are named, a narrow page scrolls rather than print names over each other.
        width=_LABEL * len(members) + 120 if len(members) <= _NAMED else 0,
        name="map",
        extra={
            "map": {
                "names": [plain(member.name) for member in members],
                "labels": labels,
                "generations": [member.generation for member in members],
                "kinds": kinds,
                "named": _NAMED,
                "slider": family.state.generation > 0,
            }
        },
    )


def _known_pairs(family: Family) -> set[frozenset[str]]:
    return set(family.state.kinship) | set(family.state.predictions)


def _matrix(
    family: Family, members: Sequence[Member]
) -> tuple[NDArray[np.float64], list[list[str]]]:
    """Values, measured where they were and predicted elsewhere, and which of these they are."""
    own = 0.0 if family.metric == "ed" else 1.0
    matrix_NN = np.full((len(members), len(members)), np.nan)
    kinds = [[_UNKNOWN] * len(members) for _ in members]
    for n, member in enumerate(members):
        matrix_NN[n, n], kinds[n][n] = own, _ITSELF
        for m, other in enumerate(members[:n]):
            pair = frozenset((member.id, other.id))
            measured = family.state.kinship.get(pair)
            found = measured or family.state.predictions.get(pair)
            if found is None:
                continue
            kinds[n][m] = kinds[m][n] = _MEASURED if measured else _PREDICTED
            value = getattr(found, family.metric)
            matrix_NN[n, m] = matrix_NN[m, n] = np.nan if value is None else value
    return matrix_NN, kinds


def _filled(matrix_NN: NDArray[np.float64]) -> NDArray[np.float64]:
    """For clustering alone: an unknown kinship is taken for the mean of those that are known."""
    known = matrix_NN[~np.isnan(matrix_NN)]
    return np.where(np.isnan(matrix_NN), known.mean(), matrix_NN)


def _rounded(matrix_NN: NDArray[np.float64]) -> list[list[float]]:
    """Four significant digits, which is what hovering shows: more would swell the page."""
    return [[float(f"{value:.4g}") for value in row] for row in matrix_NN]


def predicted_and_measured(family: Family) -> str:
    """How well recipes predicted kinship, and whether that changed a choice."""
    state, metric = family.state, family.metric
    points: list[tuple[float, float, str]] = []
    for pair, predicted in state.predictions.items():
        measured = state.kinship.get(pair)
        one, other = getattr(predicted, metric), getattr(measured, metric, None)
        if one is not None and other is not None:
            points.append((one, other, " × ".join(sorted(state.members[m].name for m in pair))))
    told = "".join(paragraph(line) for line in prediction_lines(state))
    if not points:
        return told
    largest = max(points, key=lambda point: abs(point[0] - point[1]))
    shown = sorted(points)
    if len(shown) > _POINTS:
        step = len(shown) / _POINTS
        shown = [*(shown[int(n * step)] for n in range(_POINTS)), largest]
    ends = [min(min(one, other) for one, other, _ in shown), max(max(p[:2]) for p in shown)]
    return told + figure(
        [
            {
                "type": "scatter",
                "mode": "lines",
                "x": ends,
                "y": ends,
                "line": {"color": "@line", "width": 1.5},
                "hoverinfo": "skip",
                "showlegend": False,
            },
            {
                "type": "scatter",
                "mode": "markers",
                "x": [one for one, _, _ in shown],
                "y": [other for _, other, _ in shown],
                "hovertext": [plain(name) for *_, name in shown],
                "hovertemplate": (
                    "%{hovertext}<br>predicted %{x:.4f}, measured %{y:.4f}<extra></extra>"
                ),
                "marker": {"size": 6, "opacity": 0.7, "color": "@accent"},
                "showlegend": False,
            },
        ],
        {
            "xaxis": {"title": {"text": f"predicted {metric}"}},
            "yaxis": {"title": {"text": f"measured {metric}"}},
            "hovermode": "closest",
        },
        label="Predicted against measured kinship",
    )


def closest_and_most_distant(family: Family) -> list[tuple[Member, Member]]:
    """The pair of the closest and that of the least kinship, of all that are known."""
    known = []
    for one, other in combinations(family.state.members.values(), 2):
        value = family.pair(one, other)
        if value is not None:
            known.append((value, one, other))
    if not known:
        return []
    ordered = sorted(known, key=lambda entry: entry[0])
    ends = [ordered[-1][1:], ordered[0][1:]]
    return ends[::-1] if family.metric == "ed" else ends
