"""Facts about models from the Hub. The download is a stand-in: the tests need no network."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from checkpoints import llama_like, perturbed, write_checkpoint
from huggingface_hub.errors import LocalEntryNotFoundError

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
        rng = np.random.default_rng(0)
        base = llama_like(rng, layers=1)
        for repository in ("base", "a", "b"):
            for commit in (OLD, NEW):
                write_checkpoint(folder / repository / commit, perturbed(base, rng, scale=0.05))

    def snapshot_download(self, repository: str, *, revision: str | None, **_: Any) -> str:
        self.asked.append((repository, revision))
        organisation, _slash, name = repository.partition("/")
        if organisation != "org":
            raise LocalEntryNotFoundError("no such repository, and no network")
        return str(self.folder / name / (self.main if revision in (None, "main") else revision))


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


def test_what_the_hub_does_not_give_is_named(hub: Hub) -> None:
    """A repository that cannot be had is one clear error that names it."""
    with pytest.raises(CheckpointError, match=r"^nobody/model: no such folder here, and the Hub"):
        open_checkpoint("nobody/model")
    assert hub.asked
