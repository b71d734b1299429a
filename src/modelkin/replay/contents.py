"""The parts of a replay, in the order of reading. Knows what there is, not how it is shown."""

from collections.abc import Sequence

from modelkin.replay.correlations import gain_correlations
from modelkin.replay.disagreements import disagreements
from modelkin.replay.lineage import Decision, decisions
from modelkin.replay.records import Paper
from modelkin.replay.shown import Part, Table
from modelkin.replay.shown_community import (
    correlations_part,
    matrices_part,
    paths_part,
    stopping_part,
)
from modelkin.replay.shown_runs import decisions_part, differences_part, models_part, others_part


def parts(paper: Paper) -> list[Part]:
    """Everything, in the order of reading."""
    log = decisions(paper)
    found = [
        correlations_part(paper),
        paths_part(paper),
        stopping_part(paper),
        decisions_part(paper, log),
        models_part(paper),
        differences_part(paper),
        *([matrices_part(paper)] if paper.figure_7 else []),
        others_part(paper),
        _disagreements(paper),
    ]
    return [_overview(paper, log, found), *found]


def _overview(paper: Paper, log: Sequence[Decision], found: Sequence[Part]) -> Part:
    same = sum(decision.as_published for decision in log)
    published = sum(bool(decision.child) for decision in log)
    first = [row for row in gain_correlations(paper) if row.sample == "path 1"]
    texts = [
        "Exploring Model Kinship for Merging Large Language Models (arXiv 2410.12613), computed "
        f"again from its own numbers: {paper.source}.",
        f"Algorithm 1 makes {same} of the {published} merges of the main experiment's two runs. "
        f"{sum(row.equal for row in first)} of the {len(first)} correlations of Table 2 come out "
        "within 0.01 from path 1. The paper disagrees with itself in "
        f"{len(found[-1].tables[0].rows)} places, which are listed last.",
    ]
    missing = [
        name
        for name, rows in (
            ("claims.csv", paper.claims),
            ("reprints.csv", paper.reprints),
            ("statements.csv", paper.statements),
            ("figure_7.csv", paper.figure_7),
        )
        if not rows
    ]
    if missing:
        texts.append(
            f"Not there, and left out with what is compared with them: {', '.join(missing)}."
        )
    return Part("overview", "The paper, replayed", texts, [])


def _disagreements(paper: Paper) -> Part:
    rows = [[d.kind, d.where, d.printed, d.found, d.why] for d in disagreements(paper)]
    heads = ("about", "where", "printed", "but", "why")
    return Part(
        "disagreements",
        "Where the paper disagrees with itself",
        [
            "Computed from the printed numbers where they allow it; the rest are places that "
            "contradict each other in words, with what the published runs decide.",
        ],
        [Table("disagreements", heads, rows, wordy=True)],
    )
