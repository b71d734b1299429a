"""Blends against dense weights: factors by the methods' definitions, statistics by measuring."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from checkpoints import Array, llama_like, perturbed
from hypothesis import given, settings
from hypothesis import strategies as st

from modelkin.blend import (
    Blend,
    Coefficients,
    NotLinear,
    child_statistics,
    coefficients,
    compile_recipe,
    flatten,
)
from modelkin.errors import ConfigError, MergeError
from modelkin.gram import GramStats
from modelkin.similarity import kinship_from

Model = Mapping[str, Array]
TENSORS = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{kind}.weight" for n in range(5) for kind in ("mlp", "self_attn", "norm")),
    "model.norm.weight",
)


def stats_of(base: Model, models: Mapping[str, Model]) -> GramStats:
    """The statistics by their definition."""
    bases = [values.ravel() for values in base.values()]
    deltas = [
        np.array([(model[name] - base[name]).ravel() for model in models.values()]) for name in base
    ]
    return GramStats(
        models=tuple(models),
        tensors=tuple(base),
        count_T=np.array([b_B.size for b_B in bases]),
        base_T=np.array([b_B @ b_B for b_B in bases]),
        base_sum_T=np.array([b_B.sum() for b_B in bases]),
        sum_TN=np.array([delta_NB.sum(axis=1) for delta_NB in deltas]),
        cross_TN=np.array([d_NB @ b_B for d_NB, b_B in zip(deltas, bases, strict=True)]),
        gram_TNN=np.array([delta_NB @ delta_NB.T for delta_NB in deltas]),
        distance_TNN=np.array([((d[:, None] - d[None]) ** 2).sum(axis=2) for d in deltas]),
    )


def dense(base: Model, models: Mapping[str, Model], c: Coefficients) -> dict[str, Array]:
    """The child that factors stand for."""
    return {
        name: sum(
            (c.model_TN[t, n] * models[model][name] for n, model in enumerate(c.models)),
            c.base_T[t] * base[name],
        )
        for t, name in enumerate(c.tensors)
    }


def assert_same(found: GramStats, expected: GramStats, tolerance: float = 1e-9) -> None:
    """Equal but for rounding, as a share of the norms of what is multiplied."""
    assert (found.models, found.tensors) == (expected.models, expected.tensors)
    base_T1 = np.sqrt(expected.base_T)[:, None]
    size_TN = np.sqrt(np.diagonal(expected.gram_TNN, axis1=1, axis2=2)) + 1e-6 * base_T1
    pairs_TNN = size_TN[:, :, None] * size_TN[:, None, :]
    wide_TNN = np.maximum(size_TN[:, :, None], size_TN[:, None, :]) ** 2
    for name, scale in {
        "sum_TN": size_TN * np.sqrt(expected.count_T)[:, None],
        "cross_TN": size_TN * base_T1,
        "gram_TNN": pairs_TNN,
        "distance_TNN": wide_TNN,
    }.items():
        error = np.abs(getattr(found, name) - getattr(expected, name))
        assert np.all(error <= tolerance * scale), (name, float((error / scale).max()))


def some_models(seed: int, *, near: float = 0.01) -> tuple[dict[str, Array], dict[str, Model]]:
    """A base, two models near it, and a third at wide angles."""
    rng = np.random.default_rng(seed)
    base = llama_like(rng, layers=2)
    far = {name: rng.standard_normal(values.shape) for name, values in base.items()}
    models = {name: perturbed(base, rng, scale=near) for name in "ab"}
    return base, {**models, "far": far}


def recipe(method: str, models: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """mergekit's configuration; each model has a weight, or `None`."""
    entries = [
        {"model": name} | ({} if weight is None else {"parameters": {"weight": weight}})
        for name, weight in models.items()
    ]
    base = {"base_model": keys.pop("base")} if "base" in keys else {}
    return {"merge_method": method, "models": entries, **base, **keys}


def compiled(config: Mapping[str, Any], tensors: tuple[str, ...] = TENSORS, **keys: Any) -> Blend:
    found = compile_recipe(config, tensors=tensors, **keys)
    assert isinstance(found, Blend)
    return found


def factors(config: Mapping[str, Any], stats: GramStats) -> Coefficients:
    """The factors; "base" in a recipe is the statistics' base, other names are their own."""
    known = {name: name for name in stats.models} | {"base": None}
    return coefficients(compiled(config, stats.tensors), stats, known)


# Factors, against the methods' definitions on dense vectors.


def unit(v_B: Array) -> Array:
    found: Array = v_B / np.linalg.norm(v_B)
    return found


def weighted_sum(weights: Sequence[float], vectors: Sequence[Array]) -> Array:
    """Not by a product of matrices, to be unlike what is tested."""
    found: Array = np.sum([w * v_B for w, v_B in zip(weights, vectors, strict=True)], axis=0)
    return found


def arc(t: float, one_B: Array, other_B: Array) -> Array:
    """SLERP: from one direction to the other, by the share t of the angle."""
    angle = 2 * np.arctan2(
        np.linalg.norm(unit(one_B) - unit(other_B)), np.linalg.norm(unit(one_B) + unit(other_B))
    )
    found: Array = (np.sin((1 - t) * angle) * one_B + np.sin(t * angle) * other_B) / np.sin(angle)
    return found


def multislerp(weights: Sequence[float], vectors: Sequence[Array], eps: float = 1e-8) -> Array:
    """Tangents at the weighted mean direction, averaged, and taken back to the sphere."""
    units = [v_B / (np.linalg.norm(v_B) + eps) for v_B in vectors]
    mean_B = unit(weighted_sum(weights, units))
    tangent_B = weighted_sum(weights, [u_B - (u_B @ mean_B) * mean_B for u_B in units])
    length = float(np.linalg.norm(tangent_B)) + eps
    norm = sum(w * float(np.linalg.norm(v_B)) for w, v_B in zip(weights, vectors, strict=True))
    found: Array = norm * (np.cos(length) * mean_B + np.sin(length) / length * tangent_B)
    return found


def model_stock(vectors: Sequence[Array]) -> Array:
    """The paper's share t of the mean change, by the mean cosine of the changes."""
    cosine = float(np.mean([unit(u_B) @ unit(v_B) for u_B, v_B in combinations(vectors, 2)]))
    n = len(vectors)
    return n * cosine / (1 + (n - 1) * cosine) * weighted_sum([1 / n] * n, vectors)


Vectors = Mapping[str, Array]
DEFINITIONS: Mapping[str, tuple[dict[str, Any], Callable[[Vectors], Array]]] = {
    "linear": (
        recipe("linear", {"a": 1, "far": 3}),
        lambda v: (v["a"] + 3 * v["far"]) / 4,
    ),
    "task_arithmetic": (
        recipe("task_arithmetic", {"a": 0.5, "b": -0.25}, base="far", parameters={"lambda": 2}),
        lambda v: v["far"] + (v["a"] - v["far"]) - 0.5 * (v["b"] - v["far"]),
    ),
    "task_arithmetic, normalize": (
        recipe("task_arithmetic", {"a": 0.5, "b": 2}, base="base", parameters={"normalize": True}),
        lambda v: (v["a"] + 4 * v["b"]) / 5,
    ),
    "slerp": (
        recipe("slerp", {"a": None, "far": None}, base="far", parameters={"t": 0.2}),
        lambda v: arc(0.2, v["far"], v["a"]),
    ),
    "slerp, straight": (
        recipe("slerp", {"a": None}, base="base", parameters={"t": 0.2}),
        lambda v: 0.8 * v["base"] + 0.2 * v["a"],
    ),
    "nuslerp": (
        recipe("nuslerp", {"far": 1, "b": 3}),
        lambda v: arc(0.75, v["far"], v["b"]),
    ),
    "nuslerp, base": (
        recipe("nuslerp", {"a": 1, "b": 3}, base="base"),
        lambda v: v["base"] + arc(0.75, v["a"] - v["base"], v["b"] - v["base"]),
    ),
    "multislerp": (
        recipe("multislerp", {"a": 1, "b": 2, "far": 1}),
        lambda v: multislerp([0.25, 0.5, 0.25], [v["a"], v["b"], v["far"]]),
    ),
    "multislerp, base": (
        recipe(
            "multislerp",
            {"a": 1, "far": 0.5},
            base="b",
            parameters={"normalize_weights": False, "eps": 0.01},
        ),
        lambda v: v["b"] + multislerp([1, 0.5], [v["a"] - v["b"], v["far"] - v["b"]], 0.01),
    ),
    "model_stock": (
        recipe("model_stock", {"a": None, "b": None, "far": None}, base="base"),
        lambda v: v["base"] + model_stock([v[name] - v["base"] for name in ("a", "b", "far")]),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_factors_are_the_methods_own(name: str) -> None:
    """The child of the factors is the child of the definition, tensor by tensor."""
    config, definition = DEFINITIONS[name]
    # So near that SLERP is straight (an angle below 0.03 from weights of width 0.02), but not so
    # near that model_stock's cosine is held down (products of norms below 1e-6).
    base, models = some_models(1, near=0.0005)
    child = dense(base, models, factors(config, stats_of(base, models)))
    for tensor in base:
        vectors = {"base": base[tensor].ravel()} | {m: v[tensor].ravel() for m, v in models.items()}
        expected = definition(vectors)
        error = np.abs(child[tensor].ravel() - expected).max() / np.abs(expected).max()
        assert error < 1e-9, tensor


def test_karcher_is_where_the_logarithms_cancel() -> None:
    """The mean's direction is where the angles' directions sum to 0, its norm the mean norm."""
    base, models = some_models(2)
    config = recipe(
        "karcher", dict.fromkeys(("a", "b", "far")), parameters={"max_iter": 200, "tol": 1e-12}
    )
    child = dense(base, models, factors(config, stats_of(base, models)))
    for tensor, values in child.items():
        parents = [model[tensor].ravel() for model in models.values()]
        mean_B = unit(values.ravel())
        assert np.linalg.norm(values) == pytest.approx(np.mean([*map(np.linalg.norm, parents)]))
        pulls = []
        for v_B in map(unit, parents):
            across_B = v_B - (v_B @ mean_B) * mean_B
            pulls.append(np.arccos(v_B @ mean_B) * unit(across_B))
        assert np.linalg.norm(np.sum(pulls, axis=0)) < 1e-7


def test_no_change_in_one_parent_is_a_right_angle() -> None:
    """mergekit's SLERPs take a tensor of zeros to be at right angles to every other."""
    base, models = some_models(3)
    models["b"] = base
    c = factors(recipe("nuslerp", {"a": 1, "b": 1}, base="base"), stats_of(base, models))
    assert np.allclose(c.model_TN[:, :2], np.sqrt(0.5))
    assert np.allclose(c.base_T, 1 - 2 * np.sqrt(0.5))


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_identical_parents_have_themselves_as_child(method: str) -> None:
    """Nothing is divided by the sine of an angle that is 0."""
    base, models = some_models(4)
    models["b"] = models["a"]
    weight = 1 if method in ("nuslerp", "multislerp") else None
    config = recipe(
        method,
        {"a": weight, "b": weight},
        **({"base": "base"} if method == "model_stock" else {}),
        **({"base": "a", "parameters": {"t": 0.3}} if method == "slerp" else {}),
    )
    child = dense(base, models, factors(config, stats_of(base, models)))
    for tensor, values in child.items():
        assert np.allclose(values, models["a"][tensor], rtol=0, atol=1e-7), tensor


def opposed() -> GramStats:
    """One tensor; b's change is the opposite of a's, that of c is none."""
    base, models = some_models(5)
    name = "model.norm.weight"
    delta = models["a"][name] - base[name]
    return stats_of(
        {name: base[name]},
        {
            "a": {name: base[name] + delta},
            "b": {name: base[name] - delta},
            "c": {name: base[name]},
            "minus a": {name: -base[name] - delta},
        },
    )


def test_opposite_parents() -> None:
    """Two opposite vectors are mixed on the straight line, as if there were no sphere."""
    found = factors(recipe("nuslerp", {"a": 1, "b": 3}, base="base"), opposed())
    assert np.allclose(found.model_TN[0], [0.25, 0.75, 0, 0])
    found = factors(recipe("multislerp", {"a": 1, "b": 1}, base="base"), opposed())
    assert np.allclose(found.model_TN[0], [0.5, 0.5, 0, 0])
    found = factors(
        recipe("slerp", {"a": None, "minus a": None}, base="a", parameters={"t": 0.3}), opposed()
    )
    assert np.allclose(found.model_TN[0], [0.7, 0, 0, 0.3])
    found = factors(recipe("model_stock", {"a": None, "b": None}, base="base"), opposed())
    assert np.allclose(found.model_TN[0], 0)
    found = factors(recipe("karcher", {"a": None, "minus a": None}), opposed())
    assert np.allclose(found.model_TN[0], [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (
            recipe("linear", {"a": 1, "b": -1}),
            r"^linear: model.norm.weight: expected weights whose",
        ),
        (recipe("multislerp", {"a": 1, "b": -1}), r"expected weights whose sum is not 0.*1, -1$"),
        (
            recipe("multislerp", {"a": 1, "b": 1.5, "c": 1, "a2": 0.5}, base="base"),
            r"expected directions whose weighted sum is not 0",
        ),
        (
            recipe("multislerp", {"a": 1, "c": 1}, base="base", parameters={"eps": 0}),
            r"expected eps above 0",
        ),
        (recipe("linear", {"stranger": 1}), r"expected a model for the recipe's stranger, found"),
        (recipe("linear", {"typo": 1}), r"expected nobody in the statistics, found none"),
    ],
)
def test_what_has_no_answer_is_refused(config: dict[str, Any], complaint: str) -> None:
    """Where mergekit would divide by zero, or a model is unknown, the message says so."""
    stats = opposed()
    known = {name: name for name in stats.models} | {"base": None, "a2": "a", "typo": "nobody"}
    with pytest.raises(MergeError, match=complaint):
        coefficients(compiled(config, stats.tensors), stats, known)


def test_the_first_tensor_without_answer_is_named() -> None:
    """Of several complaints about several tensors, the first tensor's is made."""
    base, models = some_models(5)
    names = zero, opposite, cancelled = "model.norm.weight", *sorted(base)[:2]
    models["a"] = {**models["a"], zero: base[zero], opposite: 2 * base[opposite]}
    models["b"] = {**models["b"], opposite: 0 * base[opposite]}

    def complaint(*some: str) -> str:
        """What is said of these tensors, in their order."""
        stats = stats_of(
            {name: base[name] for name in some},
            {m: {name: model[name] for name in some} for m, model in models.items()},
        )
        third = [{"filter": cancelled, "value": -2}, {"value": 1e-9}]
        config = recipe(
            "multislerp", {"a": 1, "b": 1, "far": third}, base="base", parameters={"eps": 0}
        )
        with pytest.raises(MergeError) as raised:
            factors(config, stats)
        return str(raised.value)

    assert complaint(*names).startswith(f"multislerp: {zero}: expected eps above 0")
    assert complaint(opposite, zero, cancelled).startswith(
        f"multislerp: {opposite}: expected directions whose weighted sum is not 0"
    )
    assert complaint(cancelled, zero, opposite).startswith(
        f"multislerp: {cancelled}: expected weights whose sum is not 0"
    )


@pytest.mark.parametrize("name", [*DEFINITIONS, "karcher"])
def test_every_tensor_has_factors_of_its_own(name: str) -> None:
    """All tensors together have the factors that each has by itself, whatever the others need."""
    base, models = some_models(9, near=0.3)
    # One tensor did not change, one is zero, two parents are one, and two are opposite.
    kept, none, same, opposite = sorted(base)[:4]
    models["a"] = {**models["a"], none: 0 * base[none]}
    one = models["a"]
    changed = {kept: base[kept], same: one[same], opposite: -one[opposite]}
    models["b"] = {**models["b"], **changed}
    config = DEFINITIONS[name][0] if name in DEFINITIONS else recipe("karcher", {"a": 1, "b": 1})
    if name == "karcher":
        # Some arrive at once, some take many steps, some are stopped on the way.
        turns = [{"filter": "q_proj", "value": 1}, {"filter": "mlp", "value": 40}, {"value": 5}]
        config |= {"parameters": {"max_iter": turns, "tol": 1e-11}}
        config["models"].append({"model": "far"})
    together = factors(config, stats_of(base, models))
    for t, tensor in enumerate(base):
        parts = {m: {tensor: model[tensor]} for m, model in models.items()}
        alone = factors(config, stats_of({tensor: base[tensor]}, parts))
        found_K = np.append(together.model_TN[t], together.base_T[t])
        expected_K = np.append(alone.model_TN[0], alone.base_T[0])
        assert np.allclose(found_K, expected_K, rtol=1e-12, atol=1e-14), tensor


def test_a_plan_is_for_its_tensors() -> None:
    """Factors are not taken from statistics of other tensors than were planned for."""
    with pytest.raises(MergeError, match="found one for 18"):
        coefficients(compiled(recipe("linear", {"a": 1})), opposed(), {"a": "a"})


# Recipes.


def test_the_first_filter_that_matches_decides() -> None:
    """Filters are parts of names; an empty list says nothing, and the recipe's own value counts."""
    setting = [
        {"filter": "self_attn", "value": 0.1},
        {"filter": "layers.3.", "value": []},
        {"filter": "model", "value": True},
    ]
    config = recipe("linear", {"a": setting, "b": "2e-1"}, parameters={"weight": 7})
    plan = compiled(config)
    assert plan.weight_TM is not None
    found = dict(zip(TENSORS, plan.weight_TM[:, 0], strict=True))
    assert found["model.layers.3.self_attn.weight"] == 0.1
    assert found["model.layers.3.mlp.weight"] == 7
    assert found["model.layers.2.mlp.weight"] == 1
    assert found["lm_head.weight"] == 7
    assert np.all(plan.weight_TM[:, 1] == 0.2)


def test_a_gradient_goes_over_the_layers() -> None:
    """First value in the first layer, last in the last, and the first outside of all layers."""
    config = recipe("slerp", {"a": None}, base="b", parameters={"t": [0.2, 0.4, 1.0]})
    expected = {"0": 0.2, "1": 0.3, "2": 0.4, "3": 0.7, "4": 1.0}
    found = dict(zip(TENSORS, compiled(config).shared_T["t"], strict=True))
    for name, t in found.items():
        layer = name.split(".")[2] if "layers" in name else "0"
        assert t == pytest.approx(expected[layer]), name
    # The names may be of some layers only.
    some = tuple(name for name in TENSORS if "layers.4" not in name)
    found = dict(zip(some, compiled(config, some, layers=5).shared_T["t"], strict=True))
    assert found["model.layers.3.mlp.weight"] == pytest.approx(0.7)
    one = ("model.embed_tokens.weight", "model.layers.0.mlp.weight")
    assert list(compiled(config, one).shared_T["t"]) == [0.2, 1.0]


def test_yes_and_no_are_chosen_and_not_mixed() -> None:
    """A list of yes and no changes at the layer that its step falls on."""
    config = recipe("linear", {"a": 1}, parameters={"normalize": ["yes", False]})
    found = dict(zip(TENSORS, compiled(config).shared_T["normalize"], strict=True))
    assert [found[f"model.layers.{n}.mlp.weight"] for n in range(5)] == [1, 1, 1, 1, 0]


def test_the_base_takes_part_as_the_method_says() -> None:
    """The base is the origin, one of two, or an input with a weight of its own."""
    plan = compiled(recipe("task_arithmetic", {"base": 5, "a": 1}, base="base"))
    assert (plan.models, plan.base) == (("base", "a"), "base")
    assert plan.weight_TM is not None
    assert np.all(np.isnan(plan.weight_TM[:, 0]))
    plan = compiled(recipe("linear", {"a": 1}, base="base", parameters={"weight": 2}))
    assert (plan.models, plan.base) == (("a", "base"), None)
    assert plan.weight_TM is not None
    assert np.all(plan.weight_TM == [1, 2])


def test_the_base_of_the_merge_need_not_be_that_of_the_statistics() -> None:
    """Factors go to whichever model is meant, to one model twice if it has two names."""
    base, models = some_models(6)
    stats = stats_of(base, models)
    plan = compiled(recipe("task_arithmetic", {"x": 0.5, "y": 1}, base="z"), stats.tensors)
    c = coefficients(plan, stats, {"x": "far", "y": None, "z": "b"})
    assert np.allclose(c.base_T, 1)
    assert np.allclose(c.model_TN, [0, -0.5, 0.5])
    c = coefficients(plan, stats, {"x": "a", "y": "a", "z": None})
    assert np.allclose(c.base_T, -0.5)
    assert np.allclose(c.model_TN, [1.5, 0, 0])


AB: Mapping[str, Any] = {"a": 1, "b": 1}
GRADIENT = {"parameters": {"weight": [0, 1]}}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (recipe("ties", AB), r"^merge_method ties is none of linear, task_arithmetic"),
        (recipe("linear", AB, chat_template="auto"), "^chat_template: "),
        (recipe("linear", AB, tokenizer={"source": "union"}), "^tokenizer: "),
        (recipe("linear", AB, tokenizer_source="union"), "^tokenizer_source: "),
        (recipe("linear", AB, dtype="int64"), "^dtype: 'int64' is none of float16, "),
        ({"merge_method": "slerp", "slices": [{"sources": []}]}, "^slices: "),
        ({"merge_method": "slerp", "modules": {"text": {}}}, "^modules: "),
        ({"merge_method": "linear", "models": [{"model": {"model": "a"}}]}, "given in parts"),
        (
            recipe("nuslerp", AB, parameters={"nuslerp_flatten": [{"filter": "mlp", "value": 0}]}),
            "^nuslerp without nuslerp_flatten",
        ),
        (
            recipe("model_stock", AB, base="c", parameters={"filter_wise": True}),
            "^model_stock with filter_wise",
        ),
    ],
)
def test_what_is_not_linear_says_why(config: dict[str, Any], reason: str) -> None:
    """What one factor a tensor cannot do is left to mergekit, with the reason."""
    found = compile_recipe(config, tensors=TENSORS)
    assert isinstance(found, NotLinear)
    assert re.search(reason, found.reason), found.reason


def test_keys_that_change_no_weight_are_passed_over() -> None:
    """Formats, a vocabulary that all share, other methods' parameters, empty keys."""
    keys = {
        "dtype": "torch.bfloat16",
        "out_dtype": "float16",
        "chat_template": None,
        "tokenizer_source": "base",
        "name": "child",
        "parameters": {"density": 0.3, "nuslerp_row_wise": True, "int8_mask": True},
    }
    plan = compiled(recipe("nuslerp", AB, **keys), same_vocabulary=True)
    assert plan.method == "nuslerp"


@pytest.mark.parametrize(
    ("tensors", "layers", "reason"),
    [
        (("encoder.block.0.mlp.weight", "decoder.block.0.mlp.weight"), None, "more than one stack"),
        (("embed.weight",), None, "the tensors' names have none"),
        (TENSORS, 4, "needs layers 0 to 3, and there is a layer 4"),
    ],
)
def test_a_gradient_needs_layers(tensors: tuple[str, ...], layers: int | None, reason: str) -> None:
    """Where the depth of a tensor is not certain, mergekit decides; else nobody asks."""
    config = recipe("linear", {"a": None}, **GRADIENT)
    found = compile_recipe(config, tensors=tensors, layers=layers)
    assert isinstance(found, NotLinear)
    assert reason in found.reason
    compiled(recipe("linear", {"a": [1]}), tensors)


T: Mapping[str, Any] = {"parameters": {"t": 0.5}}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"models": []}, r"merge_method: expected a name, found none"),
        ({"merge_method": "linear"}, r"models: expected a list of models, found none"),
        ({"merge_method": "linear", "models": "a"}, r"models: expected a list of models, found a"),
        ({"merge_method": "linear", "models": ["a"]}, r"models\[0\]: expected a mapping with the"),
        (recipe("linear", {"a": 1}, base=3), r"base_model: expected a name, found 3"),
        (recipe("linear", {"a": None}), r"weight of a: expected a value for lm_head.weight, found"),
        (recipe("linear", {"a": 1}, base="b"), r"parameters.weight of b: expected a value for"),
        (recipe("linear", {"a": "x"}), r"parameters.weight: expected a number, found x"),
        (recipe("linear", {"a": float("inf")}), r"weight: expected a number, found inf"),
        (
            recipe("linear", {"a": [{"value": {}}]}),
            r"weight: expected a value, conditions, or",
        ),
        (recipe("linear", {"a": [{"filter": "mlp"}]}), r"\[0\].*weight: expected .*found {'filter"),
        (recipe("linear", {"a": [{"value": 1}, 1]}), r"weight: expected only conditions .*found 1"),
        (recipe("linear", {"a": "one\ntwo"}), r"expected a number, found one two"),
        (
            recipe("linear", {"a": [{"filter": 1, "value": 1}]}),
            r"filter: expected a part of a name",
        ),
        (
            recipe("linear", {"a": 1}, parameters=[1]),
            r"parameters: expected a mapping, found \[1\]",
        ),
        (recipe("linear", {"a": 1}, parameters={"normalize": 2}), r"a yes or no, found 2"),
        (
            recipe("linear", AB) | {"models": [{"model": "a", "parameters": {"weight": 1}}] * 2},
            r"models: expected different models, found a, a",
        ),
        (recipe("slerp", {"a": None, "b": None}, **T), r"base_model: expected a model, as slerp"),
        (recipe("slerp", {"a": None, "b": None}, base="a"), r"parameters.t: expected a value for"),
        (
            recipe("slerp", {"a": None, "b": None}, base="c", **T),
            r"expected 1 for slerp .*, found 2",
        ),
        (recipe("model_stock", {"a": None}, base="b"), r"at least 2 for model_stock .*, found 1"),
        (
            recipe("karcher", {"a": None}, parameters={"max_iter": [4, 9]}),
            r"max_iter: expected a whole number, found 5.25",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(config: dict[str, Any], complaint: str) -> None:
    """The key, what was expected there, and what was found."""
    with pytest.raises(ConfigError, match=complaint) as raised:
        compile_recipe(config, tensors=TENSORS)
    assert str(raised.value).startswith("recipe: ")
    assert "\n" not in str(raised.value)


# Statistics of children.

weight = st.one_of(st.floats(-1, 2).filter(lambda w: abs(w) > 0.05), st.just(1.0))
GENERATIONS = st.tuples(
    *(
        st.tuples(
            st.sampled_from([*sorted(DEFINITIONS), "karcher"]), weight, weight, st.floats(0, 1)
        )
        for _ in range(3)
    )
)


def breed(
    name: str, one: str, other: str, weights: tuple[float, float], t: float
) -> dict[str, Any]:
    """A recipe of a method, for two parents."""
    method, _, option = name.partition(", ")
    weighted = method not in ("slerp", "karcher", "model_stock")
    one_weight, other_weight = weights if weighted else (None, None)
    parameters: dict[str, Any] = {"t": [t, 1 - t]}
    if abs(sum(weights)) < 0.2:  # nearly nothing to divide by
        parameters |= {"normalize": False, "normalize_weights": False}
    if option == "normalize":
        parameters["normalize"] = abs(sum(weights)) >= 0.2
    base = {"task_arithmetic": "base", "model_stock": "base", "slerp": one}.get(method)
    if option == "base":
        base = "base"
    return recipe(
        method,
        {one: one_weight, other: other_weight},
        parameters=parameters,
        **({"base": base} if base else {}),
    )


@given(seed=st.integers(0, 2**32 - 1), generations=GENERATIONS)
@settings(max_examples=40, deadline=None)
def test_three_generations_are_as_if_measured(seed: int, generations: Any) -> None:
    """Children's statistics and kinship equal those of their dense weights, and so do flat factors.

    (1) has the parents a and b, (2) has (1) and far, (3) has (2) and (1).
    """
    base, models = some_models(seed)
    foundations = stats = stats_of(base, models)
    family: dict[str, Coefficients] = {}
    for number, (method, one, other, t) in enumerate(generations, start=1):
        parents = [("a", "b"), ("1", "far"), ("2", "1")][number - 1]
        c = factors(breed(method, *parents, (one, other), t), stats)
        name = str(number)
        models = {**models, name: dense(base, models, c)}
        family[name] = c
        stats = child_statistics(stats, c).joined(stats, name)
        expected = stats_of(base, models)
        assert_same(stats, expected)
        flat = flatten(c, family)
        assert set(flat.models) <= set(foundations.models)
        own = child_statistics(foundations, flat).joined(foundations, name)
        assert_same(own, expected.select(own.models))
    found, measured = (
        kinship_from(each, base="base", total_parameters=1) for each in (stats, expected)
    )
    assert np.allclose(found.cs_NN, measured.cs_NN, rtol=0, atol=1e-7)


def test_distances_to_near_identical_models_keep_their_digits() -> None:
    """A child's distance to parents a millionth apart is right to many digits."""
    base, models = some_models(8)
    rng = np.random.default_rng(8)
    models["b"] = perturbed(models["a"], rng, scale=1e-8)
    stats = stats_of(base, models)
    c = factors(recipe("linear", {"a": 1, "b": 3}), stats)
    found = child_statistics(stats, c).distance_TN[:, :2]
    apart_T1 = stats.distance_TNN[:, 0, 1:2]
    assert np.allclose(found, apart_T1 * [9 / 16, 1 / 16], rtol=1e-9, atol=0)
    # The parent itself is no distance from itself.
    same = child_statistics(stats, factors(recipe("linear", {"a": 1}), stats))
    assert np.all(same.distance_TN[:, 0] == 0)


def test_only_rows_of_parents_are_looked_at() -> None:
    """What models that are no parents have in common has no part in a child's statistics."""
    base, models = some_models(10)
    stats = stats_of(base, {**models, "far too": models["far"]})
    c = factors(recipe("multislerp", {"a": 1, "b": 3}), stats)
    unknown = replace(stats, gram_TNN=stats.gram_TNN.copy(), distance_TNN=stats.distance_TNN.copy())
    for values_TNN in (unknown.gram_TNN, unknown.distance_TNN):
        values_TNN[:, [2, 3], [3, 2]] = np.nan
    found, expected = (vars(child_statistics(each, c)) for each in (unknown, stats))
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name
    itself = child_statistics(stats, replace(c, base_T=c.base_T + 1, model_TN=0 * c.model_TN))
    assert np.all(itself.gram_TN == 0)
    assert np.array_equal(itself.distance_TN, np.diagonal(stats.gram_TNN, axis1=1, axis2=2))


def test_rows_are_joined_to_their_own_statistics() -> None:
    """Rows join what they were taken from, under a new name."""
    stats = opposed()
    row = child_statistics(stats, factors(recipe("linear", {"a": 1}), stats))
    with pytest.raises(MergeError, match="expected a new name, found b"):
        row.joined(stats, "b")
    with pytest.raises(MergeError, match=r"\(1, 4\), found \(1, 2\)"):
        row.joined(stats.select(["a", "b"]), "child")


def test_factors_are_of_models_and_tensors_that_are_there() -> None:
    """Factors of other tensors or models are named."""
    stats = opposed()
    one = np.ones((1, 1))
    with pytest.raises(MergeError, match="expected models of the statistics, found x"):
        child_statistics(stats, Coefficients(("x",), stats.tensors, one[0], one))
    with pytest.raises(
        MergeError, match="coefficients of the 1 tensors of the statistics, found 2"
    ):
        child_statistics(stats, Coefficients(("a",), TENSORS[:2], one[0], one))


def test_flatten_needs_a_family_tree() -> None:
    """Ancestors of other tensors, and circles, are refused; no share is no ancestor."""
    half = np.full((1, 1), 0.5)

    def mean(*parents: str, tensors: tuple[str, ...] = ("w",)) -> Coefficients:
        return Coefficients(parents, tensors, np.zeros(1), np.tile(half, len(parents)))

    family = {"x": mean("a", "b"), "y": mean("x", "a"), "z": mean("y", "y2"), "y2": mean("x", "c")}
    flat = flatten(family["z"], family)
    assert dict(zip(flat.models, flat.model_TN[0], strict=True)) == {"a": 0.5, "b": 0.25, "c": 0.25}
    itself = Coefficients(("a", "x"), ("w",), np.zeros(1), np.array([[1.0, 0.0]]))
    assert flatten(itself, {"x": itself}).models == ("a",)
    with pytest.raises(MergeError, match="is its own ancestor"):
        flatten(mean("x"), {"x": mean("y"), "y": mean("x")})
    with pytest.raises(MergeError, match="expected the tensors of the child, found those of x"):
        flatten(mean("x"), {"x": mean("a", tensors=("v",))})
