"""Groups of tensors: what their names say, and kinship within each of them."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelkin.errors import ConfigError
from modelkin.gram import GramStats
from modelkin.records import METRICS
from modelkin.similarity import Kinship, kinship_from
from modelkin.tensor_names import KINDS, LEVELS, Level, group, kind, select

Array = np.ndarray

LLAMA = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1, 10, 2)  # sorted as text, as safetensors files are
        for part in (
            "input_layernorm",
            "mlp.down_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "post_attention_layernorm",
            "self_attn.k_proj",
            "self_attn.o_proj",
            "self_attn.q_proj",
            "self_attn.v_proj",
        )
    ),
    "model.norm.weight",
)


def _stats(tensors: dict[str, tuple[Array, list[Array]]]) -> GramStats:
    """The statistics of base and deltas by their definition."""
    bases = [base.ravel() for base, _ in tensors.values()]
    deltas = [np.array([delta.ravel() for delta in found]) for _, found in tensors.values()]
    return GramStats(
        models=tuple(f"m{n}" for n in range(len(deltas[0]))),
        tensors=tuple(tensors),
        count_T=np.array([base.size for base in bases]),
        base_T=np.array([base @ base for base in bases]),
        base_sum_T=np.array([base.sum() for base in bases]),
        sum_TN=np.array([delta_NB.sum(axis=1) for delta_NB in deltas]),
        cross_TN=np.array([d @ b for d, b in zip(deltas, bases, strict=True)]),
        gram_TNN=np.array([delta_NB @ delta_NB.T for delta_NB in deltas]),
        distance_TNN=np.array([((d[:, None] - d[None]) ** 2).sum(axis=2) for d in deltas]),
    )


def _family(
    names: tuple[str, ...] = LLAMA, models: int = 3, seed: int = 0
) -> tuple[Kinship, dict[str, Array]]:
    """A kinship, and the deltas that it is of: for each tensor N x B."""
    rng = np.random.default_rng(seed)
    deltas = {name: rng.standard_normal((models, 5 + n)) + 0.3 for n, name in enumerate(names)}
    stats = _stats({name: (np.ones(d.shape[1]), list(d)) for name, d in deltas.items()})
    total = int(stats.count_T.sum())
    return kinship_from(stats, base="base", total_parameters=total), deltas


def _assert_is_kinship_of(found: Kinship, delta_NB: Array) -> None:
    norm_N = np.linalg.norm(delta_NB, axis=1)
    np.testing.assert_allclose(found.pcc_NN, np.corrcoef(delta_NB), atol=1e-12)
    np.testing.assert_allclose(found.cs_NN, delta_NB @ delta_NB.T / np.outer(norm_N, norm_N))
    for i, j in combinations(range(len(delta_NB)), 2):
        assert found.ed_NN[i, j] == pytest.approx(np.linalg.norm(delta_NB[i] - delta_NB[j]))
    assert found.compared_parameters == delta_NB.shape[1]


# What names say


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Llama, Mistral, Qwen, Gemma
        ("model.embed_tokens.weight", "embeddings"),
        ("model.layers.0.self_attn.q_proj.weight", "q_proj"),
        ("model.layers.0.self_attn.k_proj.bias", "k_proj"),
        ("model.layers.0.self_attn.v_proj.weight", "v_proj"),
        ("model.layers.0.self_attn.o_proj.weight", "o_proj"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.layers.0.pre_feedforward_layernorm.weight", "norm"),
        ("model.layers.0.post_attention_layernorm.weight", "norm"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "head"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "other"),
        # the original Llama format
        ("tok_embeddings.weight", "embeddings"),
        ("layers.0.attention.wo.weight", "o_proj"),
        ("layers.0.attention_norm.weight", "norm"),
        ("layers.0.feed_forward.w1.weight", "mlp"),
        ("output.weight", "head"),
        # Mixtral, Qwen-MoE, DeepSeek, gpt-oss
        ("model.layers.0.block_sparse_moe.gate.weight", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", "mlp"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "mlp"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", "mlp"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "qkv_proj"),
        ("model.layers.0.self_attn.q_a_proj.weight", "q_proj"),
        ("model.layers.0.self_attn.q_a_layernorm.weight", "norm"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", "mlp"),
        ("model.layers.0.self_attn.sinks", "other"),
        # Phi
        ("model.layers.0.self_attn.qkv_proj.weight", "qkv_proj"),
        ("model.layers.0.self_attn.dense.weight", "o_proj"),
        ("model.layers.0.mlp.fc1.bias", "mlp"),
        # GPT-2
        ("transformer.wte.weight", "embeddings"),
        ("wpe.weight", "embeddings"),
        ("h.0.ln_1.weight", "norm"),
        ("h.0.attn.bias", "other"),
        ("transformer.h.0.attn.c_attn.weight", "qkv_proj"),
        ("transformer.h.0.attn.c_proj.bias", "o_proj"),
        ("transformer.h.0.mlp.c_proj.bias", "mlp"),
        ("transformer.ln_f.bias", "norm"),
        # GPT-NeoX, Falcon, BLOOM, MPT
        ("gpt_neox.embed_in.weight", "embeddings"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "qkv_proj"),
        ("gpt_neox.layers.0.attention.dense.weight", "o_proj"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "mlp"),
        ("embed_out.weight", "head"),
        ("transformer.word_embeddings_layernorm.weight", "norm"),
        ("transformer.blocks.0.attn.Wqkv.weight", "qkv_proj"),
        ("transformer.blocks.0.ffn.down_proj.weight", "mlp"),
        # OPT
        ("model.decoder.embed_positions.weight", "embeddings"),
        ("model.decoder.layers.0.fc2.weight", "mlp"),
        ("model.decoder.layers.0.self_attn.out_proj.weight", "o_proj"),
        ("model.decoder.layers.0.self_attn_layer_norm.bias", "norm"),
        # BERT
        ("bert.embeddings.LayerNorm.weight", "norm"),
        ("bert.encoder.layer.0.attention.self.query.weight", "q_proj"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "o_proj"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "mlp"),
        ("bert.encoder.layer.0.output.dense.weight", "mlp"),
        ("bert.pooler.dense.weight", "other"),
        ("cls.predictions.decoder.weight", "head"),
        ("classifier.weight", "head"),
        # T5
        ("shared.weight", "embeddings"),
        ("encoder.block.0.layer.0.SelfAttention.o.weight", "o_proj"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "other"),
        ("decoder.block.0.layer.2.DenseReluDense.wo.weight", "mlp"),
        ("decoder.final_layer_norm.weight", "norm"),
        # not a transformer
        ("backbone.layers.0.mixer.A_log", "other"),
        ("w", "other"),
    ],
)
def test_the_kind_of_module(name: str, expected: str) -> None:
    """The kind of module follows from the name, in every family of architectures."""
    assert kind(name) == expected
    assert expected in KINDS


def test_layers_are_in_numerical_order() -> None:
    """Layers are in the model's order, though names are sorted as text; the rest is around."""
    assert list(group(LLAMA, "layer")) == ["embeddings", "0", "1", "2", "10", "norm", "head"]


def test_modules_are_in_the_order_of_the_model() -> None:
    """Modules are in the order in which a model uses them."""
    assert list(group(LLAMA, "module")) == [
        "embeddings",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "mlp",
        "norm",
        "head",
    ]


def test_tensors_are_in_the_order_of_the_model() -> None:
    """Tensors are groups of one, embeddings first, then layer by layer."""
    names = list(group(LLAMA, "tensor"))
    assert sorted(names) == sorted(LLAMA)
    assert names[0] == "model.embed_tokens.weight"
    assert names[1] == "model.layers.0.self_attn.q_proj.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    numbers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.0.ln_1.weight", "wte.weight"], ["embeddings", "0"]),
        (["gpt_neox.layers.3.mlp.x", "embed_out.weight"], ["3", "head"]),
        (["encoder.block.1.a", "decoder.block.1.a"], ["encoder.1", "decoder.1"]),
        (
            ["model.language_model.layers.0.a", "model.vision_tower.encoder.layers.0.a"],
            ["language_model.0", "vision_tower.encoder.0"],
        ),
        (["model.layers.0.a", "model.visual.blocks.0.a"], ["0", "visual.0"]),
        (["layers.0.a", "visual.blocks.0.a"], ["0", "visual.0"]),
        (["transformer.h.0.mlp.experts.5.w1", "layer_scale"], ["0", "other"]),
        (["pooler.attention.query.weight", "encoder.layer.0.a"], ["0", "other"]),
    ],
)
def test_layers_of_other_families(names: list[str], expected: list[str]) -> None:
    """A stack of layers is named only where there is more than one."""
    assert list(group(names, "layer")) == expected


parts = st.sampled_from(
    ("model", "layers", "0", "12", "h", "mlp", "attn", "q_proj", "norm", "weight", "", "x")
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(parts, min_size=1, max_size=6).map(".".join), unique=True))
def test_every_tensor_is_in_one_group(names: list[str]) -> None:
    """Whatever the names, a level is a partition: nothing is lost and nothing counted twice."""
    for level in LEVELS:
        positions = [p for found in group(names, level).values() for p in found]
        assert sorted(positions) == list(range(len(names)))


# Patterns


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), 39),
        (("q_proj",), (), 4),
        (("self_attn",), (), 16),
        (("self_attn.q_proj", "mlp"), (), 16),
        (("layers.1",), (), 9),
        (("model.norm.weight",), (), 1),
        (("*norm*",), (), 9),
        (("model.layers.?.mlp.*",), (), 9),
        (("*.[kv]_proj.*",), (), 8),
        ((), ("mlp",), 27),
        (("layers.1",), ("mlp",), 6),
        (("q_proj",), ("layers.10", "layers.0"), 2),
    ],
)
def test_patterns(include: tuple[str, ...], exclude: tuple[str, ...], expected: int) -> None:
    """A pattern without wildcards stands for whole parts, one with them for the whole name."""
    found = select(LLAMA, include, exclude)
    assert len(found) == expected
    assert list(found) == [name for name in LLAMA if name in found]  # the order is kept


def test_one_pattern_may_be_given_bare() -> None:
    """A string is one pattern, not a sequence of letters."""
    assert select(LLAMA, "q_proj") == select(LLAMA, ("q_proj",))


@pytest.mark.parametrize("pattern", ["proj", "Q_PROJ", "q_proj*", "layers.3", "weight.model", ""])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_without_a_match_is_named(pattern: str, option: str) -> None:
    """A pattern that matches nothing is a mistake, and the error says which."""
    with pytest.raises(ConfigError, match=f"^{option}: ") as caught:
        select(LLAMA, **{option: ["mlp", pattern]})
    assert repr(pattern) in str(caught.value)


def test_something_must_be_left() -> None:
    """Patterns that leave nothing are refused."""
    with pytest.raises(ConfigError, match="none of 39"):
        select(LLAMA, ["q_proj"], ["self_attn"])


# Kinship within groups


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("models", [2, 4])
def test_kinship_per_level(level: Level, models: int) -> None:
    """The kinship of a group is that of the concatenated deltas of its tensors."""
    found, deltas = _family(models=models)
    groups = found.per(level)
    assert list(groups) == list(group(LLAMA, level))
    for name, positions in group(LLAMA, level).items():
        _assert_is_kinship_of(
            groups[name], np.concatenate([deltas[LLAMA[p]] for p in positions], axis=1)
        )
        assert (groups[name].base, groups[name].models) == (found.base, found.models)
    assert sum(one.compared_parameters for one in groups.values()) == found.compared_parameters
    assert sum(one.coverage for one in groups.values()) == pytest.approx(1.0)


def test_the_whole_model_is_a_level() -> None:
    """Level "model" is one group: the kinship itself."""
    found, _ = _family()
    (whole,) = found.per("model").values()
    for metric in METRICS:
        np.testing.assert_array_equal(whole.matrix(metric), found.matrix(metric))


def test_levels_can_be_combined() -> None:
    """A group can be grouped again: the modules of one layer."""
    found, deltas = _family()
    inner = found.per("layer")["10"].per("module")
    assert list(inner) == ["q_proj", "k_proj", "v_proj", "o_proj", "mlp", "norm"]
    _assert_is_kinship_of(inner["k_proj"], deltas["model.layers.10.self_attn.k_proj.weight"])


def test_a_frozen_layer_is_undefined_there_only() -> None:
    """A model equal to the base within a group has no similarity there, and has it elsewhere."""
    rng = np.random.default_rng(1)
    names = ("model.layers.0.mlp.weight", "model.layers.1.mlp.weight")
    deltas = {name: rng.standard_normal((3, 8)) for name in names}
    deltas[names[0]][1] = 0.0
    stats = _stats({name: (np.ones(8), list(d)) for name, d in deltas.items()})
    found = kinship_from(stats, base="base", total_parameters=16)
    frozen, tuned = found.per("layer").values()
    assert frozen.undefined == ("m1",)
    assert np.isnan(frozen.pcc_NN[1]).all()
    assert frozen.mean("pcc") is None
    assert frozen.ed_NN[0, 1] == pytest.approx(np.linalg.norm(deltas[names[0]][0]))
    assert tuned.undefined == found.undefined == ()
    said = found.as_dict("layer")
    assert said["groups"][0]["pcc"][1] == [None] * 3
    assert said["groups"][1]["pcc"][1][1] == 1.0
    assert json.loads(json.dumps(said, allow_nan=False)) == said


def test_a_group_without_elements_is_undefined() -> None:
    """A tensor of shape (0, n) is a group of nothing."""
    empty = {"none": (np.zeros(0), [np.zeros(0)] * 2), "w": (np.ones(3), list(np.eye(3)[:2]))}
    found = kinship_from(_stats(empty), base="base", total_parameters=3)
    nothing = found.per("tensor")["none"]
    assert nothing.compared_parameters == 0
    assert np.isnan(nothing.pcc_NN).all()
    assert np.isnan(nothing.cs_NN).all()
    assert (nothing.ed_NN == 0).all()


def test_identical_models_are_one_in_every_group() -> None:
    """Two models of equal weights have kinship exactly 1 and distance 0 wherever one looks."""
    rng = np.random.default_rng(2)
    rows = {name: rng.standard_normal(9) for name in LLAMA}
    stats = _stats({name: (np.ones(9), [d, d]) for name, d in rows.items()})
    found = kinship_from(stats, base="base", total_parameters=9 * len(LLAMA))
    for level in LEVELS:
        for one in found.per(level).values():
            assert one.pcc_NN[0, 1] == one.cs_NN[0, 1] == 1.0
            assert one.ed_NN[0, 1] == 0.0


def test_without_statistics_there_are_no_levels() -> None:
    """A kinship made of bare matrices cannot be regrouped, and says so."""
    one = np.eye(2)
    with pytest.raises(ValueError, match="stats"):
        Kinship("base", ("a", "b"), 1, 1, one, one, one).per("layer")


# Tables of it


def test_rows_hold_every_pair_once() -> None:
    """The long table has a row for each group and unordered pair, with the matrices' values."""
    found, _ = _family(models=4)
    rows = list(found.rows("layer"))
    groups = found.per("layer")
    assert len(rows) == len(groups) * 6
    for row in rows:
        i, j = found.models.index(row.model_1), found.models.index(row.model_2)
        assert i < j
        one = groups[row.group]
        assert row.level == "layer"
        assert row.parameters == one.compared_parameters
        assert (row.pcc, row.cs, row.ed) == (one.pcc_NN[i, j], one.cs_NN[i, j], one.ed_NN[i, j])
    assert {row.group for row in found.rows()} == {"model"}


@pytest.mark.parametrize("level", ["layer", "module", "tensor"])
def test_groups_are_added_to_the_dict(level: Level) -> None:
    """With a level the dict gains the groups, and all else stays."""
    found, _ = _family()
    plain, said = found.as_dict(), found.as_dict(level)
    assert "groups" not in plain
    assert said.pop("level") == level
    groups = said.pop("groups")
    assert said == plain
    assert [one["name"] for one in groups] == list(group(LLAMA, level))
    assert list(groups[0]) == ["name", "compared_parameters", "pcc", "cs", "ed"]
    assert sum(one["compared_parameters"] for one in groups) == found.compared_parameters


@pytest.mark.parametrize("size", [1e-150, 1e-90, 1.0, 1e90, 1e150])
def test_norms_of_any_size_have_a_cosine(size: float) -> None:
    """Cosines of deltas of very different sizes are exact where the squares' product is not."""
    one, other = np.array([3.0, 4.0]) * size, np.array([4.0, 3.0]) / size
    found = kinship_from(
        _stats({"w": (np.ones(2), [one, other, one])}), base="b", total_parameters=2
    )
    assert found.cs_NN[0, 1] == pytest.approx(0.96, abs=1e-15)
    assert found.cs_NN[0, 2] == 1.0
