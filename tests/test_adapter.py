"""LoRA adapters as models: they are what PEFT makes of them, in whatever slices they are read."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    EMBEDDING,
    HEAD,
    Array,
    llama_config,
    llama_like,
    stored,
    write_checkpoint,
    write_safetensors,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelkin.checkpoint import Checkpoint, as_float64, fingerprint, open_checkpoint
from modelkin.checkpoint import lora as lora_module
from modelkin.errors import CheckpointError

PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"
RANK = 2


def read(model: Checkpoint) -> dict[str, Array]:
    """All tensors, in float64."""
    return {
        name: as_float64(tensor.read(0, tensor.count), tensor.format).reshape(tensor.shape)
        for name, tensor in model.tensors.items()
    }


def write_adapter(
    folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> Path:
    """An adapter's two files, written by hand; the names lack PEFT's prefix."""
    folder.mkdir()
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    named = {PREFIX + name: np.asarray(values) for name, values in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", named, "F32")
    return folder


def factors(rng: np.random.Generator, module: str, shape: tuple[int, int]) -> dict[str, Array]:
    """A pair of factors for a weight of that shape."""
    rows, columns = shape
    return {
        f"{module}.lora_A.weight": rng.standard_normal((RANK, columns)),
        f"{module}.lora_B.weight": rng.standard_normal((rows, RANK)),
    }


@pytest.fixture
def weights() -> dict[str, Array]:
    """The weights of the hand-written base."""
    return llama_like(np.random.default_rng(0), layers=1)


@pytest.fixture
def base(tmp_path: Path, weights: dict[str, Array]) -> Checkpoint:
    """A base written by hand, in float32."""
    return open_checkpoint(write_checkpoint(tmp_path / "base", weights))


def refusal(folder: Path, base: Checkpoint | None, *parts: object) -> str:
    """The one line with which an adapter is refused; holds all of `parts`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, base=base)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


# Against PEFT itself


LLAMA: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
}
OPTIONS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name -> (changes of the model's config, LoraConfig)
    "plain": ({}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all linear": ({}, {"target_modules": "all-linear", "r": 5, "lora_alpha": 7}),
    "rank stabilised": ({}, {"target_modules": ["q_proj"], "use_rslora": True, "r": 3}),
    "patterns": (
        {},
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"^model.layers.1.self_attn.q_proj": 2, "k_proj": 3, "down_proj": 6},
            "alpha_pattern": {r"layers\.0\.\w+\.q_proj": 11, "proj": 5},
            "use_rslora": True,
        },
    ),
    "modules to save": (
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "embedding and head": ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "biases": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "all"}),
    "own biases": ({"attention_bias": True}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "tied, modules to save": (
        {"tie_word_embeddings": True},
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "gaussian": ({}, {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ({}, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "minor components": ({}, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "gpt-2": ({"model_type": "gpt2"}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt-2, head and embedding": (
        {"model_type": "gpt2", "tie_word_embeddings": False},
        {"target_modules": ["c_attn", "c_proj", "wte", "lm_head"], "fan_in_fan_out": True},
    ),
}


@cache
def _model(changes: tuple[tuple[str, Any], ...]) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    torch.manual_seed(0)
    changed = dict(changes)
    if changed.pop("model_type", "llama") == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8, **changed
        )
    else:
        config = transformers.LlamaConfig(**{**LLAMA, **changed})
    return transformers.AutoModelForCausalLM.from_config(config)


def trained(model: Any, **settings_: Any) -> Any:
    """The model with an adapter of PEFT whose weights are random."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")

    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, **settings_}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, values in adapted.named_parameters():
            if values.requires_grad or ".lora_" in name:
                values.add_(0.1 * torch.randn_like(values))
    return adapted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", OPTIONS)
def test_an_adapter_is_what_peft_merges(option: str, tmp_path: Path) -> None:
    """As a model, an adapter equals PEFT's merge in float32, within rounding, under each option."""
    changes, settings_ = OPTIONS[option]
    model = copy.deepcopy(_model(tuple(changes.items())))
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model, **settings_)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")

    base = open_checkpoint(tmp_path / "base")
    found = open_checkpoint(tmp_path / "adapter", base=base)
    expected = read(open_checkpoint(tmp_path / "merged"))
    assert list(found.tensors) == list(expected)
    changed = 0
    for name, values in read(found).items():
        np.testing.assert_allclose(values, expected[name], rtol=2e-6, atol=3e-7, err_msg=name)
        changed += found.tensors[name] is not base.tensors[name]
    assert changed == sum(
        not np.array_equal(values, expected[name]) for name, values in read(base).items()
    )
    assert found.architecture == base.architecture


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings_", "stays_tied"),
    [
        ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
    ],
)
def test_an_adapter_of_a_tied_model_answers_as_peft_does(
    settings_: dict[str, Any], stays_tied: bool, tmp_path: Path
) -> None:
    """With our weights the model gives the adapter's own logits.

    Not PEFT's merge: it adds the change of a tied weight twice.
    """
    torch = pytest.importorskip("torch")

    model = copy.deepcopy(_model((("tie_word_embeddings", True),)))
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model, **{"target_modules": ["q_proj"], **settings_}).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(20)[None]
    found = open_checkpoint(tmp_path / "adapter", base=open_checkpoint(tmp_path / "base"))
    assert (HEAD not in found.tensors) == stays_tied == found.config["tie_word_embeddings"]
    values = {name: torch.from_numpy(array).float() for name, array in read(found).items()}
    values.setdefault(HEAD, values[EMBEDDING])
    ours = copy.deepcopy(_model((("tie_word_embeddings", False),))).eval()
    ours.load_state_dict(values)
    with torch.no_grad():
        np.testing.assert_allclose(
            ours(tokens).logits.numpy(), adapted(tokens).logits.numpy(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.filterwarnings("ignore")
def test_a_dora_of_peft_is_refused(tmp_path: Path) -> None:
    """What PEFT writes for DoRA is refused by the setting's name."""
    peft = pytest.importorskip("peft")

    model = copy.deepcopy(_model(()))
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    ).save_pretrained(tmp_path / "adapter")
    base = open_checkpoint(tmp_path / "base")
    refusal(tmp_path / "adapter", base, "use_dora", "not supported")


# By its formula


def test_an_adapter_is_its_formula(
    tmp_path: Path, base: Checkpoint, weights: dict[str, Array]
) -> None:
    """theta = base + alpha / r * B @ A; the tensors that are not adapted are the base's own."""
    pair = factors(np.random.default_rng(1), QUERY, (8, 8))
    folder = write_adapter(tmp_path / "adapter", pair)
    model = open_checkpoint(folder, base=base)
    a, b = (stored(values, "F32") for values in pair.values())
    expected = stored(weights[f"{QUERY}.weight"], "F32") + 3 / RANK * (b @ a)
    np.testing.assert_allclose(read(model)[f"{QUERY}.weight"], expected, rtol=1e-6)
    for name, tensor in model.tensors.items():
        assert (tensor is base.tensors[name]) == (name != f"{QUERY}.weight")
    adapted = model.tensors[f"{QUERY}.weight"]
    assert (adapted.format, adapted.dtype, adapted.shape) == ("F64", "F32+LoRA", (8, 8))
    assert (adapted.count, adapted.bytes) == (64, 4 * (64 + 16 + 16))
    assert (model.name, model.base, model.parameters) == ("adapter", base, base.parameters)


@cache
def _long() -> Checkpoint:
    """An adapter with a weight of 37 x 23."""
    rng = np.random.default_rng(2)
    folder = Path(tempfile.mkdtemp())
    try:
        tensors = {"w": rng.standard_normal((37, 23))}
        base = open_checkpoint(write_checkpoint(folder / "base", {"w.weight": tensors["w"]}))
        model = open_checkpoint(write_adapter(folder / "a", factors(rng, "w", (37, 23))), base=base)
        model.tensors["w.weight"].read(0, 1)  # mapped: the folder can go
        return model
    finally:
        shutil.rmtree(folder)


@given(st.integers(0, 37 * 23), st.integers(0, 37 * 23), st.sampled_from([1, 23, 60, 1 << 18]))
@settings(max_examples=60, deadline=None)
@example(0, 37 * 23, 1)
@example(22, 24, 1)
@example(5, 5, 1)
def test_any_slice_is_a_part_of_the_whole(one: int, other: int, tile: int) -> None:
    """Slices may start and stop within a row, and tiles may be of any size."""
    tensor = _long().tensors["w.weight"]
    whole = tensor.read(0, tensor.count)
    start, stop = sorted((one, other))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_module, "TILE", tile)
        found = tensor.read(start, stop)
    np.testing.assert_allclose(found, whole[start:stop], rtol=0, atol=1e-6)
    assert found.dtype == np.float64
    assert found.flags.c_contiguous


def test_memory_can_be_released(tmp_path: Path, base: Checkpoint) -> None:
    """After a release the same numbers are read again, and what was read is still valid."""
    folder = write_adapter(tmp_path / "adapter", factors(np.random.default_rng(3), QUERY, (8, 8)))
    model = open_checkpoint(folder, base=base)
    tensor, untouched = model.tensors[f"{QUERY}.weight"], model.tensors[EMBEDDING]
    before, view = tensor.read(3, 40), untouched.read(0, 5)
    copied = view.copy()
    model.release()
    np.testing.assert_array_equal(view, copied)
    np.testing.assert_array_equal(tensor.read(3, 40), before)


def test_an_embedding_may_bring_its_own_base(
    tmp_path: Path, base: Checkpoint, weights: dict[str, Array]
) -> None:
    """An adapter that holds a module's own weight beside its factors replaces it first."""
    rng = np.random.default_rng(4)
    vocab, hidden = weights[EMBEDDING].shape
    module = EMBEDDING.removesuffix(".weight")
    tensors = {
        f"{module}.base_layer.weight": rng.standard_normal((vocab, hidden)),
        f"{module}.lora_embedding_A": rng.standard_normal((RANK, vocab)),
        f"{module}.lora_embedding_B": rng.standard_normal((hidden, RANK)),
    }
    model = open_checkpoint(write_adapter(tmp_path / "adapter", tensors), base=base)
    own, a, b = (stored(values, "F32") for values in tensors.values())
    np.testing.assert_allclose(read(model)[EMBEDDING], own + 1.5 * (b @ a).T, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_an_adapter(tmp_path: Path, base: Checkpoint) -> None:
    """The base may be an adapter with its own base: the changes add up."""
    rng = np.random.default_rng(5)
    pairs = [factors(rng, QUERY, (8, 8)) for _ in range(2)]
    first = open_checkpoint(write_adapter(tmp_path / "first", pairs[0]), base=base)
    second = open_checkpoint(write_adapter(tmp_path / "second", pairs[1]), base=first)
    name = f"{QUERY}.weight"
    deltas = [1.5 * (b @ a) for a, b in (pair.values() for pair in pairs)]
    expected = read(base)[name] + deltas[0] + deltas[1]
    np.testing.assert_allclose(read(second)[name], expected, rtol=1e-5, atol=1e-6)
    assert set(base.files) < set(first.files) < set(second.files)


@pytest.mark.parametrize("setting", [False, True])
def test_square_weights_of_linear_layers_are_not_turned(
    setting: bool, tmp_path: Path, base: Checkpoint
) -> None:
    """A wrong `fan_in_fan_out` is seen from the weights that are not square, as PEFT sees it."""
    rng = np.random.default_rng(6)
    pair = factors(rng, QUERY, (8, 8))
    other = factors(rng, "model.layers.0.mlp.up_proj", (16, 8))
    folder = write_adapter(tmp_path / "a", {**pair, **other}, {"fan_in_fan_out": setting})
    a, b = pair.values()
    found = read(open_checkpoint(folder, base=base))[f"{QUERY}.weight"]
    np.testing.assert_allclose(found, read(base)[f"{QUERY}.weight"] + 1.5 * b @ a, atol=1e-5)


def test_a_square_weight_is_turned_as_the_setting_says(tmp_path: Path, base: Checkpoint) -> None:
    """Where shapes show nothing, `fan_in_fan_out` decides."""
    pair = factors(np.random.default_rng(7), QUERY, (8, 8))
    folder = write_adapter(tmp_path / "a", pair, {"fan_in_fan_out": True})
    a, b = pair.values()
    found = read(open_checkpoint(folder, base=base))[f"{QUERY}.weight"]
    np.testing.assert_allclose(found, read(base)[f"{QUERY}.weight"] + 1.5 * (b @ a).T, atol=1e-5)


# Heads that are tied to the embedding


@pytest.fixture
def tied(tmp_path: Path) -> Checkpoint:
    """A base without a head of its own."""
    tensors = llama_like(np.random.default_rng(8), layers=1, tied=True)
    return open_checkpoint(
        write_checkpoint(tmp_path / "tied", tensors, config=llama_config(tensors))
    )


@pytest.mark.parametrize("changed", [{EMBEDDING}, {HEAD}, {EMBEDDING, HEAD}])
def test_a_change_of_one_unties_the_head(
    changed: set[str], tmp_path: Path, tied: Checkpoint
) -> None:
    """Where embedding and head differ, both are listed, and the config says so."""
    rng = np.random.default_rng(9)
    shape = tied.tensors[EMBEDDING].shape
    tensors = {name: rng.standard_normal(shape) for name in changed}
    model = open_checkpoint(write_adapter(tmp_path / "a", tensors), base=tied)
    found, before = read(model), read(tied)[EMBEDDING]
    for name in (EMBEDDING, HEAD):
        expected = stored(tensors[name], "F32") if name in changed else before
        np.testing.assert_array_equal(found[name], expected)
    assert model.config["tie_word_embeddings"] is False
    assert tied.config["tie_word_embeddings"] is True


def test_the_same_change_of_both_leaves_them_tied(tmp_path: Path, tied: Checkpoint) -> None:
    """An embedding and a head that were saved alike are one tensor."""
    values = np.random.default_rng(10).standard_normal(tied.tensors[EMBEDDING].shape)
    folder = write_adapter(tmp_path / "a", {EMBEDDING: values, HEAD: values})
    model = open_checkpoint(folder, base=tied)
    assert list(model.tensors) == list(tied.tensors)
    assert model.config["tie_word_embeddings"] is True


def test_a_model_without_a_head_gets_none(tmp_path: Path) -> None:
    """An encoder's embedding can be replaced without there being a head to untie."""
    name = "embeddings.word_embeddings.weight"
    folder = write_checkpoint(
        tmp_path / "encoder", {name: np.ones((4, 3))}, config={"architectures": ["BertModel"]}
    )
    adapter = write_adapter(tmp_path / "a", {name: np.zeros((4, 3))})
    found = read(open_checkpoint(adapter, base=open_checkpoint(folder)))
    assert {key: values.sum() for key, values in found.items()} == {name: 0}


def test_a_default_tie_is_known_by_the_architecture(tmp_path: Path) -> None:
    """GPT-2 ties its head without saying so, and its files lack the first part of the names."""
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    folder = write_checkpoint(tmp_path / "m", {"wte.weight": np.ones((4, 3))}, config=config)
    adapter = write_adapter(tmp_path / "a", {"transformer.wte.weight": np.zeros((4, 3))})
    found = read(open_checkpoint(adapter, base=open_checkpoint(folder)))
    assert {key: values.sum() for key, values in found.items()} == {"wte.weight": 0, HEAD: 12}


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_lora_on_one_of_a_tied_pair_is_refused(
    module: str, tmp_path: Path, tied: Checkpoint
) -> None:
    """Merged it would change both, as an adapter one of them: there is no one model."""
    rows, columns = tied.tensors[EMBEDDING].shape
    folder = write_adapter(
        tmp_path / "a", factors(np.random.default_rng(11), module, (rows, columns))
    )
    refusal(folder, tied, module, "tied")


# What is refused


def test_an_adapter_needs_its_base(tmp_path: Path) -> None:
    """Without a base, an adapter is no model, and the message says what it is."""
    folder = write_adapter(tmp_path / "a", {})
    refusal(folder, None, folder, "is a LoRA adapter: expected a full model here")


def test_a_full_model_beside_an_adapter_is_taken(tmp_path: Path, weights: dict[str, Array]) -> None:
    """A folder that holds a full model is one, whatever an adapter left there."""
    folder = write_checkpoint(tmp_path / "m", weights)
    (folder / "adapter_config.json").write_text("{}")
    assert open_checkpoint(folder).base is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("lora_bias", True),
        ("use_qalora", True),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [1]),
        ("target_parameters", ["experts.down_proj"]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 64}),
        ("enable_lora", [True, False]),
        ("something_new", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "something"),
        ("init_lora_weights", [1]),
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", 8.0),
        ("r", "8"),
        ("r", None),
        ("r", 10**30),
        ("lora_alpha", -1),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", True),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", 10**400),
        ("use_rslora", 1),
        ("use_rslora", "yes"),
        ("fan_in_fan_out", 0),
        ("ensure_weight_tying", []),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": True}),
        ("rank_pattern", {"(": 8}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("alpha_pattern", 3),
    ],
)
def test_a_setting_that_is_not_understood_is_named(
    key: str, value: Any, tmp_path: Path, base: Checkpoint
) -> None:
    """No setting that decides the weights is passed over, and no number taken unchecked."""
    pair = factors(np.random.default_rng(12), QUERY, (8, 8))
    folder = write_adapter(tmp_path / "a", pair, {key: value})
    # A rank is right or wrong by the shapes alone.
    named = f"rank {value}" if value == 10**30 else key
    refusal(folder, base, tmp_path / "a", named, "found")


def test_settings_without_effect_are_passed_over(tmp_path: Path, base: Checkpoint) -> None:
    """How an adapter was trained, and settings that are off, decide nothing."""
    pair = factors(np.random.default_rng(13), QUERY, (8, 8))
    config = {
        "base_model_name_or_path": "org/base",
        "lora_dropout": 0.1,
        "target_modules": ["q_proj"],
        "megatron_core": "megatron.core",
        "use_dora": False,
        "something_new": None,
        "corda_config": {"corda_method": "ipm"},
        "init_lora_weights": "eva",
    }
    open_checkpoint(write_adapter(tmp_path / "a", pair, config), base=base)


_RNG = np.random.default_rng(14)
_PAIR = factors(_RNG, QUERY, (8, 8))
_A, _B = _PAIR


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({}, ["found none"]),
        ({_A: _PAIR[_A]}, [_A, "found no B"]),
        ({_B: _PAIR[_B]}, [_B, "found no A"]),
        (factors(_RNG, "model.layers.7.self_attn.q_proj", (8, 8)), ["layers.7", "has no"]),
        (factors(_RNG, QUERY, (9, 8)), [QUERY, "[8, 8]", "[9, 2]"]),
        (factors(_RNG, QUERY, (8, 7)), [QUERY, "[8, 8]", "[2, 7]"]),
        (factors(_RNG, "model.norm", (8, 8)), ["model.norm", "[8]"]),
        ({**_PAIR, _A: np.zeros((3, 8))}, [_A, "rank 2", "[3, 8]"]),
        ({**_PAIR, _B: np.zeros((8, 2, 1))}, [_B, "rank 2", "[8, 2, 1]"]),
        ({**_PAIR, _B: np.zeros(8)}, [_B, "rank 2", "[8]"]),
        ({**_PAIR, f"{QUERY}.lora_B.bias": np.zeros(8)}, ["lora_B.bias", "another kind"]),
        ({**_PAIR, f"{QUERY}.lora_magnitude_vector": np.zeros(8)}, ["lora_magnitude_vector"]),
        ({**_PAIR, f"{QUERY}.lora_embedding_A": np.zeros((2, 8))}, ["lora_embedding_A"]),
        ({**_PAIR, f"{QUERY}.bias": np.zeros(8)}, [f"{QUERY}.bias", "has no"]),
        ({**_PAIR, "score.weight": np.zeros((2, 8))}, ["score.weight", "has no"]),
        ({HEAD: np.zeros((17, 8))}, [HEAD, "[16, 8]", "[17, 8]"]),
        (
            {HEAD: np.zeros((16, 8)), "lm_head.base_layer.weight": np.zeros((16, 8))},
            [HEAD, "base_layer", "too"],
        ),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(
    tensors: dict[str, Array], parts: list[str], tmp_path: Path, base: Checkpoint
) -> None:
    """A tensor that matches none of the base, lacks its other half or its shape is named."""
    refusal(write_adapter(tmp_path / "a", tensors), base, "adapter_model.safetensors", *parts)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"r": 8, "r": 9, "peft_type": "LORA"}'])
def test_a_broken_config_is_named(content: str, tmp_path: Path, base: Checkpoint) -> None:
    """A config that is no JSON object, or says a thing twice, is refused with its name."""
    folder = write_adapter(tmp_path / "a", _PAIR)
    (folder / "adapter_config.json").write_text(content)
    refusal(folder, base, folder / "adapter_config.json")


def test_an_adapter_without_weights_is_named(tmp_path: Path, base: Checkpoint) -> None:
    """Weights that are missing or pickled are said to be so."""
    folder = write_adapter(tmp_path / "a", _PAIR)
    (folder / "adapter_model.safetensors").unlink()
    refusal(folder, base, folder, "adapter_model.safetensors", "found adapter_config.json")
    (folder / "adapter_model.bin").write_bytes(b"")
    refusal(folder, base, "--allow-pickle")


def test_a_truncated_adapter_is_named(tmp_path: Path, base: Checkpoint) -> None:
    """The adapter's file is checked as a model's is."""
    folder = write_adapter(tmp_path / "a", _PAIR)
    file = folder / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    refusal(folder, base, file, "truncated")


_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=4), st.integers() | st.none(), max_size=2)
)
_KEYS = st.sampled_from(
    [
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
        *("fan_in_fan_out", "init_lora_weights", "use_dora", "ensure_weight_tying"),
    ]
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=4))
@settings(max_examples=80, deadline=None)
@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_no_config_raises_anything_else(config: dict[str, Any]) -> None:
    """Whatever the settings: a model, or one line."""
    with tempfile.TemporaryDirectory() as name:
        base = open_checkpoint(write_checkpoint(Path(name) / "b", {"w.weight": np.eye(3)}))
        pair = factors(np.random.default_rng(0), "w", (3, 3))
        folder = write_adapter(Path(name) / "a", pair, config)
        try:
            found = open_checkpoint(folder, base=base).tensors["w.weight"]
        except CheckpointError as error:
            assert not re.search(r"\n", str(error))  # noqa: PT017
            return
        assert found.read(0, 9).shape == (9,)


# Files and fingerprints


def test_the_fingerprint_depends_on_adapter_and_base(
    tmp_path: Path, weights: dict[str, Array]
) -> None:
    """A change of the adapter, its settings or its base changes it, and a copy does not."""
    for name in ("one", "same", "other"):
        tensors = weights if name != "other" else {**weights, HEAD: weights[HEAD] + 1}
        write_checkpoint(tmp_path / f"base-{name}", tensors)
    bases = {name: open_checkpoint(tmp_path / f"base-{name}") for name in ("one", "same", "other")}
    a = write_adapter(tmp_path / "a", _PAIR)
    b = write_adapter(tmp_path / "b", _PAIR)
    c = write_adapter(tmp_path / "c", _PAIR, {"lora_alpha": 4})
    d = write_adapter(tmp_path / "d", {**_PAIR, _A: _PAIR[_A] + 1})

    def mark(folder: Path, base: str) -> str:
        return fingerprint(open_checkpoint(folder, base=bases[base]))

    assert mark(a, "one") == mark(b, "same")
    assert len({mark(a, "one"), mark(a, "other"), mark(c, "one"), mark(d, "one")}) == 4
    assert mark(a, "one") != fingerprint(bases["one"])


def test_the_files_are_the_adapters_and_the_bases(tmp_path: Path, base: Checkpoint) -> None:
    """Every file that decides the weights is listed."""
    folder = write_adapter(tmp_path / "a", _PAIR)
    model = open_checkpoint(folder, base=base)
    assert set(model.files) == {
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
        base.folder / "config.json",
        base.folder / "model.safetensors",
    }
