"""Where Tables 10, 11 and 15 disagree with each other: other tasks, and Llama models.

Knows task scores and their differences; not how models were made.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from itertools import combinations, permutations, product

from modelkin.replay.records import Disagreement, Pair, Paper, Scores, mean, unit

# Table 15's columns in the order of print, and the tasks that they are compared with.
LABELS = ("winogrande", "truthfulqa", "gsm8k")
# How far a model's scores are moved in search of those that Table 15 was made of.
SHIFTS = tuple(Decimal(shift) / 10 for shift in range(-2, 3))
# Fewer rows than this fit by chance.
FEW = 3

Differences = tuple[Decimal, ...]


def llama_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """Everything that Table 15 says otherwise than Table 11, or twice."""
    scores = {name: model.scores for name, model in paper.table("Table 11").items()}
    order = _order(paper.pairs, scores)
    if order != LABELS:
        fits = _fitting(paper.pairs, scores, order)
        yield Disagreement(
            "task difference",
            "Table 15, columns",
            "labelled " + ", ".join(LABELS),
            f"by Table 11 they hold {', '.join(order)}: {len(fits)} of {len(paper.pairs)} rows "
            f"fit so, and {len(_fitting(paper.pairs, scores, LABELS))} as labelled",
            "the labels are exchanged; below they are read as Table 11 says",
        )
    corrected = _corrected(paper.pairs, scores, order)
    yield from _other_scores(paper, scores, corrected, order)
    for pair in paper.pairs:
        printed = tuple(pair.differences[task] for task in LABELS)
        by_scores = _differences(pair.models, scores, order)
        if printed not in (by_scores, _differences(pair.models, corrected, order)):
            yield Disagreement(
                "task difference",
                f"Table 15, row {pair.row}: {' and '.join(pair.models)}",
                "differences " + _listed(printed),
                f"{_listed(by_scores)} by Table 11",
                _explained(pair.models, printed, scores, corrected, order),
            )
        if abs(mean(printed) - pair.mean) > unit(pair.mean):
            yield Disagreement(
                "task difference",
                f"Table 15, row {pair.row}",
                f"mean difference {pair.mean}",
                f"{mean(printed):.2f} from its three differences",
                "not explained",
            )
    for one, other in combinations(paper.pairs, 2):
        if set(one.models) == set(other.models):
            yield Disagreement(
                "task difference",
                f"Table 15, rows {one.row} and {other.row}",
                f"{' and '.join(one.models)}: {one.mean}, cosine {one.kinship['cs']}",
                f"the same pair again: {other.mean}, cosine {other.kinship['cs']}",
                "not explained",
            )


def child_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """Generations of the greedy runs with more children than k best have pairs."""
    claim = paper.claims.get("k")
    if claim is None:
        return
    most = int(claim.value) * (int(claim.value) - 1) // 2
    found = Counter(
        (model.table, model.generation) for model in paper.listed if model.column == "greedy"
    )
    found += Counter(
        ("Table 9", model.generation)
        for model in paper.models.values()
        if model.column in ("both", "greedy")
    )
    for (table, generation), count in found.items():
        if generation > 1 and count > most:
            yield Disagreement(
                "generation",
                f"{table}, greedy run, generation {generation}",
                f"{count} children",
                f"k = {claim.value} ({claim.source}) has {most} pairs",
                "not explained",
            )


def _differences(
    models: tuple[str, str], scores: Mapping[str, Scores], order: Iterable[str]
) -> Differences:
    one, other = (scores[name] for name in models)
    return tuple(abs(one[task] - other[task]) for task in order)


def _fitting(
    pairs: Iterable[Pair], scores: Mapping[str, Scores], order: Iterable[str]
) -> list[int]:
    tasks = tuple(order)
    return [
        pair.row
        for pair in pairs
        if tuple(pair.differences[task] for task in LABELS)
        == _differences(pair.models, scores, tasks)
    ]


def _order(pairs: Iterable[Pair], scores: Mapping[str, Scores]) -> tuple[str, ...]:
    """What the columns hold: the order under which most rows fit Table 11; as labelled if equal."""
    rows = list(pairs)
    return max(
        permutations(LABELS),
        key=lambda order: (len(_fitting(rows, scores, order)), order == LABELS),
    )


def _corrected(
    pairs: Iterable[Pair], scores: Mapping[str, Scores], order: tuple[str, ...]
) -> dict[str, Scores]:
    """Scores under which more rows fit: for each model that many misfits share, others nearby."""
    corrected = dict(scores)
    rows = list(pairs)
    fitting = set(_fitting(rows, scores, order))
    misfits = Counter(name for pair in rows if pair.row not in fitting for name in pair.models)
    for name, count in misfits.items():
        if count < FEW:
            continue
        of_model = [pair for pair in rows if name in pair.models]
        best = len(_fitting(of_model, scores, order))
        for shifts in product(SHIFTS, repeat=len(order)):
            moved = {
                task: scores[name][task] + shift for task, shift in zip(order, shifts, strict=True)
            }
            fits = len(_fitting(of_model, {**scores, name: moved}, order))
            if fits >= best + FEW:
                best, corrected[name] = fits - FEW + 1, moved
    return corrected


def _other_scores(
    paper: Paper,
    scores: Mapping[str, Scores],
    corrected: Mapping[str, Scores],
    order: tuple[str, ...],
) -> Iterable[Disagreement]:
    for name, moved in corrected.items():
        if moved == scores[name]:
            continue
        rows = sorted(
            set(_fitting(paper.pairs, corrected, order)) - set(_fitting(paper.pairs, scores, order))
        )
        yield Disagreement(
            "task difference",
            f"Table 11, {name}",
            _scores(scores[name], order),
            f"rows {', '.join(map(str, rows))} of Table 15 fit {_scores(moved, order)}",
            "Table 15 was made of other scores for this model",
        )


def _explained(
    models: tuple[str, str],
    printed: Differences,
    scores: Mapping[str, Scores],
    corrected: Mapping[str, Scores],
    order: tuple[str, ...],
) -> str:
    others = [
        " and ".join(pair)
        for pair in combinations(scores, 2)
        if _differences(pair, scores, order) == printed
    ]
    for known in (scores, corrected):
        right = _differences(models, known, order)
        if max(abs(a - b) for a, b in zip(printed, right, strict=True)) <= Decimal("0.1"):
            return "within 0.1, the last digit of the scores"
    for known in (scores, corrected):
        right = _differences(models, known, order)
        if sorted(printed) == sorted(right):
            swapped = [task for task, a, b in zip(order, printed, right, strict=True) if a != b]
            return f"the differences of {' and '.join(swapped)} seem exchanged"
    return f"they are those of {others[0]}" if others else "no pair of models has these differences"


def _listed(differences: Differences) -> str:
    return ", ".join(f"{value:.1f}" for value in differences)


def _scores(scores: Scores, order: Iterable[str]) -> str:
    return ", ".join(f"{task} {scores[task]}" for task in order)
