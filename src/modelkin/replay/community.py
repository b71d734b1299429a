"""Where the tables of community merges (4 to 8) disagree with each other and with the text.

Knows nothing of the experiments.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import combinations, pairwise

from modelkin.replay.records import CommunityMerge, Disagreement, Paper, Step, mean, unit

# A parent's average follows from a gain as 2 (child - gain) - other parent. With each of the three
# rounded to 0.01 two such averages of one model are up to this far apart.
IMPLIED = Decimal("0.05")


def same_model(one: str, other: str) -> bool:
    """Whether two printed names may be the same model's: one goes on where the other ends.

    >>> same_model("Experiment28", "Experiment28-7B")
    True
    >>> same_model("Beagle14-7B", "NeuralBeagle14-7B")
    False
    """
    short, long = sorted((one, other), key=len)
    return long == short or long.startswith(f"{short}-")


def misspelt(one: str, other: str) -> bool:
    """Whether two names have the same letters and numbers in another order.

    >>> misspelt("Hermes-2.5-Mistral", "Herems-Mistral-2.5")
    True
    >>> misspelt("Merges_21", "Merges_12")
    False
    """
    return one != other and all(
        sorted(part(one)) == sorted(part(other)) for part in (_letters, _numbers)
    )


def _letters(name: str) -> list[str]:
    return [letter for letter in name if letter.isalpha()]


def _numbers(name: str) -> list[str]:
    return "".join(letter if letter.isdigit() else " " for letter in name).split()


def _same_pair(one: Sequence[str], other: Sequence[str]) -> bool:
    def alike(first: str, second: str) -> bool:
        return same_model(first, second) or misspelt(first, second)

    if len(one) != 2 or len(other) != 2:
        return False
    return (alike(one[0], other[0]) and alike(one[1], other[1])) or (
        alike(one[0], other[1]) and alike(one[1], other[0])
    )


def sample_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """Merges of Table 8 that are listed twice, and those that Tables 6 and 7 print otherwise."""
    for one, other in combinations(paper.merges, 2):
        if _same_pair(one.parents, other.parents):
            yield _repeated(one, other)
    for merge in paper.merges:
        for step in paper.steps:
            coarse = max(unit(merge.gain), unit(step.gain))
            if _same_pair(merge.parents, step.parents) and abs(merge.gain - step.gain) > coarse:
                yield Disagreement(
                    "community merge",
                    f"Table 8, row {merge.row}: {' x '.join(merge.parents)}",
                    f"gain {merge.gain:+}",
                    f"gain {step.gain:+} in path {step.path}, step {step.number}",
                    "not explained",
                )
                break
    negative = [merge.gain for merge in paper.merges if merge.gain < 0]
    axis = paper.claims.get("figure_2_lowest_gain")
    if axis and negative and min(negative) < axis.value:
        yield Disagreement(
            "community merge",
            axis.source,
            f"the axis of merge gain begins at {axis.value}",
            f"Table 8 has {len(negative)} negative gains, down to {min(negative)}",
            "the figure shows fewer merges than the text says, or sizes of gains only",
        )


def _repeated(one: CommunityMerge, other: CommunityMerge) -> Disagreement:
    spelt = any(misspelt(a, b) for a in one.parents for b in other.parents)
    return Disagreement(
        "community merge",
        f"Table 8, rows {one.row} and {other.row}: {' x '.join(one.parents)}",
        f"gain {one.gain:+}",
        f"the same pair again, gain {other.gain:+}",
        "one row twice, with a name misspelt"
        if spelt
        else "one pair twice"
        if one.gain == other.gain
        else "one pair twice, perhaps in the other order, which SLERP does tell apart",
    )


def path_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """What the two paths share, where they break off, and scores that do not go together."""
    yield from _shared(paper)
    yield from _breaks(paper)
    yield from _implied_scores(paper)
    yield from _other_names(paper)
    for number in sorted({step.path for step in paper.steps}):
        yield from _saturation(paper, number)


def _shared(paper: Paper) -> Iterable[Disagreement]:
    one, other = paper.path(1), paper.path(2)
    shared = [(a, b) for a in one for b in other if a.model == b.model]
    if shared:
        yield Disagreement(
            "evolution path",
            "Tables 6, 7",
            "two evolution paths",
            f"steps {_numbered([a for a, _ in shared])} of path 1 are steps "
            f"{_numbered([b for _, b in shared])} of path 2",
            "the paths end in the same model, so their saturation stages are not independent",
        )


def _numbered(steps: Sequence[Step]) -> str:
    return ", ".join(str(step.number) for step in steps)


def _breaks(paper: Paper) -> Iterable[Disagreement]:
    for number in sorted({step.path for step in paper.steps}):
        steps = paper.path(number)
        for before, step in pairwise(steps):
            if not any(same_model(before.model, parent) for parent in step.parents):
                yield Disagreement(
                    "evolution path",
                    f"path {number}, step {step.number}",
                    f"step {before.number} made {before.model}",
                    f"step {step.number} merges {' and '.join(step.parents)}",
                    "not a chain of merges alone: a fine-tune of the merged model came between",
                )


def _implied_scores(paper: Paper) -> Iterable[Disagreement]:
    """Averages of parents that are merged twice, as each of the two gains implies them."""
    printed = {step.model: step.score for step in paper.steps}
    unknown = [
        (step, parent, other)
        for step in paper.steps
        if len(step.parents) == 2
        for parent, other in (step.parents, step.parents[::-1])
        if _known(printed, parent) is None
    ]
    implied: dict[str, tuple[Decimal, Step]] = {}
    reported: set[str] = set()
    # Each round can make one more parent known, which makes others known in the next.
    for _ in paper.steps:
        for step, parent, other in unknown:
            scores = {**{name: score for name, (score, _) in implied.items()}, **printed}
            known = _known(scores, other)
            if known is None:
                continue
            score = 2 * (step.score - step.gain) - known
            name = next((name for name in implied if same_model(name, parent)), parent)
            first, first_step = implied.setdefault(name, (score, step))
            if abs(first - score) > IMPLIED and name not in reported:
                reported.add(name)
                yield Disagreement(
                    "evolution path",
                    f"path {first_step.path}, step {first_step.number}",
                    f"its gain implies {first:.2f} for {name}",
                    f"step {step.number} of path {step.path} implies {score:.2f}",
                    "not explained",
                )


def _known(scores: Mapping[str, Decimal], name: str) -> Decimal | None:
    return next((score for known, score in scores.items() if same_model(known, name)), None)


def _other_names(paper: Paper) -> Iterable[Disagreement]:
    made = {f"merged from {' and '.join(step.parents)}": step for step in paper.steps}
    for reprint in paper.reprints:
        step = made.get(reprint.quantity)
        if step and step.model != reprint.subject:
            yield Disagreement(
                "evolution path",
                reprint.source,
                f"{' x '.join(step.parents)} made {reprint.subject}",
                f"Table 4: it made {step.model}",
                "the name that is printed here is that of the next step's model",
            )
    tables = {name for merge in paper.merges for name in (*merge.parents, merge.child) if name}
    names = {name for step in paper.steps for name in (*step.parents, step.model)}
    apart = sorted(
        f"{one} / {other}"
        for one, other in combinations(sorted(tables | names), 2)
        if one != other and same_model(one, other)
    )
    if apart:
        yield Disagreement(
            "community merge",
            "Tables 6, 7, 8",
            "names of models",
            f"{len(apart)} names are printed in two ways: {', '.join(apart)}",
            "taken as the same models",
        )


def _saturation(paper: Paper, number: int) -> Iterable[Disagreement]:
    """What section 5.2 says of a path's saturated merges."""
    steps = paper.path(number)
    count = paper.claims.get(f"saturated_{number}")
    if count is None or not 0 < count.value < len(steps):
        return
    saturated = steps[-int(count.value) :]
    claim = paper.claims.get(f"saturated_gain_{number}")
    average = mean([step.gain for step in saturated])
    if claim and abs(average - claim.value) > unit(claim.value):
        rises = [step.number for step in steps[:-1] if steps[-1].score - step.score == claim.value]
        yield Disagreement(
            "evolution path",
            f"{claim.source}, path {number}",
            f"average gain {claim.value} of {count.value} saturated merges",
            f"their mean gain is {average:.2f}",
            f"it is the total rise from step {rises[0]} to step {steps[-1].number}"
            if rises
            else "not explained",
        )
    level = paper.claims.get("saturation_score")
    above = [step for step in steps if level and step.score >= level.value]
    if level and len(above) != count.value:
        yield Disagreement(
            "evolution path",
            f"{count.source}, path {number}",
            f"{count.value} saturated merges",
            f"{len(above)} merges are at {level.value} or more, where saturation begins by "
            f"{level.source}",
            "the text does not say how the merges were counted",
        )
