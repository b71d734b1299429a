"""Facts about runs of real parts: mergekit, lm-eval, transformers, processes and signals."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pico import TASKS, write_model, write_tasks

import modelkin as mk
from modelkin.errors import ConfigError
from modelkin.ledger import read_events
from modelkin.records import Merged, Scored
from modelkin.state import Cost, RunState

MODELKIN = Path(sys.executable).parent / "modelkin"


# Merges of our own, and merges that only mergekit makes.
MERGES = pytest.mark.parametrize(
    "merge",
    [
        {"preset": "slerp"},
        {
            "template": {
                "merge_method": "ties",
                "base_model": "{base}",
                "models": [
                    {"model": f"{{parent_{n}}}", "parameters": {"weight": 0.5, "density": 0.7}}
                    for n in (1, 2)
                ],
                "dtype": "bfloat16",
            }
        },
    ],
    ids=["native", "mergekit"],
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base, three models made from it, and tasks for them."""
    folder = tmp_path_factory.mktemp("zoo")
    base = write_model(folder / "base")
    for seed, name in enumerate("abc", start=1):
        write_model(folder / name, like=base, seed=seed)
    write_tasks(folder / "tasks")
    return folder


def write_run(folder: Path, zoo: Path, **changes: Any) -> Path:
    """A run file over the zoo."""
    content: dict[str, Any] = {
        "base": str(zoo / "base"),
        "models": {name: str(zoo / name) for name in "abc"},
        "limits": {"generations": 2},
        "merge": {"preset": "slerp"},
        "evaluation": {
            "tasks": list(TASKS),
            "include_path": str(zoo / "tasks"),
            "device": "cpu",
            "dtype": "float32",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}), encoding="utf-8")
    return path


@MERGES
def test_real_models_are_bred(zoo: Path, tmp_path: Path, merge: dict[str, Any]) -> None:
    """Real merges and evaluations give children that load, with scores, samples and kinship."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = mk.evolve(write_run(tmp_path, zoo, merge=merge))
    assert bool(run.state.predictions) == ("preset" in merge)
    members = list(run.state.members.values())
    assert run.state.generation == 2
    assert all(member.failure is None for member in members)
    for member in members:
        model = AutoModelForCausalLM.from_pretrained(run.weights(member))
        assert model.dtype == torch.bfloat16
        assert len(AutoTokenizer.from_pretrained(run.weights(member))) == model.config.vocab_size
        assert member.scorecard is not None
        assert tuple(member.scorecard.scores) == TASKS
        assert {task: len(items) for task, items in run.samples(member).items()} == {
            task: score.n for task, score in member.scorecard.scores.items()
        }
    found = mk.kinship(zoo / "base", [run.weights(member) for member in members])
    for i, one in enumerate(members):
        for j, other in enumerate(members[:i]):
            recorded = run.state.kinship[frozenset((one.id, other.id))]
            expected = (found.pcc_NN[i, j], found.cs_NN[i, j], found.ed_NN[i, j])
            assert recorded == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge": {"preset": "slerp", "options": {"cuda": "perhaps"}}}, "merge.options.cuda"),
        (
            {
                "merge": {
                    "template": {
                        "merge_method": "slepr",
                        "models": [{"model": "{parent_1}"}, {"model": "{parent_2}"}],
                    }
                }
            },
            "merge: mergekit does not accept it: .*slepr",
        ),
    ],
    ids=["option", "method"],
)
def test_what_mergekit_refuses_is_refused_before_any_work(
    zoo: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """A merge that cannot work is an error at the start, and leaves a folder that can be used."""
    with pytest.raises(ConfigError, match=message):
        mk.evolve(write_run(tmp_path, zoo, **changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_with_broken_data_is_refused_before_any_work(zoo: Path, tmp_path: Path) -> None:
    """A task that cannot be loaded is an error at the start, and leaves nothing behind."""
    (tmp_path / "tasks").mkdir()
    task = (zoo / "tasks" / f"{TASKS[0]}.yaml").read_text()
    (tmp_path / "tasks" / f"{TASKS[0]}.yaml").write_text(task)  # without its data
    evaluation = {"tasks": [TASKS[0]], "include_path": "tasks", "device": "cpu"}
    with pytest.raises(ConfigError, match=r"evaluation.tasks: lm-eval cannot load them"):
        mk.evolve(write_run(tmp_path, zoo, evaluation=evaluation), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Scores depend on the weights alone. The script says when it is asked and of whom it has answered,
# and where a file `hold` lies it does not answer.
SCRIPT = """\
import hashlib, json, pathlib, sys, time
folder, log = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
weights = hashlib.sha256()
for file in sorted(folder.glob("*.safetensors")):
    weights.update(file.read_bytes())
(log / "asking").touch()
while (log / "hold").exists():
    time.sleep(0.02)
with (log / "answered").open("a") as stream:
    stream.write(folder.name + "\\n")
print(json.dumps({"task": int(weights.hexdigest()[:8], 16) / 2**32}))
"""


def kill_when(command: list[str], happens: Callable[[], bool]) -> bool:
    """Start a command and kill it, with all its children, in the middle of something.

    It is halted first, so that what happens cannot be over when the signal arrives. Returns
    whether it happened before the command ended.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while process.poll() is None:
            if happens():
                os.killpg(process.pid, signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                if happens():
                    os.killpg(process.pid, signal.SIGKILL)
                    return process.wait() == -signal.SIGKILL
                os.killpg(process.pid, signal.SIGCONT)
            time.sleep(0.002)
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def timeless(state: RunState) -> RunState:
    """The state but for the time that it took."""
    return replace(state, cost=Cost())


@MERGES
def test_a_run_killed_in_the_middle_ends_the_same(
    zoo: Path, tmp_path: Path, merge: dict[str, Any]
) -> None:
    """SIGKILL within a merge and within an evaluation costs no result and no recorded score."""
    (tmp_path / "score.py").write_text(SCRIPT, encoding="utf-8")
    log = tmp_path / "log"
    log.mkdir()
    evaluation = {
        "evaluator": "command",
        "command": [sys.executable, str(tmp_path / "score.py"), "{model}", str(log)],
        "tasks": ["task"],
    }
    run_file = write_run(tmp_path, zoo, evaluation=evaluation, merge=merge)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [str(MODELKIN), "evolve", str(run_file), "--out", str(killed)]

    assert kill_when(command, lambda: any(killed.glob("models/.*.partial")))
    before_merge = recorded(killed)
    assert len(before_merge) >= 3
    assert any(killed.glob("models/.*.partial"))

    (log / "asking").unlink()
    (log / "hold").touch()
    assert kill_when(command, (log / "asking").exists)
    during_evaluation = recorded(killed)
    (log / "hold").unlink()

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(before_merge) <= set(during_evaluation) <= set(recorded(killed))
    answered = Counter((log / "answered").read_text().splitlines())
    finished = mk.read_run(killed)
    for model in during_evaluation:
        assert answered[finished.weights(finished.state.members[model]).name] == 1
    for kind in (Scored, Merged):
        models = [event.model for event in read_events(killed) if isinstance(event, kind)]
        assert len(models) == len(set(models))
    assert not any(killed.glob("models/.*"))

    fresh = mk.evolve(run_file, out=undisturbed)
    assert timeless(finished.state) == timeless(fresh.state)
    for member in fresh.state.members.values():
        assert weights(finished.weights(member)) == weights(fresh.weights(member))


def recorded(folder: Path) -> list[str]:
    """The ids of models whose scores are in a run's ledger."""
    return [event.model for event in read_events(folder) if isinstance(event, Scored)]


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of a model's weight files."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
