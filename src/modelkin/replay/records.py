"""What the paper printed, as values. Numbers are decimals, which remember their printed digits.

Knows nothing of files, and nothing of what the numbers mean together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

Scores = Mapping[str, Decimal]


@dataclass(frozen=True)
class Model:
    """A model of the main experiment (Tables 3, 9).

    `column` is `foundation`, `both`, `greedy` or `kinship`: the runs that the paper shows it in.
    """

    name: str
    column: str
    generation: int
    parents: tuple[str, ...]
    scores: Scores
    average: Decimal
    gain: Decimal | None
    kinship: Decimal | None
    evidence: str

    @property
    def exploration(self) -> bool:
        """Whether kinship chose the second parent."""
        return self.name.endswith("-exp")


@dataclass(frozen=True)
class Step:
    """A merge of an evolution path (Tables 4 to 7). A parent that is not printed is left out."""

    path: int
    number: int
    parents: tuple[str, ...]
    model: str
    score: Decimal
    gain: Decimal
    kinship: Mapping[str, Decimal]


@dataclass(frozen=True)
class CommunityMerge:
    """A sample merge (Table 8)."""

    row: int
    parents: tuple[str, str]
    child: str
    gain: Decimal


@dataclass(frozen=True)
class PublishedCorrelation:
    """A row of Table 2: kinship against merge gain, as it is and without its sign."""

    metric: str
    signed_r: Decimal
    signed_p: Decimal
    absolute_r: Decimal
    absolute_p: Decimal


@dataclass(frozen=True)
class Listed:
    """A model with its scores and its printed average, of whatever table.

    `kinship` is that of its parents; `same_as` names the model of Table 9 with the same scores.
    """

    table: str
    name: str
    column: str
    generation: int
    scores: Scores
    average: Decimal
    kinship: Decimal | None = None
    same_as: str = ""


@dataclass(frozen=True)
class Pair:
    """Two Llama models (Table 15): differences of scores, their mean, and kinship by metric."""

    row: int
    models: tuple[str, str]
    differences: Scores
    mean: Decimal
    kinship: Mapping[str, Decimal]


@dataclass(frozen=True)
class Matched:
    """Kinship of two models in Figure 7; `parents_of` names the child they have in Table 9."""

    stage: str
    models: tuple[str, str]
    kinship: Decimal
    parents_of: str


@dataclass(frozen=True)
class Claim:
    """A number that the paper states in words or in a figure."""

    value: Decimal
    source: str
    text: str


@dataclass(frozen=True)
class Reprint:
    """A number that is printed once more elsewhere, or for another purpose."""

    subject: str
    quantity: str
    value: Decimal
    source: str


@dataclass(frozen=True)
class Statement:
    """Two places that contradict each other in words, and which of them the evidence favours."""

    topic: str
    one_source: str
    one_says: str
    other_source: str
    other_says: str
    settled: str


@dataclass(frozen=True)
class Paper:
    """Everything that was read. The last four are empty where their files are left out.

    Attributes:
        source: the folder's name, for messages.
        models: the main experiment, foundation models first.
        listed: models of all other tables with scores, by table.
    """

    source: str
    models: Mapping[str, Model]
    steps: Sequence[Step]
    merges: Sequence[CommunityMerge]
    correlations: Mapping[str, PublishedCorrelation]
    listed: Sequence[Listed]
    pairs: Sequence[Pair]
    figure_7: Sequence[Matched]
    claims: Mapping[str, Claim]
    reprints: Sequence[Reprint]
    statements: Sequence[Statement]

    def table(self, name: str) -> dict[str, Listed]:
        """The models that one table lists, by name."""
        return {model.name: model for model in self.listed if model.table == name}

    def path(self, number: int) -> list[Step]:
        """The merges of one evolution path, in order."""
        steps = [step for step in self.steps if step.path == number]
        return sorted(steps, key=lambda step: step.number)

    def without(self, models: frozenset[str]) -> list[Step]:
        """The distinct merges of both paths, but for those that made one of `models`."""
        distinct = {step.model: step for step in self.steps if step.model not in models}
        return list(distinct.values())


@dataclass(frozen=True)
class Disagreement:
    """A place where the paper disagrees with itself.

    Attributes:
        kind: what it is about.
        where: table, row, model.
        printed: what is printed there.
        found: what is printed elsewhere, or follows from other printed numbers.
        why: what explains it, as far as it is known.
    """

    kind: str
    where: str
    printed: str
    found: str
    why: str


def mean(values: Sequence[Decimal]) -> Decimal:
    """The plain mean."""
    return sum(values, Decimal(0)) / len(values)


def unit(value: Decimal) -> Decimal:
    """One in the last printed digit.

    >>> unit(Decimal("68.72"))
    Decimal('0.01')
    """
    return Decimal(1).scaleb(int(value.as_tuple().exponent))
