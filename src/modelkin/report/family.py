"""A run as a report needs it: its state with everything that follows from it, computed once.

Knows the state and the samples; decides nothing and draws nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from modelkin.analyse import Difference, Gain, Samples, gains
from modelkin.gram import GramStats
from modelkin.records import Metric, Recipe, Similarity, canonical_json
from modelkin.state import Member, RunState

SamplesOf = Callable[[Member], Samples]
# A recipe beside a model is cut to so many characters; the file has all of it.
_RECIPE_WIDTH = 160


@dataclass(frozen=True)
class Source:
    """A run that is reported.

    Attributes:
        name: among the runs of one report.
        state: the fold of its events.
        samples_of: a member's outcomes, item by item; empty where none were kept.
        statistics: per-tensor statistics of its models, named by id, where there are any. Asked
            for once, and only by a page.
        run_file: the settings as they were written, empty if they are gone.
    """

    name: str
    state: RunState
    samples_of: SamplesOf
    statistics: Callable[[], GramStats | None]
    run_file: str


@dataclass(frozen=True)
class Family:
    """A run's members with their gains, kinship and lineages, scores on the scale of `factor`."""

    state: RunState
    samples_of: SamplesOf

    @cached_property
    def factor(self) -> float:
        """100 where all scores lie between 0 and 1, so that gains read in points; else 1."""
        values = [
            score.value
            for member in self.state.members.values()
            if member.scorecard
            for score in member.scorecard.scores.values()
        ]
        return 100.0 if values and all(0 <= value <= 1 for value in values) else 1.0

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the run's protocol, in its order."""
        for member in self.state.members.values():
            if member.scorecard:
                return tuple(member.scorecard.scores)
        return ()

    @property
    def metric(self) -> Metric:
        """The similarity that counted as kinship."""
        metric: Metric = self.setting("metric", "pcc")
        return metric

    def setting(self, name: str, default: Any = None) -> Any:
        """One of the settings that the run began with."""
        return self.state.started.settings.get(name, default) if self.state.started else default

    @cached_property
    def foundations(self) -> list[Member]:
        """In the order of the run file."""
        return [member for member in self.state.members.values() if not member.parents]

    @cached_property
    def children(self) -> list[Member]:
        """In the order in which they were decided on."""
        return [member for member in self.state.members.values() if member.parents]

    @cached_property
    def path(self) -> list[Member]:
        """The children that have scores, in the order of their merges."""
        return [member for member in self.children if member.average is not None]

    @cached_property
    def best_child(self) -> Member | None:
        """By average; `None` before any child has scores."""
        return next((member for member in self.state.ranked() if member.parents), None)

    @cached_property
    def best_foundation(self) -> Member | None:
        """By average."""
        return next((member for member in self.state.ranked() if not member.parents), None)

    @cached_property
    def gains(self) -> Mapping[str, Gain]:
        """Id to gain, for the children whose samples allow it; Holm over all of them."""
        found = gains(
            {member.id: member.parents for member in self.path},
            {member.id: self.samples_of(member) for member in self.state.ranked()},
            self.best_foundation.id if self.best_foundation else None,
        )
        return {
            child: Gain(
                self._scaled(gain.over_mean),
                tuple(self._scaled(one) for one in gain.over_parents),
                gain.over_best and self._scaled(gain.over_best),
                gain.adjusted_p,
            )
            for child, gain in found.items()
        }

    def _scaled(self, one: Difference) -> Difference:
        factor = self.factor
        return replace(one, value=factor * one.value, low=factor * one.low, high=factor * one.high)

    def average(self, member: Member) -> float | None:
        """Average task performance on the report's scale."""
        return None if member.average is None else self.factor * member.average

    def scores(self, member: Member) -> list[float | None]:
        """One score for each of `tasks`, on the report's scale."""
        card = member.scorecard
        return [self.factor * card.scores[task].value if card else None for task in self.tasks]

    def gain(self, member: Member) -> float | None:
        """Merge gain (paper eq. 6) on the report's scale."""
        found = self.state.gain(member)
        return None if found is None else self.factor * found

    def names(self, members: Sequence[str]) -> str:
        """Names of members given by id, such as a child's parents."""
        return " × ".join(self.state.members[member].name for member in members)

    def measured(self, member: Member) -> Similarity | None:
        """Kinship of a child's parents, from their weights."""
        return self.state.kinship.get(frozenset(member.parents))

    def predicted(self, member: Member) -> Similarity | None:
        """Kinship of a child's parents, from their recipes."""
        return self.state.predictions.get(frozenset(member.parents))

    def kinship(self, member: Member, metric: Metric | None = None) -> float | None:
        """Kinship of a child's parents, measured where it was, or else predicted."""
        found = self.measured(member) or self.predicted(member)
        value: float | None = getattr(found, metric or self.metric) if found else None
        return value

    def pair(self, one: Member, other: Member) -> float | None:
        """Kinship of two members, measured where it was, or else predicted."""
        pair = frozenset((one.id, other.id))
        found = self.state.kinship.get(pair) or self.state.predictions.get(pair)
        value: float | None = getattr(found, self.metric) if found else None
        return value

    @cached_property
    def lineage(self) -> frozenset[str]:
        """Ids of the best child and of all its ancestors."""
        seen: set[str] = set()
        waiting = [self.best_child.id] if self.best_child else []
        while waiting:
            member = waiting.pop()
            if member not in seen:
                seen.add(member)
                waiting += self.state.members[member].parents
        return frozenset(seen)


def recipe_text(recipe: Recipe) -> str:
    """What a merge did, in a line."""
    config = recipe.config
    rest = {
        key: value
        for key, value in config.items()
        if key in ("parameters", "slices", "weights") and value
    }
    text = str(config.get("merge_method", "merge"))
    if rest:
        text += " " + canonical_json(rest)
    return text if len(text) <= _RECIPE_WIDTH else text[: _RECIPE_WIDTH - 1] + "…"
