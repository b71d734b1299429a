"""Facts about models from the Hub. The download is a stand-in: the tests need no network."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from checkpoints import llama_like, perturbed, write_checkpoint, write_safetensors
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from modelkin.checkpoint import open_checkpoint
from modelkin.config import RunConfig, parse_config
from modelkin.errors import CheckpointError
from modelkin.run import Run, evolve
from modelkin.testing import FunctionEvaluator, FunctionMerger

OLD, NEW = "0" * 40, "1" * 40


class Hub:
    """Repositories whose `main` can move on; a snapshot's folder is named after its commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.main = OLD
        self.asked: list[tuple[str, str | None]] = []
        self.offline: type[Exception] | None = None
        rng = np.random.default_rng(0)
        base = llama_like(rng, layers=1)
        for repository in ("base", "a", "b"):
            for commit in (OLD, NEW):
                write_checkpoint(folder / repository / commit, perturbed(base, rng, scale=0.05))

    def snapshot_download(
        self,
        repository: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        """Links the files asked for into a snapshot, as the library's cache does."""
        self.asked.append((repository, revision))
        if self.offline is not None:
            raise self.offline("a long story\nover several lines")
        organisation, _slash, name = repository.partition("/")
        if organisation != "org":
            raise LocalEntryNotFoundError("no such repository, and no network")
        commit = self.main if revision in (None, "main") else revision
        assert commit is not None
        source, snapshot = self.folder / name / commit, self.folder / "cache" / name / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in source.rglob("*"):
            file = str(path.relative_to(source))
            if not any(fnmatch(file, pattern) for pattern in allow_patterns):
                continue
            if any(fnmatch(file, pattern) for pattern in ignore_patterns):
                continue
            (snapshot / file).parent.mkdir(exist_ok=True)
            (snapshot / file).unlink(missing_ok=True)
            (snapshot / file).symlink_to(source / file)
        return str(snapshot)

    def fetched(self, name: str) -> set[str]:
        """The files of a repository that were asked for."""
        folder = self.folder / "cache" / name
        return {path.name for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub's stand-in."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def run(folder: Path, generations: int) -> Run:
    """A run over models of the Hub, by fakes."""
    config: RunConfig = parse_config(
        {
            "base": "org/base",
            "models": ["org/a", "org/b"],
            "k": 2,
            "limits": {"generations": generations},
            "merge": {"preset": "slerp"},
            "evaluation": {
                "evaluator": "command",
                "command": ["unused", "{model}"],
                "tasks": ["size"],
            },
        },
        folder=folder,
    )

    def copy_first_parent(recipe: Any, out: Path) -> None:
        shutil.copytree(recipe["models"][0]["model"], out, dirs_exist_ok=True)

    return evolve(
        config,
        out=folder / "run",
        merger=FunctionMerger(copy_first_parent),
        evaluator=FunctionEvaluator(lambda subject: {"size": float(len(subject.name))}),
    )


def test_the_revision_asked_for_is_opened(hub: Hub) -> None:
    """`org/name@revision` is that revision, and the checkpoint says which commit it is."""
    assert open_checkpoint(f"org/a@{NEW}").revision == NEW
    assert hub.asked == [("org/a", NEW)]


def test_a_run_stays_with_the_commits_it_began_with(hub: Hub, tmp_path: Path) -> None:
    """The ledger pins each model's commit; a resumed run asks for it though `main` moved on."""
    first = run(tmp_path, generations=1)
    members = [member for member in first.state.members.values() if not member.parents]
    assert {member.revision for member in members} == {OLD}
    hub.main, hub.asked = NEW, []
    again = run(tmp_path, generations=2)
    assert {revision for _, revision in hub.asked} == {OLD}
    assert again.state.generation == 2


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, OfflineModeIsEnabled])
@pytest.mark.parametrize("offline", [True, False])
def test_no_network_is_one_line(
    error: type[Exception], offline: bool, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is not in the cache and cannot be had is named, with the reason."""
    hub.offline = error
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("org/a")
    why = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the Hub cannot be reached"
    assert str(caught.value) == (
        f"org/a: no such folder here, it is not in the local cache, and {why}"
    )


def test_offline_mode_of_the_library_itself(tmp_path: Path) -> None:
    """The real library, told to be offline, gives the same line."""
    code = (
        "from modelkin.checkpoint import open_checkpoint\n"
        "try: open_checkpoint('org/certainly-not-cached')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == (
        "CheckpointError org/certainly-not-cached: no such folder here, it is not in the local "
        "cache, and offline mode is on (HF_HUB_OFFLINE)\n"
    )


@pytest.mark.parametrize("error", [ValueError("a\nb"), OSError("a"), RuntimeError("a")])
def test_what_the_hub_does_not_give_is_named(
    error: Exception, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the library or its HTTP client raises is one line that names the model."""

    def fails(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("nobody/model")
    assert str(caught.value) == (
        "nobody/model: no such folder here, and the Hub did not give it: a"
    )


def test_only_what_is_needed_is_fetched(hub: Hub) -> None:
    """Weights under another name, in another format or in another folder stay where they are."""
    folder = hub.folder / "a" / OLD
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "pytorch_model.bin", "m.gguf", "README.md"):
        (folder / name).write_bytes(b"")
        (folder / "original" / name).write_bytes(b"")
    for name in ("tokenizer.json", "tokenizer.model", "modeling_own.py"):
        (folder / name).write_bytes(b"{}")
    for allowed in (False, True):
        open_checkpoint("org/a", allow_pickle=allowed)
        assert hub.fetched("a") == {
            *("config.json", "model.safetensors"),
            *("tokenizer.json", "tokenizer.model", "modeling_own.py"),
        }


def _pickled_only(hub: Hub) -> None:
    torch = pytest.importorskip("torch")

    folder = hub.folder / "a" / OLD
    (folder / "model.safetensors").unlink()
    torch.save({"w": torch.ones(3)}, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"")


def test_pickles_are_fetched_where_they_are_allowed_and_needed(hub: Hub) -> None:
    """`*.bin` is fetched with the flag only, of the same commit, and no other pickles with it."""
    _pickled_only(hub)
    with pytest.raises(CheckpointError, match=r"is no model.*--allow-pickle"):
        open_checkpoint("org/a")
    assert hub.fetched("a") == {"config.json"}
    found = open_checkpoint("org/a", allow_pickle=True)
    assert list(found.tensors) == ["w"]
    assert found.revision == OLD
    assert hub.asked[-1] == ("org/a", OLD)
    assert hub.fetched("a") == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_of_the_hub(kind: str, hub: Hub) -> None:
    """A repository with an adapter is opened with its base, and only the adapter is fetched."""
    folder = hub.folder / "adapter" / OLD
    folder.mkdir(parents=True)
    base = open_checkpoint("org/base")
    name = "model.layers.0.self_attn.q_proj"
    rows, columns = base.tensors[f"{name}.weight"].shape
    pair = {
        f"base_model.model.{name}.lora_A.weight": np.ones((2, columns), "f4"),
        f"base_model.model.{name}.lora_B.weight": np.ones((rows, 2), "f4"),
    }
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "training_args.bin").write_bytes(b"")
    if kind == "safetensors":
        write_safetensors(folder / "adapter_model.safetensors", pair)
        (folder / "adapter_model.bin").write_bytes(b"")
    else:
        torch = pytest.importorskip("torch")
        torch.save(
            {key: torch.from_numpy(values) for key, values in pair.items()},
            folder / "adapter_model.bin",
        )
        with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors"):
            open_checkpoint("org/adapter", base=base)
    found = open_checkpoint("org/adapter", base=base, allow_pickle=kind == "bin")
    np.testing.assert_allclose(
        found.tensors[f"{name}.weight"].read(0, 5),
        base.tensors[f"{name}.weight"].read(0, 5) + 2.0,
    )
    assert (found.name, found.revision) == ("adapter", OLD)
    assert hub.fetched("adapter") == {"adapter_config.json", f"adapter_model.{kind}"}
