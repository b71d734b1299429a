"""Frozen values that the other modules pass around, canonical JSON, and content ids.

Knows nothing about files, weights or time: a value here says what was planned or what happened,
can be printed, hashed, compared, and written as JSON and read back unchanged.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# Pearson correlation, cosine, Euclidean distance: the field names of `Similarity`.
Metric = Literal["pcc", "cs", "ed"]
METRICS: tuple[Metric, ...] = ("pcc", "cs", "ed")

ID_LENGTH = 16  # hex digits: 64 bits, no collision in any run that a disk can hold


def canonical_json(value: object) -> str:
    """`value` as JSON with sorted keys and no spaces: equal values give equal text.

    >>> canonical_json({"b": 1, "a": [0.5, None]})
    '{"a":[0.5,null],"b":1}'
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def content_id(value: object) -> str:
    """A short name for `value` that depends on its content alone.

    >>> content_id({"a": 1}) == content_id({"a": 1}) != content_id({"a": 2})
    True
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:ID_LENGTH]


@dataclass(frozen=True)
class Recipe:
    """How a child is made: a mergekit configuration whose parents are still placeholders.

    Attributes:
        parents: ids of the parents, in the order of `{parent_1}`, `{parent_2}`.
        base: id of the common base, for `{base}`.
        config: the mergekit configuration, with placeholders.
        seed: for merge methods that draw random numbers.
    """

    parents: tuple[str, ...]
    base: str
    config: Mapping[str, Any]
    seed: int

    @property
    def id(self) -> str:
        """The hash of the canonical JSON; also the name of the child's folder."""
        return content_id(
            {
                "parents": self.parents,
                "base": self.base,
                "config": dict(self.config),
                "seed": self.seed,
            }
        )


@dataclass(frozen=True)
class Pairing:
    """A decision to merge two models.

    Attributes:
        name: the child's name in its family: `<generation>-<number>` or `<generation>-exp`.
        parents: ids of the parents, the better one first.
        exploration: whether kinship chose the partner, rather than rank.
    """

    name: str
    parents: tuple[str, str]
    exploration: bool = False


@dataclass(frozen=True)
class Proposal:
    """A pairing with the recipe that carries it out.

    Attributes:
        model: the child's id, which is the recipe's.
        name: the child's name in its family.
        recipe: how it is made.
        exploration: see `Pairing`.
        predicted: its kinship with each model known before it, by id, as the recipe alone says;
            empty where the recipe is not linear in each tensor.
    """

    model: str
    name: str
    recipe: Recipe
    exploration: bool = False
    predicted: Mapping[str, "Similarity"] = field(default_factory=dict)


class Similarity(NamedTuple):
    """The kinship of two models; `None` where a delta is zero and the value undefined."""

    pcc: float | None
    cs: float | None
    ed: float


@dataclass(frozen=True)
class Score:
    """One task's result.

    Attributes:
        value: the task's metric, on the task's own scale.
        stderr: its standard error, where the evaluator knows one.
        n: number of items.
    """

    value: float
    stderr: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Scorecard:
    """All tasks' results of one model under one evaluation protocol.

    Attributes:
        scores: task name to result, in the protocol's order.
        protocol: fingerprint of everything that was asked of the model.
    """

    scores: Mapping[str, Score]
    protocol: str

    @property
    def average(self) -> float:
        """Average task performance, the plain mean over the tasks (paper eq. 5)."""
        return sum(score.value for score in self.scores.values()) / len(self.scores)


# Events: what happened, in the order in which it happened. A run is their fold (see `state`).


@dataclass(frozen=True)
class Started:
    """A run began: the settings that decide its course, and where it ran.

    `evaluations` is the folder of per-sample outcomes, relative to the run folder if within it.
    """

    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    evaluations: str
    kind: Literal["started"] = "started"


@dataclass(frozen=True)
class Founded:
    """A model from outside entered the family; `role` tells the base from the foundations."""

    model: str
    name: str
    role: Literal["base", "foundation"]
    source: str
    revision: str | None
    fingerprint: str
    kind: Literal["founded"] = "founded"


@dataclass(frozen=True)
class Proposed:
    """A generation was decided on."""

    generation: int
    proposals: tuple[Proposal, ...]
    kind: Literal["proposed"] = "proposed"


@dataclass(frozen=True)
class Merged:
    """A child's folder is whole."""

    model: str
    fingerprint: str
    bytes: int
    seconds: float
    kind: Literal["merged"] = "merged"


@dataclass(frozen=True)
class Scored:
    """A model was evaluated; `evaluation` names the file of its per-sample outcomes.

    There is none for scores that somebody told.
    """

    model: str
    scorecard: Scorecard
    evaluation: str | None
    seconds: float
    kind: Literal["scored"] = "scored"


@dataclass(frozen=True)
class Measured:
    """Kinship of a model with each model known before it, by id."""

    model: str
    kinship: Mapping[str, Similarity]
    seconds: float
    kind: Literal["measured"] = "measured"


@dataclass(frozen=True)
class Failed:
    """A model could not be made, measured or evaluated; the run went on without it."""

    model: str
    stage: Literal["merge", "measure", "evaluate"]
    message: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Stopped:
    """Nothing was left to do under the rules of the time."""

    reason: str
    kind: Literal["stopped"] = "stopped"


Event = Started | Founded | Proposed | Merged | Scored | Measured | Failed | Stopped


@cache
def _event_adapter() -> "TypeAdapter[Event]":
    # Imported here: who reads or writes no events should not wait for pydantic.
    from pydantic import Field, TypeAdapter

    return TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def event_to_json(event: Event) -> str:
    """`event` as JSON. Not canonical: the order of tasks is part of a scorecard."""
    return json.dumps(
        _event_adapter().dump_python(event, mode="json"),
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )


def event_from_json(text: str) -> Event:
    """The event that `event_to_json` wrote; raises pydantic.ValidationError on anything else."""
    return _event_adapter().validate_json(text)


@dataclass(frozen=True)
class Subject:
    """A model that is to be evaluated.

    Attributes:
        name: its name in the family.
        pedigree: what it descends from, whatever its name: see `pedigree`.
        folder: where its weights are.
        fingerprint: hash of the files that decide what it answers.
    """

    name: str
    pedigree: str
    folder: str
    fingerprint: str


@dataclass(frozen=True)
class Evaluation:
    """A scorecard with what it was made of.

    Attributes:
        samples: for each task, item id to outcome; empty where the evaluator keeps none.
    """

    scorecard: Scorecard
    samples: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def pedigree(*parents: str) -> str:
    """What names a child by its descent: a hash of its parents' pedigrees, whatever their order.

    That of a foundation model is its name.

    >>> pedigree("b", "a") == pedigree("a", "b") != pedigree("a", "c")
    True
    """
    return content_id(sorted(parents))
