"""What is shown of the community's merges: correlations, paths, stages, early stopping.

Computes nothing but what it counts.
"""

from itertools import pairwise

from modelkin.analyse import EarlyStop
from modelkin.replay.correlations import GainCorrelation, gain_correlations
from modelkin.replay.lineage import generations
from modelkin.replay.paths import PATIENCES, THRESHOLDS, Path, paths
from modelkin.replay.records import Paper, mean
from modelkin.replay.shown import R_HEADS, Cell, Part, Table, p_text, r_cells, r_text


def correlations_part(paper: Paper) -> Part:
    """Table 2, and the same from other merges, with its uncertainty."""
    found = gain_correlations(paper)
    carried = dict.fromkeys((row.sample, row.decisive) for row in found if row.decisive)
    texts = [
        "Pearson correlation of the parents' kinship with the merge gain, as it is (signed) and "
        "without its sign (absolute). The published numbers are those of path 1 (Table 6), not "
        "of the 37 merges of Table 8, whose kinship is not printed. Intervals are by bootstrap "
        "over merges; the range is that of r when any one merge is left out. p "
        "follows from r and n; a small change of r, as by its rounding, moves p more.",
        *(
            f"Beware: in {sample} one merge alone, {model}, carries the correlation."
            for sample, model in carried
        ),
    ]
    table_2 = [
        [*_named(row), r_text(row.found.r), f"{row.printed[0]}", p_text(row.found.p),
         f"{row.printed[1]}", row.why]
        for row in found
        if row.sample == "path 1"
    ]  # fmt: skip
    rows = [[row.sample, *_named(row), *r_cells(row.found)] for row in found]
    heads = ("kinship", "gain", "r", "printed", "p", "printed p", "why")
    return Part(
        "correlations",
        "Kinship against merge gain (Table 2)",
        texts,
        [
            Table("table-2", heads, table_2),
            Table("correlations", ("merges", "kinship", "gain", *R_HEADS), rows),
        ],
    )


def _named(row: GainCorrelation) -> tuple[str, str]:
    return row.metric, "signed" if row.signed else "absolute"


def paths_part(paper: Paper) -> Part:
    """Both paths by our stages, beside the counts of the paper."""
    found = paths(paper)
    summary = [
        [path.name, len(path.scores), path.found_saturated,
         None if path.saturated is None else int(path.saturated.value),
         "" if path.saturated is None else _agreed(path)]
        for path in found
    ]  # fmt: skip
    texts = [
        f"Improving and saturation stage. Our rule: {found[0].stages.rule}. The paper counts "
        "merges that brought little (section 5.2) without a rule.",
    ]
    tables = [
        Table(
            "stages",
            ("path", "merges", "saturated, by our rule", "by the paper", "verdict"),
            summary,
        )
    ]
    tables += [_path_table(path) for path in found if path.name.startswith("path")]
    return Part("paths", "Evolution paths and their stages", texts, tables)


def _agreed(path: Path) -> str:
    assert path.saturated is not None
    if path.found_saturated == path.saturated.value:
        return "as published"
    return f"differs: {path.saturated.source} counts by eye"


def _path_table(path: Path) -> Table:
    count = None if path.saturated is None else int(path.saturated.value)
    rows: list[list[Cell]] = [
        [number, model, score, best, "" if kinship is None else f"{kinship:.2f}",
         _stage(number, len(path.scores), path.found_saturated),
         "" if count is None else _stage(number, len(path.scores), count)]
        for number, (model, score, best, kinship) in enumerate(
            zip(path.models, path.scores, path.stages.best_so_far, path.kinship, strict=True),
            start=1,
        )
    ]  # fmt: skip
    heads = (path.name, "merged model", "average", "best so far", "pcc of parents", "stage",
             "by the paper")  # fmt: skip
    return Table(path.name.replace(" ", "-"), heads, rows)


def _stage(number: int, merges: int, saturated: int) -> str:
    return "saturation" if number > merges - saturated else "improving"


def stopping_part(paper: Paper) -> Part:
    """What every threshold and patience would have saved and lost on each path."""
    found = paths(paper)
    rows: list[list[Cell]] = []
    for path in found:
        for threshold in THRESHOLDS:
            stops = {stop.patience: stop for stop in path.stops if stop.threshold == threshold}
            rows.append(
                [path.name, f"{threshold}", *(_stopped(stops[patience]) for patience in PATIENCES)]
            )
    heads = ("path", "stops above", *(f"{p} in a row" for p in PATIENCES))
    return Part(
        "stopping",
        "Early stopping",
        [
            "What would have been saved and lost if a path had been stopped when its parents' "
            "kinship (pcc) was above a threshold for so many merges in a row. Saved: merges not "
            "made. Lost: the best score of all less the best score until then.",
            *_stopping_claims(paper),
        ],
        [Table("early-stopping", heads, rows)],
    )


def _stopped(stop: EarlyStop) -> str:
    if stop.stops_after is None:
        return "never stops"
    return f"saves {stop.saved} ({stop.saved_share:.0%}), loses {stop.lost:.2f}"


def _stopping_claims(paper: Paper) -> list[str]:
    share, threshold = paper.claims.get("saved_share"), paper.claims.get("stop_kinship")
    little = [paper.claims.get(f"saturated_{path}") for path in (1, 2)]
    texts = []
    if share and all(little):
        count = sum(int(claim.value) for claim in little if claim)
        merges = len(paper.steps)
        texts.append(
            f"{share.source} says that about {share.value:.0%} of the time is saved: {count} of "
            f"{merges} merges, {count / merges:.0%}, if it is known beforehand which they are."
        )
    if threshold:
        best = [
            f"after generation {row.number} of the {row.run} run"
            for row in generations(paper)
            if row.kinship is not None and row.kinship > threshold.value
        ]
        texts.append(
            f"{threshold.source} suggests to stop when the kinship of the best is above "
            f"{threshold.value}: that is so {', '.join(best) or 'nowhere'}, as far as kinship is "
            "printed."
        )
    generation = paper.claims.get("saturated_generations_greedy")
    if generation:
        greedy = [row for row in generations(paper) if row.run == "greedy"]
        flat = sum(b.average <= a.average for a, b in pairwise(greedy))
        texts.append(
            f"{generation.source}: {generation.value} generations of the greedy run brought "
            f"little. Its best score did not rise in {flat}."
        )
    return texts


def matrices_part(paper: Paper) -> Part:
    """The means of Figure 7's matrices."""
    rows: list[list[Cell]] = []
    for stage in dict.fromkeys(pair.stage for pair in paper.figure_7):
        values = [pair.kinship for pair in paper.figure_7 if pair.stage == stage]
        models = dict.fromkeys(
            name for pair in paper.figure_7 if pair.stage == stage for name in pair.models
        )
        rows.append(
            [stage, ", ".join(models), float(mean(values)), f"{min(values)}", f"{max(values)}"]
        )
    return Part(
        "matrices",
        "Kinship of five models at three stages (Figure 7)",
        ["The kinship of n models is the mean over their pairs (equation 4)."],
        [Table("figure-7", ("stage", "models", "kinship", "lowest", "highest"), rows)],
    )
