"""Pairs in the order in which they are worth merging, with the reasons. Pure.

The rule: pairs are ranked by the mean of the parents' average scores, highest first. Of equals the
more complementary come first, then the less kin; where scores are missing, kinship alone ranks.
Near-duplicates come last: parents whose kinship exceeds 0.95, or whose child is predicted to exceed
it with a model that is neither of them.

Why the mean: over the 23 merges of the paper's main experiment its rank correlation with the
child's average is 0.76. What the parents could have together, the better score at each task, sounds
better and is worse: 0.25. So how they complement each other is said of each pair, as what there is
to win, but decides between equals only.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, islice
from typing import Any

from modelkin.errors import MergeError
from modelkin.previewing import Crossing
from modelkin.records import Metric

# Models more kin than this are near-duplicates.
NEAR_DUPLICATE = 0.95
# So many of the tasks at which a parent is stronger are named.
TASKS = 3


@dataclass(frozen=True)
class Evidence:
    """What is known of some models.

    Attributes:
        models: the models to choose parents from, by distinct names.
        scores: model -> task -> score, higher is better; without models that have none. All have
            the same tasks.
        kinship: unordered pair of models -> its kinship; without pairs for which it is unknown or
            undefined.
        metric: what kinship is here, "pcc" or "cs".
        merged: unordered pairs that were merged before.
        crossing: predicts the children of pairs of its models; `None` where nothing can.
        notes: what to say about what is known and what is not.
    """

    models: tuple[str, ...]
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    kinship: Mapping[frozenset[str], float] = field(default_factory=dict)
    metric: Metric = "pcc"
    merged: frozenset[frozenset[str]] = frozenset()
    crossing: Crossing | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Neighbour:
    """The model that a predicted child is most kin to, its parents aside; `ed` as `Similarity`."""

    model: str
    kinship: float
    ed: float


@dataclass(frozen=True)
class Suggestion:
    """Two models to merge.

    Attributes:
        parents: the one with the higher average first.
        kinship: of the parents; `None` where unknown or undefined.
        averages: mean score of each parent; `None` where one of them has no scores.
        promise: mean over tasks of the better parent's score: what a child would average that had
            the strengths of both; `None` as above.
        stronger: for each parent, tasks at which it is better -> by how much, the most first.
        nearest: whom the child is predicted to resemble most; `None` where nothing predicts it.
        unpredicted: why the child is not predicted, although others are.
    """

    parents: tuple[str, str]
    kinship: float | None
    averages: tuple[float, float] | None
    promise: float | None
    stronger: tuple[Mapping[str, float], Mapping[str, float]]
    nearest: Neighbour | None = None
    unpredicted: str | None = None

    @property
    def mean(self) -> float | None:
        """The mean of both averages, by which pairs are ranked."""
        return None if self.averages is None else _mean(self.averages)

    @property
    def complement(self) -> float | None:
        """What the promise has above the better parent's average; 0 if it is better throughout."""
        if self.promise is None or self.averages is None:
            return None
        return self.promise - self.averages[0]

    @property
    def warnings(self) -> tuple[str, ...]:
        """In words, what makes it a near-duplicate."""
        found = []
        if self.parents_alike and self.kinship is not None:
            found.append(
                f"the parents are near-duplicates (kinship {self.kinship:.3f}, above "
                f"{NEAR_DUPLICATE}): merging them changes next to nothing"
            )
        if self._child_alike and self.nearest is not None:
            found.append(
                f"the child would be a near-duplicate of {self.nearest.model} (predicted kinship "
                f"{self.nearest.kinship:.3f}, above {NEAR_DUPLICATE})"
            )
        return tuple(found)

    @property
    def reasons(self) -> tuple[str, ...]:
        """In words, what speaks for the pair, warnings aside."""
        said = [
            "kinship of the parents unknown or undefined"
            if self.kinship is None
            else f"kinship of the parents {self.kinship:.2f}"
        ]
        if self.promise is not None and self.averages is not None:
            said.append(
                f"averages {_score(self.averages[0])} and {_score(self.averages[1])}, in the mean "
                f"{_score(_mean(self.averages))}"
            )
            said.append(self._strengths())
            said.append(
                f"as good as the better of them at each task, a child would average "
                f"{_score(self.promise)}, {_score(self.promise - self.averages[0])} above "
                f"{self.parents[0]}"
            )
        if self.nearest is not None:
            said.append(
                f"besides its parents the child would be most kin to {self.nearest.model}: "
                f"predicted {self.nearest.kinship:.2f}, at a distance of {self.nearest.ed:.3g}"
            )
        if self.unpredicted is not None:
            said.append(f"the child cannot be predicted: {self.unpredicted}")
        return tuple(said)

    def as_dict(self) -> dict[str, Any]:
        """What `modelkin suggest --json` writes of it; unknown values are `None`."""
        return {
            "parents": list(self.parents),
            "kinship": self.kinship,
            "averages": self.averages and list(self.averages),
            "mean": self.mean,
            "promise": self.promise,
            "complement": self.complement,
            "stronger": dict(zip(self.parents, map(dict, self.stronger), strict=True)),
            "nearest": asdict(self.nearest) if self.nearest else None,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
        }

    @property
    def parents_alike(self) -> bool:
        """Whether the parents are near-duplicates."""
        return self.kinship is not None and self.kinship > NEAR_DUPLICATE

    @property
    def _child_alike(self) -> bool:
        return self.nearest is not None and self.nearest.kinship > NEAR_DUPLICATE

    def _strengths(self) -> str:
        one, other = (
            f"{name} is stronger at {_tasks(tasks)}" if tasks else ""
            for name, tasks in zip(self.parents, self.stronger, strict=True)
        )
        if one and other:
            return f"{one}; {other}"
        if not one and not other:
            return "equal scores at every task"
        return f"{one or other}; {self.parents[bool(one)]} at no task"


@dataclass(frozen=True)
class Suggestions:
    """The pairs most worth merging.

    Attributes:
        suggestions: the best first.
        rule: how they were ranked, in words.
        pairs: how many pairs there were to choose from.
        notes: what is not known, or was left out.
    """

    suggestions: tuple[Suggestion, ...]
    rule: str
    pairs: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What `modelkin suggest --json` writes."""
        return {
            "rule": self.rule,
            "pairs": self.pairs,
            "notes": list(self.notes),
            "suggestions": [one.as_dict() for one in self.suggestions],
        }


def suggest(evidence: Evidence, *, top: int = 10) -> Suggestions:
    """The pairs most worth merging, by the rule of this module; at most `top`."""
    pairs = [
        _assessed(evidence, one, other)
        for one, other in combinations(evidence.models, 2)
        if frozenset((one, other)) not in evidence.merged
    ]
    pairs.sort(key=_order)
    notes = [*evidence.notes]
    if not evidence.kinship:
        notes.append("no kinship is known: near-duplicates cannot be told")
    if not evidence.scores:
        notes.append("no scores are known: whether parents complement each other cannot be told")
    elif missing := [name for name in evidence.models if name not in evidence.scores]:
        notes.append(f"no scores of {', '.join(missing)}: pairs with them come after the others")
    known = evidence.crossing.models if evidence.crossing else evidence.models
    notes += [
        f"no statistics of {name}: no child of it is predicted"
        for name in evidence.models
        if name not in known
    ]
    return Suggestions(
        suggestions=tuple(islice(_near_duplicates_last(evidence, pairs), top)),
        rule=_rule(evidence),
        pairs=len(pairs),
        notes=tuple(notes),
    )


def _near_duplicates_last(evidence: Evidence, pairs: list[Suggestion]) -> Iterable[Suggestion]:
    """The same order, but for near-duplicates; no child is predicted before it matters."""
    last: list[Suggestion] = []
    for pair in pairs:
        found = pair if pair.parents_alike else _predicted(evidence, pair)
        if found.warnings:
            last.append(found)
        else:
            yield found
    for pair in last:
        yield _predicted(evidence, pair) if pair.parents_alike else pair


def _assessed(evidence: Evidence, one: str, other: str) -> Suggestion:
    """A pair by its scores and kinship."""
    kinship = evidence.kinship.get(frozenset((one, other)))
    if one not in evidence.scores or other not in evidence.scores:
        return Suggestion((one, other), kinship, None, None, ({}, {}))
    if _mean(evidence.scores[other].values()) > _mean(evidence.scores[one].values()):
        one, other = other, one
    ours, theirs = evidence.scores[one], evidence.scores[other]
    ahead = {task: ours[task] - theirs[task] for task in ours}
    return Suggestion(
        parents=(one, other),
        kinship=kinship,
        averages=(_mean(ours.values()), _mean(theirs.values())),
        promise=_mean(max(ours[task], theirs[task]) for task in ours),
        stronger=(
            _largest_first({task: lead for task, lead in ahead.items() if lead > 0}),
            _largest_first({task: -lead for task, lead in ahead.items() if lead < 0}),
        ),
    )


def _predicted(evidence: Evidence, pair: Suggestion) -> Suggestion:
    """The same with whom its child will resemble."""
    crossing = evidence.crossing
    if crossing is None or not set(pair.parents) <= set(crossing.models):
        return pair
    try:
        child = crossing.child(*pair.parents)
    except MergeError as error:
        return replace(pair, unpredicted=str(error))
    others = child.others(evidence.metric)
    if not others:
        return pair
    name, kinship = others[0]
    return replace(pair, nearest=Neighbour(name, kinship, child.kinship[name].ed))


def _order(pair: Suggestion) -> tuple[bool, float, float, bool, float]:
    """Highest mean, most complementary, least kin first; unknown comes after what is known."""
    return (
        pair.mean is None,
        -(pair.mean or 0.0),
        -(pair.promise or 0.0),
        pair.kinship is None,
        pair.kinship or 0.0,
    )


def _rule(evidence: Evidence) -> str:
    """The rule in words, as far as what is known lets it matter."""
    said = []
    if evidence.scores:
        said.append("Ranked by the mean of the parents' average scores, the highest first.")
        then = ", then the less kin" if evidence.kinship else ""
        said.append(f"Of equals the more complementary{then} come first.")
    elif evidence.kinship:
        said.append("Ranked by the kinship of the parents, the least kin first.")
    if evidence.kinship or evidence.crossing:
        said.append(f"Near-duplicates, of kinship above {NEAR_DUPLICATE}, come last.")
    if evidence.scores:
        said.append("What a child could average is no forecast: it takes the better of two scores.")
    return " ".join(said)


def _mean(scores: Iterable[float]) -> float:
    found = list(scores)
    # Exact, so that equal scores in another order are equal averages.
    return math.fsum(found) / len(found)


def _largest_first(leads: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(leads.items(), key=lambda entry: -entry[1]))


def _tasks(leads: Mapping[str, float]) -> str:
    named = [f"{task} (+{_score(lead)})" for task, lead in islice(leads.items(), TASKS)]
    more = len(leads) - TASKS
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _score(score: float) -> str:
    """In its own units, shares or percent: as many digits as tell either apart."""
    return f"{score:.4g}"
