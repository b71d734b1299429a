"""Facts about whole runs: whatever interrupts them, they end the same. With fakes, no models."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Array, llama_like, perturbed, write_checkpoint
from rich.console import Console

from modelkin import evolve, read_run
from modelkin.checkpoint import as_float64, open_checkpoint
from modelkin.config import RunConfig, parse_config
from modelkin.errors import CheckpointError, ConfigError, DiskFullError, LedgerError
from modelkin.ledger import LEDGER_FILE, open_ledger, read_events
from modelkin.measuring import kinship
from modelkin.records import Event, Failed, Founded, Measured, Scored, Started, Subject
from modelkin.report import failure_lines, terminal_table
from modelkin.run import Run
from modelkin.state import Cost, RunState
from modelkin.testing import FunctionEvaluator, FunctionMerger, ShuffledWorkers
from modelkin.workers import Workers

TEMPLATE = {
    "merge_method": "mean",
    "models": [{"model": "{parent_1}"}, {"model": "{parent_2}"}],
}
ITEMS = 8


def read(folder: Path) -> dict[str, Array]:
    """All tensors of a checkpoint, in float64."""
    return {
        name: as_float64(tensor.read(0, tensor.count), tensor.format).reshape(tensor.shape)
        for name, tensor in open_checkpoint(folder).tensors.items()
    }


def mean(config: Mapping[str, Any], folder: Path) -> None:
    """Merge two models by their mean, so that children lie between their parents."""
    one, two = (read(Path(entry["model"])) for entry in config["models"])
    folder.rmdir()
    write_checkpoint(folder, {name: (one[name] + two[name]) / 2 for name in one})


def near_target(folder: str) -> Mapping[str, Mapping[str, float]]:
    """Two tasks of a few items; the score depends on the weights alone, and merging helps."""
    weights = np.concatenate([values.ravel() for values in read(Path(folder)).values()])
    parts = np.array_split(weights, ITEMS)
    return {
        "near": {str(i): 1 / (1 + float(np.square(part).mean())) for i, part in enumerate(parts)},
        "flat": {str(i): 1 / (1 + float(np.abs(part).max())) for i, part in enumerate(parts)},
    }


@dataclass
class Fakes:
    """A merger and an evaluator that note what they were asked."""

    spoil: Callable[[Mapping[str, Any], Path], None] = mean
    score: Callable[[str], Mapping[str, Mapping[str, float]]] = near_target
    merged: list[str] = field(default_factory=list)
    evaluated: list[str] = field(default_factory=list)

    def merge(self, config: Mapping[str, Any], folder: Path) -> None:
        self.merged.append(folder.name)
        self.spoil(config, folder)

    def evaluate(self, subject: Subject) -> Mapping[str, Mapping[str, float]]:
        self.evaluated.append(subject.fingerprint)
        return self.score(subject.folder)

    def run(self, config: RunConfig, out: Path, workers: Workers | None = None) -> Run:
        return evolve(
            config,
            out=out,
            merger=FunctionMerger(self.merge),
            evaluator=FunctionEvaluator(self.evaluate, protocol="near-target"),
            workers=workers,
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models made from it."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(7)
    base = llama_like(rng, layers=1)
    write_checkpoint(folder / "base", base)
    for name in "abc":
        write_checkpoint(folder / name, perturbed(base, rng, scale=0.05))
    return folder


def settings(zoo: Path, **changes: Any) -> RunConfig:
    """Settings of a small run; the evaluator is replaced by a fake."""
    content: dict[str, Any] = {
        "base": "base",
        "models": ["a", "b", "c"],
        "limits": {"generations": 3},
        "merge": {"template": TEMPLATE},
        "evaluation": {
            "evaluator": "command",
            "command": ["unused", "{model}"],
            "tasks": ["near", "flat"],
        },
    }
    return parse_config({**content, **changes}, folder=zoo)


def timeless(state: RunState) -> RunState:
    """The state but for the time that it took."""
    return replace(state, cost=Cost())


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupted."""
    run = Fakes().run(settings(models), tmp_path_factory.mktemp("runs") / "undisturbed")
    assert run.state.generation == 3
    assert len(run.state.members) >= 9
    return run


# Resuming.


def interrupted(run: Run, count: int, folder: Path, *, with_files: bool) -> Path:
    """A copy of a run as it was after `count` events, with or without the files it left."""
    if with_files:
        shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("ledger*", "*.html"))
    with open_ledger(folder) as ledger:
        events = read_events(run.folder)[:count]
        if events:
            ledger.append(*events)
    return folder


def test_a_ledger_without_tables_is_as_good_as_none(models: Path, tmp_path: Path) -> None:
    """A process killed while it made the ledger's file leaves a run that can be begun."""
    (tmp_path / LEDGER_FILE).touch()
    assert Fakes().run(settings(models, limits={"generations": 1}), tmp_path).state.generation == 1


def test_foundation_models_may_move(models: Path, tmp_path: Path) -> None:
    """A run goes on with the same models in another folder, and ends as if they had stayed."""
    moved = tmp_path / "moved"
    shutil.copytree(models, tmp_path / "models")
    Fakes().run(settings(tmp_path / "models", limits={"generations": 1}), tmp_path / "run")
    (tmp_path / "models").rename(moved)
    run = Fakes().run(settings(moved), tmp_path / "run")
    undisturbed = Fakes().run(settings(moved), tmp_path / "undisturbed")
    assert [m.fingerprint for m in run.state.ranked()] == [
        m.fingerprint for m in undisturbed.state.ranked()
    ]
    assert not failure_lines(run.state)


@pytest.mark.parametrize("name", ["base", "b"])
def test_a_run_does_not_begin_with_what_cannot_be_measured(
    models: Path, tmp_path: Path, name: str
) -> None:
    """A NaN in the base or a foundation model is an error before any evaluation, and mendable."""
    shutil.copytree(models, tmp_path / "models")
    tensors = read(tmp_path / "models" / name)
    next(iter(tensors.values())).flat[0] = np.nan
    shutil.rmtree(tmp_path / "models" / name)
    write_checkpoint(tmp_path / "models" / name, tensors)
    fakes = Fakes()
    config = settings(tmp_path / "models", limits={"generations": 1})
    with pytest.raises(CheckpointError, match=rf"models/{name}/.*expected finite numbers"):
        fakes.run(config, tmp_path / "run")
    assert not fakes.evaluated
    shutil.rmtree(tmp_path / "models" / name)
    shutil.copytree(models / name, tmp_path / "models" / name)
    assert fakes.run(config, tmp_path / "run").state.generation == 1


def prefixes(events: Sequence[Event]) -> list[int]:
    """All numbers of events after which a run can have been interrupted.

    The first transaction holds the start, the base and the foundations.
    """
    first = sum(isinstance(event, Started | Founded) for event in events)
    return [0, *range(first, len(events) + 1)]


@pytest.mark.parametrize("with_files", [True, False], ids=["with files", "without files"])
@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
def test_a_run_resumed_anywhere_ends_the_same(
    undisturbed: Run, models: Path, tmp_path: Path, with_files: bool, shuffled: bool
) -> None:
    """After any number of events, with the files or without them, the final state is the same."""
    events = read_events(undisturbed.folder)
    for count in prefixes(events)[:: 6 if shuffled else 1]:
        folder = interrupted(undisturbed, count, tmp_path / str(count), with_files=with_files)
        fakes = Fakes()
        run = fakes.run(settings(models), folder, ShuffledWorkers(count) if shuffled else None)
        assert timeless(run.state) == timeless(undisturbed.state), f"after {count} events"
        assert timeless(read_run(folder).state) == timeless(undisturbed.state)
        if with_files:
            assert (fakes.merged, fakes.evaluated) == ([], []), f"after {count} events"
        recorded = {event.model for event in events[:count] if isinstance(event, Scored)}
        weights = {undisturbed.state.members[model].fingerprint for model in recorded}
        assert weights.isdisjoint(fakes.evaluated)
        assert max(Counter(fakes.evaluated).values(), default=1) == 1


def test_a_finished_run_does_nothing_more(undisturbed: Run, models: Path, tmp_path: Path) -> None:
    """Running a finished run again merges, evaluates and records nothing."""
    events = read_events(undisturbed.folder)
    folder = interrupted(undisturbed, len(events), tmp_path / "run", with_files=True)
    fakes = Fakes()
    assert fakes.run(settings(models), folder).state == undisturbed.state
    assert read_events(folder) == events
    assert fakes == Fakes()


def test_workers_in_any_order_give_the_same_run(
    undisturbed: Run, models: Path, tmp_path: Path
) -> None:
    """The order in which work is done and finished has no part in the result."""
    for seed in range(3):
        run = Fakes().run(settings(models), tmp_path / str(seed), ShuffledWorkers(seed))
        assert timeless(run.state) == timeless(undisturbed.state)


def test_a_run_that_broke_within_a_generation_goes_on(
    undisturbed: Run, models: Path, tmp_path: Path
) -> None:
    """An exception in the middle loses nothing that was done before it, whoever raised it."""
    for calls in (1, 3, 5, 8):
        folder = tmp_path / str(calls)
        fakes = Fakes()

        def score(path: str, fakes: Fakes = fakes, calls: int = calls) -> Any:
            if len(fakes.evaluated) == calls:
                raise KeyboardInterrupt
            return near_target(path)

        fakes.score = score
        with pytest.raises(KeyboardInterrupt):
            fakes.run(settings(models), folder)
        again = Fakes()
        run = again.run(settings(models), folder)
        assert timeless(run.state) == timeless(undisturbed.state)
        # What was under way when it broke is asked again, and nothing else.
        assert Counter(fakes.evaluated + again.evaluated).most_common()[0][1] == 2
        assert len(fakes.evaluated + again.evaluated) == len(run.state.members) + 1
        assert len(fakes.merged + again.merged) == len(set(fakes.merged + again.merged))


def test_no_weights_are_evaluated_twice(models: Path, tmp_path: Path) -> None:
    """Every distinct set of weights is evaluated once, even where runs share their evaluations."""
    fakes = Fakes()
    shared = {
        "evaluator": "command",
        "command": ["unused", "{model}"],
        "tasks": ["near", "flat"],
        "cache": str(tmp_path / "shared"),
    }
    for strategy in ("kinship", "greedy", "random"):
        run = fakes.run(settings(models, evaluation=shared, strategy=strategy), tmp_path / strategy)
        assert run.samples(run.best) == near_target(str(run.weights(run.best)))
    assert max(Counter(fakes.evaluated).values()) == 1


# What a run leaves.


def test_the_run_folder_is_whole(undisturbed: Run) -> None:
    """A run leaves its settings, its ledger, its children, their evaluations and a report."""
    names = {path.name for path in undisturbed.folder.iterdir()}
    assert names >= {"run.yaml", "ledger.db", "models", "evaluations", "report.html"}
    state = undisturbed.state
    children = [member for member in state.members.values() if member.parents]
    assert {path.name for path in (undisturbed.folder / "models").iterdir()} == {
        member.id for member in children
    }
    assert {path.name for path in (undisturbed.folder / "evaluations").iterdir()} == {
        f"{member.evaluation}.jsonl.gz" for member in state.members.values()
    }
    assert state.stopped == "reached the limit of 3 generations"


def test_settings_are_written_down_again(undisturbed: Run, models: Path, tmp_path: Path) -> None:
    """A run interrupted before its settings were written down writes them when it goes on."""
    folder = interrupted(undisturbed, 5, tmp_path / "run", with_files=False)
    Fakes().run(settings(models), folder)
    assert (folder / "run.yaml").read_text() == (undisturbed.folder / "run.yaml").read_text()


def test_children_are_where_their_recipe_says(undisturbed: Run) -> None:
    """A child's folder is named by its recipe's id, and holds the recipe with real paths."""
    for member in undisturbed.state.members.values():
        if member.recipe is None:
            continue
        assert undisturbed.weights(member).name == member.recipe.id == member.id
        record = json.loads((undisturbed.weights(member) / "modelkin.json").read_text())
        assert [entry["model"] for entry in record["recipe"]["models"]] == [
            str(undisturbed.weights(parent)) for parent in undisturbed.state.parents_of(member)
        ]


def test_samples_belong_to_the_weights(undisturbed: Run) -> None:
    """Per-sample outcomes of every member are kept, and average to its scores."""
    for member in undisturbed.state.members.values():
        samples = undisturbed.samples(member)
        assert samples == near_target(str(undisturbed.weights(member)))
        assert member.scorecard is not None
        for task, score in member.scorecard.scores.items():
            assert score.value == pytest.approx(np.mean(list(samples[task].values())))


def test_kinship_in_the_ledger_is_that_of_the_weights(undisturbed: Run, models: Path) -> None:
    """Every pair of scored members was measured, and measuring them at once says the same."""
    members = list(undisturbed.state.members.values())
    found = kinship(models / "base", [undisturbed.weights(member) for member in members])
    for i, one in enumerate(members):
        for j, other in enumerate(members[:i]):
            recorded = undisturbed.state.kinship[frozenset((one.id, other.id))]
            expected = (found.pcc_NN[i, j], found.cs_NN[i, j], found.ed_NN[i, j])
            assert recorded == pytest.approx(expected, rel=1e-9, abs=1e-12)


# Failures.


def break_first(*names: str) -> Callable[[Mapping[str, Any], Path], None]:
    """A merge that fails for children of models of exactly these folder names."""

    def merge(config: Mapping[str, Any], folder: Path) -> None:
        if {Path(entry["model"]).name for entry in config["models"]} == set(names):
            raise RuntimeError("the oven is cold")
        mean(config, folder)

    return merge


def member_of(state: RunState, *parents: str) -> str:
    """The id of the child of two models, by their names."""
    ids = {member.name: member.id for member in state.members.values()}
    (found,) = (
        member.id
        for member in state.members.values()
        if set(member.parents) == {ids[name] for name in parents}
    )
    return found


def check_failure(run: Run, model: str, stage: str, message: str) -> None:
    """The model failed as said, the run went on without it, and status shows it."""
    failure = run.state.members[model].failure
    assert failure is not None
    assert (failure.stage, message in failure.message) == (stage, True), failure
    assert sum(isinstance(event, Failed) for event in read_events(run.folder)) == 1
    assert run.state.generation == 3
    assert run.state.stopped == "reached the limit of 3 generations"
    assert run.best.id != model
    assert all(model not in member.parents for member in run.state.members.values())
    assert not any(model in pair for pair in run.state.kinship)
    name = run.state.members[model].name
    console = Console(width=200)
    with console.capture() as shown:
        console.print(terminal_table(run.state, run.samples, width=200))
    row = next(line for line in shown.get().splitlines() if f" {name} " in line)
    assert " failed " in row
    (line,) = failure_lines(run.state)
    assert line == f"{name} failed to {stage}: {failure.message}"
    assert message in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_failing_merge_is_recorded(models: Path, tmp_path: Path) -> None:
    """A child that cannot be merged becomes a failure of the stage `merge`; the run goes on."""
    run = Fakes(spoil=break_first("a", "b")).run(settings(models), tmp_path / "run")
    child = member_of(run.state, "a", "b")
    check_failure(run, child, "merge", "mean: RuntimeError: the oven is cold")
    assert not (run.folder / "models" / child).exists()


def test_a_failing_evaluation_is_recorded(models: Path, tmp_path: Path) -> None:
    """A child that gives no scores becomes a failure of the stage `evaluate`; the run goes on."""

    def score(path: str) -> Any:
        scores = dict(near_target(path))
        return {**scores, "flat": {"0": float("nan")}} if is_child_of_a_and_b(path) else scores

    run = Fakes(score=score).run(settings(models), tmp_path / "run")
    child = member_of(run.state, "a", "b")
    check_failure(run, child, "evaluate", "expected a finite number")


def is_child_of_a_and_b(folder: str) -> bool:
    """Whether the recipe in a folder names the models a and b."""
    path = Path(folder) / "modelkin.json"
    if not path.exists():
        return False
    recipe = json.loads(path.read_text())["recipe"]
    return {Path(entry["model"]).name for entry in recipe["models"]} == {"a", "b"}


def test_weights_that_are_no_numbers_are_a_failure(models: Path, tmp_path: Path) -> None:
    """A child with NaN in it becomes a failure of the stage `measure`, whatever it scored."""

    def merge(config: Mapping[str, Any], folder: Path) -> None:
        mean(config, folder)
        if {Path(entry["model"]).name for entry in config["models"]} == {"a", "b"}:
            tensors = read(folder)
            tensors["model.norm.weight"][3] = np.nan
            shutil.rmtree(folder)
            write_checkpoint(folder, tensors)

    def score(path: str) -> Any:
        return (
            {"near": {"0": 99.0}} if np.isnan(read(Path(path))[NORM]).any() else near_target(path)
        )

    run = Fakes(spoil=merge, score=score).run(settings(models), tmp_path / "run")
    child = member_of(run.state, "a", "b")
    check_failure(run, child, "measure", "expected finite numbers, found nan")
    assert run.state.members[child].average is None


NORM = "model.norm.weight"


def test_a_failed_model_is_not_tried_again(models: Path, tmp_path: Path) -> None:
    """A failure is final: resuming with a merger that works now does not change the past."""
    folder = tmp_path / "run"
    Fakes(spoil=break_first("a", "b")).run(settings(models), folder)
    fakes = Fakes()
    run = fakes.run(settings(models), folder)
    assert fakes == Fakes()
    assert run.state.members[member_of(run.state, "a", "b")].failure is not None


def test_a_full_disk_is_nobodys_failure(undisturbed: Run, models: Path, tmp_path: Path) -> None:
    """A full disk stops the run, is recorded as no model's failure, and the run can go on."""

    def merge(config: Mapping[str, Any], folder: Path) -> None:
        if {Path(entry["model"]).name for entry in config["models"]} == {"a", "b"}:
            raise OSError(28, "No space left on device")
        mean(config, folder)

    with pytest.raises(DiskFullError):
        Fakes(spoil=merge).run(settings(models), tmp_path / "run")
    assert not any(isinstance(event, Failed) for event in read_events(tmp_path / "run"))
    run = Fakes().run(settings(models), tmp_path / "run")
    assert timeless(run.state) == timeless(undisturbed.state)


def test_deleted_weights_are_made_again_where_they_are_needed(
    undisturbed: Run, models: Path, tmp_path: Path
) -> None:
    """Scored children may be deleted: a finished run misses none, one that goes on remakes them."""
    folder = tmp_path / "run"
    first = Fakes().run(settings(models, limits={"generations": 2}), folder)
    shutil.rmtree(folder / "models")
    fakes = Fakes()
    fakes.run(settings(models, limits={"generations": 2}), folder)
    assert fakes == Fakes()
    run = fakes.run(settings(models), folder)
    assert timeless(run.state) == timeless(undisturbed.state)
    assert len(fakes.evaluated) == len(run.state.members) - len(first.state.members)


def test_a_recipe_that_gives_other_weights_now_is_no_substitute(
    models: Path, tmp_path: Path
) -> None:
    """A deleted child that cannot be made as it was stops the run; nothing takes its place."""
    folder = tmp_path / "run"
    Fakes().run(settings(models, limits={"generations": 1}), folder)
    before = read_events(folder)
    shutil.rmtree(folder / "models")

    def other(config: Mapping[str, Any], path: Path) -> None:
        path.rmdir()
        write_checkpoint(path, perturbed(read(models / "a"), np.random.default_rng(1)))

    with pytest.raises(LedgerError, match="its recipe now gives other weights"):
        Fakes(spoil=other).run(settings(models), folder)
    after = read_events(folder)
    assert not any(isinstance(event, Failed | Scored) for event in after[len(before) :])
    assert list((folder / "models").iterdir()) == []


# Changed settings and models.


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("strategy", {"strategy": "greedy"}),
        ("k", {"k": 2}),
        ("metric", {"metric": "ed"}),
        ("seed", {"seed": 1}),
        ("explore", {"explore": {"pool": "lagged"}}),
        ("merge", {"merge": {"template": {**TEMPLATE, "dtype": "float32"}}}),
    ],
)
def test_changed_settings_are_refused(
    undisturbed: Run, models: Path, tmp_path: Path, key: str, change: dict[str, Any]
) -> None:
    """A run does not go on with other settings: the first that differs is named."""
    events = read_events(undisturbed.folder)
    folder = interrupted(undisturbed, 8, tmp_path / "run", with_files=False)
    with pytest.raises(LedgerError, match=rf"was started with {key} = "):
        Fakes().run(settings(models, **change), folder)
    assert read_events(folder) == events[:8]


def test_another_protocol_is_refused(undisturbed: Run, models: Path, tmp_path: Path) -> None:
    """Scores of two protocols are never mixed in one run."""
    folder = interrupted(undisturbed, 8, tmp_path / "run", with_files=False)
    with pytest.raises(LedgerError, match="was started with another evaluation"):
        evolve(
            settings(models),
            out=folder,
            merger=FunctionMerger(mean),
            evaluator=FunctionEvaluator(lambda subject: near_target(subject.folder)),
        )


def test_changed_weights_are_refused(undisturbed: Run, models: Path, tmp_path: Path) -> None:
    """A run does not go on with another model behind an old name, and says which."""
    changed = shutil.copytree(models, tmp_path / "models")
    folder = interrupted(undisturbed, 8, tmp_path / "run", with_files=False)
    assert Fakes().run(settings(changed, limits={"generations": 1}), folder)
    for name in ("b", "base"):
        shutil.rmtree(changed / name)
        write_checkpoint(changed / name, perturbed(read(models / name), np.random.default_rng(0)))
        with pytest.raises(LedgerError, match=f"was started with the model {name} of fingerprint"):
            Fakes().run(settings(changed), folder)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d"], ["b", "a", "c"]])
def test_other_models_are_refused(
    undisturbed: Run, models: Path, tmp_path: Path, names: list[str]
) -> None:
    """A run does not go on with fewer or more models, or in another order."""
    more = shutil.copytree(models, tmp_path / "models")
    write_checkpoint(more / "d", perturbed(read(models / "base"), np.random.default_rng(3)))
    folder = interrupted(undisturbed, 8, tmp_path / "run", with_files=False)
    with pytest.raises(LedgerError, match="was started with"):
        Fakes().run(settings(more, models=names), folder)


def test_raised_limits_continue_a_stopped_run(
    undisturbed: Run, models: Path, tmp_path: Path
) -> None:
    """A run that stopped at a limit goes on when the limit is raised, as if it had not stopped."""
    folder = tmp_path / "run"
    first = Fakes().run(settings(models, limits={"generations": 1}), folder)
    assert first.state.stopped == "reached the limit of 1 generations"
    fakes = Fakes()
    run = fakes.run(settings(models), folder)
    assert timeless(run.state) == timeless(undisturbed.state)
    assert len(fakes.evaluated) == len(run.state.members) - len(first.state.members)


def test_a_limit_of_evaluations_cuts_the_generation(models: Path, tmp_path: Path) -> None:
    """No more models are evaluated than allowed; what was cut off is not made up for later."""
    fakes = Fakes()
    run = fakes.run(settings(models, limits={"evaluations": 5}), tmp_path / "run")
    assert len(fakes.evaluated) == 5
    assert run.state.stopped == "reached the limit of 5 evaluations"


# Unusual families.


def test_a_foundation_may_equal_the_base(models: Path, tmp_path: Path) -> None:
    """The base itself may be bred from: its kinship is undefined, its distance is not."""
    config = settings(models, models={"a": "a", "b": "b", "plain": "base"})
    run = Fakes().run(config, tmp_path / "run")
    plain, a = (
        next(member.id for member in run.state.members.values() if member.name == name)
        for name in ("plain", "a")
    )
    assert run.state.similarity(plain, a, "pcc") is None
    assert run.state.similarity(plain, a, "cs") is None
    assert (run.state.similarity(plain, a, "ed") or 0) > 0
    assert not any(isinstance(event, Failed) for event in read_events(run.folder))
    assert run.state.generation >= 2


def test_equal_models_are_refused(models: Path, tmp_path: Path) -> None:
    """The same files under two names are one model, which cannot be crossed with itself."""
    config = settings(models, models={"a": "a", "again": "a"})
    with pytest.raises(ConfigError, match=r"models\.again: .* the same files as models\.a"):
        Fakes().run(config, tmp_path / "run")


def test_an_unreadable_foundation_stops_the_run_before_it_starts(
    models: Path, tmp_path: Path
) -> None:
    """A foundation that is no model is named by its key, and no ledger is made."""
    with pytest.raises(CheckpointError, match=r"^models\.nowhere: "):
        Fakes().run(settings(models, models=["a", "./nowhere"]), tmp_path / "run")
    assert not (tmp_path / "run" / LEDGER_FILE).exists()


def test_children_with_equal_weights_share_their_evaluation(models: Path, tmp_path: Path) -> None:
    """Two children that turn out the same are two members, evaluated once, of kinship one."""

    def merge(config: Mapping[str, Any], folder: Path) -> None:
        folder.rmdir()
        write_checkpoint(folder, perturbed(read(models / "a"), np.random.default_rng(1)))

    fakes = Fakes(spoil=merge)
    run = fakes.run(settings(models, limits={"generations": 1}), tmp_path / "run")
    one, two, three = (member for member in run.state.members.values() if member.parents)
    assert one.scorecard == two.scorecard == three.scorecard
    assert len(fakes.evaluated) == 4
    assert run.state.similarity(one.id, two.id) == pytest.approx(1.0)


def test_every_pair_is_measured_once(undisturbed: Run) -> None:
    """Each member is measured once, against all that were measured before it."""
    measured = [event for event in read_events(undisturbed.folder) if isinstance(event, Measured)]
    assert [event.model for event in measured] == list(undisturbed.state.members)
    for position, event in enumerate(measured):
        assert set(event.kinship) == {earlier.model for earlier in measured[:position]}
