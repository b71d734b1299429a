"""The main experiment over again: what Algorithm 1 decides on the paper's scores and kinship.

Decides nothing itself (`evolution.propose` does) and knows no averages but through the state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from modelkin.analyse import convergence
from modelkin.evolution import Explore, Limits, Rules, Stop, propose, top_k
from modelkin.records import (
    Event,
    Founded,
    Measured,
    Pairing,
    Proposal,
    Proposed,
    Recipe,
    Score,
    Scorecard,
    Scored,
    Similarity,
)
from modelkin.replay.records import Model, Paper
from modelkin.state import RunState, fold

RUNS = ("greedy", "kinship")
K = 3


@dataclass(frozen=True)
class Decision:
    """A merge that Algorithm 1 decides on, or that the paper made, or both.

    Attributes:
        run: `greedy` or `kinship`.
        generation: of the child.
        parents: the better one first.
        child: the paper's name for it, empty if the paper did not make it.
        decided: whether Algorithm 1 makes it.
        exploration: whether kinship chose the second parent.
        why: by which rule it is made, or what explains the difference.
    """

    run: str
    generation: int
    parents: tuple[str, str]
    child: str
    decided: bool
    exploration: bool
    why: str

    @property
    def as_published(self) -> bool:
        """Whether the paper and Algorithm 1 both made this merge."""
        return self.decided and bool(self.child)


@dataclass(frozen=True)
class Generation:
    """The end of a generation.

    Attributes:
        best: the k best, the best one first.
        average: of the best one, from its task scores.
        kinship: the mean over the pairs of the k best; None where one was not printed.
        changed: whether the k best changed in it.
        next: what Algorithm 1 does then.
        last: whether the paper's run ended here.
    """

    run: str
    number: int
    best: tuple[str, ...]
    average: float
    kinship: float | None
    changed: bool
    next: str
    last: bool


def rules(run: str) -> Rules:
    """Those of the published runs: k = 3, the partner of the generation before the newest."""
    return Rules(
        strategy="kinship" if run == "kinship" else "greedy",
        k=K,
        explore=Explore(pool="lagged"),
        limits=Limits(generations=1000),
    )


def members(paper: Paper, run: str, generation: int) -> list[Model]:
    """The models of a run up to a generation, and those of the other run that they came from."""
    found = {
        model.name
        for model in paper.models.values()
        if model.generation <= generation and model.column in ("foundation", "both", run)
    }
    # Sorted by generation, so children come after their parents: backwards, none is missed.
    for model in reversed(list(paper.models.values())):
        if model.name in found:
            found.update(model.parents)
    return [model for model in paper.models.values() if model.name in found]


def last_generation(paper: Paper, run: str) -> int:
    """The last one that the paper shows of a run."""
    return max(model.generation for model in paper.models.values() if model.column in ("both", run))


def state_after(paper: Paper, run: str, generation: int) -> RunState:
    """The run's state at the end of a generation, with all kinship that the paper prints.

    That is of parents of published models only, and from their own and later generations: a pair's
    kinship does not depend on when it was printed.
    """
    models = members(paper, run, generation)
    names = {model.name for model in models}
    events: list[Event] = [
        Founded(model.name, model.name, "foundation", model.name, None, model.name)
        for model in models
        if model.generation == 0
    ]
    for number in range(generation + 1):
        grown = [model for model in models if model.generation == number]
        if number:
            events.append(Proposed(number, tuple(map(_proposal, grown))))
        for model in grown:
            scores = {task: Score(float(value)) for task, value in model.scores.items()}
            events.append(Scored(model.name, Scorecard(scores, "paper"), None, 0.0))
    for model in paper.models.values():
        if model.kinship is not None and names.issuperset(model.parents):
            one, other = model.parents
            # By Pearson correlation alone: the paper prints no other kinship for these.
            similarity = Similarity(float(model.kinship), None, float("nan"))
            events.append(Measured(one, {other: similarity}, 0.0))
    return fold(events)


def _proposal(model: Model) -> Proposal:
    one, other = model.parents
    recipe = Recipe((one, other), "base", {}, 0)
    return Proposal(model.name, model.name, recipe, model.exploration)


def decisions(paper: Paper) -> list[Decision]:
    """Every merge of both runs, by generation, those of Algorithm 1 first."""
    return [
        decision
        for run in RUNS
        for generation in range(1, last_generation(paper, run) + 1)
        for decision in _decisions(paper, run, generation)
    ]


def _decisions(paper: Paper, run: str, generation: int) -> Iterable[Decision]:
    state = state_after(paper, run, generation - 1)
    decision = propose(state, rules(run))
    decided = () if isinstance(decision, Stop) else decision
    printed = {
        frozenset(model.parents): model
        for model in paper.models.values()
        if model.generation == generation and model.column in ("both", run)
    }
    missed = [model for pair, model in printed.items() if pair not in {_pair(p) for p in decided}]
    for pairing in decided:
        model = printed.get(_pair(pairing))
        why = _rule(state, pairing, generation)
        if model is None:
            instead = " and ".join(" x ".join(other.parents) for other in missed) or "nothing"
            why += f"; the paper merged {instead} instead"
        yield Decision(
            run, generation, pairing.parents, model.name if model else "", True,
            pairing.exploration, why,
        )  # fmt: skip
    for model in missed:
        one, other = model.parents
        why = (
            decision.reason
            if isinstance(decision, Stop)
            else "; ".join(_outside(paper, state, run, name) for name in model.parents).strip("; ")
        )
        yield Decision(run, generation, (one, other), model.name, False, model.exploration, why)


def _pair(pairing: Pairing) -> frozenset[str]:
    return frozenset(pairing.parents)


def _rule(state: RunState, pairing: Pairing, generation: int) -> str:
    if generation == 1:
        return "every pair of foundation models"
    ranks = {member.id: rank for rank, member in enumerate(state.ranked(), start=1)}
    if not pairing.exploration:
        one, other = (f"{ranks[name]}" for name in pairing.parents)
        return f"numbers {one} and {other} of the {K} best, not merged before"
    best, partner = pairing.parents
    merged = state.merged_pairs()
    pool = {
        member.id: state.similarity(best, member.id)
        for member in state.members.values()
        if member.generation == generation - 2
        and member.id != best
        and frozenset((member.id, best)) not in merged
    }
    known = ", ".join(f"{name} {value:.2f}" for name, value in pool.items() if value is not None)
    unknown = ", ".join(name for name, value in pool.items() if value is None)
    return (
        f"the best with the least related model of generation {generation - 2}, {partner}, as far "
        f"as kinship is printed: {known}" + (f"; not printed: {unknown}" if unknown else "")
    )


def _outside(paper: Paper, state: RunState, run: str, name: str) -> str:
    """Why a model would not be bred from; nothing if it would."""
    ranked = [member.id for member in state.ranked()]
    if name in ranked[:K]:
        return ""
    model = paper.models[name]
    average = float(sum(model.scores.values())) / len(model.scores)
    last = state.members[ranked[min(K, len(ranked)) - 1]]
    text = f"{name} ({average:.2f}) is not among the {K} best, the last of which is {last.name} "
    text += f"({last.average:.2f})"
    if model.column not in ("foundation", "both", run):
        text += f"; it is a model of the {model.column} run"
    return text


def generations(paper: Paper) -> list[Generation]:
    """How each run stood after each generation, and whether Algorithm 1 would go on."""
    found = []
    for run in RUNS:
        last = last_generation(paper, run)
        states = [state_after(paper, run, number) for number in range(last + 1)]
        ranked = [[member.id for member in top_k(state, K)] for state in states]
        # The last state knows all kinship that was ever printed.
        kinship = convergence(ranked, states[-1].similarity)
        for number in range(last + 1):
            decision = propose(states[number], rules(run))
            best = states[number].members[ranked[number][0]]
            found.append(
                Generation(
                    run=run,
                    number=number,
                    best=tuple(ranked[number]),
                    average=best.average or 0.0,
                    kinship=kinship[number],
                    changed=number == 0 or set(ranked[number]) != set(ranked[number - 1]),
                    next=f"stops: {decision.reason}"
                    if isinstance(decision, Stop)
                    else f"goes on with {len(decision)} merges",
                    last=number == last,
                )
            )
    return found
