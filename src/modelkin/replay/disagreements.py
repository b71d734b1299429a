"""Every place where the paper disagrees with itself: found in its numbers, or told as a fact.

Knows which checks there are; each says itself what it found.
"""

from collections.abc import Iterable

from modelkin.replay import arithmetic, community, lineage, llama, restated
from modelkin.replay.correlations import gain_correlations, merges_by_p, task_correlations
from modelkin.replay.records import Disagreement, Paper, unit


def disagreements(paper: Paper) -> list[Disagreement]:
    """The whole list, by kind."""
    return [
        *arithmetic.average_disagreements(paper),
        *arithmetic.gain_disagreements(paper),
        *restated.reprint_disagreements(paper),
        *restated.lead_disagreements(paper),
        *_rule_disagreements(paper),
        *llama.child_disagreements(paper),
        *_correlation_disagreements(paper),
        *community.sample_disagreements(paper),
        *community.path_disagreements(paper),
        *_kinship_disagreements(paper),
        *llama.llama_disagreements(paper),
        *(
            Disagreement(
                statement.topic,
                statement.one_source,
                statement.one_says,
                f"{statement.other_source}: {statement.other_says}",
                statement.settled,
            )
            for statement in paper.statements
        ),
    ]


def _rule_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """Where the published runs depart from Algorithm 1."""
    for decision in lineage.decisions(paper):
        if not decision.as_published:
            yield Disagreement(
                "decision",
                f"{decision.run} run, generation {decision.generation}",
                f"{decision.child} = {' x '.join(decision.parents)}"
                if decision.child
                else "no such merge",
                "Algorithm 1 does not make it"
                if decision.child
                else f"Algorithm 1 makes {' x '.join(decision.parents)}",
                decision.why,
            )
    for generation in lineage.generations(paper):
        if generation.last and generation.changed:
            yield Disagreement(
                "decision",
                f"{generation.run} run, after generation {generation.number}",
                "the run ends here",
                f"Algorithm 1 {generation.next}",
                "the 3 best changed in this generation: now " + ", ".join(generation.best),
            )


def _correlation_disagreements(paper: Paper) -> Iterable[Disagreement]:
    for found in gain_correlations(paper):
        if found.sample == "path 1" and not found.equal:
            yield Disagreement(
                "correlation",
                f"Table 2, {found.metric.upper()}, {'signed' if found.signed else 'absolute'}",
                f"{found.printed[0]}",
                f"{found.found.r:.2f} from path 1",
                f"rounding of the printed numbers moves it by {found.rounding:.2f} only",
            )
    claim = paper.claims.get("correlation_merges")
    fits = merges_by_p(paper)
    if claim and claim.value not in fits:
        yield Disagreement(
            "correlation",
            claim.source,
            f"the correlations are of {claim.value} merges",
            f"the p values of Table 2 are of {' or '.join(map(str, fits)) or 'no one number of'} "
            f"merges, and path 1 has {len(paper.path(1))}",
            "the correlations are path 1's alone, from which they can be recomputed",
        )
    for task in task_correlations(paper):
        printed = task.printed
        if (
            printed is not None
            and abs(round(task.found.r, 2) - float(printed)) >= float(unit(printed)) - 1e-9
        ):
            yield Disagreement(
                "correlation",
                f"Table 14, {task.metric.upper()}",
                f"{printed}",
                f"{task.found.r:.2f} from Table 15, {task.rescored.r:.2f} by Table 11's scores",
                "cut off instead of rounded"
                if abs(task.found.r) < abs(float(printed)) + float(unit(printed))
                else "not explained",
            )


def _kinship_disagreements(paper: Paper) -> Iterable[Disagreement]:
    for table, rows in (
        ("Tables 6, 7", [step.kinship for step in paper.steps]),
        ("Table 15", [pair.kinship for pair in paper.pairs]),
    ):
        apart = [row["pcc"] - row["cs"] for row in rows]
        wide = [value for value in apart if abs(value) > max(unit(value) for value in apart)]
        if wide:
            yield Disagreement(
                "kinship",
                table,
                "Pearson and cosine of the same weights",
                f"differ by more than 0.01 in {len(wide)} of {len(apart)} rows, from "
                f"{min(apart):+} to {max(apart):+}",
                "weight changes have a mean of nearly zero, where the two are one number",
            )
    for model in paper.table("Table 12").values():
        known = paper.models.get(model.same_as)
        if known is None or known.kinship is None or model.kinship is None:
            continue
        if abs(model.kinship - known.kinship) > unit(known.kinship):
            yield Disagreement(
                "kinship",
                f"Table 12, {model.name}",
                f"{model.kinship} (cosine)",
                f"{known.kinship} (Pearson) in Table 9 for {known.name}, the same merge",
                "the official code's cosine has no sign"
                if known.kinship < 0
                else "not explained: the two should be one number",
            )
    for pair in paper.figure_7:
        known = paper.models.get(pair.parents_of)
        if (
            known
            and known.kinship is not None
            and abs(pair.kinship - known.kinship) > unit(known.kinship)
        ):
            yield Disagreement(
                "kinship",
                f"Figure 7, {pair.models[0]} and {pair.models[1]}",
                f"{pair.kinship}",
                f"{known.kinship} in Table 9, as kinship of {known.name}'s parents",
                "the official code's cosine has no sign; the figure names no metric"
                if known.kinship < 0
                else "the figure names no metric",
            )
