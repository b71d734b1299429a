"""Native merges of models from the Hub. The download is the stand-in of `test_hub`."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from test_blend_mergekit import weights
from test_hub import NEW, OLD, Hub
from test_native_merge import rounded

from modelkin.checkpoint import fingerprint, open_checkpoint
from modelkin.merging import Native, choose_engine
from modelkin.merging.writing import COPIED

# Every kind of file that a child takes from its donor.
BESIDE = (
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "qwen.tiktoken", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "modeling_own.py"),
    *("preprocessor_config.json", "additional_chat_templates/tools.jinja"),
)
# Folders whose names are nearly that of the only one that is wanted.
ELSEWHERE = (
    *("original/params.json", "a/x.json", "additional/x.json", "additional_chat_templatesx/x.py"),
    *("xadditional_chat_templates/x.json", "tokenizer/x.json", "vocab.x/x.json", "d/e/f.json"),
    *("Additional_chat_templates/x.json", "additional-chat-templates/x.json", "add/x/y.json"),
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub's stand-in, whose models have everything that a model can have."""
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    for name in (*BESIDE, *ELSEWHERE):
        file = found.folder / "a" / NEW / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return found


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_what_is_copied_was_downloaded(hub: Hub, tmp_path: Path) -> None:
    """A child of models of the Hub has all that a child of the same folders has."""
    for pattern in COPIED:
        assert any(fnmatch(name.partition("/")[0], pattern) for name in BESIDE), pattern
    source = hub.folder / "a" / NEW
    for name, model in {"hub": f"org/a@{NEW}", "folder": str(source)}.items():
        config = {
            "merge_method": "linear",
            "models": [{"model": model, "parameters": {"weight": 1}}],
            "dtype": "bfloat16",
        }
        Native().merge(config, tmp_path / name / "child")
    assert set(BESIDE) <= files(tmp_path / "hub" / "child")
    assert files(tmp_path / "hub" / "child") == files(tmp_path / "folder" / "child")
    fetched = hub.folder / "cache" / "a" / NEW
    assert files(fetched) == {*BESIDE, "config.json", "model.safetensors"}
    assert fingerprint(open_checkpoint(fetched)) == fingerprint(open_checkpoint(source))


def test_models_of_the_hub_are_merged(hub: Hub, tmp_path: Path) -> None:
    """By the revisions asked for, and the card names them as the Hub's cards do."""
    config = {
        "merge_method": "linear",
        "models": [
            {"model": f"org/a@{NEW}", "parameters": {"weight": 0.25}},
            {"model": "org/b", "parameters": {"weight": 0.75}},
        ],
        "dtype": "bfloat16",
    }
    assert choose_engine(config, "auto").engine == "native"
    hub.asked = []
    stats = Native().merge_measured(config, tmp_path / "child")
    assert set(hub.asked) == {("org/a", NEW), ("org/b", None)}
    assert stats.models == ("org/b", "child")

    a, b = (weights(hub.folder / name) for name in (f"a/{NEW}", f"b/{OLD}"))
    for name, found in weights(tmp_path / "child").items():
        assert np.array_equal(found, rounded(0.25 * a[name] + 0.75 * b[name], "BF16"))
    _, front, text = (tmp_path / "child" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == ["org/a", "org/b"]
    assert f"org/a@{NEW}" in text
    assert yaml.safe_load((tmp_path / "child" / "mergekit_config.yml").read_text()) == config
    assert not any(path.is_symlink() for path in (tmp_path / "child").rglob("*"))
