"""Scores and gains on the page: against kinship, by task, and as tables."""

from typing import Any

from modelkin.analyse import Correlation, correlate, fit_line
from modelkin.heatmap import LABELS
from modelkin.pages import Cell, figure, listing, paragraph, plain, table
from modelkin.records import METRICS, Metric
from modelkin.report.family import Family, recipe_text
from modelkin.state import Member
from modelkin.tables import shortened

_TRACES = 4  # of `_gain_traces`


def gain_against_kinship(family: Family) -> str:
    """Each merge as a point, the fit with its interval, and the correlations as a table."""
    metrics = sorted(METRICS, key=lambda metric: metric != family.metric)
    points = {metric: _points(family, metric) for metric in metrics}
    points = {metric: own for metric, own in points.items() if own}
    if not points:
        return paragraph("No merge has both a gain and a known kinship of its parents.")
    traces = [trace for metric, own in points.items() for trace in _gain_traces(metric, own)]
    lines: list[list[Cell]] = []
    warnings: list[str] = []
    for metric, own in points.items():
        for of, sign in (("gain", False), ("|gain|", True)):
            x = [value for _, value, _ in own]
            y = [abs(gain) if sign else gain for *_, gain in own]
            for kind in ("pearson", "spearman"):
                found = correlate(x, y, kind)
                if found is None:
                    continue
                lines.append(_correlation(metric, of, found))
                if found.decisive is not None:
                    name = own[found.decisive][0].name
                    warnings.append(
                        f"The {kind} correlation of {metric} with {of} hangs on one merge, {name}: "
                        f"with any one merge left out it lies between "
                        f"{found.leave_one_out[0]:.2f} and {found.leave_one_out[1]:.2f}."
                    )
    return "".join(
        (
            paragraph(
                "Each point is a merge: its parents' kinship and what the child gained over their "
                "mean. The line is a least-squares fit with the 95 % interval of its mean."
            ),
            figure(
                traces,
                {
                    "xaxis": {"title": {"text": "kinship of the parents"}},
                    "yaxis": {"title": {"text": "gain"}, "zeroline": True},
                    "hovermode": "closest",
                },
                label="Gain of each merge against the kinship of its parents",
                choices={
                    LABELS[metric]: range(_TRACES * n, _TRACES * (n + 1))
                    for n, metric in enumerate(points)
                },
            ),
            table(
                ["similarity", "with", "kind", "n", "r", "low", "high", "p", "least", "most"],
                lines,
                name="correlations",
            )
            if lines
            else "",
            paragraph(
                "Low and high are the ends of the 95 % bootstrap interval; least and most are r "
                "when any one merge is left out. Merges of one run share parents, so p values are "
                "too small: they assume that the points are independent."
            )
            if lines
            else paragraph("Fewer than three merges: no correlation."),
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


def _points(family: Family, metric: Metric) -> list[tuple[Member, float, float]]:
    """Children with the kinship of their parents and their gain."""
    found = []
    for member in family.path:
        kinship, gain = family.kinship(member, metric), family.gain(member)
        if kinship is not None and gain is not None:
            found.append((member, kinship, gain))
    return found


def _gain_traces(metric: Metric, points: list[tuple[Member, float, float]]) -> list[dict[str, Any]]:
    fit = fit_line([value for _, value, _ in points], [gain for *_, gain in points])
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
                "x": [value for _, value, _ in own],
                "y": [gain for *_, gain in own],
                "hovertext": [plain(member.name) for member, *_ in own],
                "hovertemplate": (
                    f"%{{hovertext}}<br>{metric} %{{x:.3f}}, gain %{{y:+.2f}}<extra></extra>"
                ),
                "marker": {"symbol": symbol, "color": colour, "size": 8},
                "name": name,
                "showlegend": bool(own),
            }
        )
    return [band, line, *marks]


def by_task(family: Family) -> str:
    """The best child beside its parents and the best foundation model, task by task."""
    best = family.best_child
    if best is None:
        return paragraph("No child has scores yet.")
    shown = [best, *family.state.parents_of(best)]
    if family.best_foundation and family.best_foundation not in shown:
        shown.append(family.best_foundation)
    tasks = [plain(shortened(task, 24)) for task in family.tasks]
    styles = (("star", "@best"), ("circle", "@accent"), ("circle", "@series4"), ("square", "@ink"))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "y": tasks,
            "x": family.scores(member),
            "name": plain(shortened(member.name, 24)),
            "marker": {"symbol": symbol, "color": colour, "size": 11},
            "hovertemplate": "%{y}: %{x:.2f}<extra>%{fullData.name}</extra>",
        }
        for member, (symbol, colour) in zip(shown, styles, strict=False)
    ]
    return paragraph(
        f"{best.name} (the star), its parents, and the best foundation model. The scores of all "
        "models are in the table below."
    ) + figure(
        traces,
        {
            "yaxis": {"autorange": "reversed", "type": "category"},
            "xaxis": {"title": {"text": "score"}},
            "hovermode": "closest",
        },
        label="Scores by task of the best child, its parents and the best foundation model",
        height=34 * len(tasks) + 170,
    )


def gains_table(family: Family) -> str:
    """What each merge gained, over whom, and how sure that is."""
    if not family.gains:
        return paragraph("No samples were kept that could be compared, so gains have no intervals.")
    best = family.best_foundation
    heads = ["child", "parents", "verdict", "gain", "low", "high", "p, by Holm"]
    heads += ["over parent 1", "verdict 1", "over parent 2", "verdict 2"]
    heads += [f"over {best.name if best else 'best'}", "low ", "high ", "verdict "]
    lines: list[list[Cell]] = []
    marks: dict[int, str] = {}
    for child, gain in family.gains.items():
        member = family.state.members[child]
        parents: list[Cell] = []
        for one in gain.over_parents[:2]:
            parents += [one.value, one.verdict]
        parents += [None, ""] * (2 - len(parents) // 2)
        over = gain.over_best
        if _mark(family, member):
            marks[len(lines)] = _mark(family, member)
        mean = gain.over_mean
        lines.append(
            [
                member.name,
                family.names(member.parents),
                gain.verdict,
                *(mean.value, mean.low, mean.high),
                gain.adjusted_p,
                *parents,
                *((over.value, over.low, over.high, over.verdict) if over else (None,) * 3 + ("",)),
            ]
        )
    return paragraph(
        "Gain is the child's average minus the mean of its parents', with the 95 % interval of a "
        "paired bootstrap over the evaluation items; its verdict is by p values that are "
        "corrected for the number of merges (Holm). The other verdicts are by their own intervals, "
        "uncorrected."
    ) + table(heads, lines, name="gains", marks=marks)


def all_models(family: Family) -> str:
    """Everything known of every model, one row each."""
    heads = ["model", "generation", "parents", "exploration", *family.tasks, "average", "gain"]
    heads += ["verdict", "pcc", "cs", "ed", f"predicted {family.metric}", "recipe", "failure"]
    lines: list[list[Cell]] = []
    marks: dict[int, str] = {}
    for member in family.state.members.values():
        gain = family.gains.get(member.id)
        found = family.measured(member)
        predicted = family.predicted(member)
        if _mark(family, member):
            marks[len(lines)] = _mark(family, member)
        lines.append(
            [
                member.name,
                member.generation,
                family.names(member.parents),
                "yes" if member.exploration else "",
                *family.scores(member),
                family.average(member),
                family.gain(member),
                gain.verdict if gain else "",
                *(found or (None, None, None)),
                getattr(predicted, family.metric) if predicted else None,
                recipe_text(member.recipe) if member.recipe else "",
                f"{member.failure.stage}: {member.failure.message}" if member.failure else "",
            ]
        )
    return paragraph(
        "pcc, cs and ed are the kinship of a child's parents: Pearson correlation, cosine and "
        "Euclidean distance, as measured. Click a head to sort."
    ) + table(heads, lines, name="models", marks=marks)


def _mark(family: Family, member: Member) -> str:
    if member.failure:
        return "failed"
    if family.best_child and member.id == family.best_child.id:
        return "best"
    return "exploration" if member.exploration else ""
