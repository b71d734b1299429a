"""The demo's zoo: its skills, its splits, and folders that other tools can load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from modelkin.demo.skills import (
    DEV_ITEMS,
    SKILLS,
    TEST_ITEMS,
    TRAIN_ITEMS,
    Item,
    Skill,
    Split,
    split,
)
from modelkin.demo.zoo import ZOO_RECIPE, Stage, Zoo, build_zoo
from modelkin.errors import ConfigError

BY_NAME = {skill.name: skill for skill in SKILLS}


def _short(stage: Stage) -> Stage:
    return replace(stage, steps=2, batch=4)


SHORT = replace(
    ZOO_RECIPE,
    base=_short(ZOO_RECIPE.base),
    experts={name: _short(stage) for name, stage in ZOO_RECIPE.experts.items()},
)


@pytest.mark.parametrize(
    ("name", "question", "item"),
    [
        ("rev", "abcd", Item("Rabcd=", "dcba.")),
        ("inter", "ab,cd", Item("Iab,cd=", "acbd.")),
        ("dedup", "aabbca", Item("Daabbca=", "abca.")),
        ("shift", "abp", Item("Nabp=", "bca.")),
    ],
)
def test_a_skill_asks_and_answers(name: str, question: str, item: Item) -> None:
    """Each skill turns a hand-written question into the prompt and answer expected of it."""
    assert BY_NAME[name].item(question) == item


@pytest.fixture(scope="module")
def splits() -> dict[Skill, Split]:
    return {skill: split(skill, seed=0) for skill in SKILLS}


@pytest.mark.parametrize("skill", SKILLS, ids=lambda skill: skill.name)
def test_the_parts_of_a_split_share_no_prompt(skill: Skill, splits: dict[Skill, Split]) -> None:
    """Training, selection and report items are all different, and as many as promised."""
    parts = splits[skill]
    assert [len(part) for part in (parts.test, parts.dev, parts.train)] == [
        TEST_ITEMS,
        DEV_ITEMS,
        TRAIN_ITEMS,
    ]
    prompts = [item.prompt for item in (*parts.test, *parts.dev, *parts.train)]
    assert len(set(prompts)) == len(prompts)


def test_a_seed_fixes_the_items(splits: dict[Skill, Split]) -> None:
    """The same seed deals the same items, another seed others."""
    skill = BY_NAME["rev"]
    assert split(skill, seed=0) == splits[skill]
    assert split(skill, seed=1).test != splits[skill].test


def test_importing_the_zoo_is_light() -> None:
    """Neither torch nor transformers is imported before a zoo is built."""
    probe = "import sys, modelkin.demo.zoo; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return tmp_path_factory.mktemp("demo") / "zoo"


@pytest.fixture(scope="module")
def zoo(folder: Path) -> Zoo:
    return build_zoo(folder, recipe=SHORT)


def _written(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_models_load_like_any_other(zoo: Zoo) -> None:
    """Base and experts are ordinary causal models in bfloat16 that differ from each other."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(path) for path in (zoo.base, *zoo.experts.values())
    ]
    assert {model.dtype for model in models} == {torch.bfloat16}
    embeddings = [model.get_input_embeddings().weight for model in models]
    assert not any(torch.equal(embeddings[0], other) for other in embeddings[1:])


def test_a_prompt_and_its_answer_survive_the_tokenizer(
    zoo: Zoo, splits: dict[Skill, Split]
) -> None:
    """Encoding puts one `<bos>` in front, and a prompt's tokens begin those of the whole item."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.experts["inter"])
    for skill in SKILLS:
        item = splits[skill].test[0]
        tokens = tokenizer.encode(item.prompt + item.answer)
        assert tokenizer.convert_ids_to_tokens(tokens) == ["<bos>", *item.prompt, *item.answer]
        prompt = tokenizer.encode(item.prompt)
        assert tokens[: len(prompt)] == prompt


def test_tasks_point_at_the_held_out_items(zoo: Zoo, splits: dict[Skill, Split]) -> None:
    """Every named task is a YAML whose data file, next to it, holds that part of the split."""
    for tasks, names, part in (
        (zoo.dev_tasks, zoo.dev_task_names, "dev"),
        (zoo.test_tasks, zoo.test_task_names, "test"),
    ):
        assert names == tuple(f"{skill.name}_{part}" for skill in SKILLS)
        for skill, name in zip(SKILLS, names, strict=True):
            task = yaml.safe_load((tasks / f"{name}.yaml").read_text())
            assert task["task"] == name
            lines = (tasks / task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
            held_out = getattr(splits[skill], part)
            assert [Item(**json.loads(line)) for line in lines] == list(held_out)


def test_a_whole_zoo_is_not_made_again(zoo: Zoo, folder: Path) -> None:
    """Building a zoo that is whole writes nothing and gives the same answer."""
    before = _written(folder)
    assert build_zoo(folder, recipe=SHORT) == zoo
    assert _written(folder) == before


def test_a_killed_build_is_resumed(zoo: Zoo, folder: Path) -> None:
    """Only what is missing is made again, byte for byte, over what a killed build left behind."""
    before = _written(folder)
    shutil.rmtree(zoo.experts["shift"])
    partial = folder / "models" / ".shift.abcd1234.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"cut sho")

    build_zoo(folder, recipe=SHORT)
    after = _written(folder)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    remade = {name for name in before if after[name] != before[name]}
    assert remade == {name for name in before if name.startswith("models/shift/")}


def test_torch_randomness_is_left_alone(tmp_path: Path) -> None:
    """A program's own random numbers are the same whether or not it builds a zoo in between."""
    torch = pytest.importorskip("torch")
    state = torch.random.get_rng_state()
    build_zoo(tmp_path, recipe=replace(SHORT, experts={}))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.usefixtures("zoo")
def test_another_recipe_or_seed_is_refused(folder: Path) -> None:
    """A folder made from one recipe and seed is not passed off as made from another."""
    longer = replace(SHORT, base=replace(SHORT.base, steps=3))
    with pytest.raises(ConfigError, match=str(folder)):
        build_zoo(folder, recipe=longer)
    with pytest.raises(ConfigError, match="another seed"):
        build_zoo(folder, seed=1, recipe=SHORT)
