"""Where the paper's averages and gains do not follow from its own task scores.

Knows Tables 1, 3 and 9 to 12; not how models were made.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from itertools import combinations
from statistics import median

from modelkin.replay.records import Disagreement, Model, Paper, Scores, mean, unit

# Averages that gains imply for one model are the same if they are this close: each of the three
# printed numbers that one is worked out from is off by up to one in its last digit.
IMPLIED = Decimal("0.02")


@dataclass(frozen=True)
class Average:
    """A printed average beside the mean of the printed task scores."""

    table: str
    name: str
    printed: Decimal
    found: Decimal
    half_unit: Decimal

    @property
    def rounded(self) -> bool:
        """Whether rounding gives the printed number."""
        return self.found.quantize(unit(self.printed), ROUND_HALF_UP) == self.printed

    @property
    def cut_off(self) -> bool:
        """Whether leaving out digits gives the printed number."""
        return self.found.quantize(unit(self.printed), ROUND_DOWN) == self.printed

    @property
    def within_rounding(self) -> bool:
        """Whether scores that were rounded to the printed ones can have the printed average."""
        low, high = self.found - self.half_unit, self.found + self.half_unit
        return low < self.printed + unit(self.printed) and high >= self.printed - (
            unit(self.printed) / 2
        )


def averages(paper: Paper) -> list[Average]:
    """Every average that the paper prints beside task scores."""
    rows: list[tuple[str, str, Decimal, Scores]] = [
        ("Table 9", model.name, model.average, model.scores) for model in paper.models.values()
    ]
    rows += [(model.table, model.name, model.average, model.scores) for model in paper.listed]
    return [
        Average(
            table, name, printed, mean(list(scores.values())),
            mean([unit(score) for score in scores.values()]) / 2,
        )
        for table, name, printed, scores in rows
    ]  # fmt: skip


def average_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """Averages that neither rounding nor cutting off explains; tables that do it differently."""
    found = averages(paper)
    for average in found:
        if not average.rounded and not average.cut_off:
            yield Disagreement(
                "average",
                f"{average.table}, {average.name}",
                f"{average.printed}",
                f"{average.found:.4f} from the task scores",
                "the scores' own rounding can explain it"
                if average.within_rounding
                else "not explained: neither rounded nor cut off",
            )
    cut = Counter(a.table for a in found if a.cut_off and not a.rounded)
    rounded = Counter(a.table for a in found if a.rounded and not a.cut_off)
    if cut and rounded:
        yield Disagreement(
            "average",
            "all tables with averages",
            "cut off: " + _counted(cut),
            "rounded: " + _counted(rounded),
            "no one way of shortening; counted where the two ways differ",
        )


def _counted(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{table} ({count})" for table, count in counter.items())


# Gains


def average_of(model: Model) -> Decimal:
    """The mean of a model's task scores (paper eq. 5)."""
    return mean(list(model.scores.values()))


def gain_of(paper: Paper, model: Model) -> Decimal:
    """Merge gain from task scores (paper eq. 6)."""
    return average_of(model) - mean([average_of(paper.models[name]) for name in model.parents])


def gain_differs(paper: Paper, model: Model) -> bool:
    """Whether the printed gain is further from the computed one than its last digit."""
    return model.gain is not None and abs(model.gain - gain_of(paper, model)) > tolerance(
        model.gain
    )


def tolerance(value: Decimal) -> Decimal:
    """How far a computed number may be from a printed one: one in its last digit."""
    # A little more: a mean of three has endless digits.
    return unit(value) + Decimal("1e-9")


def _printed_gain(paper: Paper, model: Model) -> Decimal:
    """The gain from printed averages."""
    return model.average - mean([paper.models[name].average for name in model.parents])


def gain_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """Gains of Tables 3 and 9 that do not follow from the task scores, and what would explain."""
    wrong = [model for model in paper.models.values() if gain_differs(paper, model)]
    suspect = _suspect(paper, wrong)
    if suspect:
        yield _two_averages(paper, suspect)
    for model in wrong:
        yield Disagreement(
            "gain",
            f"Tables 3, 9, {model.name}",
            f"{model.gain:+}",
            f"{gain_of(paper, model):+.3f} from the task scores",
            _explained(paper, model, suspect),
        )


@dataclass(frozen=True)
class _Suspect:
    """A model whose average, were it another one, would explain several gains."""

    name: str
    average: Decimal
    explains: frozenset[str]


def _implied(paper: Paper, model: Model, name: str) -> Decimal:
    """The average of `name`, the child or a parent, that the printed gain goes with."""
    assert model.gain is not None
    if name == model.name:
        return model.gain + mean([paper.models[parent].average for parent in model.parents])
    (other,) = (parent for parent in model.parents if parent != name)
    return 2 * (model.average - model.gain) - paper.models[other].average


def _suspect(paper: Paper, wrong: list[Model]) -> _Suspect | None:
    found: list[_Suspect] = []
    for name in paper.models:
        implied = {
            model.name: _implied(paper, model, name)
            for model in wrong
            if name in (model.name, *model.parents)
        }
        if len(implied) < 3:
            continue
        average = median(implied.values())
        close = {
            child: value for child, value in implied.items() if abs(value - average) <= IMPLIED
        }
        average = mean(list(close.values())) if close else average
        if len(close) >= 3 and abs(average - paper.models[name].average) > IMPLIED:
            found.append(_Suspect(name, average, frozenset(close)))
    return max(found, key=lambda suspect: len(suspect.explains), default=None)


def _two_averages(paper: Paper, suspect: _Suspect) -> Disagreement:
    model = paper.models[suspect.name]
    fitting = [
        other.name
        for other in paper.models.values()
        if suspect.name in other.parents
        and other.gain is not None
        and abs(_implied(paper, other, suspect.name) - model.average) <= IMPLIED
    ]
    above = [
        f"{other.name} ({other.average})"
        for other in paper.models.values()
        if model.average < other.average < suspect.average
    ]
    return Disagreement(
        "average",
        f"Table 9, {model.name}",
        f"{model.average}" + (f", which the gains of {', '.join(fitting)} fit" if fitting else ""),
        f"the gains of {', '.join(sorted(suspect.explains))} fit {suspect.average:.2f}",
        f"two averages were in use; by the higher one {model.name} is better than "
        f"{', '.join(above)}"
        if above
        else "two averages were in use",
    )


def _explained(paper: Paper, model: Model, suspect: _Suspect | None) -> str:
    assert model.gain is not None
    if abs(_printed_gain(paper, model) - model.gain) <= tolerance(model.gain):
        return "it was worked out from printed averages, one of which is wrong"
    if suspect and model.name in suspect.explains:
        return (
            f"it fits an average of {suspect.average:.2f} for {suspect.name}; "
            f"printed is {paper.models[suspect.name].average}"
        )
    older = _fitting_pairs(paper, model, model.generation - 1)
    if older:
        return f"not explained; it would be that of {_first(older)}"
    text = "not explained: no pair of older models has this gain"
    siblings = _fitting_pairs(paper, model, model.generation)
    return text + (f"; {_first(siblings)} would" if siblings else "")


def _fitting_pairs(paper: Paper, model: Model, generation: int) -> list[str]:
    """Pairs of models up to a generation from which the printed gain follows."""
    assert model.gain is not None
    return [
        f"{one.name} x {other.name}"
        for one, other in combinations(paper.models.values(), 2)
        if max(one.generation, other.generation) <= generation
        and model not in (one, other)
        and abs(model.average - (one.average + other.average) / 2 - model.gain)
        <= tolerance(model.gain)
    ]


def _first(pairs: list[str]) -> str:
    return pairs[0] + (f" or of {len(pairs) - 1} other pairs" if len(pairs) > 1 else "")
