"""The run file: every mistake is one line that names the key; a dry run writes nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import llama_config, llama_like, perturbed, write_checkpoint
from click.testing import CliRunner

import modelkin as mk
from modelkin.cli import app
from modelkin.config import RunConfig, load_config, load_yaml, parse_config
from modelkin.errors import CheckpointError, ConfigError, IncomparableError
from modelkin.evaluating.command import CommandSettings
from modelkin.evaluating.harness import HarnessSettings
from modelkin.evaluating.table import TableSettings
from modelkin.evolution import Rules
from modelkin.run import default_folder, plan
from modelkin.testing import FunctionEvaluator, FunctionMerger

GOOD: Mapping[str, Any] = {
    "base": "base",
    "models": ["a", "b"],
    "merge": {"preset": "slerp"},
    "evaluation": {"evaluator": "command", "command": ["echo", "{model}"], "tasks": ["t"]},
}
TEMPLATE: Mapping[str, Any] = {
    "merge_method": "linear",
    "models": [
        {"model": "{parent_1}", "parameters": {"weight": 1}},
        {"model": "{parent_2}", "parameters": {"weight": 1}},
    ],
    "dtype": "float32",
}
ABSENT = object()


def _changed(path: str, value: Any) -> dict[str, Any]:
    """Good settings with one key, as `merge.preset`, set to a value or taken away."""
    content = copy.deepcopy(dict(GOOD))
    *above, key = path.split(".")
    place = content
    for part in above:
        place = place.setdefault(part, {})
    if value is ABSENT:
        del place[key]
    else:
        place[key] = value
    return content


def _run_file(folder: Path, content: Any = GOOD) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else yaml.safe_dump(dict(content))
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return folder / "run.yaml"


def _refusal(file: Path, *parts: object) -> str:
    """The one line with which a run file is refused; begins with its name, holds `parts`."""
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{file}: ")
    for part in parts:
        assert str(part) in message
    return message


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a run file, its base and the models a and b."""
    rng = np.random.default_rng(0)
    base = llama_like(rng)
    write_checkpoint(tmp_path / "base", base, dtype="BF16")
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, perturbed(base, rng), dtype="BF16")
    _run_file(tmp_path)
    return tmp_path


def _all_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _paths(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# What is right


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    """A run file that says no more than it must breeds by kinship with k = 3."""
    config = load_config(_run_file(tmp_path))
    assert config.models == {"a": "a", "b": "b"}
    assert config.rules == Rules()
    assert (config.strategy, config.k, config.metric, config.seed) == ("kinship", 3, "pcc", 0)
    assert config.limits.evaluations is None
    assert config.stop.kinship is None
    assert not config.trust_remote_code


def test_rules_are_what_the_run_file_says(tmp_path: Path) -> None:
    """Every setting of the search reaches the rules that `evolution` decides by."""
    said = {
        "strategy": "greedy",
        "k": 4,
        "metric": "ed",
        "seed": 7,
        "explore": {"pool": "lagged"},
        "limits": {"generations": 3, "evaluations": 20, "hours": 1.5},
        "stop": {"kinship": 0.9, "patience": 2},
    }
    rules = load_config(_run_file(tmp_path, {**GOOD, **said})).rules
    assert rules.model_dump() == said


def test_models_are_named_by_their_last_part(tmp_path: Path) -> None:
    """A list of models names each by the last part of its path or Hub id, without revision."""
    listed = ["zoo/a", "./b/", "org/c", "org/d@main", "/abs/e"]
    config = load_config(_run_file(tmp_path, _changed("models", listed)))
    assert list(config.models) == ["a", "b", "c", "d", "e"]
    assert list(config.models.values()) == listed


def test_models_can_be_named(tmp_path: Path) -> None:
    """A mapping of models gives each a name of its own."""
    config = load_config(_run_file(tmp_path, _changed("models", {"x": "zoo/a", "y": "other/a"})))
    assert config.models == {"x": "zoo/a", "y": "other/a"}


@pytest.mark.parametrize(
    ("evaluation", "kind"),
    [
        ({"tasks": ["arc_easy"]}, HarnessSettings),
        ({"evaluator": "lm-eval", "tasks": [{"task": "t", "num_fewshot": 5}]}, HarnessSettings),
        (GOOD["evaluation"], CommandSettings),
        ({"evaluator": "table", "path": "scores.csv", "tasks": ["t"]}, TableSettings),
    ],
)
def test_the_evaluator_is_chosen_by_name(evaluation: Any, kind: type, tmp_path: Path) -> None:
    """`evaluation.evaluator` says which settings apply; lm-eval is the default."""
    config = load_config(_run_file(tmp_path, _changed("evaluation", evaluation)))
    assert isinstance(config.evaluation, kind)


def test_a_template_is_kept(tmp_path: Path) -> None:
    """A template reaches the merge with its placeholders as they are."""
    file = _run_file(tmp_path, _changed("merge", {"template": dict(TEMPLATE)}))
    assert load_config(file).merge.config() == TEMPLATE


def test_relative_paths_start_at_the_run_file(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative folders are taken from the run file's folder, not from the working directory."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(models / "run.yaml")
    assert config.source("a") == str(models / "a")
    assert config.source("./a") == str(models / "a")
    assert config.source("../x") == str(models.parent / "x")
    assert [model.folder for model in plan(config, elsewhere / "out").models] == [
        models / name for name in ("base", "a", "b")
    ]


def test_a_relative_run_file_is_found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run file named relative to the working directory has an absolute folder."""
    monkeypatch.chdir(models.parent)
    assert load_config(Path(models.name) / "run.yaml").folder == models


def test_a_hub_id_stays_one(tmp_path: Path) -> None:
    """A name that is no folder here is left to be a Hub id."""
    assert load_config(_run_file(tmp_path)).source("org/name@main") == "org/name@main"


def test_the_run_folder_is_beside_the_run_file() -> None:
    """A run without a folder of its own goes to `runs/<name>` beside its file."""
    assert default_folder(Path("x/greedy.yaml")) == Path("x/runs/greedy")


# What is wrong


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        # Keys that there are not, and keys that there must be.
        ("generations", 5, ["generations: unknown key", "strategy", "limits"]),
        ("folder", "x", ["folder: unknown key"]),
        ("limits.generation", 5, ["limits.generation: unknown key"]),
        ("explore.size", 5, ["explore.size: unknown key"]),
        ("stop.after", 5, ["stop.after: unknown key"]),
        ("merge.presets", "slerp", ["merge.presets: unknown key"]),
        ("evaluation.task", "t", ["evaluation.task: unknown key"]),
        ("base", ABSENT, ["base: expected this key, found none"]),
        ("models", ABSENT, ["models: expected this key, found none"]),
        ("merge", ABSENT, ["merge: expected this key, found none"]),
        ("evaluation", ABSENT, ["evaluation: expected this key, found none"]),
        ("evaluation.tasks", ABSENT, ["evaluation.tasks: expected this key, found none"]),
        ("evaluation.command", ABSENT, ["evaluation.command: expected this key, found none"]),
        # Values out of bounds, or of another kind.
        ("k", 1, ["k: ", "greater than or equal to 2", "found 1"]),
        ("k", "three", ["k: ", "integer", "found 'three'"]),
        ("seed", -1, ["seed: ", "greater than or equal to 0", "found -1"]),
        ("metric", "pccc", ["metric: ", "'pcc', 'cs' or 'ed'", "found 'pccc'"]),
        ("strategy", "best", ["strategy: ", "'greedy', 'kinship' or 'random'", "found 'best'"]),
        ("explore.pool", "some", ["explore.pool: ", "'all'", "found 'some'"]),
        ("limits.generations", 0, ["limits.generations: ", "found 0"]),
        ("limits.hours", 0, ["limits.hours: ", "greater than 0", "found 0"]),
        ("limits", 3, ["limits: ", "found 3"]),
        ("stop.patience", 0, ["stop.patience: ", "found 0"]),
        ("base", 3, ["base: ", "string", "found 3"]),
        ("trust_remote_code", "perhaps", ["trust_remote_code: ", "boolean", "found 'perhaps'"]),
        # Models.
        ("models", ["a"], ["models: expected at least 2 models, found 1"]),
        ("models", [], ["models: expected at least 2 models, found 0"]),
        ("models", {}, ["models: expected at least 2 models, found 0"]),
        ("models", "a", ["models: ", "found 'a'"]),
        ("models", None, ["models: ", "found None"]),
        ("models", ["zoo/a", "other/a"], ["models: ", "'a' twice", "zoo/a", "other/a"]),
        ("models", ["a", "a"], ["models: ", "'a' twice"]),
        ("models", ["o/a@x", "o/a@y"], ["models: ", "'a' twice"]),
        ("models", ["zoo/a", "zoo/a/"], ["models: ", "'a' twice"]),
        ("models", {"1-1": "a", "b": "b"}, ["models: ", "no child", "found '1-1'"]),
        ("models", {"12-exp": "a", "b": "b"}, ["models: ", "no child", "found '12-exp'"]),
        ("models", ["zoo/2-3", "b"], ["models: ", "no child", "found '2-3'"]),
        ("models", {" ": "a", "b": "b"}, ["models: ", "printable", "found ' '"]),
        ("models", {"a\nb": "a", "b": "b"}, ["models: ", "printable", "found 'a\\nb'"]),
        ("models", {"": "a", "b": "b"}, ["models: ", "found ''"]),
        ("models", {"a": 3, "b": "b"}, ["models.a: ", "string", "found 3"]),
        ("models", [{"a": "x"}, "b"], ["models"]),
        ("models", [3, "b"], ["models.3: ", "string", "found 3"]),
        # How children are made.
        ("merge", {}, ["merge: expected either 'preset' or 'template'"]),
        (
            "merge",
            {"preset": "slerp", "template": dict(TEMPLATE)},
            ["merge: expected either 'preset' or 'template'"],
        ),
        ("merge.preset", "slurp", ["merge.preset: ", "'slerp' or 'paper'", "found 'slurp'"]),
        (
            "merge",
            {"template": {"merge_method": "slerp", "models": []}},
            ["merge: template: ", "{parent_1}"],
        ),
        (
            "merge",
            {"template": {"merge_method": "slerp", "models": [{"model": "{parent_1}"}]}},
            ["merge: template: ", "{parent_2}"],
        ),
        (
            "merge",
            {"template": {**TEMPLATE, "base_model": "{bass}"}},
            ["merge: template: ", "{base}", "found {bass}"],
        ),
        ("merge", {"template": {"models": []}}, ["merge: template: ", "'merge_method'"]),
        # Limits that leave nothing to do.
        ("limits.evaluations", 2, ["limits.evaluations: ", "2 foundation models", "found 2"]),
        ("limits.evaluations", 1, ["limits.evaluations: ", "found 1"]),
        ("limits.evaluations", 0, ["limits.evaluations: ", "found 0"]),
        # How models are scored.
        (
            "evaluation.evaluator",
            "eval",
            ["evaluation.evaluator: expected one of 'lm-eval', 'command', ", "found 'eval'"],
        ),
        ("evaluation.tasks", [], ["evaluation.tasks: ", "at least 1", "found []"]),
        ("evaluation", {"tasks": [3]}, ["evaluation.tasks.0: "]),
        ("evaluation", {"tasks": [{"name": "t"}]}, ["evaluation.tasks.0"]),
        ("evaluation", {"tasks": ["t"], "limit": 0}, ["evaluation.limit: ", "found 0"]),
        ("evaluation", None, ["evaluation: expected keys and values, found NoneType"]),
        ("evaluation", ["t"], ["evaluation: expected keys and values, found list"]),
    ],
)
def test_a_mistake_is_named(path: str, value: Any, parts: list[str], tmp_path: Path) -> None:
    """A mistake is one line that names the file, the key and what was expected there."""
    _refusal(_run_file(tmp_path, _changed(path, value)), *parts)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "text\n", "3\n", "null\n"])
def test_a_run_file_of_another_kind_is_refused(content: str, tmp_path: Path) -> None:
    """A run file that is no mapping is refused with what it is."""
    _refusal(_run_file(tmp_path, content), "expected keys and values, found ")


@pytest.mark.parametrize(
    "content",
    ["base: [", "base: x\n\tmodels: y", "a: b: c", "\x00", "? [a]\n: b\n", "*nothing", "[" * 5000],
)
def test_a_run_file_that_is_no_yaml_is_refused(content: str, tmp_path: Path) -> None:
    """YAML that cannot be parsed is one line, although YAML's own message is several."""
    _refusal(_run_file(tmp_path, content), "not valid YAML")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("base: x\nbase: y\n", "base"),
        ("models:\n  a: x\n  b: y\n  a: z\n", "a"),
        ("limits: {hours: 1, hours: 2}\n", "hours"),
    ],
)
def test_a_key_that_stands_twice_is_refused(content: str, key: str, tmp_path: Path) -> None:
    """Of two equal keys YAML would keep the last in silence; here they are a mistake."""
    _refusal(_run_file(tmp_path, content), f"found {key!r} twice", "line")


def test_merged_keys_of_yaml_may_be_overridden(tmp_path: Path) -> None:
    """A key that overrides one that an anchor brings is not a key that stands twice."""
    (tmp_path / "x.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert load_yaml(tmp_path / "x.yaml")["b"] == {"x": 3, "y": 2}


def test_a_missing_run_file_is_named(tmp_path: Path) -> None:
    """A run file that is not there is a ConfigError with its name."""
    _refusal(tmp_path / "none.yaml", "cannot be read: No such file")


def test_settings_can_be_validated_without_a_file(tmp_path: Path) -> None:
    """Settings from Python are validated as those of a file are."""
    assert isinstance(parse_config(dict(GOOD), folder=tmp_path), RunConfig)
    with pytest.raises(ConfigError, match=r"^mine: k: "):
        parse_config(_changed("k", 0), folder=tmp_path, origin="mine")


# Before any work


def _evolve(config: Path | RunConfig, out: Path) -> mk.Run:
    """A run whose merger and evaluator must not be asked."""

    def never(*_: object) -> Any:
        raise AssertionError("work was begun")

    return mk.evolve(
        config, out=out, merger=FunctionMerger(never), evaluator=FunctionEvaluator(never)
    )


def _without(models: Path, name: str) -> None:
    for file in (models / name).iterdir():
        file.unlink()
    (models / name).rmdir()


@pytest.mark.parametrize(("gone", "key"), [("base", "base"), ("a", "models.a"), ("b", "models.b")])
def test_a_missing_model_stops_before_any_work(gone: str, key: str, models: Path) -> None:
    """A model that is not there is named by its key, and nothing was made."""
    _without(models, gone)
    content = {**GOOD, "base": "./base", "models": ["./a", "./b"]}
    file = _run_file(models, content)
    before = _paths(models)
    for attempt in (plan, _evolve):
        with pytest.raises(CheckpointError) as caught:
            attempt(load_config(file), models / "out")
        assert str(caught.value).startswith(f"{key}: {models / gone}: no such folder")
    assert _paths(models) == before


def test_an_unreadable_model_stops_before_any_work(models: Path) -> None:
    """A truncated model is found by its header before anything is merged or evaluated."""
    file = models / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = _paths(models)
    with pytest.raises(CheckpointError, match=r"^models\.b: .*truncated"):
        _evolve(models / "run.yaml", models / "out")
    assert _paths(models) == before


def test_an_incomparable_model_stops_before_any_work(models: Path) -> None:
    """A model of another architecture than the base is refused before any work."""
    _without(models, "b")
    tensors = llama_like(np.random.default_rng(1))
    write_checkpoint(
        models / "b", tensors, config={**llama_config(tensors), "architectures": ["Other"]}
    )
    before = _paths(models)
    with pytest.raises(IncomparableError, match="Other"):
        _evolve(models / "run.yaml", models / "out")
    assert _paths(models) == before


def test_a_run_without_a_file_needs_a_folder(models: Path) -> None:
    """Settings alone do not say where a run goes: `out` must."""
    with pytest.raises(ConfigError, match="expected 'out'"):
        mk.evolve(load_config(models / "run.yaml"))


# The plan


@pytest.mark.parametrize(
    ("content", "merges"),
    [
        # One pair of foundations, then three pairs of the three best and an exploration.
        ({"limits": {"generations": 1}}, 1),
        ({"limits": {"generations": 3}}, 1 + 2 * 4),
        ({"limits": {"generations": 3}, "strategy": "greedy"}, 1 + 2 * 3),
        ({"limits": {"generations": 3}, "strategy": "random", "k": 2}, 1 + 2 * 1),
        ({"limits": {"evaluations": 5}}, 3),
    ],
)
def test_a_plan_counts_what_can_happen(content: Any, merges: int, models: Path) -> None:
    """Merges and evaluations are counted at most, and bytes from the size of a child."""
    found = plan(load_config(_run_file(models, {**GOOD, **content})), models / "out")
    assert found.merges == merges
    assert found.evaluations == merges + 2
    assert found.bytes == merges * 2 * found.models[0].parameters
    assert found.free > 0
    assert found.fits == (found.bytes <= found.free)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_bytes_follow_the_dtype_of_the_merge(dtype: str, size: int, models: Path) -> None:
    """A template's dtype decides how large the children are."""
    template = {**TEMPLATE, "dtype": dtype}
    file = _run_file(
        models, {**GOOD, "merge": {"template": template}, "limits": {"generations": 1}}
    )
    found = plan(load_config(file), models / "out")
    assert found.bytes == size * found.models[0].parameters


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evolve --dry-run` prints models, merges, evaluations and bytes, and writes nothing."""
    monkeypatch.chdir(models)
    before = (_paths(models), _all_files(models))
    done = CliRunner().invoke(app, ["evolve", "run.yaml", "--dry-run"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert (_paths(models), _all_files(models)) == before
    lines = done.stdout.splitlines()
    for name, line in zip(("base", "a", "b"), lines, strict=False):
        assert line.split()[0] == name
        assert f"LlamaForCausalLM, 1,448 parameters, {models / name}" in line
    assert lines[3] == "at most 37 merges and 39 evaluations"
    assert "0.00 GB to be written to runs/run" in lines[4]
    assert lines[4].endswith("GB free: fits")


def test_a_dry_run_of_a_run_file_elsewhere(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run finds the models beside the run file from any working directory."""
    (models / "elsewhere").mkdir()
    monkeypatch.chdir(models / "elsewhere")
    done = CliRunner().invoke(app, ["evolve", "../run.yaml", "--dry-run"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert str(models / "a") in done.stdout
