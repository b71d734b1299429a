"""What to do next, and when to stop: top-k greedy merging and its variants. Pure.

Has no files, no clock and no global randomness: the same state, rules and seed give the same
decision. Implements Algorithm 1 of arXiv 2410.12613; where its versions contradict each other,
the published runs decide (`docs/architecture.md`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from modelkin.records import Metric, Pairing
from modelkin.state import Member, RunState

Strategy = Literal["greedy", "kinship", "random"]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Explore(_Settings):
    """Where the partner of an exploration merge comes from (strategy `kinship`).

    `all`: every model so far. `previous`: the newest generation, as the paper's third version
    writes. `lagged`: the generation before that one, which is what the published runs did.
    """

    pool: Literal["all", "previous", "lagged"] = "all"


class Limits(_Settings):
    """Bounds on a run, checked before each generation.

    Attributes:
        generations: number of generations of children.
        evaluations: number of models evaluated, foundation models included.
        hours: time spent on merging, evaluating and measuring.
    """

    generations: Annotated[int, Field(ge=1)] = 10
    evaluations: Annotated[int, Field(ge=1)] | None = None
    hours: Annotated[float, Field(gt=0)] | None = None


class EarlyStop(_Settings):
    """Stop when the mean kinship of the k best was above `kinship` for `patience` generations.

    The paper suggests 0.9 (section 5.2). Off unless `kinship` is given.
    """

    kinship: float | None = None
    patience: Annotated[int, Field(ge=1)] = 1


class Rules(_Settings):
    """How a family is bred.

    Attributes:
        strategy: `greedy` merges the pairs of the k best; `kinship` adds an exploration merge;
            `random` merges as many random pairs, as a control.
        k: how many of the best are bred from.
        metric: the similarity that counts as kinship; with `ed`, least related is most distant.
        seed: for `random`, and for merge methods that draw random numbers.
    """

    strategy: Strategy = "kinship"
    k: Annotated[int, Field(ge=2)] = 3
    metric: Metric = "pcc"
    seed: int = 0
    explore: Explore = Explore()
    limits: Limits = Limits()
    stop: EarlyStop = EarlyStop()


@dataclass(frozen=True)
class Stop:
    """Nothing to do any more, and why."""

    reason: str


def top_k(state: RunState, k: int, generation: int | None = None) -> list[Member]:
    """S of Algorithm 1: the k best of everything up to a generation, foundations included."""
    return state.ranked(generation)[:k]


def propose(state: RunState, rules: Rules) -> tuple[Pairing, ...] | Stop:
    """The pairs that the next generation merges, or why there is none.

    Every member of `state` must be settled: scored, or failed.
    """
    stop = _stop(state, rules)
    if stop:
        return stop
    generation = state.generation + 1
    if generation == 1:
        pairs = _unmerged(state, state.ranked())
    elif rules.strategy == "random":
        pairs = _random_pairs(state, rules, generation)
    else:
        pairs = _unmerged(state, top_k(state, rules.k))
    pairings = [
        Pairing(name=f"{generation}-{number}", parents=(better.id, other.id))
        for number, (better, other) in enumerate(pairs, start=1)
    ]
    if rules.strategy == "kinship" and generation > 1:
        partner = _distant_partner(state, rules, {frozenset(p.parents) for p in pairings})
        if partner:
            best = state.ranked()[0]
            pairings.append(Pairing(f"{generation}-exp", (best.id, partner.id), exploration=True))
    if not pairings:
        return Stop("no pair is left that was not merged before")
    if rules.limits.evaluations is not None:
        pairings = pairings[: rules.limits.evaluations - len(state.members)]
    return tuple(pairings)


@dataclass(frozen=True)
class Divergence:
    """A generation that measured kinship would have chosen otherwise than predictions did.

    Attributes:
        generation: its number.
        predicted: what predictions chose: pairs of parents' ids; empty where they said stop.
        measured: what measured kinship would have chosen.
    """

    generation: int
    predicted: tuple[tuple[str, str], ...]
    measured: tuple[tuple[str, str], ...]


def divergences(state: RunState, rules: Rules) -> tuple[Divergence, ...]:
    """Where measured kinship would have chosen other merges than predictions did.

    Each generation is decided on again, as it was then. Where a pair was not measured, its
    prediction stands in.
    """
    # Limits stop a run whatever its kinship.
    rules = rules.model_copy(update={"limits": Limits(generations=state.generation + 1)})
    found = []
    for generation in range(1, state.generation):
        then = state.until(generation)
        # A limit may have cut the generation short, for either.
        made = sum(member.generation == generation + 1 for member in state.members.values())
        predicted, measured = (
            _pairs(propose(one, rules))[:made] for one in (then, then.as_measured())
        )
        if predicted != measured:
            found.append(Divergence(generation + 1, predicted, measured))
    return tuple(found)


def _pairs(decision: tuple[Pairing, ...] | Stop) -> tuple[tuple[str, str], ...]:
    return () if isinstance(decision, Stop) else tuple(pairing.parents for pairing in decision)


def most_children(rules: Rules, foundations: int) -> int:
    """An upper bound on the number of children that a run can have.

    >>> most_children(Rules(strategy="greedy", k=3, limits=Limits(generations=2)), foundations=4)
    9
    """
    each = rules.k * (rules.k - 1) // 2 + (rules.strategy == "kinship")
    first = foundations * (foundations - 1) // 2
    children = first + each * (rules.limits.generations - 1)
    if rules.limits.evaluations is not None:
        children = min(children, max(rules.limits.evaluations - foundations, 0))
    return children


def _stop(state: RunState, rules: Rules) -> Stop | None:
    generation, limits = state.generation, rules.limits
    if len(state.ranked()) < 2:
        return Stop(f"expected at least 2 models with scores, found {len(state.ranked())}")
    if generation >= 2 and rules.strategy != "random":
        # A random generation that changes nothing says nothing about the next one.
        before, after = (
            {member.id for member in top_k(state, rules.k, upto)}
            for upto in (generation - 1, generation)
        )
        if before == after:
            return Stop(f"the {rules.k} best did not change in generation {generation}")
    if generation >= limits.generations:
        return Stop(f"reached the limit of {limits.generations} generations")
    if limits.evaluations is not None and len(state.members) >= limits.evaluations:
        return Stop(f"reached the limit of {limits.evaluations} evaluations")
    if limits.hours is not None and state.seconds >= 3600 * limits.hours:
        return Stop(f"reached the limit of {limits.hours} hours")
    return _converged(state, rules)


def _converged(state: RunState, rules: Rules) -> Stop | None:
    threshold, patience = rules.stop.kinship, rules.stop.patience
    if threshold is None or state.generation < patience:
        return None
    means = [
        state.mean_kinship(top_k(state, rules.k, state.generation - back), rules.metric)
        for back in range(patience)
    ]
    if any(mean is None or not _closer(rules, mean, threshold) for mean in means):
        return None
    return Stop(
        f"the kinship of the {rules.k} best was beyond {threshold} for {patience} generation(s)"
    )


def _closer(rules: Rules, one: float, other: float) -> bool:
    """Whether `one` is the closer relation; the Euclidean distance grows the other way."""
    return one < other if rules.metric == "ed" else one > other


def _unmerged(state: RunState, members: Sequence[Member]) -> list[tuple[Member, Member]]:
    """Pairs of `members`, in their order, that were never merged."""
    merged = state.merged_pairs()
    return [
        (one, other)
        for one, other in combinations(members, 2)
        if frozenset((one.id, other.id)) not in merged
    ]


def _random_pairs(state: RunState, rules: Rules, generation: int) -> list[tuple[Member, Member]]:
    """As many pairs as the k best have, drawn from all unmerged pairs (paper, Algorithm 2)."""
    pairs = _unmerged(state, state.ranked())
    count = min(rules.k * (rules.k - 1) // 2, len(pairs))
    # Derived from (seed, generation) and not from a saved generator: a resumed run draws alike.
    draw = np.random.default_rng([rules.seed, generation])
    return [pairs[i] for i in sorted(draw.choice(len(pairs), size=count, replace=False))]


def _distant_partner(state: RunState, rules: Rules, planned: set[frozenset[str]]) -> Member | None:
    """The model of lowest kinship to the best one, out of the pool of `explore.pool`.

    Lowest as in the paper's third version and its published runs. A partner already merged with
    the best, or whose kinship is unknown, is passed over.
    """
    best, *others = state.ranked()
    newest = state.generation
    pool = {
        "all": range(newest + 1),
        "previous": range(newest, newest + 1),
        "lagged": range(newest - 1, newest),
    }[rules.explore.pool]
    taken = state.merged_pairs() | planned
    distant: tuple[float, Member] | None = None
    for other in others:
        kinship = state.similarity(best.id, other.id, rules.metric)
        if (
            kinship is not None
            and other.generation in pool
            and frozenset((best.id, other.id)) not in taken
            and (distant is None or _closer(rules, distant[0], kinship))
        ):
            distant = (kinship, other)
    return distant[1] if distant else None
