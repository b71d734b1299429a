"""Facts about decisions: whom to merge next, and when to stop. Pure; no files, no models."""

import csv
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelkin.evolution import EarlyStop, Explore, Limits, Rules, Stop, most_children, propose
from modelkin.records import (
    Event,
    Failed,
    Founded,
    Measured,
    Merged,
    Pairing,
    Proposal,
    Proposed,
    Recipe,
    Score,
    Scorecard,
    Scored,
    Similarity,
)
from modelkin.state import RunState, fold

PAPER = Path(__file__).parent / "data" / "paper" / "main_experiment.csv"
TASKS = ("truthfulqa", "winogrande", "gsm8k")


class History:
    """The events of a made-up run; a model's id is its name."""

    def __init__(self, **averages: float | None) -> None:
        self.events: list[Event] = [
            Founded(name, name, "foundation", f"/{name}", None, name) for name in averages
        ]
        for name, average in averages.items():
            self.settle(name, average)

    @property
    def state(self) -> RunState:
        return fold(self.events)

    def settle(self, name: str, average: float | None) -> None:
        """Score a model; with `None` its evaluation fails."""
        self.events.append(
            Failed(name, "evaluate", "it answered nothing")
            if average is None
            else Scored(name, Scorecard({"task": Score(average)}, "protocol"), name, 0.0)
        )

    def decide(self, *pairings: Pairing) -> None:
        """Record the next generation; each child's id is its name."""
        proposals = tuple(
            Proposal(p.name, p.name, Recipe(p.parents, "base", {}, 0), p.exploration)
            for p in pairings
        )
        self.events.append(Proposed(self.state.generation + 1, proposals))

    def breed(self, **children: tuple[str, str, float | None]) -> "History":
        """A whole generation: name to parents and average."""
        named = {name.replace("_", "-"): child for name, child in children.items()}
        self.decide(*(Pairing(name, (one, other)) for name, (one, other, _) in named.items()))
        for name, (_, _, average) in named.items():
            self.settle(name, average)
        return self

    def measure(self, one: str, other: str, pcc: float | None, ed: float = 1.0) -> "History":
        """Record the kinship of two models."""
        self.events.append(Measured(one, {other: Similarity(pcc, pcc, ed)}, 0.0))
        return self

    def measure_all(self, pcc: float = 0.5) -> "History":
        """The same kinship for every pair that has none."""
        state, names = self.state, list(self.state.members)
        for position, one in enumerate(names):
            for other in names[:position]:
                if frozenset((one, other)) not in state.kinship:
                    self.measure(one, other, pcc)
        return self


def pairs(decision: tuple[Pairing, ...] | Stop) -> list[tuple[str, str]]:
    """The parents that were decided on."""
    assert not isinstance(decision, Stop), decision.reason
    return [pairing.parents for pairing in decision]


def names(decision: tuple[Pairing, ...] | Stop) -> list[str]:
    """The children's names that were decided on."""
    assert not isinstance(decision, Stop), decision.reason
    return [pairing.name for pairing in decision]


def reason(decision: tuple[Pairing, ...] | Stop) -> str:
    """Why there is nothing to do."""
    assert isinstance(decision, Stop)
    return decision.reason


def explored(decision: tuple[Pairing, ...] | Stop) -> tuple[str, str] | None:
    """The parents of the exploration merge."""
    assert not isinstance(decision, Stop), decision.reason
    return next((pairing.parents for pairing in decision if pairing.exploration), None)


# Algorithm 1 on the paper's own numbers.


def published(column: str) -> dict[str, dict[str, str]]:
    """The rows of one column of Table 3, by the model's name."""
    with PAPER.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {row["model"]: row for row in rows if row["strategy"] in ("foundation", "both", column)}


def replay(column: str, generation: int) -> History:
    """The published run of `column` up to a generation, with every kinship that is known.

    The paper prints kinship only for parents of published models.
    """
    run = History()
    rows = published(column)
    for row in rows.values():
        name = row["model"]
        if row["strategy"] == "foundation":
            run.events.append(Founded(name, name, "foundation", f"/{name}", None, name))
    for step in range(generation + 1):
        members = [row for row in rows.values() if int(row["generation"]) == step]
        if step:
            run.decide(*(Pairing(r["model"], (r["parent_1"], r["parent_2"])) for r in members))
        for row in members:
            scores = {task: Score(float(row[task])) for task in TASKS}
            run.events.append(Scored(row["model"], Scorecard(scores, "paper"), row["model"], 0.0))
    for row in rows.values():
        if row["kinship_published"] and {row["parent_1"], row["parent_2"]} <= set(
            run.state.members
        ):
            run.measure(row["parent_1"], row["parent_2"], float(row["kinship_published"]))
    return run


def published_parents(column: str, generation: int) -> set[frozenset[str]]:
    """The pairs that the authors merged in a generation."""
    return {
        frozenset((row["parent_1"], row["parent_2"]))
        for row in published(column).values()
        if int(row["generation"]) == generation
    }


def paper_rules(column: str) -> Rules:
    """The published runs: k = 3, and the partner out of the generation before the newest."""
    strategy = "kinship" if column == "kinship" else "greedy"
    return Rules(strategy=strategy, explore=Explore(pool="lagged"))


@pytest.mark.parametrize(
    ("column", "generation"),
    [*(("kinship", g) for g in (1, 2, 3)), *(("greedy", g) for g in (1, 2, 3, 4))],
)
def test_decisions_equal_the_published_ones(column: str, generation: int) -> None:
    """On the paper's scores and kinship, Algorithm 1 merges exactly the pairs the paper merged."""
    decision = propose(replay(column, generation - 1).state, paper_rules(column))
    assert {frozenset(pair) for pair in pairs(decision)} == published_parents(column, generation)
    assert len(pairs(decision)) == len(published_parents(column, generation))


@pytest.mark.parametrize(
    ("generation", "parents"),
    [
        (2, ("model-1-3", "mistral-7b-instruct-v0.2")),
        (3, ("model-2-1", "model-1-1")),
        (4, ("model-3-3", "model-2-3")),
    ],
)
def test_exploration_is_the_published_one(generation: int, parents: tuple[str, str]) -> None:
    """The best is crossed with its least related partner of the generation before the newest."""
    decision = propose(replay("kinship", generation - 1).state, paper_rules("kinship"))
    assert explored(decision) == parents


def test_generation_4_of_the_paper_departs_once_from_its_own_rule() -> None:
    """One merge of the kinship run's fourth generation takes a model that the greedy run made."""
    decision = propose(replay("kinship", 3).state, paper_rules("kinship"))
    found = {frozenset(pair) for pair in pairs(decision)}
    assert found ^ published_parents("kinship", 4) == {
        frozenset(("model-3-3", "model-3-4")),
        frozenset(("model-3-3", "model-3-1")),
    }


def test_the_published_greedy_run_was_not_finished() -> None:
    """The three best still changed in the greedy run's last generation: the rule would go on."""
    assert not isinstance(propose(replay("greedy", 4).state, paper_rules("greedy")), Stop)


# Which pairs.


@pytest.mark.parametrize("strategy", ["greedy", "kinship", "random"])
def test_the_first_generation_merges_all_pairs(strategy: Any) -> None:
    """Generation 1 crosses every pair of foundation models, the better one first."""
    run = History(a=1, b=4, c=3, d=2).measure_all()
    decision = propose(run.state, Rules(strategy=strategy, k=2))
    assert pairs(decision) == [
        ("b", "c"), ("b", "d"), ("b", "a"), ("c", "d"), ("c", "a"), ("d", "a")
    ]  # fmt: skip
    assert names(decision) == ["1-1", "1-2", "1-3", "1-4", "1-5", "1-6"]


def test_foundations_may_stay_among_the_best() -> None:
    """The k best are the best of everything so far, foundations included."""
    run = History(a=9, b=8, c=1).breed(x=("a", "b", 2), y=("a", "c", 8.5), z=("b", "c", 3))
    assert pairs(propose(run.state, Rules(strategy="greedy"))) == [("a", "y"), ("y", "b")]


def test_a_pair_is_merged_once() -> None:
    """A pair that was merged is not merged again, whoever came first and whatever became of it."""
    run = History(a=3, b=2, c=1).breed(x=("b", "a", None), y=("a", "c", 2.5), z=("b", "c", 0))
    assert pairs(propose(run.state, Rules(strategy="greedy"))) == [("a", "y"), ("y", "b")]


def test_a_failed_model_is_never_a_parent() -> None:
    """Failures do not enter the k best and are no partners, but their parents stay merged."""
    run = History(a=3, b=2, c=1).breed(
        x=("a", "b", None), y=("a", "c", None), z=("b", "c", None)
    ).measure_all()  # fmt: skip
    for strategy in ("greedy", "kinship", "random"):
        decision = propose(run.state, Rules(strategy=strategy))
        assert reason(decision) == "no pair is left that was not merged before"


def test_a_failed_foundation_is_passed_over() -> None:
    """A foundation model without scores is not bred from."""
    run = History(a=3, b=None, c=1)
    assert pairs(propose(run.state, Rules())) == [("a", "c")]


def test_a_model_that_could_not_be_measured_loses_its_scores() -> None:
    """Scores of a model whose weights cannot be measured are not trusted."""
    run = History(a=3, b=2).breed(x=("a", "b", 9))
    run.events.append(Failed("x", "measure", "NaN"))
    assert [member.id for member in run.state.ranked()] == ["a", "b"]


def test_ties_go_to_the_older() -> None:
    """Of models with equal averages the one decided on earlier ranks higher."""
    run = History(a=1, b=1, c=1).breed(x=("a", "b", 1), y=("a", "c", 1))
    assert [member.id for member in run.state.ranked()] == ["a", "b", "c", "x", "y"]
    assert pairs(propose(History(a=1, b=1, c=1).state, Rules())) == [
        ("a", "b"), ("a", "c"), ("b", "c")
    ]  # fmt: skip


# Exploration.


def explorer() -> History:
    """A run of two generations; `2-1` is the best, and kinship to it grows with age."""
    run = History(a=1, b=2, c=3).breed(
        **{"1-1": ("c", "b", 4), "1-2": ("c", "a", 1.5), "1-3": ("b", "a", 1.2)}
    )
    run.breed(**{"2-1": ("1-1", "c", 9), "2-2": ("1-1", "b", 1.1), "2-3": ("c", "1-2", 1.3)})
    distances = {"a": 0.1, "b": 0.2, "1-2": 0.3, "1-3": 0.35, "2-2": 0.5, "2-3": 0.4}
    for name, pcc in distances.items():
        run.measure("2-1", name, pcc, ed=10 - pcc)
    return run


@pytest.mark.parametrize(
    ("pool", "partner"), [("all", "a"), ("lagged", "1-2"), ("previous", "2-3")]
)
def test_the_partner_comes_from_the_pool(pool: Any, partner: str) -> None:
    """`all` looks at every model, `previous` at the newest generation, `lagged` one before it."""
    decision = propose(explorer().state, Rules(explore=Explore(pool=pool)))
    assert explored(decision) == ("2-1", partner)
    assert names(decision)[-1] == "3-exp"


def test_distance_is_kinship_the_other_way_round() -> None:
    """By `ed` the least related partner is the most distant one."""
    run = History(a=1, b=2).breed(x=("b", "a", 3))
    run.breed(y=("x", "b", 4), z=("x", "a", 0.5))
    run.measure("y", "a", 0.9, ed=5.0).measure("y", "z", 0.1, ed=4.0)
    assert explored(propose(run.state, Rules(k=2, metric="pcc"))) == ("y", "z")
    assert explored(propose(run.state, Rules(k=2, metric="ed"))) == ("y", "a")


def test_a_partner_merged_before_is_passed_over() -> None:
    """Neither a parent of the best nor a pair planned for the same generation is explored."""
    run = explorer()
    for related in ("1-1", "c"):
        run.measure("2-1", related, -1.0)
    assert explored(propose(run.state, Rules(explore=Explore(pool="all")))) == ("2-1", "a")


def test_unknown_kinship_is_no_distance() -> None:
    """A partner whose kinship is unknown or undefined is passed over; without any, none is made."""
    run = explorer()
    run.events = [event for event in run.events if not isinstance(event, Measured)]
    assert explored(propose(run.state, Rules())) is None
    run.measure("2-1", "b", 0.9).measure("2-1", "a", None)
    assert explored(propose(run.state, Rules())) == ("2-1", "b")


def test_exploration_follows_the_greedy_pairs() -> None:
    """The kinship strategy does what greedy does, and one merge more."""
    state = explorer().state
    greedy = pairs(propose(state, Rules(strategy="greedy")))
    assert pairs(propose(state, Rules(strategy="kinship")))[:-1] == greedy


def test_exploration_alone_is_a_generation() -> None:
    """Where all pairs of the best were merged, the exploration merge is still made."""
    run = History(a=3, b=2, c=1).breed(x=("a", "b", 0.5), y=("a", "c", 0.4), z=("b", "c", 0.3))
    run.measure("a", "x", 0.9).measure("a", "z", 0.2)
    assert pairs(propose(run.state, Rules(explore=Explore(pool="previous")))) == [("a", "z")]


# Random control.


def crowd() -> History:
    """Five foundation models and their ten children: many unmerged pairs."""
    founders = {name: float(number) for number, name in enumerate("abcde")}
    run = History(**founders)
    decision = propose(run.state, Rules())
    assert not isinstance(decision, Stop)
    run.decide(*decision)
    for number, pairing in enumerate(decision):
        run.settle(pairing.name, 5.0 + number)
    return run


def test_random_draws_depend_on_seed_and_generation_only() -> None:
    """The same seed and generation draw the same pairs; another of either draws others."""
    state = crowd().state
    drawn = [pairs(propose(state, Rules(strategy="random", seed=seed))) for seed in range(8)]
    again = [pairs(propose(state, Rules(strategy="random", seed=seed))) for seed in range(8)]
    assert drawn == again
    assert len({tuple(found) for found in drawn}) > 1
    later = crowd()
    later.decide()
    assert later.state.generation == state.generation + 1
    assert drawn != [
        pairs(propose(later.state, Rules(strategy="random", seed=seed))) for seed in range(8)
    ]


@pytest.mark.parametrize(("k", "count"), [(2, 1), (3, 3), (4, 6)])
def test_random_merges_as_many_pairs_as_greedy_may(k: int, count: int) -> None:
    """k(k-1)/2 distinct unmerged pairs are drawn, the better parent first."""
    state = crowd().state
    for seed in range(20):
        found = pairs(propose(state, Rules(strategy="random", k=k, seed=seed)))
        assert len({frozenset(pair) for pair in found}) == count
        assert not {frozenset(pair) for pair in found} & state.merged_pairs()
        order = [member.id for member in state.ranked()]
        assert all(order.index(one) < order.index(other) for one, other in found)


def test_random_takes_what_is_left() -> None:
    """Where fewer pairs are left than wanted, all of them are merged."""
    run = History(a=2, b=1).breed(x=("a", "b", 0))
    assert pairs(propose(run.state, Rules(strategy="random"))) == [("a", "x"), ("b", "x")]


# Stopping.


def test_unchanged_best_stop_the_run() -> None:
    """A generation that changes nothing among the k best is the last, but never the first one."""
    run = History(a=9, b=8, c=7).breed(x=("a", "b", 1), y=("a", "c", 2), z=("b", "c", 3))
    run.measure("a", "z", 0.1)
    assert pairs(propose(run.state, Rules())) == [("a", "z")]
    run.breed(w=("a", "z", 1))
    assert reason(propose(run.state, Rules())) == "the 3 best did not change in generation 2"


def test_a_new_order_of_the_best_is_no_change() -> None:
    """The k best are compared as sets, as Algorithm 1 says."""
    run = History(a=3, b=2).breed(x=("a", "b", 5)).breed(y=("x", "a", 1))
    assert reason(propose(run.state, Rules(k=2))).startswith("the 2 best did not change")


def test_random_goes_on_when_nothing_changed() -> None:
    """A random generation that improves nothing says nothing about the next one."""
    run = History(a=9, b=8, c=7).breed(x=("a", "b", 1), y=("a", "c", 2), z=("b", "c", 3))
    run.breed(w=("a", "x", 1))
    assert not isinstance(propose(run.state, Rules(strategy="random")), Stop)


def test_generations_are_limited() -> None:
    """No generation is decided on beyond the limit, and one more when the limit is raised."""
    run = History(a=1, b=2).breed(x=("b", "a", 3))
    limited = Rules(limits=Limits(generations=1))
    assert reason(propose(run.state, limited)) == "reached the limit of 1 generations"
    assert pairs(propose(run.state, Rules(limits=Limits(generations=2))))


@pytest.mark.parametrize("limit", [4, 5, 6])
def test_evaluations_are_limited(limit: int) -> None:
    """A generation is cut off where the number of evaluations is reached, the best pairs first."""
    run = History(a=1, b=2, c=3)
    rules = Rules(limits=Limits(evaluations=limit))
    everything = pairs(propose(run.state, Rules()))
    assert pairs(propose(run.state, rules)) == everything[: limit - 3]
    decision = propose(run.state, rules)
    assert not isinstance(decision, Stop)
    run.decide(*decision)
    for pairing in decision:
        run.settle(pairing.name, None if pairing.name == "1-1" else 9.0)
    assert reason(propose(run.state, rules)) == f"reached the limit of {limit} evaluations"


def test_hours_are_limited() -> None:
    """The time that was spent on merging, evaluating and measuring stops a run."""
    run = History(a=1, b=2).breed(x=("b", "a", 3))
    rules = Rules(limits=Limits(hours=0.5))
    run.events.append(Merged("x", "x", 1, seconds=1799.0))
    assert pairs(propose(run.state, rules))
    run.events.append(Measured("x", {}, seconds=1.0))
    assert reason(propose(run.state, rules)) == "reached the limit of 0.5 hours"


def converging() -> History:
    """The two best are of kinship 0.5, then 0.95, then 0.97."""
    run = History(a=1, b=2).measure("a", "b", 0.1, ed=9)
    run.breed(x=("b", "a", 3)).measure("x", "b", 0.5, ed=5).measure("x", "a", 0.2, ed=8)
    run.breed(y=("x", "b", 4)).measure("y", "x", 0.95, ed=2).measure("y", "b", 0.6, ed=6)
    run.breed(z=("y", "x", 5)).measure("z", "y", 0.97, ed=1).measure("z", "b", 0.4, ed=7)
    return run


@pytest.mark.parametrize(
    ("threshold", "patience", "stops"),
    [(0.9, 1, True), (0.9, 2, True), (0.9, 3, False), (0.4, 3, True), (0.96, 1, True),
     (0.96, 2, False), (0.97, 1, False), (0.0, 4, False), (None, 1, False)],
)  # fmt: skip
def test_early_stop_waits_for_patience(threshold: float | None, patience: int, stops: bool) -> None:
    """A run stops when the k best were too closely related for `patience` generations."""
    rules = Rules(k=2, stop=EarlyStop(kinship=threshold, patience=patience))
    assert isinstance(propose(converging().state, rules), Stop) == stops


@pytest.mark.parametrize(("threshold", "stops"), [(3.0, True), (1.5, True), (1.0, False)])
def test_early_stop_by_distance_is_below_the_threshold(threshold: float, stops: bool) -> None:
    """By `ed` models are too closely related when their distance is small."""
    rules = Rules(k=2, metric="ed", stop=EarlyStop(kinship=threshold))
    assert isinstance(propose(converging().state, rules), Stop) == stops


def test_early_stop_needs_to_know() -> None:
    """Where a kinship among the k best is unknown, nothing is said about convergence."""
    rules = Rules(k=3, stop=EarlyStop(kinship=-1.0))
    assert not isinstance(propose(converging().state, rules), Stop)


def test_two_models_are_needed() -> None:
    """With fewer than two scored models there is nothing to breed from."""
    assert "found 1" in reason(propose(History(a=1, b=None).state, Rules()))
    assert "found 0" in reason(propose(History(a=None, b=None).state, Rules()))


def test_deciding_is_pure() -> None:
    """The same state and rules give the same decision, however often one asks."""
    for rules in (Rules(), Rules(strategy="random"), Rules(strategy="greedy")):
        assert propose(crowd().state, rules) == propose(crowd().state, rules)


# Whole runs, with scores and kinship out of a hat.


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    """Any sensible rules."""
    return Rules(
        strategy=draw(st.sampled_from(["greedy", "kinship", "random"])),
        k=draw(st.integers(2, 4)),
        metric=draw(st.sampled_from(["pcc", "cs", "ed"])),
        seed=draw(st.integers(0, 3)),
        explore=Explore(pool=draw(st.sampled_from(["all", "previous", "lagged"]))),
        limits=Limits(
            generations=draw(st.integers(1, 6)),
            evaluations=draw(st.none() | st.integers(6, 20)),
            hours=draw(st.none() | st.just(1.0)),
        ),
        stop=EarlyStop(
            kinship=draw(st.none() | st.floats(-1, 1)), patience=draw(st.integers(1, 3))
        ),
    )


def any_similarity(hat: random.Random) -> Similarity:
    """A kinship that is sometimes undefined."""
    value = hat.choice([None, *(hat.uniform(-1, 1) for _ in range(4))])
    return Similarity(value, value, hat.uniform(0, 5))


def simulate(given_rules: Rules, foundations: int, hat: random.Random) -> Iterable[
    tuple[RunState, tuple[Pairing, ...]]
]:  # fmt: skip
    """Every decision of a run until it stops, with the state that it was made in."""
    # Few distinct scores, so that there are ties; and failures.
    averages: Mapping[str, float] = {f"m{i}": float(hat.randint(0, 4)) for i in range(foundations)}
    run = History(**averages)
    run.measure_all(0.3)
    while True:
        state = run.state
        decision = propose(state, given_rules)
        if isinstance(decision, Stop):
            return
        yield state, decision
        run.decide(*decision)
        known = list(state.members)
        for pairing in decision:
            run.settle(pairing.name, None if hat.random() < 0.15 else float(hat.randint(0, 9)))
            kin = {name: any_similarity(hat) for name in known}
            run.events.append(Measured(pairing.name, kin, hat.choice([0.0, 300.0])))
            known.append(pairing.name)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(rules(), st.integers(2, 5), st.integers(0, 2**32))
def test_any_run_ends_and_keeps_its_rules(given_rules: Rules, foundations: int, seed: int) -> None:
    """Runs end within their limits; no pair is merged twice, no model with itself or a failure."""
    children: list[str] = []
    generations = 0
    for state, decision in simulate(given_rules, foundations, random.Random(seed)):
        generations += 1
        order = [member.id for member in state.ranked()]
        merged = state.merged_pairs()
        for pairing in decision:
            better, other = pairing.parents
            assert order.index(better) < order.index(other)
            assert frozenset(pairing.parents) not in merged
            merged.add(frozenset(pairing.parents))
        assert sum(pairing.exploration for pairing in decision) <= (
            given_rules.strategy == "kinship" and generations > 1
        )
        children += [pairing.name for pairing in decision]
        limit = given_rules.limits.evaluations
        assert limit is None or foundations + len(children) <= limit
    assert generations <= given_rules.limits.generations
    assert len(set(children)) == len(children)
    assert len(children) <= most_children(given_rules, foundations)


def test_the_bound_on_children_is_reached() -> None:
    """Where every generation improves, a run has as many children as it can have."""
    run = History(a=1, b=2, c=3).measure_all()
    limited = Rules(limits=Limits(generations=4))
    children = 0
    while not isinstance(decision := propose(run.state, limited), Stop):
        run.decide(*decision)
        for pairing in decision:
            children += 1
            run.settle(pairing.name, 3.0 + children)
        run.measure_all()
    assert children == most_children(limited, 3) == 3 + 3 * 4
