"""What is shown of the experiments: decisions, averages and gains, task differences, controls.

Computes nothing but what it counts.
"""

from collections.abc import Sequence

from modelkin.replay import arithmetic
from modelkin.replay.correlations import task_correlations
from modelkin.replay.lineage import Decision, generations
from modelkin.replay.records import Paper, mean
from modelkin.replay.restated import leads
from modelkin.replay.shown import R_HEADS, Cell, Part, Table, r_cells, r_text


def decisions_part(paper: Paper, log: Sequence[Decision]) -> Part:
    """The log of both runs, and how they stood after each generation."""
    rows: list[list[Cell]] = [
        [row.run, row.generation, " x ".join(row.parents), row.child or "(not made)",
         "as published" if row.as_published else "differs", row.why]
        for row in log
    ]  # fmt: skip
    marks = {at: "failed" for at, row in enumerate(log) if not row.as_published}
    marks |= {at: "exploration" for at, row in enumerate(log) if row.exploration}
    ends: list[list[Cell]] = [
        [row.run, row.number, ", ".join(row.best), row.average, row.kinship,
         row.next + ("; the paper ends here" if row.last else "")]
        for row in generations(paper)
    ]  # fmt: skip
    heads = ("run", "generation", "merge", "model", "verdict", "why")
    return Part(
        "decisions",
        "The main experiment's decisions",
        [
            "What Algorithm 1 decides on the scores and kinship that the paper prints: k = 3, the "
            "exploration partner is the least related model of the generation before the newest. "
            "Kinship is printed for parents of published models only, so the choice of a partner "
            "is tested as far as the log says.",
        ],
        [
            Table("decisions", heads, rows, wordy=True, marks=marks),
            Table(
                "generations",
                ("run", "after", "the 3 best", "best average", "their kinship", "Algorithm 1"),
                ends,
                wordy=True,
            ),
        ],
    )


def models_part(paper: Paper) -> Part:
    """Averages and gains beside the printed ones."""
    rows: list[list[Cell]] = []
    marks = {}
    for model in paper.models.values():
        found = arithmetic.average_of(model)
        gain = None if not model.parents else float(arithmetic.gain_of(paper, model))
        wrong = arithmetic.gain_differs(paper, model)
        if wrong:
            marks[len(rows)] = "failed"
        rows.append(
            [model.name, model.column, " x ".join(model.parents), f"{model.average}", float(found),
             "" if model.gain is None else f"{model.gain:+}", gain,
             "" if model.kinship is None else f"{model.kinship}", model.evidence]
        )  # fmt: skip
    heads = ("model", "run", "parents", "printed average", "average", "printed gain", "gain",
             "pcc of parents", "parents by")  # fmt: skip
    return Part(
        "models",
        "Averages and gains of the main experiment (Tables 3, 9)",
        [
            "Computed from the printed task scores. Where a gain differs from the printed one, "
            "the list of disagreements says what would explain it."
        ],
        [
            Table("models", heads, rows, marks=marks),
            *_leads(paper),
        ],
    )


def _leads(paper: Paper) -> list[Table]:
    rows: list[list[Cell]] = [
        [lead.experiment, lead.kinship, lead.greedy, f"{lead.printed:+}", float(lead.found)]
        for lead in leads(paper)
    ]
    heads = ("experiment", "best by kinship", "best by greedy", "printed lead", "lead")
    return [Table("leads", heads, rows)] if rows else []


def differences_part(paper: Paper) -> Part:
    """Tables 14 and 15."""
    rows = [
        [row.metric, *r_cells(row.found), "" if row.printed is None else f"{row.printed}",
         r_text(row.ranks.r), r_text(row.rescored.r)]
        for row in task_correlations(paper)
    ]  # fmt: skip
    heads = ("kinship", *R_HEADS, "printed r", "by ranks", "by Table 11's scores")
    return Part(
        "differences",
        "Kinship against task difference (Tables 14, 15)",
        [
            f"Correlation of kinship with the mean absolute difference of task scores over "
            f"{len(paper.pairs)} pairs of Llama models, as Table 15 prints both. Pairs share "
            "models, so p and interval promise too much."
        ],
        [Table("task-differences", heads, rows)],
    )


def others_part(paper: Paper) -> Part:
    """Tables 1 and 12."""
    baselines = paper.table("Table 1").values()
    averages = {model.name: mean(list(model.scores.values())) for model in baselines}
    iterative = [m for m in baselines if m.column == "iterative"]
    others = [m for m in baselines if m.column != "iterative"]
    texts = ["Averages from the printed task scores; single runs, without error bars."]
    if iterative and others:
        lead = [max(averages[m.name] for m in rows) for rows in (iterative, others)]
        texts.append(
            f"Iterative merging is {lead[0] - lead[1]:+.2f} ahead of the best of the other "
            "methods of Table 1."
        )
    random = list(paper.table("Table 12").values())
    if random:
        best = max(random, key=lambda model: mean(list(model.scores.values())))
        texts.append(
            f"The run with random partners (Table 12) came to {best.average} with {best.name}. Its "
            "parents are not printed, so its gains cannot be computed."
        )
    table_1: list[list[Cell]] = [
        [m.name, m.column, f"{m.average}", float(averages[m.name])] for m in baselines
    ]
    table_12: list[list[Cell]] = [
        [m.name, m.generation, f"{m.average}", float(mean(list(m.scores.values()))),
         "" if m.kinship is None else f"{m.kinship}", _also(paper, m.same_as)]
        for m in random
    ]  # fmt: skip
    return Part(
        "others",
        "Other methods and random partners (Tables 1, 12)",
        texts,
        [
            Table("table-1", ("method", "family", "printed average", "average"), table_1),
            Table(
                "table-12",
                ("model", "generation", "printed average", "average", "cs of parents",
                 "same scores as, with pcc"),
                table_12,
            ),
        ],
    )  # fmt: skip


def _also(paper: Paper, name: str) -> str:
    known = paper.models.get(name)
    return f"{name}, {known.kinship}" if known else name
