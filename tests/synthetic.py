"""Runs that nobody made: families of any size whose kinship and scores follow from small vectors.

A model is a vector; its kinship is that of its vector, its score falls with the distance to a
target. Children are the means of their parents and some noise, chosen by Algorithm 1.

Axes: L layers, B elements of one, N models.
"""

import math
from collections.abc import Sequence
from itertools import combinations, count
from typing import Any

import numpy as np

from modelkin.gram import GramStats
from modelkin.records import (
    Event,
    Failed,
    Founded,
    Measured,
    Merged,
    Proposal,
    Proposed,
    Recipe,
    Score,
    Scorecard,
    Scored,
    Similarity,
    Started,
    Stopped,
)
from modelkin.report import Source
from modelkin.state import Member, fold

Array = np.ndarray[Any, np.dtype[np.float64]]
LAYERS, ELEMENTS = 4, 24
TENSORS = tuple(f"model.layers.{n}.mlp.up_proj.weight" for n in range(LAYERS))
CONFIG = {"merge_method": "slerp", "parameters": {"t": 0.5}}
TASKS = ("near", "far")


class Synthetic:
    """A run in the making: vectors, outcomes and events."""

    def __init__(
        self, names: Sequence[str], seed: int, items: int, strategy: str, predicted: bool, k: int
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._strategy, self._predicted, self._items, self._k = strategy, predicted, items, k
        self._target_LB = self._rng.standard_normal((LAYERS, ELEMENTS))
        self._hardness = {task: self._rng.uniform(0.2, 0.9, items) for task in TASKS}
        self.vectors: dict[str, Array] = {}
        self.samples: dict[str, dict[str, dict[str, float]]] = {}
        self.averages: dict[str, float] = {}
        self.merged: set[frozenset[str]] = set()
        settings = {
            **{"strategy": strategy, "k": k, "metric": "pcc", "seed": seed},
            "explore": {"pool": "all"},
        }
        environment = {"python": "3.11.2", "cpus": "2", "modelkin": "0.0"}
        self.events: list[Event] = [
            Started(settings, environment, "evaluations"),
            Founded("base", "base", "base", "models/base", None, "f-base"),
        ]
        for name in names:
            spread_LB = self._rng.standard_normal((LAYERS, ELEMENTS))
            self.vectors[name] = 0.6 * self._target_LB + spread_LB
            self.events.append(
                Founded(name, name, "foundation", f"models/{name}", "abc123", f"f-{name}")
            )
        for name in names:
            self.score(name)
        self.measure(names)

    def score(self, model: str) -> None:
        distance = float(np.square(self.vectors[model] - self._target_LB).mean())
        skill = 1 / (1 + distance)
        self.samples[model] = {
            task: {
                str(i): float(skill + 0.2 * self._rng.standard_normal() > hard)
                for i, hard in enumerate(hardness)
            }
            for task, hardness in self._hardness.items()
        }
        means = {
            task: float(np.mean(list(own.values()))) for task, own in self.samples[model].items()
        }
        card = Scorecard(
            {t: Score(value, n=self._items) for t, value in means.items()}, "synthetic"
        )
        self.averages[model] = card.average
        self.events.append(Scored(model, card, f"e-{model}", 60.0))

    def measure(self, models: Sequence[str]) -> None:
        known = list(self.vectors)
        for model in models:
            earlier = known[: known.index(model)]
            if earlier:
                own_LB = self.vectors[model]
                found = {other: similarity(own_LB, self.vectors[other]) for other in earlier}
                self.events.append(Measured(model, found, 2.0))

    def breed(self, generation: int, room: int) -> int:
        """One generation of at most `room` children; returns how many."""
        ranked = sorted(self.averages, key=lambda model: -self.averages[model])
        wanted = ranked if generation == 1 else ranked[: self._k]
        pairs = [
            (pair, False) for pair in combinations(wanted, 2) if frozenset(pair) not in self.merged
        ]
        if generation > 1 and self._strategy == "kinship":
            best_LB = self.vectors[ranked[0]]
            others = [
                other
                for other in ranked[1:]
                if frozenset((ranked[0], other)) not in self.merged
                and all(set(pair) != {ranked[0], other} for pair, _ in pairs)
            ]
            if others:
                distant = min(others, key=lambda m: similarity(best_LB, self.vectors[m]).pcc or 0)
                pairs.append(((ranked[0], distant), True))
        pairs = pairs[:room]
        proposals = []
        expected = dict(self.vectors)
        for number, (pair, explored) in enumerate(pairs, start=1):
            name = f"{generation}-exp" if explored else f"{generation}-{number}"
            recipe = Recipe(pair, "base", CONFIG, 0)
            exact_LB = (self.vectors[pair[0]] + self.vectors[pair[1]]) / 2
            predicted = {}
            if self._predicted:
                predicted = {m: similarity(exact_LB, own_LB) for m, own_LB in expected.items()}
                expected[recipe.id] = exact_LB
            proposals.append(Proposal(recipe.id, name, recipe, explored, predicted))
            self.merged.add(frozenset(pair))
        if not proposals:
            return 0
        self.events.append(Proposed(generation, tuple(proposals)))
        for proposal in proposals:
            one, other = proposal.recipe.parents
            noise_LB = 0.15 * self._rng.standard_normal((LAYERS, ELEMENTS))
            self.vectors[proposal.model] = (self.vectors[one] + self.vectors[other]) / 2 + noise_LB
            self.events.append(Merged(proposal.model, f"f-{proposal.model}", 10**9, 30.0))
            self.score(proposal.model)
        self.measure([proposal.model for proposal in proposals])
        return len(proposals)


def similarity(one_LB: Array, other_LB: Array) -> Similarity:
    """Of two vectors, by definition."""
    one_D, other_D = one_LB.ravel(), other_LB.ravel()
    return Similarity(
        pcc=cosine(one_D - one_D.mean(), other_D - other_D.mean()),
        cs=cosine(one_D, other_D),
        ed=math.dist(one_D, other_D),
    )


def cosine(one_D: Array, other_D: Array) -> float:
    return float(one_D @ other_D) / math.sqrt(float(one_D @ one_D) * float(other_D @ other_D))


def statistics(vectors: dict[str, Array]) -> GramStats:
    """By definition, of deltas from a base of ones."""
    delta_LNB = np.stack(list(vectors.values()), axis=1)
    gram_LNN = delta_LNB @ delta_LNB.swapaxes(1, 2)
    square_LN = np.diagonal(gram_LNN, axis1=1, axis2=2)
    distance_LNN = square_LN[:, :, None] + square_LN[:, None] - 2 * gram_LNN
    return GramStats(
        models=tuple(vectors),
        tensors=TENSORS,
        count_T=np.full(LAYERS, ELEMENTS),
        base_T=np.full(LAYERS, float(ELEMENTS)),
        base_sum_T=np.full(LAYERS, float(ELEMENTS)),
        sum_TN=delta_LNB.sum(axis=2),
        cross_TN=delta_LNB.sum(axis=2),
        gram_TNN=gram_LNN,
        distance_TNN=np.maximum(distance_LNN, 0.0),
    )


def events_of(models: int) -> list[Event]:
    """What happened in a run like that of `run_of`."""
    return _bred(models, ("arith", "code", "law", "prose"), 0, 20, "kinship", False, 3).events


def run_of(
    models: int,
    *,
    names: Sequence[str] = ("arith", "code", "law", "prose"),
    seed: int = 0,
    items: int = 100,
    strategy: str = "kinship",
    k: int = 3,
    predicted: bool = True,
    failing: bool = False,
    samples: bool = True,
    name: str = "synthetic",
) -> Source:
    """A finished run of about `models` models, foundation models included.

    Args:
        models: at least as many as there are names, at most.
        names: of the foundation models.
        seed: of everything.
        items: evaluation items of each task.
        strategy: as in a run file.
        k: as in a run file.
        predicted: whether recipes told the kinship of children.
        failing: whether the last child failed.
        samples: whether outcomes were kept.
        name: of the run.
    """
    made = _bred(models, names, seed, items, strategy, predicted, k)
    if failing:
        generation = fold(made.events).generation + 1
        recipe = Recipe((names[0], names[-1]), "base", CONFIG, 1)
        made.events += [
            Proposed(generation, (Proposal(recipe.id, f"{generation}-1", recipe),)),
            Failed(recipe.id, "merge", "the oven <b>is</b> cold"),
        ]
    made.events.append(Stopped(f"reached the limit of {models} evaluations"))
    state = fold(made.events)

    def samples_of(member: Member) -> dict[str, dict[str, float]]:
        return made.samples.get(member.id, {}) if samples else {}

    return Source(
        name, state, samples_of, lambda: statistics(made.vectors), f"strategy: {strategy}\nk: {k}\n"
    )


def _bred(
    models: int,
    names: Sequence[str],
    seed: int,
    items: int,
    strategy: str,
    predicted: bool,
    k: int,
) -> Synthetic:
    made = Synthetic(names, seed, items, strategy, predicted, k)
    for generation in count(1):
        if not made.breed(generation, models - len(made.vectors)):
            break
    return made
