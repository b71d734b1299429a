"""A replay as one page that opens offline. Knows how things are drawn, not what they mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from modelkin import pages
from modelkin.analyse import Fit, fit_line
from modelkin.replay.correlations import METRICS, gains
from modelkin.replay.paths import Path, paths
from modelkin.replay.records import Paper
from modelkin.replay.shown import Part

Trace = Mapping[str, Any]

# Cells longer than this are sentences.
SENTENCE = 30


def replay_page(paper: Paper, parts: Sequence[Part]) -> str:
    """The page of what `contents.parts` found, with figures.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    figures = {
        "correlations": [_gain_figure(paper)],
        "paths": [_path_figure(path) for path in paths(paper) if path.name.startswith("path")],
        "differences": [_difference_figure(paper)],
    }
    sections = [
        pages.section(
            part.title,
            *map(pages.paragraph, part.texts),
            *figures.get(part.key, ()),
            *(
                pages.table(table.heads, table.rows, name=table.name, marks=table.marks)
                for table in part.tables
            ),
        )
        for part in parts
    ]
    contents = pages.contents([part.title for part in parts])
    return pages.page(
        "Model kinship: the paper's numbers", contents, *sections, style=_style(parts)
    )


def _style(parts: Sequence[Part]) -> str:
    """Sentences in tables are read in full; elsewhere long cells are names, and cut."""
    rules = []
    for table in (table for part in parts for table in part.tables):
        if any(isinstance(row[-1], str) and len(row[-1]) > SENTENCE for row in table.rows):
            cells = f'[data-name="{table.name}"] td'
            if table.wordy:
                rules.append(f"{cells} {{ white-space: normal; min-width: 8rem; }}")
            rules.append(f"{cells}:last-child {{ white-space: normal; min-width: 16rem; }}")
    return "".join(rules)


def _gain_figure(paper: Paper) -> str:
    """Gain against kinship on path 1, with the fitted line and its band, by metric and sign."""
    steps = paper.path(1)
    names = [step.model for step in steps]
    traces: list[Trace] = []
    choices: dict[str, Sequence[int]] = {}
    for metric in METRICS:
        for kind, signed in (("signed", True), ("absolute", False)):
            kinship = [float(step.kinship[metric]) for step in steps]
            added = _scatter(kinship, gains(steps, signed=signed), names)
            choices[f"{metric}, {kind} gain"] = range(len(traces), len(traces) + len(added))
            traces += added
    layout = {
        "xaxis": {"title": {"text": "kinship of the parents"}},
        "yaxis": {"title": {"text": "merge gain"}},
        "showlegend": False,
    }
    label = "Merge gain against kinship of the parents on path 1, with the fitted line"
    return pages.figure(traces, layout, label=label, choices=choices)


def _difference_figure(paper: Paper) -> str:
    """Task difference against kinship over the pairs of Table 15."""
    names = [" and ".join(pair.models) for pair in paper.pairs]
    difference = [float(pair.mean) for pair in paper.pairs]
    traces: list[Trace] = []
    choices: dict[str, Sequence[int]] = {}
    for metric in METRICS:
        added = _scatter([float(pair.kinship[metric]) for pair in paper.pairs], difference, names)
        choices[metric] = range(len(traces), len(traces) + len(added))
        traces += added
    layout = {
        "xaxis": {"title": {"text": "kinship"}},
        "yaxis": {"title": {"text": "mean difference of task scores"}},
        "showlegend": False,
    }
    label = "Mean difference of task scores against kinship over pairs of Llama models"
    return pages.figure(traces, layout, label=label, choices=choices)


def _scatter(x: Sequence[float], y: Sequence[float], names: Sequence[str]) -> list[Trace]:
    """Points, and the line through them with its 95 % band where there is one."""
    points = {
        "type": "scatter", "mode": "markers", "x": list(x), "y": list(y),
        "text": [pages.plain(name) for name in names],
        "hovertemplate": "%{text}<br>%{x:.2f}, %{y:.2f}<extra></extra>",
        "marker": {"color": "@accent", "size": 9},
    }  # fmt: skip
    fit = fit_line(x, y)
    return [points] if fit is None else [*_band(fit), points]


def _band(fit: Fit) -> list[Trace]:
    edge = {"type": "scatter", "mode": "lines", "x": fit.x_X, "line": {"width": 0},
            "hoverinfo": "skip"}  # fmt: skip
    return [
        {**edge, "y": fit.low_X},
        {**edge, "y": fit.high_X, "fill": "tonexty", "fillcolor": "@band"},
        {"type": "scatter", "mode": "lines", "x": fit.x_X, "y": fit.y_X,
         "line": {"color": "@muted", "width": 2}, "hoverinfo": "skip"},
    ]  # fmt: skip


def _path_figure(path: Path) -> str:
    """Scores and the best so far, the kinship of the parents, and where saturation begins."""
    number = list(range(1, len(path.scores) + 1))
    names = [pages.plain(name) for name in path.models]
    hover = "%{text}<br>%{y:.2f}<extra></extra>"
    traces: list[Trace] = [
        {"type": "scatter", "mode": "markers", "name": "average", "x": number,
         "y": list(path.scores), "text": names, "hovertemplate": hover,
         "marker": {"color": "@accent", "size": 9}},
        {"type": "scatter", "mode": "lines", "name": "best so far", "x": number,
         "y": list(path.stages.best_so_far), "line": {"shape": "hv", "color": "@best"}},
        {"type": "scatter", "mode": "lines+markers", "name": "pcc of the parents", "x": number,
         "y": list(path.kinship), "text": names, "hovertemplate": hover, "yaxis": "y2",
         "line": {"color": "@exploration", "dash": "dot"}},
    ]  # fmt: skip
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": f"merge of {pages.plain(path.name)}"},
                  "range": [0.5, len(number) + 0.5]},
        "yaxis": {"title": {"text": "average"}},
        "yaxis2": {"title": {"text": "kinship"}, "overlaying": "y", "side": "right",
                   "range": [0, 1.05], "tick0": 0, "dtick": 0.25, "tickmode": "linear",
                   "showgrid": False},
        "margin": {"r": 56},
    }  # fmt: skip
    first = path.stages.saturation
    if first is not None:
        line = {"type": "line", "x0": first + 0.5, "x1": first + 0.5, "y0": 0, "y1": 1,
                "yref": "paper", "line": {"color": "@muted", "dash": "dash"}}  # fmt: skip
        layout["shapes"] = [line]
        layout["annotations"] = [
            # Curves that rise leave this corner empty.
            {"x": first + 0.5, "y": 0, "yref": "paper", "yanchor": "bottom", "xanchor": "left",
             "showarrow": False, "text": "saturation"}
        ]  # fmt: skip
    label = f"Average and kinship along {path.name}, with the beginning of saturation"
    return pages.figure(traces, layout, label=label)
