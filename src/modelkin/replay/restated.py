"""What the paper prints a second time, or states in words: gains, kinship, differences, leads.

Knows what is compared with what; averages and gains are `arithmetic`'s.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from modelkin.replay.arithmetic import average_of, tolerance
from modelkin.replay.records import Claim, Disagreement, Paper, mean


def reprint_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """Gains and kinship that are printed with another value elsewhere; "delta to top"."""
    for reprint in paper.reprints:
        model = paper.models.get(reprint.subject)
        if model is None or reprint.quantity not in ("gain", "kinship"):
            continue
        printed = model.gain if reprint.quantity == "gain" else model.kinship
        if printed is not None and printed != reprint.value:
            same = [
                other.name
                for other in paper.models.values()
                if reprint.quantity == "gain" and other.gain == reprint.value
            ]
            yield Disagreement(
                reprint.quantity,
                f"{reprint.source}, {model.name}",
                f"{reprint.value}",
                f"{printed} in Table 9",
                f"it is the {reprint.quantity} of {same[0]}" if same else "not explained",
            )
    references = _references(paper)
    wrong = {name: other for name, (other, right) in references.items() if not right}
    if wrong:
        yield Disagreement(
            "delta to top",
            "Table 3",
            f"differences to the best model, for {len(references)} models",
            "not to the best of the generations before: "
            + ", ".join(f"{name} to {other}" for name, other in wrong.items()),
            "the column has no fixed reference",
        )


def _references(paper: Paper) -> dict[str, tuple[str, bool]]:
    """For each printed "delta to top", whom it is taken to, and whether that was the best."""
    found = {}
    for reprint in paper.reprints:
        model = paper.models.get(reprint.subject)
        if model is None or reprint.quantity != "delta to top":
            continue
        # Models of the other run were not there, those of both runs were.
        runs = {"foundation", "both", model.column}
        known = [other for other in paper.models.values() if other.column in runs]
        before = [other for other in known if other.generation < model.generation]
        best = max(before, key=lambda other: other.average)
        reference = model.average - reprint.value
        nearest = min(
            known,
            key=lambda other: (abs(other.average - reference), other.generation),
        )
        right = abs(best.average - reference) <= tolerance(reprint.value)
        found[model.name] = (best.name if right else nearest.name, right)
    return found


@dataclass(frozen=True)
class Lead:
    """How far the best of the kinship run is ahead of the best of the greedy run.

    Attributes:
        printed: by the averages that the text names.
        found: by the means of the task scores.
        greedy, kinship: the best models.
    """

    experiment: str
    printed: Decimal
    found: Decimal
    greedy: str
    kinship: str

    @property
    def differs(self) -> bool:
        """Whether the two are further apart than the last printed digit."""
        return abs(self.printed - self.found) > tolerance(self.printed)


def leads(paper: Paper) -> list[Lead]:
    """Of the main experiment, the second task set and the Llama models."""
    main = [(m.name, m.column, average_of(m)) for m in paper.models.values()]
    found = []
    for experiment, claim, rows in (
        ("main experiment", "best_{}", main),
        ("second task set", "best_second_{}", _rows(paper, "Table 10")),
        ("Llama-2", "best_llama_{}", _rows(paper, "Table 11")),
    ):
        claims = [paper.claims.get(claim.format(run)) for run in ("greedy", "kinship")]
        best = [
            max(
                (row for row in rows if row[1] in ("foundation", "both", run)),
                key=_last,
                default=None,
            )
            for run in ("greedy", "kinship")
        ]
        match (*claims, *best):
            case (Claim() as low, Claim() as high, (greedy, _, less), (kinship, _, more)):
                found.append(Lead(experiment, high.value - low.value, more - less, greedy, kinship))
    return found


def _last(row: tuple[str, str, Decimal]) -> Decimal:
    return row[2]


def _rows(paper: Paper, table: str) -> list[tuple[str, str, Decimal]]:
    return [
        (model.name, model.column, mean(list(model.scores.values())))
        for model in paper.table(table).values()
    ]


def lead_disagreements(paper: Paper) -> Iterable[Disagreement]:
    """Leads of the kinship run that the task scores give another size."""
    for lead in leads(paper):
        if lead.differs:
            yield Disagreement(
                "lead",
                f"{lead.experiment}, {lead.kinship} over {lead.greedy}",
                f"{lead.printed:+}",
                f"{lead.found:+.2f} from the task scores",
                "the printed averages are not the means of the scores, or shortened in two ways",
            )
