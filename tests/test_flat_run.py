"""Facts about runs whose merges are linear in each tensor: children as numbers. Fake scores."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from test_run import (
    TEMPLATE,
    Fakes,
    interrupted,
    models,
    near_target,
    prefixes,
    read,
    settings,
    timeless,
)

from modelkin import evolve, kinship
from modelkin.checkpoint import fingerprint, open_checkpoint
from modelkin.config import RunConfig
from modelkin.errors import ConfigError, LedgerError
from modelkin.evolution import Rules, divergences
from modelkin.ledger import read_events
from modelkin.merging import Native
from modelkin.records import METRICS, Proposed, Similarity, Subject
from modelkin.run import Run, materialise
from modelkin.state import Member, RunState
from modelkin.testing import FunctionEvaluator

__all__ = ["models"]

SLERP = {
    "template": {
        "merge_method": "slerp",
        "base_model": "{parent_1}",
        "models": [{"model": "{parent_1}"}, {"model": "{parent_2}"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0.2, 0.7]}, {"value": 0.4}]},
        "dtype": "float32",
    }
}


def bred(config: RunConfig, out: Path, most: list[int] | None = None) -> Run:
    """A run with native merges; notes in `most` how many children there were at each evaluation."""

    def score(subject: Subject) -> Mapping[str, Mapping[str, float]]:
        if most is not None:
            most.append(len(list((out / "models").glob("[!.]*"))))
        return near_target(subject.folder)

    return evolve(config, out=out, evaluator=FunctionEvaluator(score, protocol="near-target"))


def linear(zoo: Path, **changes: Any) -> RunConfig:
    """Settings of a run whose merges are linear in each tensor."""
    return settings(zoo, **{"merge": SLERP, **changes})


def children(state: RunState) -> list[Member]:
    return [member for member in state.members.values() if member.parents]


def present(folder: Path) -> set[str]:
    """The children whose weights are there."""
    return {path.name for path in (folder / "models").glob("[!.]*")}


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four generations that keeps all weights."""
    run = bred(linear(models, limits={"generations": 4}), tmp_path_factory.mktemp("runs") / "all")
    assert not any(member.failure for member in run.state.members.values())
    assert len(children(run.state)) >= 9
    return run


# Predicted kinship.


def test_every_child_is_predicted_before_it_is_made(whole: Run) -> None:
    """The ledger has a child's kinship with everyone before it, when it is decided on."""
    seen: list[str] = []
    for member in whole.state.members.values():
        if member.parents:
            for other in seen:
                assert frozenset((member.id, other)) in whole.state.predictions
        seen.append(member.id)


def test_predicted_is_measured(whole: Run) -> None:
    """In 32 bits the prediction is what is then measured, for all pairs of four generations."""
    state = whole.state
    assert set(state.predictions) < set(state.kinship)
    for pair, predicted in state.predictions.items():
        measured = state.kinship[pair]
        assert predicted[:2] == pytest.approx(measured[:2], abs=1e-6)
        assert predicted.ed == pytest.approx(measured.ed, rel=1e-5)


def test_choices_go_by_predictions(whole: Run) -> None:
    """What choices go by is the prediction, where there is one, and else the measured kinship."""
    state = whole.state
    for pair, measured in state.kinship.items():
        one, other = pair
        expected = state.predictions.get(pair, measured)
        for metric in METRICS:
            assert state.similarity(one, other, metric) == getattr(expected, metric)
            assert state.as_measured().similarity(one, other, metric) == getattr(measured, metric)


def test_measured_kinship_chooses_the_same(whole: Run) -> None:
    """Where predictions are what is measured, no generation would have been chosen otherwise."""
    assert divergences(whole.state, Rules()) == ()


def test_where_measured_kinship_chooses_otherwise_is_found(whole: Run) -> None:
    """A measured kinship that is not the predicted one shows in the generation that it decides."""
    state = whole.state
    explored = next(m for m in children(state) if m.exploration)
    best, partner = explored.parents
    # The partner that was taken for the least related turns out to be the closest kin.
    measured = {**state.kinship, frozenset((best, partner)): Similarity(1.0, 1.0, 0.0)}
    first, *_ = divergences(replace(state, kinship=measured), Rules())
    assert first.generation == explored.generation
    assert explored.parents in first.predicted
    assert explored.parents not in first.measured


def test_a_merge_that_a_limit_cut_off_decides_nothing(whole: Run) -> None:
    """What neither kinship could have chosen any more is no difference between them."""
    state = whole.state
    explored = next(m for m in children(state) if m.exploration)
    made = {m.id: m for m in state.until(explored.generation).members.values() if m != explored}
    measured = {**state.kinship, frozenset(explored.parents): Similarity(1.0, 1.0, 0.0)}
    cut = replace(state, members=made, kinship=measured, generation=explored.generation)
    assert divergences(cut, Rules()) == ()


def test_statistics_of_a_run_are_those_of_its_weights(whole: Run, models: Path) -> None:
    """What a run's statistics say of each layer is what measuring its weights says."""
    stats = whole.statistics()
    assert stats is not None
    assert stats.models == tuple(whole.state.members)
    found = kinship(models / "base", [whole.weights(m) for m in whole.state.members.values()])
    assert found.stats is not None
    assert stats.tensors == found.stats.tensors
    norms_TN = found.stats.gram_TNN.diagonal(axis1=1, axis2=2) ** 0.5
    scale_TNN = norms_TN[:, :, None] * norms_TN[:, None, :]
    # Within one small tensor the rounding of a weight of 1 is a millionth of its change.
    assert (abs(stats.gram_TNN - found.stats.gram_TNN) <= 1e-5 * scale_TNN).all()


# Flat recipes.


def test_children_are_made_of_foundations_alone(whole: Run, models: Path) -> None:
    """Each child's recipe is one linear merge over the foundations, whatever its generation."""
    sources = {str(models / name) for name in "abc"}
    for member in children(whole.state):
        record = json.loads((whole.weights(member) / "modelkin.json").read_text())
        assert record["recipe"]["merge_method"] == "linear"
        assert {entry["model"] for entry in record["recipe"]["models"]} <= sources


def test_a_flat_child_is_its_parents_merge(whole: Run, tmp_path: Path) -> None:
    """Made of its parents' weights instead, a child differs by their rounding alone."""
    newest = children(whole.state)[-1]
    assert newest.recipe is not None
    one, two = (str(whole.weights(parent)) for parent in whole.state.parents_of(newest))
    template = json.dumps(newest.recipe.config)
    direct = json.loads(template.replace("{parent_1}", one).replace("{parent_2}", two))
    Native().merge(direct, tmp_path / "direct")
    made, flat = read(tmp_path / "direct"), read(whole.weights(newest))
    for name, values in made.items():
        # Three roundings to 24 bits in a row, of weights about 1 and less.
        assert abs(values - flat[name]).max() <= 4 * 2**-24 * max(1.0, abs(values).max())


# Storage.


@pytest.mark.parametrize("keep", ["top-k", "none"])
def test_what_is_kept_does_not_change_the_course(
    whole: Run, models: Path, tmp_path: Path, keep: str
) -> None:
    """A run that gives weights up ends with the same family, scores and weights."""
    most: list[int] = []
    config = linear(models, limits={"generations": 4}, storage={"keep": keep})
    run = bred(config, tmp_path / "run", most=most)
    assert {m.id: (m.name, m.fingerprint, m.scorecard) for m in run.state.members.values()} == {
        m.id: (m.name, m.fingerprint, m.scorecard) for m in whole.state.members.values()
    }
    assert run.state.predictions == whole.state.predictions
    best = {m.id for m in run.state.ranked()[:3] if m.parents} if keep == "top-k" else set()
    assert present(run.folder) == best
    # The k best, and the one that is being scored.
    assert max(most) <= (4 if keep == "top-k" else 1)


def test_twenty_merges_keep_no_more_than_k(models: Path, tmp_path: Path) -> None:
    """A run of twenty merges with `top-k` never has more than k + 1 children on disk."""
    most: list[int] = []
    config = linear(
        models,
        strategy="random",
        limits={"generations": 9, "evaluations": 23},
        storage={"keep": "top-k"},
    )
    run = bred(config, tmp_path / "run", most=most)
    assert len(children(run.state)) == 20
    assert len(most) == 23
    assert max(most) <= 4
    assert present(run.folder) == {m.id for m in run.state.ranked()[:3] if m.parents}


@pytest.mark.parametrize("keep", ["all", "top-k", "none"])
@pytest.mark.parametrize("with_files", [True, False], ids=["with files", "without files"])
def test_a_flat_run_resumed_anywhere_ends_the_same(
    models: Path, tmp_path: Path, keep: str, with_files: bool
) -> None:
    """After any number of events, with the files or without them, the final state is the same."""
    config = linear(models, storage={"keep": keep})
    undisturbed = bred(config, tmp_path / "undisturbed")
    events = read_events(undisturbed.folder)
    for count in prefixes(events)[::3]:
        folder = interrupted(undisturbed, count, tmp_path / str(count), with_files=with_files)
        run = bred(config, folder)
        assert timeless(run.state) == timeless(undisturbed.state), f"after {count} events"
        assert present(folder) == present(undisturbed.folder)


def test_children_are_not_given_up_where_they_cannot_be_made_again(
    models: Path, tmp_path: Path
) -> None:
    """Merges that are not linear in each tensor cannot do without their parents' weights."""
    config = settings(models, storage={"keep": "top-k"})
    with pytest.raises(ConfigError, match=r"storage.keep: expected 'all'.*merge_method mean"):
        Fakes().run(config, tmp_path / "run")


# Materialising.


def test_every_child_can_be_made_again(whole: Run, models: Path, tmp_path: Path) -> None:
    """Children whose weights were given up come back bit for bit, by name or by id."""
    config = linear(models, limits={"generations": 4}, storage={"keep": "none"})
    run = bred(config, tmp_path / "run")
    assert not present(run.folder)
    for position, member in enumerate(children(run.state)):
        out = tmp_path / "made" / str(position)
        materialise(run.folder, member.id if position % 2 else member.name, out)
        assert fingerprint(open_checkpoint(out)) == member.fingerprint
        original = whole.weights(whole.state.members[member.id])
        assert (out / "model.safetensors").read_bytes() == (
            original / "model.safetensors"
        ).read_bytes()
    assert not present(run.folder)


def test_a_child_that_is_there_is_copied(whole: Run, tmp_path: Path) -> None:
    """A child whose weights were kept is given out as it is."""
    member = children(whole.state)[2]
    materialise(whole.folder, member.name, tmp_path / "out")
    assert fingerprint(open_checkpoint(tmp_path / "out")) == member.fingerprint
    assert (whole.weights(member) / "modelkin.json").exists()


def test_children_of_other_methods_are_made_of_their_parents(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where recipes are not linear, a child's deleted parents are made on the way."""
    from modelkin.run import materialising

    fakes = Fakes()
    run = fakes.run(settings(models), tmp_path / "run")
    grandchild = next(m for m in children(run.state) if m.generation == 3)
    shutil.rmtree(tmp_path / "run" / "models")

    class Merger:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def merge(self, config: Mapping[str, Any], out: Path, *, seed: int = 0) -> None:
            from modelkin.testing import FunctionMerger

            FunctionMerger(fakes.merge).merge(config, out, seed=seed)

    monkeypatch.setattr(materialising, "EitherEngine", Merger)
    materialise(run.folder, grandchild.name, tmp_path / "out")
    assert fingerprint(open_checkpoint(tmp_path / "out")) == grandchild.fingerprint
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_what_cannot_be_made_is_said(whole: Run, models: Path, tmp_path: Path) -> None:
    """An unknown name, a foundation model and a folder that exists are errors of one line."""
    with pytest.raises(ConfigError, match=r"expected one of the models a, b, c, .*found 9-9"):
        materialise(whole.folder, "9-9", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"a: expected a child, found a foundation model"):
        materialise(whole.folder, "a", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"expected a folder that does not exist"):
        materialise(whole.folder, "1-1", tmp_path)
    with pytest.raises(LedgerError, match=r"is no run folder"):
        materialise(tmp_path, "1-1", tmp_path / "out")


def test_other_weights_are_not_given_out(models: Path, tmp_path: Path) -> None:
    """A child that would come out otherwise than it was is an error, and nothing is left."""
    shutil.copytree(models, tmp_path / "models")
    config = linear(tmp_path / "models", storage={"keep": "none"}, limits={"generations": 1})
    run = bred(config, tmp_path / "run")
    tensors = read(tmp_path / "models" / "a")
    tensors["model.norm.weight"][0] += 1
    shutil.rmtree(tmp_path / "models" / "a")
    write_checkpoint(tmp_path / "models" / "a", tensors)
    with pytest.raises(LedgerError, match=r"1-1: expected the fingerprint .*, found"):
        materialise(run.folder, "1-1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_printable_name_will_do(models: Path, tmp_path: Path) -> None:
    """Names of foundation models are text like any other."""
    names = ["<img src=x onerror=alert(1)>", "a / b + (c)"]
    config = linear(models, models=dict(zip(names, "ab", strict=True)))
    run = bred(config, tmp_path / "run")
    assert [m.name for m in run.state.members.values()][:2] == names
    assert not any(m.failure for m in run.state.members.values())
    materialise(run.folder, "1-1", tmp_path / "out")


def sequence(events: Sequence[Any]) -> list[tuple[str, ...]]:
    """Who was decided on in each generation."""
    return [
        tuple(proposal.name for proposal in event.proposals)
        for event in events
        if isinstance(event, Proposed)
    ]


def test_methods_without_an_answer_are_failures(models: Path, tmp_path: Path) -> None:
    """A child that its method cannot make fails when it is merged, and the run goes on."""
    template = {
        "merge_method": "linear",
        "models": [
            {"model": "{parent_1}", "parameters": {"weight": 1}},
            {"model": "{parent_2}", "parameters": {"weight": -1}},
        ],
        "dtype": "float32",
    }
    run = bred(linear(models, merge={"template": template}), tmp_path / "run")
    failures = [member.failure for member in children(run.state)]
    assert failures
    assert all(failure and failure.stage == "merge" for failure in failures)
    assert all("weights" in str(failure) for failure in failures)
    assert sequence(read_events(run.folder)) == [("1-1", "1-2", "1-3")]


def test_a_template_of_another_kind_still_runs(models: Path, tmp_path: Path) -> None:
    """Where recipes are not linear nothing is predicted, and everything is measured."""
    run = Fakes().run(settings(models, merge={"template": TEMPLATE}), tmp_path / "run")
    assert not run.state.predictions
    assert len(run.state.kinship) == len(run.state.members) * (len(run.state.members) - 1) // 2
