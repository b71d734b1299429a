"""Facts about runs of people who evaluate elsewhere: `ask`, `tell`, and `evolve` between them."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_flat_run import bred, children, linear, present, whole
from test_run import models, near_target, settings, timeless

from modelkin import evolve, read_run
from modelkin.config import RunConfig
from modelkin.errors import ConfigError, LedgerError
from modelkin.ledger import read_events
from modelkin.merging import Native
from modelkin.records import Merged
from modelkin.run import Run, ask, materialise, read_scores, tell
from modelkin.testing import FunctionMerger

__all__ = ["models", "whole"]


def told(zoo: Path, **changes: Any) -> RunConfig:
    """Settings of a run whose scores are told."""
    evaluation = {"evaluator": "told", "tasks": ["near", "flat"]}
    return linear(zoo, evaluation=evaluation, **changes)


def means(outcomes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {task: sum(items.values()) / len(items) for task, items in outcomes.items()}


def test_a_run_by_hand_takes_the_course_of_evolve(whole: Run, models: Path, tmp_path: Path) -> None:
    """Asking, merging, scoring and telling by hand breeds the family that `evolve` breeds."""
    config = told(models, limits={"generations": 4})
    folder = tmp_path / "run"
    asked = ask(folder, config)
    assert [member.name for member in asked.waiting] == ["a", "b", "c"]
    while asked.waiting:
        assert ask(folder) == asked  # nothing is decided twice
        for member in asked.waiting:
            made = models / member.name
            if member.parents:
                made = tmp_path / "made" / member.name
                Native().merge(asked.recipes[member.name], made)
            tell(folder, member.name, means(near_target(str(made))))
        asked = ask(folder)
    assert asked.stopped == whole.state.stopped
    state = read_run(folder).state
    assert [(m.name, m.parents) for m in state.members.values()] == [
        (m.name, m.parents) for m in whole.state.members.values()
    ]
    assert state.predictions == whole.state.predictions
    assert not present(folder)


def test_evolve_goes_on_where_people_left(whole: Run, models: Path, tmp_path: Path) -> None:
    """`ask`, `tell` and `evolve` share one ledger: each goes on from what the others did."""
    config = linear(models, limits={"generations": 2})
    run = bred(config, tmp_path / "run")
    longer = linear(models, limits={"generations": 4})
    asked = ask(run.folder, longer)
    assert asked.waiting
    assert set(asked.recipes) == {member.name for member in asked.waiting}
    scores = {m.name: m.scorecard for m in whole.state.members.values()}
    first = asked.waiting[0].name
    card = scores[first]
    assert card is not None
    tell(run.folder, first, {task: score.value for task, score in card.scores.items()})
    most: list[int] = []
    run = bred(longer, run.folder, most=most)
    assert [m.id for m in run.state.ranked()] == [m.id for m in whole.state.ranked()]
    # The one that was told is not evaluated again.
    assert len(most) == len(run.state.members) - len(read_run_before(run.folder)) - 1
    assert ask(run.folder, longer).stopped == "reached the limit of 4 generations"


def read_run_before(folder: Path) -> list[str]:
    """The members of the first two generations."""
    return [m.id for m in read_run(folder).state.members.values() if m.generation <= 2]


def test_evolve_makes_children_whose_scores_are_told(models: Path, tmp_path: Path) -> None:
    """With the evaluator `told`, `evolve` makes the children, stops, and goes on when told."""
    config = told(models, limits={"generations": 2})
    run = evolve(config, out=tmp_path / "run")
    assert not children(run.state)
    for name in "abc":
        tell(run.folder, name, {**means(near_target(str(models / name))), "average": None})
    run = evolve(config, out=tmp_path / "run")
    assert present(run.folder) == {member.id for member in children(run.state)}
    assert len(children(run.state)) == 3
    assert sum(isinstance(event, Merged) for event in read_events(run.folder)) == 3
    again = evolve(config, out=tmp_path / "run")
    assert timeless(again.state) == timeless(run.state)


@pytest.mark.parametrize(
    ("model", "scores", "said"),
    [
        ("z", {"near": 1, "flat": 1}, r"expected one of the models a, b, c, found z"),
        ("a", {"near": 1}, r"scores of a: expected those of near, flat, found near"),
        ("a", {"near": 1, "flat": 1, "x": 1}, r"expected those of near, flat, found .*x"),
        ("a", {"near": "1", "flat": 1}, r"scores of a: near: expected a number, found '1'"),
        ("a", {"near": True, "flat": 1}, r"near: expected a number, found True"),
        ("a", {"near": float("nan"), "flat": 1}, r"near: expected a number, found nan"),
        ("a", {"near": {"stderr": 1}, "flat": 1}, r"near: expected a number, or value"),
        ("a", {"near": 10**400, "flat": 1}, r"near: expected a number, found 1000"),
        ("a", {"near": 1.5e308, "flat": 1.5e308}, r"expected numbers with a mean"),
        ("a", {"near": {"value": 1, "stderr": -1}, "flat": 1}, r"stderr: expected none below 0"),
        ("a", {"near": {"value": 1, "n": 0}, "flat": 1}, r"n: expected a number of items, found 0"),
        ("a", {"near": 1, "flat": 0, "average": 0.9}, r"average: expected 0.5000, .*found 0.9"),
        ("a", [1, 2], r"expected tasks with their scores, found list"),
    ],
)
def test_wrong_scores_are_refused(
    models: Path, tmp_path: Path, model: str, scores: Any, said: str
) -> None:
    """What was told is checked, and nothing is recorded of what is wrong."""
    folder = tmp_path / "run"
    ask(folder, told(models))
    before = read_events(folder)
    with pytest.raises(ConfigError, match=said):
        tell(folder, model, scores)
    assert read_events(folder) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, r"scores.json: expected JSON: maximum recursion"),
        (b'{"near": 1, "near": 2, "flat": 1}', r"distinct keys, found near, near, flat"),
        (b"\xff", r"scores.json: expected JSON: 'utf-8'"),
        (b"", r"scores.json: expected JSON"),
    ],
)
def test_files_of_scores_may_be_anything(tmp_path: Path, content: bytes, said: str) -> None:
    """What is no JSON, or says two things of one task, is an error of one line."""
    (tmp_path / "scores.json").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_scores(tmp_path / "scores.json")


def test_scores_are_told_once(models: Path, tmp_path: Path) -> None:
    """Scores may come with standard errors and counts; a second telling is refused."""
    folder = tmp_path / "run"
    ask(folder, told(models))
    run = tell(folder, "a", {"near": {"value": 0.5, "stderr": 0.1, "n": 9}, "flat": 0.25})
    card = run.member("a").scorecard
    assert card is not None
    assert (card.scores["near"].stderr, card.scores["near"].n, card.average) == (0.1, 9, 0.375)
    with pytest.raises(LedgerError, match=r"a: expected a model that waits .* average of 0.3750"):
        tell(folder, "a", {"near": 1, "flat": 1})


def test_asking_needs_a_run(tmp_path: Path) -> None:
    """A folder that is none, without a run file, is an error that says so."""
    with pytest.raises(ConfigError, match=r"is no run folder: expected run.yaml"):
        ask(tmp_path / "none")
    with pytest.raises(LedgerError, match=r"is no run folder"):
        tell(tmp_path / "none", "a", {})
    assert not (tmp_path / "none").exists()


def test_the_tasks_of_a_run_stay(models: Path, tmp_path: Path) -> None:
    """Scores of other tasks do not get into a run, by asking with another run file."""
    folder = tmp_path / "run"
    ask(folder, told(models))
    other = linear(models, evaluation={"evaluator": "told", "tasks": ["near", "far"]})
    with pytest.raises(LedgerError, match=r"started with the tasks near, flat, found near, far"):
        ask(folder, other)
    tell(folder, "a", {"near": 1, "flat": 1})


def test_nobody_waits_for_children_that_cannot_be_made(models: Path, tmp_path: Path) -> None:
    """A child that its method has no answer for is a failure, and not asked for."""
    weighted = [
        {"model": f"{{parent_{number}}}", "parameters": {"weight": weight}}
        for number, weight in ((1, 1), (2, -1))
    ]
    template = {"merge_method": "linear", "models": weighted, "dtype": "float32"}
    folder = tmp_path / "run"
    ask(folder, told(models, merge={"template": template}))
    for name in "abc":
        tell(folder, name, {"near": 1, "flat": 1})
    asked = ask(folder)
    assert (asked.waiting, asked.recipes) == ((), {})
    assert asked.stopped == "no pair is left that was not merged before"
    failures = [member.failure for member in children(read_run(folder).state)]
    assert all(failure and "weights" in failure.message for failure in failures)
    assert len(failures) == 3


def test_paths_stay_relative_to_the_run_file(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that the template names is found from wherever the run is asked."""
    third = [{"model": name, "parameters": {"weight": 1}} for name in ("{parent_1}", "c")]
    template = {
        "merge_method": "linear",
        "models": [*third, {"model": "{parent_2}", "parameters": {"weight": 1}}],
    }
    folder = tmp_path / "run"
    ask(folder, told(models, models=["a", "b"], merge={"template": template}))
    for name in "ab":
        tell(folder, name, {"near": 1, "flat": 1})
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        (recipe,) = ask(folder).recipes.values()
        assert recipe["models"][1]["model"] == str(models / "c")
    materialise(folder, "1-1", tmp_path / "out")


def test_a_parent_that_was_told_may_be_impossible_to_make(models: Path, tmp_path: Path) -> None:
    """Where the weights of a told parent cannot be made, its child fails and not the run."""
    folder = tmp_path / "run"
    evaluation = {"evaluator": "told", "tasks": ["near", "flat"]}
    config = settings(models, evaluation=evaluation)
    ask(folder, config)
    for position, name in enumerate(["a", "b", "c", "1-1", "1-2", "1-3"]):
        tell(folder, name, {"near": position, "flat": 1})
        ask(folder)

    def spoil(_config: Mapping[str, Any], _folder: Path) -> None:
        raise RuntimeError("no merge today")

    run = evolve(config, out=folder, merger=FunctionMerger(spoil))
    failed = [member.failure for member in run.state.members.values() if member.failure]
    assert failed
    assert all("no merge today" in failure.message for failure in failed)


def test_parents_that_recipes_need_are_named(models: Path, tmp_path: Path) -> None:
    """Where children are made of their parents, those that nobody made are said, and can be."""
    models_of = ["{parent_1}", "{parent_2}", str(models / "c")]
    template = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": 1}} for model in models_of],
    }
    folder = tmp_path / "run"
    ask(folder, told(models, models=["a", "b"], merge={"template": template}))
    for name in ("a", "b", "1-1"):
        tell(folder, name, {"near": 1, "flat": 1})
        asked = ask(folder)
    assert set(asked.recipes) == {"2-1", "2-2"}
    (parent,) = asked.absent
    assert parent == "1-1"
    materialise(folder, parent, asked.absent[parent])
    assert not ask(folder).absent
    for name, recipe in asked.recipes.items():
        Native().merge(recipe, tmp_path / name)


def test_telling_shows_in_the_report(models: Path, tmp_path: Path) -> None:
    """The report has scores as soon as they were told."""
    folder = tmp_path / "run"
    ask(folder, told(models))
    before = (folder / "report.html").read_text(encoding="utf-8")
    tell(folder, "a", {"near": 0.123, "flat": 0.321})
    assert (folder / "report.html").read_text(encoding="utf-8") != before


def test_names_go_before_ids(models: Path, tmp_path: Path) -> None:
    """A model that is named like another's id is the one that is meant by it."""
    first = ask(tmp_path / "first", told(models)).waiting[0].id
    folder = tmp_path / "run"
    ask(folder, told(models, models={"x": "a", first: "b", "y": "c"}))
    run = tell(folder, first, {"near": 1, "flat": 1})
    assert [m.name for m in run.state.members.values() if m.scorecard] == [first]


# The command line.


def modelkin(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "modelkin.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_commands_breed_a_family(models: Path, tmp_path: Path) -> None:
    """`ask` prints recipes that merge, `tell` takes scores, `materialise` makes any child."""
    content = told(models, limits={"generations": 2}).model_dump(mode="json", exclude_none=True)
    content |= {"base": str(models / "base"), "models": {n: str(models / n) for n in "abc"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    done = modelkin(tmp_path, "ask", "run", "--config", "mine.yaml")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == "Waiting for the scores of a, b, c.\n"
    for position, name in enumerate("abc"):
        scores = {"near": 0.5 + position / 10, "flat": 0.5}
        (tmp_path / f"{name}.json").write_text(json.dumps(scores), encoding="utf-8")
        done = modelkin(tmp_path, "tell", "run", name, f"{name}.json")
        assert done.returncode == 0, done.stderr
    assert "Not finished" in done.stdout
    done = modelkin(tmp_path, "ask", "run", "--out", "recipes")
    assert (done.returncode, done.stderr) == (0, "Waiting for the scores of 1-1, 1-2, 1-3.\n")
    assert {file.name for file in (tmp_path / "recipes").iterdir()} == {
        "1-1.yaml",
        "1-2.yaml",
        "1-3.yaml",
    }
    done = modelkin(tmp_path, "ask", "run")
    printed = list(yaml.safe_load_all(done.stdout))
    assert printed[0] == yaml.safe_load((tmp_path / "recipes" / "1-1.yaml").read_text())
    done = modelkin(tmp_path, "merge", "recipes/1-1.yaml", "child")
    assert done.returncode == 0, done.stderr
    done = modelkin(tmp_path, "materialise", "run", "1-1", "again")
    assert (done.returncode, done.stdout) == (0, "made again\n"), done.stderr
    made, again = (tmp_path / name / "model.safetensors" for name in ("child", "again"))
    assert made.read_bytes() == again.read_bytes()
    done = modelkin(tmp_path, "tell", "run", "1-1", "missing.json")
    assert (done.returncode, done.stderr) == (
        2,
        "error: missing.json: cannot be read: No such file or directory\n",
    )
