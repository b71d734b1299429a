"""Native merges: half a unit from the definition, near mergekit, whole or not there at all."""

from __future__ import annotations

import errno
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import (
    EMBEDDING,
    Array,
    Dtype,
    llama_config,
    llama_like,
    perturbed,
    write_checkpoint,
)
from test_blend import dense, stats_of
from test_blend_mergekit import CASES, DEPTH, LAYERS, MODELS, OPTIONS, PAPER, on, recipe, weights

from modelkin.blend import Blend, coefficients, compile_recipe
from modelkin.checkpoint import DTYPES, as_float64, open_checkpoint
from modelkin.errors import ConfigError, DiskFullError, MergeError
from modelkin.gram.codegen import Processor, host
from modelkin.gram.combine import OUTPUTS, combine
from modelkin.measuring import measure, streaming
from modelkin.merging import Mergekit, Native, choose_engine, fill
from modelkin.merging.writing import DTYPE_NAMES

# Format -> bits of the mantissa, the least normal exponent, the greatest.
SHAPE: Mapping[str, tuple[int, int, int]] = {
    "BF16": (7, -126, 127),
    "F16": (10, -14, 15),
    "F32": (23, -126, 127),
    "F64": (52, -1022, 1023),
}


def unit(values: Array, format: str) -> Array:
    """The distance of neighbours in the format at each value: its unit in the last place."""
    mantissa, least, _ = SHAPE[format]
    _, exponent = np.frexp(values)
    found: Array = np.ldexp(1.0, np.maximum(exponent - 1, least) - mantissa)
    return found


def rounded(values: Array, format: str) -> Array:
    """The nearest number of the format, of two as near the even one: by exact division."""
    if format == "F64":
        return values
    with np.errstate(invalid="ignore"):
        finite = np.where(np.isfinite(values), values, 0)
        steps = np.rint(finite / unit(finite, format))
        found = np.where(np.isfinite(values), np.copysign(steps, finite), values)
        found = np.where(np.isfinite(values), found * unit(finite, format), values)
    beyond = np.abs(found) >= 2.0 ** (SHAPE[format][2] + 1)
    return np.where(beyond, np.copysign(np.inf, found), found)


def combined(
    parts: list[Array], factors: list[float], format: str, processor: Processor | None = None
) -> Array:
    """The weighted sum of float64 numbers, as it is stored."""
    out = np.empty(parts[0].size, DTYPES[format])
    combine(parts, ["F64"] * len(parts), factors, out, format, processor=processor)
    return as_float64(out, format)


# Rounding


def difficult(format: str) -> Array:
    """Numbers on and around the borders at which a format rounds up, and its extremes."""
    mantissa, least, greatest = SHAPE[format]
    rng = np.random.default_rng(5)
    numbers = rng.integers(1 << mantissa, 2 << mantissa, 4000).astype(float)
    exponents = rng.integers(least - mantissa - 3, greatest - mantissa + 2, 4000)
    borders = np.ldexp(np.concatenate([numbers, numbers + 0.5]), np.tile(exponents, 2))
    # As many steps as denormal numbers have, and halves of them.
    borders = np.concatenate([borders, np.ldexp(np.arange(200) / 2, least - mantissa)])
    top = 2.0 ** (greatest + 1)
    borders = np.append(borders, [top, top - unit(np.array([top / 2]), format)[0] / 2, top * 1.5])
    around = [borders * (1 + shift) for shift in (0, 2**-52, -(2**-52), 2**-40, -(2**-40), 2**-26)]
    wide = rng.standard_normal(4000) * np.exp2(rng.uniform(-300, 300, 4000))
    special = np.array([0, np.inf, np.nan, 5e-324, 1e308, 2.0**-150, 2.0**-149, 3.4028236e38])
    found = np.concatenate([*around, wide, special])
    return np.concatenate([found, -found])


def processors() -> list[Any]:
    """This processor with and without float16, and older ones where they are like it."""
    ours = host()
    x86 = platform.machine() in ("x86_64", "AMD64")
    old = Processor("x86-64-v2", "", lanes=4, registers=16, halves=False)
    return [
        pytest.param(ours, id="host"),
        pytest.param(replace(ours, halves=False), id="no-halves"),
        pytest.param(replace(ours, lanes=4), id="4-lanes"),
        pytest.param(old, id="v2", marks=pytest.mark.skipif(not x86, reason="of x86")),
    ]


@pytest.mark.parametrize("processor", processors())
@pytest.mark.parametrize("format", ["BF16", "F16", "F32"])
def test_rounding_is_to_nearest_even_and_happens_once(format: str, processor: Processor) -> None:
    """Ties, denormals, overflow, infinities and NaN, with the sign of zero."""
    values = difficult(format)
    found, expected = combined([values], [1.0], format, processor), rounded(values, format)
    np.testing.assert_array_equal(found, expected)
    sure = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found[sure]), np.signbit(expected[sure]))


@pytest.mark.parametrize("format", ["BF16", "F16"])
def test_two_roundings_would_not_do(format: str) -> None:
    """The numbers that are rounded above are such that a stop at float32 would show."""
    values = difficult(format)
    with np.errstate(over="ignore"):
        twice = rounded(values.astype(np.float32).astype(np.float64), format)
    differ = (twice != rounded(values, format)) & ~np.isnan(values)
    assert differ.sum() > 100


def test_every_nan_of_float32_stays_one() -> None:
    """Also one whose bits are all in the half that is cut off."""
    bits = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF], np.uint32)
    for format in OUTPUTS:
        out = np.empty(4, DTYPES[format])
        combine([bits.view(np.float32)], ["F32"], [1.0], out, format)
        assert np.isnan(as_float64(out, format)).all()


@pytest.mark.parametrize("format", OUTPUTS)
@pytest.mark.parametrize("count", [1, 7, 1023, 1024, 1025, 5000])
def test_sums_of_all_formats(count: int, format: str) -> None:
    """Any number of weights, of all formats that weights are stored in."""
    rng = np.random.default_rng(count)
    formats = list(DTYPES)
    parts = [rng.integers(0, 90, count).astype("u1").view("u1")] * len(formats)
    values = []
    for position, one in enumerate(formats):
        width = np.dtype(DTYPES[one]).itemsize
        if width == 1:
            parts[position] = rng.integers(0, 120, count).astype("u1")
        elif one == "BF16":
            parts[position] = rng.integers(0x3000, 0x4100, count).astype("<u2")
        else:
            parts[position] = rng.standard_normal(count).astype(DTYPES[one])
        values.append(as_float64(parts[position], one))
    c_M = rng.standard_normal(len(formats))
    out = np.empty(count, DTYPES[format])
    combine(parts, formats, c_M, out, format)
    terms_MB = c_M[:, None] * np.array(values)
    slack_B = 1e-14 * np.abs(terms_MB).sum(axis=0)
    error_B = np.abs(as_float64(out, format) - terms_MB.sum(axis=0))
    assert (error_B <= unit(terms_MB.sum(axis=0), format) / 2 + slack_B).all()


def test_what_has_no_part_is_not_looked_at() -> None:
    """An input with the factor 0 may be anything; without any input the sum is 0."""
    ones, none = np.ones(2000), np.full(2000, np.nan)
    assert (combined([none, ones], [0, 2], "F32") == 2).all()
    assert (combined([none, ones], [0, 0], "BF16") == 0).all()


# Against the definition

KINDS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True},
    "sharded": {"shards": 3},
    "mixed": {"tied": True, "shards": 2, "mixed": True},
}


def near_family(*, tied: bool) -> dict[str, dict[str, Array]]:
    """A base, three fine-tunes of it, and one at wide angles to all of them."""
    rng = np.random.default_rng(7)
    base = llama_like(rng, layers=LAYERS, hidden=16, intermediate=32, vocab=64, tied=tied)
    models = {name: perturbed(base, rng, scale=0.002) for name in "abc"}
    far = {name: values + rng.standard_normal(values.shape) for name, values in base.items()}
    models["b"]["model.layers.1.mlp.up_proj.weight"] = base["model.layers.1.mlp.up_proj.weight"]
    for zero in (base, models["c"]):
        zero["model.layers.2.self_attn.o_proj.weight"] = np.zeros((16, 16))
    return {"base": base, **models, "far": far}


def write_family(
    folder: Path, dtype: Dtype, *, tied: bool = False, shards: int = 1, mixed: bool = False
) -> Path:
    """The family on disk; `mixed`, norms and embeddings of some models in other formats."""
    for number, (name, tensors) in enumerate(near_family(tied=tied).items()):
        dtypes: dict[str, Dtype] = dict.fromkeys(tensors, dtype)
        if mixed:
            others: list[Dtype] = ["F32", "BF16", "F16"]
            dtypes |= {one: others[number % 3] for one in tensors if "norm" in one}
            dtypes[EMBEDDING] = "F64" if name == "a" else dtype
        config = {**llama_config(tensors), "dtype": DTYPE_NAMES[dtype]}
        write_checkpoint(folder / name, tensors, dtype=dtypes, shards=shards, config=config)
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(kind, dtype) -> a folder in which each model has a folder by its name."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, dtype: Any) -> Path:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            made[kind, dtype] = write_family(folder, dtype, **KINDS[kind])
        return made[kind, dtype]

    return get


def filled(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with the models of a folder; `a2` is another way to `a`."""
    paths = {name: str(folder / name) for name in ("base", *MODELS)}
    filled: dict[str, Any] = fill(config, {**paths, "a2": f"{folder}/./a"})
    return filled


def by_definition(config: dict[str, Any], folder: Path) -> dict[str, Array]:
    """The child in float64: factors from float64 sums of what is stored."""
    base, *others = (weights(folder / name) for name in ("base", *MODELS))
    models = dict(zip(MODELS, others, strict=True))
    stats = stats_of(base, models)
    plan = compile_recipe(config, tensors=stats.tensors, layers=LAYERS)
    assert isinstance(plan, Blend)
    meant: dict[str, str | None] = {str(folder / name): name for name in MODELS}
    meant |= {str(folder / "base"): None, f"{folder}/./a": "a"}
    return dense(base, models, coefficients(plan, stats, meant))


def terms(folder: Path) -> dict[str, Array]:
    """How large what is added up can be: rounding of the sum is relative to it."""
    everyone = [weights(folder / name) for name in ("base", *MODELS)]
    return {
        name: np.asarray(sum(np.abs(one[name]) for one in everyone), np.float64)
        for name in everyone[0]
    }


def assert_half_a_unit(child: Path, expected: Mapping[str, Array], sizes: dict[str, Array]) -> None:
    """Each weight is the nearest number of its format, as far as float64 knows."""
    tensors = open_checkpoint(child).tensors
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        found = as_float64(tensor.read(0, tensor.count), tensor.format)
        wanted = expected[name].ravel()
        slack = 1e-12 * sizes[name].ravel()
        assert (np.abs(found - wanted) <= unit(wanted, tensor.format) / 2 + slack).all(), name


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_child_is_half_a_unit_from_its_definition(
    kind: str, dtype: str, families: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Every method, with its parameters in all ways: rounded once, to nearest even."""
    folder = families(kind, dtype)
    sizes = terms(folder)
    for case, config in CASES.items():
        config = filled({**config, "dtype": DTYPE_NAMES[dtype]}, folder)
        Native(threads=1).merge(config, tmp_path / case)
        assert_half_a_unit(tmp_path / case, by_definition(config, folder), sizes)


def formula(method: Callable[[Array, Array, str], Array], one: Path, two: Path) -> dict[str, Array]:
    """A method of two models, by a formula for a tensor of each and its name."""
    a, b = weights(one), weights(two)
    return {name: method(a[name].ravel(), b[name].ravel(), name) for name in a}


def slerp_of(t: float, a_B: Array, b_B: Array) -> Array:
    """Spherical interpolation of two flattened tensors; straight where the angle is tiny."""
    cosine = a_B @ b_B / np.sqrt((a_B @ a_B) * (b_B @ b_B)) if a_B.any() and b_B.any() else 0.0
    if abs(float(cosine)) > 0.9995:
        return (1 - t) * a_B + t * b_B
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a_B + np.sin(t * angle) * b_B) / np.sin(angle)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_formulas(dtype: str, families: Callable[[str, str], Path], tmp_path: Path) -> None:
    """Linear, with a gradient, and slerp are what their formulas say, without our factors."""
    folder = families("sharded", dtype)
    sizes = terms(folder)

    def straight(a_B: Array, b_B: Array, name: str) -> Array:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        weight = 0.2 + 0.6 * layer / (LAYERS - 1)
        return (weight * a_B + 0.5 * b_B) / (weight + 0.5)

    def on_the_arc(a_B: Array, b_B: Array, name: str) -> Array:
        return slerp_of(0.25 if "mlp" in name else 0.7, a_B, b_B)

    t = [{"filter": "mlp", "value": 0.25}, {"value": 0.7}]
    pairs = {
        "linear": (recipe("linear", on("a", [0.2, 0.8]), on("far", 0.5)), straight),
        "slerp": (recipe("slerp", "a", "far", base="a", parameters={"t": t}), on_the_arc),
    }
    for method, (config, by_formula) in pairs.items():
        Native().merge(filled({**config, "dtype": DTYPE_NAMES[dtype]}, folder), tmp_path / method)
        expected = formula(by_formula, folder / "a", folder / "far")
        assert_half_a_unit(tmp_path / method, expected, sizes)


def test_large_tensors_in_float32(tmp_path: Path) -> None:
    """Angles of large tensors, which kinship measures in single precision, are taken in double."""
    rng = np.random.default_rng(2)
    base = llama_like(rng, layers=1, hidden=320, intermediate=640)
    write_checkpoint(tmp_path / "a", base)
    write_checkpoint(tmp_path / "b", perturbed(base, rng, scale=0.03))
    assert min(base[name].size for name in base if "mlp" in name) > streaming.SMALL
    config = filled(recipe("slerp", "a", "b", base="a", parameters={"t": 0.4}), tmp_path)
    Native().merge(config, tmp_path / "child")
    expected = formula(lambda a_B, b_B, _: slerp_of(0.4, a_B, b_B), tmp_path / "a", tmp_path / "b")
    a, b = (weights(tmp_path / name) for name in "ab")
    sizes = {name: np.abs(a[name]) + np.abs(b[name]) for name in a}
    assert_half_a_unit(tmp_path / "child", expected, sizes)


def test_each_tensor_keeps_the_donors_format(
    families: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Without a dtype the child is stored as its donor: file by file, format by format."""
    folder = families("mixed", "BF16")
    config = filled(recipe("linear", on("a", 1), on("b", 1)), folder)
    Native().merge(config, tmp_path / "child")
    child, donor = (open_checkpoint(one) for one in (tmp_path / "child", folder / "a"))
    assert {tensor.format for tensor in donor.tensors.values()} == {"BF16", "F64"}
    for name, tensor in donor.tensors.items():
        found = child.tensors[name]
        assert (found.format, found.shape) == (tensor.format, tensor.shape)
        assert found.file.name == tensor.file.name
    assert [one for one in child.files if one.name.endswith("index.json")]
    assert_half_a_unit(tmp_path / "child", by_definition(config, folder), terms(folder))


# Against mergekit

NEAR: Mapping[str, dict[str, Any]] = {
    "linear": recipe("linear", on("a", 0.3), on("b", 0.9), on("c", [0.2, 1])),
    "task_arithmetic": recipe("task_arithmetic", on("a", 0.6), on("b", 0.8), base="base"),
    "slerp": recipe("slerp", "a", "b", base="a", parameters={"t": PAPER}),
    "nuslerp": recipe("nuslerp", on("a", 1), on("b", DEPTH), parameters={"weight": 1}),
    "nuslerp-base": recipe("nuslerp", on("a", 0.2), on("b", 0.6), base="base"),
    "multislerp": recipe("multislerp", on("a", 0.2), on("b", 0.5), on("c", 0.4)),
    "multislerp-base": recipe("multislerp", on("a", 0.2), on("b", 0.5), base="base"),
    "karcher": recipe("karcher", "a", "b", "c"),
    "model_stock": recipe("model_stock", "a", "b", "c", base="base"),
}


def apart(ours: Path, theirs: Path, format: str) -> Array:
    """How many units of the format two children differ by, for all weights."""
    one, two = weights(ours), weights(theirs)
    assert set(one) == set(two)
    return np.concatenate(
        [(np.abs(one[name] - two[name]) / unit(one[name], format)).ravel() for name in one]
    )


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("kind", ["sharded", "mixed"])
def test_the_child_is_mergekits_within_a_unit(
    kind: str, dtype: str, families: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """At least 99.9 % are, and what mergekit does otherwise is its rounding on the way.

    mergekit rounds its inputs to `dtype` and computes most methods in it. Told to compute in
    float64, and in float32 for a child of half that width, it makes the same child. (Where terms
    cancel, the last digits of float64 are all that is left.)
    """
    folder = families(kind, dtype)
    name = DTYPE_NAMES[dtype]
    size = np.concatenate([one.ravel() for one in terms(folder).values()])
    for case, config in NEAR.items():
        config = filled({**config, "dtype": name, "out_dtype": name}, folder)
        ours = tmp_path / case
        Native().merge(config, ours)
        shares: dict[str, float] = {}
        for computed in dict.fromkeys(("float64", "float32", name)):
            theirs = tmp_path / f"{case}-{computed}"
            Mergekit(OPTIONS).merge({**config, "dtype": computed}, theirs)
            units = apart(ours, theirs, dtype)
            shares[computed] = float(np.mean(units <= 1))
            if computed == "float64":
                own = np.concatenate([values.ravel() for values in weights(ours).values()])
                slack = 1e-12 * size / unit(own, dtype)
                assert (units <= 1 + slack).all(), case
        assert shares["float64"] >= 0.999, case
        if dtype != "F32":
            assert shares["float32"] >= 0.999, case
            # These compute in float32 whatever `dtype` says.
            if case in ("linear", "slerp"):
                assert shares[name] >= 0.999, case


# The folder


def one_family(tmp_path: Path, dtype: Dtype = "BF16", **how: Any) -> Path:
    return write_family(tmp_path / "models", dtype, **how)


HALF = recipe("linear", on("a", 1), on("b", 1))
ARC = recipe("slerp", "a", "far", base="a", parameters={"t": PAPER})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_loads_the_child(dtype: str, tied: bool, tmp_path: Path) -> None:
    """In its dtype, with the head tied where the donor's is, and with the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = one_family(tmp_path, "BF16", tied=tied, shards=2)
    Native().merge(filled({**ARC, "dtype": dtype}, folder), tmp_path / "child")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    assert model.dtype == getattr(torch, dtype)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    found = {name: one.detach().double().numpy() for name, one in model.named_parameters()}
    for name, values in weights(tmp_path / "child").items():
        assert np.array_equal(found[name].ravel(), values.ravel())


def test_what_comes_along(tmp_path: Path) -> None:
    """Config, generation config, tokenizer, template and code of the donor; card and recipe."""
    from mergekit.config import MergeConfiguration

    folder = one_family(tmp_path)
    texts = {
        **{"generation_config.json": "{}", "tokenizer.json": "{1}", "tokenizer_config.json": "{2}"},
        **{"special_tokens_map.json": "{3}", "chat_template.jinja": "{{ 4 }}", "vocab.txt": "5"},
        **{"modeling_mine.py": "6", "merges.txt": "7", "preprocessor_config.json": "8"},
    }
    for name, text in texts.items():
        (folder / "a" / name).write_text(text)
    # As in the Hub's cache.
    (folder / "tokenizer.model").write_text("9")
    (folder / "a" / "tokenizer.model").symlink_to(folder / "tokenizer.model")
    left = {"training_args.bin": "0", "model.onnx": "0", "README.md": "old", "optimizer.pt": "0"}
    for name, text in left.items():
        (folder / "a" / name).write_text(text)
    (folder / "b" / "added_tokens.json").write_text("b's")
    config = filled({**ARC, "dtype": "float16"}, folder)
    Native().merge(config, tmp_path / "child", seed=3)

    child = {path.name: path for path in (tmp_path / "child").iterdir()}
    ours = {"config.json", "modelkin.json", "README.md", "mergekit_config.yml", "tokenizer.model"}
    assert set(child) == {*ours, *texts, "model.safetensors"}
    assert all(child[name].read_text() == text for name, text in texts.items())
    assert not child["tokenizer.model"].is_symlink()
    donors = json.loads((folder / "a" / "config.json").read_text())
    assert json.loads(child["config.json"].read_text()) == {**donors, "dtype": "float16"}
    assert json.loads(child["modelkin.json"].read_text()) == {"recipe": config, "seed": 3}
    assert yaml.safe_load(child["mergekit_config.yml"].read_text()) == config
    parsed = MergeConfiguration.model_validate(
        yaml.safe_load(child["mergekit_config.yml"].read_text())
    )
    assert parsed.merge_method == "slerp"
    _, front, text = child["README.md"].read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": [],  # paths are none
        "library_name": "transformers",
        "tags": ["merge", "modelkin"],
    }
    assert text.startswith("# child\n")
    assert child["mergekit_config.yml"].read_text() in text


def test_older_and_inner_dtypes_in_configs(tmp_path: Path) -> None:
    """The older name of the key is kept, and parts that name a dtype name the new one."""
    tensors = llama_like(np.random.default_rng(0))
    inner = {"text_config": {"torch_dtype": "float32", "n": 1}, "other": {"n": 2}}
    config = {**llama_config(tensors), "torch_dtype": "float32", **inner}
    for name in "ab":
        write_checkpoint(tmp_path / name, tensors, config=config)
    Native().merge(filled({**HALF, "dtype": "bfloat16"}, tmp_path), tmp_path / "child")
    found = json.loads((tmp_path / "child" / "config.json").read_text())
    assert found["torch_dtype"] == found["text_config"]["torch_dtype"] == "bfloat16"
    assert "dtype" not in found
    assert found["other"] == {"n": 2}


# Statistics


@pytest.mark.parametrize("config", [HALF, ARC, CASES["model_stock"], CASES["multislerp"]])
def test_the_child_is_measured_while_it_is_made(config: dict[str, Any], tmp_path: Path) -> None:
    """What comes with the merge is what would be measured in the folder, digit by digit."""
    folder = one_family(tmp_path, "BF16", shards=2)
    config = filled({**config, "dtype": "bfloat16"}, folder)
    found = Native().merge_measured(config, tmp_path / "child", name="mine")
    first = config.get("base_model") or config["models"][0]["model"]
    base = open_checkpoint(first)
    models = [open_checkpoint(name, name=name) for name in found.models[:-1]]
    assert found.models[-1] == "mine"
    assert {first, *found.models[:-1]} == {one["model"] for one in config["models"]} | {first}
    expected = measure(base, [*models, open_checkpoint(tmp_path / "child", name="mine")])
    assert found.models == expected.models
    size_TN = np.sqrt(np.diagonal(expected.gram_TNN, axis1=1, axis2=2)) + 1e-300
    size_TNN = size_TN[:, :, None] * size_TN[:, None, :]
    for name in ("gram_TNN", "distance_TNN"):
        error_TNN = np.abs(getattr(found, name) - getattr(expected, name))
        assert (error_TNN <= 1e-12 * size_TNN).all()
    for name in ("sum_TN", "cross_TN", "base_T", "count_T"):
        assert np.allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=0)


def test_a_base_that_is_no_parent(tmp_path: Path) -> None:
    """Statistics can be taken against any model of the same tensors."""
    folder = one_family(tmp_path)
    config = filled({**HALF, "dtype": "bfloat16"}, folder)
    base = open_checkpoint(folder / "base")
    found = Native().merge_measured(config, tmp_path / "child", base=base)
    everyone = [open_checkpoint(folder / name) for name in "ab"]
    expected = measure(base, [*everyone, open_checkpoint(tmp_path / "child")])
    assert found.models == (*(str(folder / name) for name in "ab"), "child")
    assert np.array_equal(found.gram_TNN, expected.gram_TNN)
    Native().merge(config, tmp_path / "other" / "child")
    assert weights_as_bytes(tmp_path / "child") == weights_as_bytes(tmp_path / "other" / "child")


def weights_as_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a model."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_makes_the_same_bytes(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of many slices, written in any order, also where the system takes a part only."""
    folder = one_family(tmp_path, "F16", shards=2, mixed=True)
    config = filled({**ARC, "dtype": "bfloat16"}, folder)
    Native(threads=1).merge(config, tmp_path / "one" / "child")
    write = os.pwrite
    used = set()

    def slowly(descriptor: int, content: Any, at: int) -> int:
        used.add(threading.get_ident())
        time.sleep(0.0005)
        return write(descriptor, content[:700], at)

    monkeypatch.setattr(os, "pwrite", slowly)
    monkeypatch.setattr(streaming, "SLICE_BYTES", 6000)
    found = Native(threads=threads).merge_measured(config, tmp_path / "two" / "child")
    assert (len(used) > 1) == (threads > 1)
    monkeypatch.undo()
    one, two = (weights_as_bytes(tmp_path / name / "child") for name in ("one", "two"))
    assert one == two
    assert found.models[-1] == "child"


# What goes wrong


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said so, once, and no part of the child stays."""
    folder = one_family(tmp_path)
    write = os.pwrite

    def full(descriptor: int, content: Any, at: int) -> int:
        if at > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFullError, match="the disk filled up"):
        Native().merge(filled({**HALF, "dtype": "float32"}, folder), tmp_path / "new" / "child")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_no_number_is_refused(value: float, tmp_path: Path) -> None:
    """What is no finite number in a parent, or would be none in the child, is named."""
    folder = one_family(tmp_path, "F32")
    tensors = near_family(tied=False)["b"]
    tensors["model.norm.weight"][3] = value
    write_checkpoint(folder / "c2", tensors)
    models = [{"model": str(folder / name), "parameters": {"weight": 1}} for name in ("a", "c2")]
    config = {"merge_method": "linear", "models": models, "dtype": "float16"}
    where = "child" if np.isfinite(value) else "c2"
    named = rf"^linear: .*/{where}/model.safetensors: tensor 'model.norm.weight': .* at element 3$"
    with pytest.raises(MergeError, match=named):
        Native().merge(config, tmp_path / "new" / "child")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_existing_folder_is_told_before_the_work(tmp_path: Path) -> None:
    """Even by a recipe of models that do not exist."""
    (tmp_path / "child").mkdir()
    with pytest.raises(ConfigError, match="does not exist yet"):
        Native().merge(filled(HALF, tmp_path), tmp_path / "child")


KILLED = """
import json, os, signal, sys, tempfile
from pathlib import Path
from modelkin.merging import Native
# The first thing that happens after the child has its name.
tempfile.TemporaryDirectory.__exit__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Native().merge(json.loads(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_between_naming_and_tidying_up(tmp_path: Path) -> None:
    """The child is whole; the empty folder beside it goes with the next merge into that place."""
    folder = one_family(tmp_path)
    config = filled({**HALF, "dtype": "bfloat16"}, folder)
    children = tmp_path / "children"
    for name in ("one", "one.v2"):
        words = [sys.executable, "-c", KILLED, json.dumps(config), str(children / name)]
        assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    empty = {path for path in children.iterdir() if path.name.startswith(".")}
    # The second has taken away what the first left.
    assert [path.name.rsplit(".", 2)[0] for path in empty] == [".one.v2"]
    assert not any(list(path.iterdir()) for path in empty)
    # Of one that is at work, full or not, nothing is taken.
    working = [children / f".{name}.abcdefgh.partial" for name in ("three", "one")]
    for path in working:
        path.mkdir()
    (working[1] / "one").mkdir()
    Native().merge(config, children / "two")
    kept = {path.name for path in working}
    assert {path.name for path in children.iterdir()} == {"one", "one.v2", "two", *kept}
    expected = weights_as_bytes(children / "two")
    for name in ("one", "one.v2"):
        found = weights_as_bytes(children / name)
        assert {**found, "README.md": b""} == {**expected, "README.md": b""}


ENDLESS = """
import itertools, json, sys
from pathlib import Path
from modelkin.merging import Native
config, children = json.loads(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
for number in itertools.count():
    if not (children / str(number)).exists() or number == int(sys.argv[3]):
        Native().merge(config, children / str(number) / "child")
"""


def test_a_killed_merge_never_looks_whole(tmp_path: Path) -> None:
    """Killed 50 times at any moment: a folder of the child's name has all its bytes."""
    folder = one_family(tmp_path, "BF16", shards=3)
    config = filled({**HALF, "dtype": "bfloat16"}, folder)
    Native().merge(config, tmp_path / "undisturbed" / "child")
    expected = weights_as_bytes(tmp_path / "undisturbed" / "child")
    children = tmp_path / "children"
    draw = random.Random(1)
    again, cleaned = -1, 0
    remains: set[Path] = set()
    for _ in range(50):
        words = ["-c", ENDLESS, json.dumps(config), str(children), str(again)]
        with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            # A merge takes some hundredths of a second.
            time.sleep(draw.uniform(0, 0.15))
            process.kill()
        if again >= 0 and (children / str(again) / "child").exists():
            # The next merge of the same child took away what was left of the one before.
            assert remains.isdisjoint((children / str(again)).iterdir())
            cleaned += 1
        again, remains = -1, set()
        for place in children.glob("*"):
            left = [path for path in place.iterdir() if path.name != "child"]
            assert len(left) <= 1
            assert all(path.name.endswith(".partial") for path in left)
            if (place / "child").exists():
                assert weights_as_bytes(place / "child") == expected
                # Killed after the renaming: an empty folder.
                assert not any(path.is_file() for one in left for path in one.rglob("*"))
            elif left:
                again, remains = int(place.name), set(left)
    assert cleaned > 5


# The engines

ODD: Mapping[str, tuple[dict[str, Any], str]] = {
    "method": ({**HALF, "merge_method": "ties"}, "merge_method ties is none of"),
    "slices": ({**HALF, "slices": [{"sources": []}]}, "slices: takes layers apart"),
    "adapter": (recipe("linear", on("a", 1), {"model": "x+{b}"}), r"is a model with an adapter"),
    "shapes": (recipe("linear", on("a", 1), on("wide", 1)), r"expected \[64, 16\] .* \[72, 16\]"),
    "tensors": (recipe("linear", on("a", 1), on("tied", 1)), r"lm_head.weight.* found none"),
    "kind": (recipe("linear", on("a", 1), on("other", 1)), r"expected the architecture Llama"),
    "pickled": (recipe("linear", on("a", 1), on("pickled", 1)), r"holds pickled weights"),
    "quantised": (recipe("linear", on("a", 1), on("quantised", 1)), r"is quantised"),
    "float8": (recipe("linear", on("small", 1)), r"are not written as F8_E4M3"),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with models that do not fit into it."""
    folder = write_family(tmp_path_factory.mktemp("odd"), "BF16")
    rng = np.random.default_rng(1)
    same: dict[str, Any] = {"layers": LAYERS, "hidden": 16, "intermediate": 32}
    plain = llama_like(rng, vocab=64, **same)
    write_checkpoint(folder / "wide", llama_like(rng, vocab=72, **same))
    write_checkpoint(folder / "tied", llama_like(rng, vocab=64, tied=True, **same))
    write_checkpoint(folder / "other", plain, config={"architectures": ["GPT2LMHeadModel"]})
    write_checkpoint(folder / "small", plain, dtype="F8_E4M3")
    marked = {**llama_config(plain), "quantization_config": {"quant_method": "fp8"}}
    write_checkpoint(folder / "quantised", plain, config=marked)
    write_checkpoint(folder / "pickled", plain)
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("case", ODD)
def test_what_is_not_native(case: str, odd: Path, tmp_path: Path) -> None:
    """It is mergekit's, and said why; asked for all the same, it is an error with the reason."""
    config, reason = ODD[case]
    config = fill(config, {path.name: str(path) for path in odd.iterdir()})
    choice = choose_engine(config, "auto")
    assert choice.engine == "mergekit"
    assert re.search(reason, choice.reason)
    with pytest.raises(MergeError, match=reason) as caught:
        Native().merge(config, tmp_path / "child")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_float8_can_be_merged(odd: Path, tmp_path: Path) -> None:
    """Into a child of a width that children have."""
    config = filled(recipe("linear", {"model": "a", "weight": 1}, dtype="bfloat16"), odd)
    config["models"].append({"model": str(odd / "small"), "parameters": {"weight": 1}})
    Native().merge(config, tmp_path / "child")
    a, small, child = (weights(one) for one in (odd / "a", odd / "small", tmp_path / "child"))
    for name, values in child.items():
        assert np.array_equal(values, rounded((a[name] + small[name]) / 2, "BF16"))


def test_the_choice(odd: Path) -> None:
    """What was asked for is done; what nobody can do is an error at once."""
    config = filled(HALF, odd)
    assert choose_engine(config, "auto").engine == "native"
    assert choose_engine(config, "native") == ("native", "as asked")
    assert choose_engine(config, "mergekit") == ("mergekit", "as asked")
    with pytest.raises(MergeError, match=r"parameters\.weight of .*: expected a value"):
        choose_engine(filled(recipe("linear", "a"), odd), "auto")


def test_a_gradient_ends_in_the_last_layer(odd: Path, tmp_path: Path) -> None:
    """The last layer is that of the second number."""
    gradient = recipe("linear", on("a", [0, 1]), on("b", [1, 0]), dtype="float32")
    Native().merge(filled(gradient, odd), tmp_path / "child")
    child, a = weights(tmp_path / "child"), weights(odd / "a")
    last = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"
    assert np.array_equal(child[last], a[last])
