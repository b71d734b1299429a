"""The state of a run as the fold of its events. Pure: no files, no clock, no decisions.

Whatever a run needs to know after a restart is here, and comes from the ledger's events alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

from modelkin.records import (
    Event,
    Failed,
    Founded,
    Measured,
    Merged,
    Metric,
    Proposed,
    Recipe,
    Scorecard,
    Scored,
    Similarity,
    Started,
    Stopped,
    pedigree,
)


@dataclass(frozen=True)
class Member:
    """A model of the family, as far as it is known.

    Attributes:
        id: content id: of the recipe for a child, of the weights for a foundation.
        name: its name in the family.
        generation: 0 for foundation models.
        pedigree: its descent, see `records.Subject`.
        parents: ids, empty for foundation models.
        recipe: how it is made, for children.
        exploration: whether kinship chose its second parent.
        source: where it came from, for foundation models.
        revision: the Hub commit, for foundation models from there.
        fingerprint: of its weights, once they exist.
        scorecard: its scores, once it was evaluated.
        evaluation: names the file of its per-sample outcomes.
        failure: why it has no scores, if something failed.
    """

    id: str
    name: str
    generation: int
    pedigree: str
    parents: tuple[str, ...] = ()
    recipe: Recipe | None = None
    exploration: bool = False
    source: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    scorecard: Scorecard | None = None
    evaluation: str | None = None
    failure: Failed | None = None

    @property
    def average(self) -> float | None:
        """Average task performance, once evaluated (paper eq. 5)."""
        return self.scorecard.average if self.scorecard else None

    @property
    def settled(self) -> bool:
        """Whether nothing more will be learned about its scores."""
        return self.scorecard is not None or self.failure is not None


@dataclass(frozen=True)
class Cost:
    """What a run spent.

    Attributes:
        merging, evaluating, measuring: seconds.
        written: bytes of children's weights.
    """

    merging: float = 0.0
    evaluating: float = 0.0
    measuring: float = 0.0
    written: int = 0


@dataclass(frozen=True)
class RunState:
    """Everything known about a run.

    Attributes:
        started: the first event.
        base: the common base.
        members: id to member, in the order in which they were decided on.
        kinship: unordered pair of ids to similarity, measured.
        predictions: the same, predicted when a child was decided on, where its recipe allowed it.
        generation: the newest generation that was decided on; 0 before the first.
        cost: what was spent so far.
        stopped: why the run stopped, if it did and has not gone on since.
    """

    started: Started | None = None
    base: Founded | None = None
    members: Mapping[str, Member] = field(default_factory=dict)
    kinship: Mapping[frozenset[str], Similarity] = field(default_factory=dict)
    predictions: Mapping[frozenset[str], Similarity] = field(default_factory=dict)
    generation: int = 0
    cost: Cost = Cost()
    stopped: str | None = None

    @property
    def seconds(self) -> float:
        """Time spent on merging, evaluating and measuring."""
        return self.cost.merging + self.cost.evaluating + self.cost.measuring

    def until(self, generation: int) -> "RunState":
        """The state when a generation was settled, as far as decisions go."""
        members = {
            name: member for name, member in self.members.items() if member.generation <= generation
        }
        return replace(self, members=members, generation=generation, stopped=None)

    def ranked(self, generation: int | None = None) -> list[Member]:
        """Scored members up to a generation, the best first; of equals, the older first."""
        scored = [
            (-member.scorecard.average, position, member)
            for position, member in enumerate(self.members.values())
            if member.scorecard and (generation is None or member.generation <= generation)
        ]
        return [member for *_, member in sorted(scored, key=lambda entry: entry[:2])]

    def merged_pairs(self) -> set[frozenset[str]]:
        """All pairs of parents that were ever decided on."""
        return {frozenset(member.parents) for member in self.members.values() if member.parents}

    def similarity(self, one: str, other: str, metric: Metric = "pcc") -> float | None:
        """What choices go by: predicted where there is a prediction, or else measured.

        A measured child has the noise of rounding in its delta, which a child that is not made, or
        whose weights were given up, has not: so all children are compared as predicted.

        Returns:
            The similarity of two members by one metric; `None` where unknown or undefined.
        """
        pair = frozenset((one, other))
        similarity = self.predictions.get(pair) or self.kinship.get(pair)
        return getattr(similarity, metric) if similarity else None

    def as_measured(self) -> "RunState":
        """The same with measured kinship in the place of predictions, where there is any."""
        return replace(self, predictions={**self.predictions, **self.kinship})

    def mean_kinship(self, members: Iterable[Member], metric: Metric = "pcc") -> float | None:
        """Kinship of several members, the mean over pairs (paper eq. 4); `None` if unknown."""
        values = [self.similarity(a.id, b.id, metric) for a, b in combinations(members, 2)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def parents_of(self, member: Member) -> tuple[Member, ...]:
        """The members that `member` was merged from."""
        return tuple(self.members[parent] for parent in member.parents)

    def gain(self, member: Member) -> float | None:
        """Merge gain: the child's average minus the mean of its parents' (paper eq. 6)."""
        averages = [parent.average for parent in self.parents_of(member)]
        known = [average for average in averages if average is not None]
        if member.average is None or not known or len(known) < len(averages):
            return None
        return member.average - sum(known) / len(known)


def fold(events: Iterable[Event]) -> RunState:
    """The state after `events`."""
    started: Started | None = None
    base: Founded | None = None
    members: dict[str, Member] = {}
    kinship: dict[frozenset[str], Similarity] = {}
    predictions: dict[frozenset[str], Similarity] = {}
    generation = 0
    cost = Cost()
    stopped: str | None = None
    for event in events:
        match event:
            case Started():
                started = event
            case Founded(role="base"):
                base = event
            case Founded():
                members[event.model] = Member(
                    id=event.model,
                    name=event.name,
                    generation=0,
                    pedigree=event.name,
                    source=event.source,
                    revision=event.revision,
                    fingerprint=event.fingerprint,
                )
            case Proposed():
                generation, stopped = event.generation, None
                for proposal in event.proposals:
                    recipe = proposal.recipe
                    members[proposal.model] = Member(
                        id=proposal.model,
                        name=proposal.name,
                        generation=generation,
                        pedigree=pedigree(*(members[p].pedigree for p in recipe.parents)),
                        parents=recipe.parents,
                        recipe=recipe,
                        exploration=proposal.exploration,
                    )
                    for other, similarity in proposal.predicted.items():
                        predictions[frozenset((proposal.model, other))] = similarity
            case Merged():
                members[event.model] = replace(members[event.model], fingerprint=event.fingerprint)
                cost = replace(
                    cost, merging=cost.merging + event.seconds, written=cost.written + event.bytes
                )
            case Scored():
                members[event.model] = replace(
                    members[event.model], scorecard=event.scorecard, evaluation=event.evaluation
                )
                cost = replace(cost, evaluating=cost.evaluating + event.seconds)
            case Measured():
                for other, similarity in event.kinship.items():
                    kinship[frozenset((event.model, other))] = similarity
                cost = replace(cost, measuring=cost.measuring + event.seconds)
            case Failed():
                # A model that cannot be measured may have scores; they are not to be trusted.
                members[event.model] = replace(members[event.model], failure=event, scorecard=None)
            case Stopped():
                stopped = event.reason
    return RunState(started, base, members, kinship, predictions, generation, cost, stopped)
