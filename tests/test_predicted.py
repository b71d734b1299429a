"""Predicted kinship against children that were really made, three generations deep.

What is predicted comes from the statistics of the foundation models alone: those of a child are
predicted, and its own children are predicted from those. What is measured comes from files, each
generation merged from the files of the one before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Dtype, llama_like, perturbed, write_checkpoint
from hypothesis import HealthCheck, assume, event, given, note, settings
from hypothesis import strategies as st
from test_blend_mergekit import weights
from test_native_merge import unit

from modelkin.blend import (
    Blend,
    Coefficients,
    Lineage,
    child_statistics,
    coefficients,
    compile_recipe,
    flat_recipe,
    flatten,
)
from modelkin.blend.recipe import METHODS
from modelkin.blend.statistics import distances
from modelkin.checkpoint import open_checkpoint
from modelkin.gram import GramStats
from modelkin.measuring import kinship, measure, streaming
from modelkin.merging import Native
from modelkin.merging.writing import DTYPE_NAMES
from modelkin.similarity import Kinship, kinship_from

LAYERS = 3
FOUNDATIONS = ("a", "b", "c")
CHILDREN = ("1-1", "1-2", "2-1", "2-2", "3-1")

# Recipes

positive = st.floats(0.1, 1.5)
signed = st.floats(-0.4, 1.5)
shares = st.floats(-0.2, 1.2)
parts = st.sampled_from(["mlp", "self_attn", "norm", "layers.1.", "embed", "lm_head"])


def over_tensors(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    """A number, a gradient over the layers, or either for some tensors and another for the rest."""
    gradients = st.one_of(numbers, st.lists(numbers, min_size=2, max_size=4))
    some = st.fixed_dictionaries({"filter": parts, "value": gradients})
    rest = st.fixed_dictionaries({"value": gradients})
    return st.one_of(
        gradients, st.builds(lambda first, last: [*first, last], st.lists(some, max_size=2), rest)
    )


@st.composite
def recipes(draw: st.DrawFn, pool: Sequence[str]) -> dict[str, Any]:
    """A recipe of any of the seven methods for some of a pool, its youngest among them."""
    method = draw(st.sampled_from(list(METHODS)))
    *elder, youngest = pool
    others = draw(st.permutations(elder))
    count = draw(st.integers(2, 2 if method in ("slerp", "nuslerp") else 3))
    models = draw(st.permutations([youngest, *others[: count - 1]]))
    config: dict[str, Any] = {"merge_method": method, "models": [{"model": one} for one in models]}
    shared: dict[str, Any] = {}
    weight = positive
    if method == "linear":
        shared["normalize"] = draw(st.booleans())
        weight = positive if shared["normalize"] else signed
    elif method == "task_arithmetic":
        shared |= {"normalize": draw(st.booleans()), "lambda": draw(over_tensors(positive))}
    elif method == "slerp":
        shared["t"] = draw(over_tensors(shares))
    elif method == "karcher":
        shared["max_iter"] = draw(st.integers(1, 10))
    elif method == "multislerp":
        shared["normalize_weights"] = draw(st.booleans())
    if method in ("linear", "task_arithmetic", "nuslerp", "multislerp"):
        for entry in config["models"]:
            entry["parameters"] = {"weight": draw(over_tensors(weight))}
    if method == "slerp":
        config["base_model"] = draw(st.sampled_from(models))
    elif method in ("task_arithmetic", "model_stock") or (
        method in ("nuslerp", "multislerp") and draw(st.booleans())
    ):
        config["base_model"] = others[count - 1]
    return {**config, "parameters": shared, "dtype": "float32"}


@st.composite
def family_trees(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Name -> recipe of two children, two grandchildren, and a great-grandchild of all of them."""
    pool = ["base", *FOUNDATIONS]
    found: dict[str, dict[str, Any]] = {}
    for generation in range(1, 4):
        born = [name for name in CHILDREN if name.startswith(f"{generation}-")]
        # The last of the generation before is a parent of each.
        found |= {name: draw(recipes(pool)) for name in born}
        pool += born
    return found


def located(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with real paths."""
    found = {**config, "models": [{**one} for one in config["models"]]}
    for entry in [found, *found["models"]]:
        for key in {"model", "base_model"} & set(entry):
            entry[key] = str(folder / entry[key])
    return found


# Prediction


def assume_well_posed(config: Mapping[str, Any], stats: GramStats) -> None:
    """What turns on directions must have them, none opposite to another or much shorter.

    Otherwise the method itself makes a large change of the child out of a small one of its parents,
    such as the last digit of float32.
    """
    method = config["merge_method"]
    if method in ("linear", "task_arithmetic"):
        return
    everyone = ("base", *stats.models)
    inputs = [everyone.index(one["model"]) for one in config["models"]]
    if method == "slerp" or "base_model" not in config:
        # Of the weights themselves.
        cross_TK = np.pad(stats.cross_TN, ((0, 0), (1, 0)))
        gram_TKK = np.pad(stats.gram_TNN, ((0, 0), (1, 0), (1, 0)))
        sums_TKK = cross_TK[:, :, None] + cross_TK[:, None, :]
        products_TKK = stats.base_T[:, None, None] + sums_TKK + gram_TKK
        shortest = 0.01
    else:
        apart_TKK = distances(stats)
        from_TK = apart_TKK[:, :, everyone.index(config["base_model"])]
        products_TKK = (from_TK[:, :, None] + from_TK[:, None, :] - apart_TKK) / 2
        shortest = 0.1
    for products_KK, count in zip(products_TKK, stats.count_T, strict=True):
        products_MM = products_KK[np.ix_(inputs, inputs)]
        norm_M = np.sqrt(np.diag(products_MM))
        assume(norm_M.min() > 1e-3 * np.sqrt(count))
        assume(norm_M.min() > shortest * norm_M.max())
        cosines = (products_MM / np.outer(norm_M, norm_M))[np.triu_indices(len(inputs), 1)]
        assume(1 + (len(inputs) - 1) * cosines.mean() > 0.2)
        assume(cosines.min() > -0.8)


def compiled(config: Mapping[str, Any], stats: GramStats) -> Coefficients:
    """The child's factors over the models of the statistics."""
    plan = compile_recipe(config, tensors=stats.tensors, layers=LAYERS)
    assert isinstance(plan, Blend)
    return coefficients(plan, stats, {name: name for name in stats.models} | {"base": None})


def predicted(
    stats: GramStats, tree: Mapping[str, Mapping[str, Any]]
) -> tuple[GramStats, dict[str, Coefficients]]:
    """Statistics with all descendants, from those of the foundations; each one's factors."""
    found: dict[str, Coefficients] = {}
    for name, config in tree.items():
        assume_well_posed(config, stats)
        found[name] = compiled(config, stats)
        row = child_statistics(stats, found[name])
        # Of a change that is none, nothing but rounding is left to be kin.
        assume(row.square_T.sum() > 1e-4 * stats.base_T.sum())
        stats = row.joined(stats, name)
    return stats, found


def related(stats: GramStats) -> Kinship:
    return kinship_from(stats, base="base", total_parameters=int(stats.count_T.sum()))


def assert_kin(found: Kinship, expected: Kinship, tolerance: float) -> None:
    """The same similarities; distances as a share of the largest."""
    assert found.models == expected.models
    np.testing.assert_allclose(found.pcc_NN, expected.pcc_NN, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.cs_NN, expected.cs_NN, rtol=0, atol=tolerance)
    # Of two that are the same, a distance is the root of what float64 leaves of the squares.
    apart = max(tolerance, 1e-7) * expected.ed_NN.max()
    np.testing.assert_allclose(found.ed_NN, expected.ed_NN, rtol=0, atol=apart)


@contextmanager
def foundations(
    seed: int, *, tied: bool = False, shards: int = 1, spread: float = 0.01, hidden: int = 16
) -> Iterator[Path]:
    """A base and three fine-tunes of it in float32, on disk for as long as they are needed."""
    rng = np.random.default_rng(seed)
    base = llama_like(rng, layers=LAYERS, hidden=hidden, intermediate=2 * hidden, tied=tied)
    common = perturbed(base, rng, scale=spread / 2)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "base", base, shards=shards)
        for name in FOUNDATIONS:
            tensors = perturbed(common, rng, scale=spread)
            write_checkpoint(Path(folder) / name, tensors, shards=shards)
        yield Path(folder)


def founding_statistics(folder: Path) -> GramStats:
    base, *models = (open_checkpoint(folder / name) for name in ("base", *FOUNDATIONS))
    return measure(base, models)


def assert_predicted(folder: Path, tree: Mapping[str, Mapping[str, Any]]) -> None:
    """All pairs, children included, are as kin as was said before there were children."""
    founding = founding_statistics(folder)
    stats, _ = predicted(founding, tree)
    for name, config in tree.items():
        Native(threads=1).merge(located(config, folder), folder / name)
        # Of a change that float32 does not hold to 1e-6, no kinship is known to 1e-6.
        child = stats.models.index(name)
        made = np.concatenate([values.ravel() for values in weights(folder / name).values()])
        assume(
            np.linalg.norm(unit(made, "F32")) / np.sqrt(12)
            < 4e-7 * np.sqrt(stats.gram_TNN[:, child, child].sum())
        )
    measured = kinship(
        folder / "base", [folder / name for name in stats.models], cache=False, threads=1
    )
    assert_kin(related(stats), measured, 1e-6)


@given(
    tree=family_trees(),
    seed=st.integers(0, 2**32 - 1),
    tied=st.booleans(),
    shards=st.integers(1, 3),
    spread=st.floats(0.01, 0.05),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_predicted_kinship_is_measured_kinship(
    tree: dict[str, dict[str, Any]], seed: int, tied: bool, shards: int, spread: float
) -> None:
    """To 1e-6 in float32, for great-grandchildren by any recipes, from the foundations alone."""
    for config in tree.values():
        event(config["merge_method"])
    note(str(tree))
    with foundations(seed, tied=tied, shards=shards, spread=spread) as folder:
        assert_predicted(folder, tree)


def merged(method: str, *models: str, weights: Sequence[Any] = (), **keys: Any) -> dict[str, Any]:
    """A recipe in float32."""
    entries: list[dict[str, Any]] = [{"model": name} for name in models]
    for entry, weight in zip(entries, weights, strict=False):
        entry["parameters"] = {"weight": weight}
    return {"merge_method": method, "models": entries, "dtype": "float32", **keys}


def test_large_tensors() -> None:
    """Also of tensors that kinship measures in single precision."""
    mlp = [{"filter": "mlp", "value": [0.3, 0.9]}, {"value": 0.6}]
    tree = {
        "1-1": merged("slerp", "a", "b", base_model="a", parameters={"t": mlp}),
        "1-2": merged("karcher", "a", "b", "c"),
        "2-1": merged("model_stock", "1-1", "1-2", base_model="base"),
        "2-2": merged("nuslerp", "1-1", "c", weights=[[1, 2], 1], base_model="base"),
        "3-1": merged("multislerp", "2-1", "2-2", "b", weights=[1, mlp, 2], base_model="base"),
    }
    with foundations(1, hidden=264) as folder:
        sizes = [tensor.count for tensor in open_checkpoint(folder / "base").tensors.values()]
        assert sum(size > streaming.SMALL for size in sizes) > 9
        assert_predicted(folder, tree)


# Flat recipes


def assert_flat(
    folder: Path, name: str, flat: Coefficients, config: Mapping[str, Any], dtype: Dtype
) -> None:
    """What the recipe makes of the foundations is half a unit from the float64 sum at most."""
    Native(threads=1).merge(config, folder / f"{name}-{dtype}")
    everyone = [weights(folder / one) for one in ("base", *flat.models)]
    c_TK = np.column_stack([flat.base_T, flat.model_TN])
    for t, tensor in enumerate(flat.tensors):
        terms_KB = np.array([c * one[tensor] for c, one in zip(c_TK[t], everyone, strict=True)])
        exact_B, size_B = terms_KB.sum(axis=0), np.abs(terms_KB).sum(axis=0)
        found_B = weights(folder / f"{name}-{dtype}")[tensor]
        # Float64 sums of K terms in any order.
        slack_B = len(terms_KB) * 2**-52 * size_B
        assert (np.abs(found_B - exact_B) <= unit(exact_B, dtype) / 2 + slack_B).all(), tensor


@given(
    tree=family_trees(),
    seed=st.integers(0, 2**32 - 1),
    tied=st.booleans(),
    shards=st.integers(1, 3),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    donor=st.sampled_from([None, *FOUNDATIONS]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_descendant_is_made_from_its_foundations(
    tree: dict[str, dict[str, Any]],
    seed: int,
    tied: bool,
    shards: int,
    dtype: Dtype,
    donor: str | None,
) -> None:
    """Flat factors predict the same kinship, and one pass by them is rounded once."""
    with foundations(seed, tied=tied, shards=shards) as folder:
        founding = founding_statistics(folder)
        stats, factors = predicted(founding, tree)
        lineage = Lineage(founding, layers=LAYERS)
        for name, config in tree.items():
            lineage.add(name, config, base="base")
        assert_kin(related(lineage.statistics()), related(stats), 1e-9)
        assert_kin(related(lineage.whole), related(stats), 1e-9)
        for name in CHILDREN[-2:]:
            flat = flatten(factors[name], factors)
            assert set(flat.models) <= set(FOUNDATIONS)
            directly = child_statistics(founding, flat).joined(founding, name)
            expected = related(stats.select([*FOUNDATIONS, name]))
            assert_kin(related(directly), expected, 1e-9)
            recipe = flat_recipe(
                flat,
                {one: str(folder / one) for one in FOUNDATIONS},
                base=str(folder / "base"),
                donor=donor,
                dtypes={"dtype": DTYPE_NAMES[dtype]},
            )
            assert recipe["models"][0]["model"] == str(folder / (donor or "base"))
            assert_flat(folder, name, flat, recipe, dtype)
