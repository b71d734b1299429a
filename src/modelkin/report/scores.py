"""Scores and gains on the page: by task, and as tables."""

from modelkin.pages import Cell, figure, paragraph, plain, table
from modelkin.report.family import Family, recipe_text
from modelkin.state import Member
from modelkin.tables import shortened


def by_task(family: Family) -> str:
    """The best child beside its parents and the best foundation model, task by task."""
    best = family.best_child
    if best is None:
        return paragraph("No child has scores yet.")
    shown = [best, *family.state.parents_of(best)]
    if family.best_foundation and family.best_foundation not in shown:
        shown.append(family.best_foundation)
    tasks = [plain(shortened(task, 24)) for task in family.tasks]
    styles = (("star", "@best"), ("circle", "@accent"), ("diamond", "@series4"), ("square", "@ink"))
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
        traces[::-1],  # the star on top
        {
            "yaxis": {"autorange": "reversed", "type": "category"},
            "xaxis": {"title": {"text": "score"}},
            "hovermode": "closest",
            "legend": {"traceorder": "reversed"},
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
