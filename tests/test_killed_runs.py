"""Facts about runs that are killed: at any step they leave what the next call goes on from."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from test_flat_run import bred, linear, present
from test_run import interrupted, models, prefixes, read, timeless

from modelkin import evolve, read_run
from modelkin.checkpoint import fingerprint, open_checkpoint
from modelkin.config import RunConfig
from modelkin.errors import CheckpointError
from modelkin.ledger import read_events
from modelkin.measuring.archive import read_statistics
from modelkin.records import Scored, Subject
from modelkin.run import ask, flat, materialise
from modelkin.run.folder import STATISTICS_FILE
from modelkin.testing import FunctionEvaluator

__all__ = ["models"]

# Breeds in forked processes, each of which is killed at the given one of its changes to files; the
# last one is let be. A change is what Python tells an audit hook of, before it happens.
KILLED = """
import json, os, signal, sys
from pathlib import Path

tests, zoo, out, keep, *steps = sys.argv[1:]
sys.path.insert(0, tests)
from modelkin.checkpoint import fingerprint, open_checkpoint
from test_flat_run import bred, linear

WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "sqlite3.connect")

def killed_at(step):
    count = 0
    def hook(event, arguments):
        nonlocal count
        writes = event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and "__pycache__" not in str(arguments[0]):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for step in [*map(int, steps), 0]:
    child = os.fork()
    if not child:
        killed_at(step)
        bred(linear(Path(zoo), storage={"keep": keep}), Path(out))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    for folder in Path(out).glob("models/[!.]*"):
        fingerprint(open_checkpoint(folder))
        json.loads((folder / "modelkin.json").read_text())
"""


def killed(zoo: Path, out: Path, keep: str, steps: list[int]) -> list[int]:
    """How each process ended that was to be killed at a step, and then the one that was not."""
    words = [str(Path(__file__).parent), str(zoo), str(out), keep, *map(str, steps)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("keep", ["all", "top-k", "none"])
def test_a_run_killed_again_and_again_ends_the_same(
    models: Path, tmp_path: Path, keep: str
) -> None:
    """Killed while it merges, records, deletes: every folder is whole, and the end is the same."""
    undisturbed = bred(linear(models, storage={"keep": keep}), tmp_path / "undisturbed")
    draw = random.Random(keep)
    steps = [draw.randrange(1, 60) for _ in range(12)]
    codes = killed(models, tmp_path / "run", keep, steps)
    assert codes[-1] == 0
    assert codes.count(-signal.SIGKILL) >= 6
    run = read_run(tmp_path / "run")
    assert timeless(run.state) == timeless(undisturbed.state)
    assert present(run.folder) == present(undisturbed.folder)


def test_a_generation_half_scored_is_measured_when_it_is_whole(
    models: Path, tmp_path: Path
) -> None:
    """Who is among the best for a moment only is measured no more after a kill than without."""
    # The newest is the best: of a generation the last ones stay.
    order = iter(range(100))

    def config() -> RunConfig:
        return linear(models, k=2, storage={"keep": "top-k"}, limits={"generations": 2})

    def score(subject: Subject) -> Mapping[str, Mapping[str, float]]:
        seen.setdefault(subject.fingerprint, next(order))
        return {task: {"1": seen[subject.fingerprint]} for task in ("near", "flat")}

    seen: dict[str, int] = {}
    evaluator = FunctionEvaluator(score, protocol="newest")
    undisturbed = evolve(config(), out=tmp_path / "undisturbed", evaluator=evaluator)
    events = read_events(undisturbed.folder)
    for count in prefixes(events):
        folder = interrupted(undisturbed, count, tmp_path / str(count), with_files=True)
        run = evolve(config(), out=folder, evaluator=evaluator)
        assert timeless(run.state) == timeless(undisturbed.state), f"after {count} events"


def test_statistics_of_a_start_that_was_killed_are_not_believed(
    models: Path, tmp_path: Path
) -> None:
    """Statistics without a ledger may be those of another base: a run that begins measures."""
    other = bred(linear(models, base="c", models=["a", "b"]), tmp_path / "other")
    (tmp_path / "run").mkdir()
    shutil.copy(other.folder / STATISTICS_FILE, tmp_path / "run")
    run = bred(linear(models, models=["a", "b"]), tmp_path / "run")
    fresh = bred(linear(models, models=["a", "b"]), tmp_path / "fresh")
    assert run.state.predictions == fresh.state.predictions


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_lost_statistics_are_measured_again(
    models: Path, tmp_path: Path, content: bytes | None
) -> None:
    """Without its statistics a run goes on, and its children are made again, bit for bit."""
    config = linear(models, storage={"keep": "none"})
    undisturbed = bred(config, tmp_path / "undisturbed")
    events = read_events(undisturbed.folder)
    folder = interrupted(undisturbed, len(events) // 2, tmp_path / "run", with_files=True)
    for place in (folder, undisturbed.folder):
        (place / STATISTICS_FILE).unlink()
        if content is not None:
            (place / STATISTICS_FILE).write_bytes(content)
    youngest = list(undisturbed.state.members.values())[-1]
    materialise(undisturbed.folder, youngest.name, tmp_path / "again")
    assert fingerprint(open_checkpoint(tmp_path / "again")) == youngest.fingerprint
    assert timeless(bred(config, folder).state) == timeless(undisturbed.state)


def test_only_the_foundations_statistics_are_kept(models: Path, tmp_path: Path) -> None:
    """Statistics that were lost are not replaced by those of a later pass over other models."""
    config = linear(models, storage={"keep": "all"})
    run = bred(config, tmp_path / "undisturbed")
    events = read_events(run.folder)
    last = max(n for n, event in enumerate(events) if isinstance(event, Scored))
    folder = interrupted(run, last + 1, tmp_path / "run", with_files=True)
    (folder / STATISTICS_FILE).unlink()
    bred(config, folder)
    kept = read_statistics(folder / STATISTICS_FILE)
    assert kept is None or kept.models == tuple(m.id for m in run.state.members.values())[:3]


def test_damaged_weights_are_made_again(models: Path, tmp_path: Path) -> None:
    """A child whose weights are there but not what they were is made of the foundations."""
    run = bred(linear(models, limits={"generations": 1}), tmp_path / "run")
    member = run.member("1-1")
    weights = run.weights(member) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    materialise(run.folder, "1-1", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == content


def test_models_that_have_moved_are_said_to(models: Path, tmp_path: Path) -> None:
    """A child is not made of models that are gone; who says where they are can make it."""
    shutil.copytree(models, tmp_path / "models")
    changes = {"storage": {"keep": "none"}, "limits": {"generations": 1}}
    run = bred(linear(tmp_path / "models", **changes), tmp_path / "run")
    (tmp_path / "models").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base: .*no such folder.*; if the models have mov"):
        materialise(run.folder, "1-1", tmp_path / "out")
    ask(run.folder, linear(tmp_path / "moved", **changes))
    materialise(run.folder, "1-1", tmp_path / "out")
    assert fingerprint(open_checkpoint(tmp_path / "out")) == run.member("1-1").fingerprint


def test_all_digits_are_measured_for_children_in_32_bits(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children get the base's format where it comes first, whatever that of the foundations."""
    asked: list[bool] = []

    def measured(*_: Any, double: bool, **__: Any) -> Any:
        asked.append(double)

    monkeypatch.setattr(flat, "measure", measured)
    base = open_checkpoint(models / "base")
    tensors = read(models / "a")
    foundation = open_checkpoint(write_checkpoint(tmp_path / "a", tensors, dtype="BF16"))
    for template in ({}, {"dtype": "float32"}, {"dtype": "float32", "out_dtype": "bfloat16"}):
        flat.measure_foundations(template, base, {"a": foundation}, flat=True, progress=None)
    assert asked == [True, True, False]


def test_a_run_that_cannot_be_written_can_be_read(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is shown from a folder in which nothing can be written, or locked."""
    run = bred(linear(models, limits={"generations": 1}), tmp_path / "run #1?")
    (run.folder / "ledger.db").chmod(0o444)
    run.folder.chmod(0o555)
    # Those who may write everywhere may do so here too.
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = run.folder.stat().st_mtime_ns
    try:
        assert read_run(run.folder).state == run.state
        # Not even for a moment was there another file.
        assert run.folder.stat().st_mtime_ns == before
    finally:
        run.folder.chmod(0o755)


def test_a_program_may_print_any_number(models: Path, tmp_path: Path) -> None:
    """A score too large for a number fails its model, and not the run."""
    says = "print('{\"near\": 1' + '0' * 400 + ', \"flat\": 1}')"
    command = {"evaluator": "command", "command": [sys.executable, "-c", says, "{model}"]}
    config = linear(models, evaluation={**command, "tasks": ["near", "flat"]})
    run = evolve(config, out=tmp_path / "run")
    failures = [member.failure for member in run.state.members.values()]
    assert all(failure and "expected a finite number" in failure.message for failure in failures)
