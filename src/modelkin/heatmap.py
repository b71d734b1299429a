"""Kinship as a clustered heatmap with its dendrogram: a page or a picture.

Knows what was found and how to draw it. plotly, matplotlib and scipy are imported inside
functions. Axes: N models, in the order of the matrix or, where said so, of the drawing.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkin.errors import ConfigError, MissingExtraError
from modelkin.files import whole_file
from modelkin.records import Metric
from modelkin.similarity import Kinship
from modelkin.tables import shortened
from modelkin.tensor_names import Level

LABELS: Mapping[Metric, str] = {
    "pcc": "Pearson correlation",
    "cs": "cosine similarity",
    "ed": "Euclidean distance",
}
# What each kind of file is drawn with; scipy clusters for both.
_DRAWN_WITH = {".html": "plotly", ".png": "matplotlib"}
# No value: a grey that is in neither palette.
_UNDEFINED = "#9e9e9e"
# Names beside the map are cut to this; hovering shows all of them.
_NAME_WIDTH = 40
# Below this size a name beside the map cannot be read, and is left out.
_SMALLEST_FONT = 6.0


@dataclass(frozen=True)
class Dendrogram:
    """How models are drawn beside each other, and why.

    Attributes:
        order_N: positions of the models in the order of the drawing; the undefined come last.
        links: for each join four points (along the models, height): the models of the drawing
            are at 0, 1, ...; the height is a distance.
    """

    order_N: NDArray[np.int64]
    links: tuple[tuple[tuple[float, float], ...], ...]


def check_plot(file: str | os.PathLike[str]) -> None:
    """See, before the work, that such a plot can be drawn.

    Raises:
        ConfigError: the name ends in neither .html nor .png.
        MissingExtraError: what draws it is not installed.
    """
    suffix = Path(file).suffix.lower()
    if suffix not in _DRAWN_WITH:
        raise ConfigError(
            f"{file}: expected a plot's name to end in .html or .png, found {suffix or 'no ending'}"
        )
    for package in (_DRAWN_WITH[suffix], "scipy"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "plot")


def write_heatmap(
    kinship: Kinship,
    file: str | os.PathLike[str],
    metric: Metric = "pcc",
    *,
    level: Level = "model",
) -> None:
    """Draw the N x N matrix as a heatmap, close kin beside each other.

    The order is that of a clustering by average linkage, with neighbours as close as it allows,
    on the distance 1 - pcc, 1 - cs, or ed itself. Models whose kinship is undefined are grey and
    come last. The page opens without a network.

    Args:
        kinship: of N models.
        file: ends in .html (a page: hovering shows names and values) or .png; appears whole.
        metric: what is drawn.
        level: with "layer" or "module", the page can show each group too, in the order of the
            whole. Tensors are too many for that, and a picture shows the whole.

    Raises:
        ConfigError: another ending.
        MissingExtraError: plotly, matplotlib or scipy is not installed.
        DiskFullError: an older file is untouched.
    """
    check_plot(file)
    if Path(file).suffix.lower() == ".html":
        page = _page(kinship, metric, level)
        with whole_file(file) as partial:
            partial.write_text(page, encoding="utf-8")
    else:
        with whole_file(file) as partial:
            _draw(kinship, metric, partial)


def cluster(matrix_NN: NDArray[np.float64], metric: Metric) -> Dendrogram:
    """Average linkage with optimal leaf order; models without values are last, and in no link."""
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    known_K = np.flatnonzero(~np.isnan(np.diag(matrix_NN)))
    unknown = np.setdiff1d(np.arange(len(matrix_NN)), known_K)
    if len(known_K) < 2:
        return Dendrogram(np.concatenate([known_K, unknown]), ())
    distance_KK = matrix_NN[np.ix_(known_K, known_K)]
    if metric != "ed":
        distance_KK = 1 - distance_KK
    np.fill_diagonal(distance_KK, 0.0)
    tree = linkage(squareform(distance_KK, checks=False), "average", optimal_ordering=True)
    drawn = dendrogram(tree, no_plot=True)
    links = tuple(
        # scipy puts its leaves at 5, 15, 25, ...
        tuple(((along - 5) / 10, height) for along, height in zip(*points, strict=True))
        for points in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    )
    return Dendrogram(np.concatenate([known_K[drawn["leaves"]], unknown]), links)


def _range(matrix_NN: NDArray[np.float64], metric: Metric) -> tuple[float, float]:
    if metric != "ed":
        return (-1.0, 1.0)
    return (0.0, float(np.nanmax(matrix_NN, initial=0.0)) or 1.0)


def _texts(matrix_NN: NDArray[np.float64], metric: Metric) -> list[list[str]]:
    form = ".4g" if metric == "ed" else ".4f"
    return [["undefined" if np.isnan(v) else format(v, form) for v in row] for row in matrix_NN]


def _size(models: int) -> float:
    """The side of the map in pixels."""
    return float(np.clip(28 * models, 280, 1100))


def _font(models: int) -> float:
    return float(min(12.0, 0.8 * _size(models) / models))


# A page


def _page(kinship: Kinship, metric: Metric, level: Level) -> str:
    page: str = page_figure(kinship, metric, level).to_html(
        include_plotlyjs=True, full_html=True, config={"displaylogo": False}
    )
    return page


def _plain(name: str) -> str:
    """A name as text: plotly takes <b> and the like for markup, but entities for characters."""
    return escape(name, quote=False)


def page_figure(kinship: Kinship, metric: Metric, level: Level = "model") -> Any:
    """The plotly figure of `write_heatmap`: a trace "links", then the heatmap."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    tree = cluster(kinship.matrix(metric), metric)
    order_N = tree.order_N
    names = [kinship.models[n] for n in order_N]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.01, row_heights=[0.2, 0.8]
    )
    # One trace for all links: None lifts the pen.
    points: list[tuple[float | None, float | None]] = []
    for link in tree.links:
        points += [*link, (None, None)]
    figure.add_trace(
        go.Scatter(
            x=[along for along, _ in points],
            y=[height for _, height in points],
            mode="lines",
            line={"color": "#444", "width": 1},
            hoverinfo="skip",
            showlegend=False,
            name="links",
        ),
        row=1,
        col=1,
    )
    whole = _view(kinship, metric, order_N)
    places = list(range(len(names)))
    figure.add_trace(
        go.Heatmap(
            x=places,
            y=places,
            **whole,
            customdata=[[[_plain(one), _plain(other)] for other in names] for one in names],
            hovertemplate=(
                "%{customdata[0]}<br>%{customdata[1]}<br>"
                f"{LABELS[metric]} %{{text}}<extra></extra>"
            ),
            hoverongaps=True,
            # The scales of red and blue differ in direction: RdBu_r is blue where it is low.
            colorscale="Viridis_r" if metric == "ed" else "RdBu_r",
            colorbar={"title": {"text": LABELS[metric]}},
            name="kinship",
        ),
        row=2,
        col=1,
    )
    size, font = _size(len(names)), _font(len(names))
    axis = {
        "tickvals": places,
        "ticktext": [_plain(shortened(name, _NAME_WIDTH)) for name in names],
        "tickfont": {"size": max(font, 1)},
        "showticklabels": font >= _SMALLEST_FONT,
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
        "range": [-0.5, len(names) - 0.5],
    }
    figure.update_xaxes(**axis, tickangle=-45, row=2, col=1)
    figure.update_xaxes(visible=False, row=1, col=1)
    # From top to bottom as from left to right.
    figure.update_yaxes(**{**axis, "range": [len(names) - 0.5, -0.5]}, row=2, col=1)
    figure.update_yaxes(visible=False, rangemode="tozero", row=1, col=1)
    figure.update_layout(
        title={"text": f"Kinship of {len(names)} models from {_plain(kinship.base)}"},
        width=size + 420,
        height=size * 1.25 + 300,
        plot_bgcolor=_UNDEFINED,
        paper_bgcolor="white",
    )
    # The dendrogram has no values that could be undefined.
    figure.add_shape(
        type="rect",
        xref="x domain",
        yref="y domain",
        x0=0,
        x1=1,
        y0=0,
        y1=1,
        fillcolor="white",
        line_width=0,
        layer="below",
    )
    if level in ("layer", "module"):
        views = {"whole model": whole}
        for name, group in kinship.per(level).items():
            views[name] = _view(group, metric, order_N)
        figure.update_layout(updatemenus=[_menu(views)])
    return figure


def _view(kinship: Kinship, metric: Metric, order_N: NDArray[np.int64]) -> dict[str, Any]:
    """What of the heatmap differs between groups."""
    matrix_NN = kinship.matrix(metric)[np.ix_(order_N, order_N)]
    low, high = _range(matrix_NN, metric)
    values = [[None if np.isnan(v) else float(v) for v in row] for row in matrix_NN]
    return {"z": values, "text": _texts(matrix_NN, metric), "zmin": low, "zmax": high}


def _menu(views: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    heatmap = 1  # the second trace
    return {
        "x": 0.0,
        "xanchor": "left",
        "y": 1.0,
        "yanchor": "bottom",
        "buttons": [
            {
                "label": _plain(name),
                "method": "restyle",
                # plotly takes a list as one item for each trace.
                "args": [
                    {key: [part] if key in ("z", "text") else part for key, part in view.items()},
                    [heatmap],
                ],
            }
            for name, view in views.items()
        ],
    }


# A picture


def _draw(kinship: Kinship, metric: Metric, file: Path) -> None:
    figure = picture_figure(kinship, metric)
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box, which says it better.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="png", dpi=100, bbox_inches="tight")


def picture_figure(kinship: Kinship, metric: Metric) -> Any:
    """The matplotlib figure of `write_heatmap`: axes of the dendrogram, the map, its scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    tree = cluster(kinship.matrix(metric), metric)
    names = [kinship.models[n] for n in tree.order_N]
    matrix_NN = kinship.matrix(metric)[np.ix_(tree.order_N, tree.order_N)]
    low, high = _range(matrix_NN, metric)
    inches = _size(len(names)) / 80
    figure = Figure(figsize=(inches, inches * 1.25))
    FigureCanvasAgg(figure)
    links, heat = figure.subplots(
        2, 1, gridspec_kw={"height_ratios": [1, 4], "hspace": 0.02}, sharex=True
    )
    links.add_collection(LineCollection([list(link) for link in tree.links], colors="#444444"))
    links.set_ylim(0, max((h for link in tree.links for _, h in link), default=0.0) * 1.05 or 1.0)
    links.set_axis_off()
    links.set_title(f"Kinship of {len(names)} models from {kinship.base}", parse_math=False)
    heat.set_facecolor(_UNDEFINED)
    drawn = heat.imshow(
        np.ma.masked_invalid(matrix_NN),
        cmap="viridis_r" if metric == "ed" else "RdBu_r",
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="nearest",
    )
    figure.colorbar(drawn, ax=[links, heat], label=LABELS[metric], fraction=0.05)
    font = _font(len(names)) * 0.9
    if font < _SMALLEST_FONT:
        heat.set_xticks([])
        heat.set_yticks([])
        return figure
    labels = [shortened(name, _NAME_WIDTH) for name in names]
    places: Sequence[int] = range(len(names))
    # A dollar in a name is no formula.
    heat.set_xticks(places, labels, rotation=45, ha="right", fontsize=font, parse_math=False)
    heat.set_yticks(places, labels, fontsize=font, parse_math=False)
    return figure
