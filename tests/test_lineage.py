"""A family known by its foundations' statistics alone, against the weights of its children."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from checkpoints import llama_like, perturbed
from test_blend import Model, assert_same, dense, stats_of

from modelkin.blend import Coefficients, Lineage, compile_recipe, flat_recipe
from modelkin.blend.recipe import Blend
from modelkin.errors import MergeError

SLERP = {
    "merge_method": "slerp",
    "base_model": "{parent_1}",
    "models": [{"model": "{parent_1}"}, {"model": "{parent_2}"}],
    "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.4, 1]}, {"value": 0.3}]},
}
TASKS = {
    "merge_method": "task_arithmetic",
    "base_model": "b",
    "models": [
        {"model": "{parent_1}", "parameters": {"weight": 0.9}},
        {"model": "{parent_2}", "parameters": {"weight": [0.2, 0.7]}},
    ],
}
# Weights that do not make 1 leave a share of the base over.
LINEAR = {
    "merge_method": "linear",
    "models": [
        {"model": "{parent_1}", "parameters": {"weight": 0.5}},
        {"model": "{parent_2}", "parameters": {"weight": 0.4}},
        {"model": "b", "parameters": {"weight": 0.3}},
    ],
    "parameters": {"normalize": False},
}
FAMILY: Mapping[str, tuple[Mapping[str, Any], str, str]] = {
    "1-1": (SLERP, "x", "y"),
    "1-2": (TASKS, "y", "z"),
    "1-3": (LINEAR, "x", "z"),
    "2-1": (SLERP, "1-1", "1-3"),
    "2-2": (TASKS, "1-2", "x"),
    "3-1": (LINEAR, "2-1", "2-2"),
    "3-2": (SLERP, "2-1", "1-1"),
}


def named(template: Any, one: str, two: str) -> Any:
    """A template with members' names."""
    if isinstance(template, str):
        return template.replace("{parent_1}", one).replace("{parent_2}", two)
    if isinstance(template, Mapping):
        return {key: named(value, one, two) for key, value in template.items()}
    return (
        [named(value, one, two) for value in template] if isinstance(template, list) else template
    )


@pytest.fixture(scope="module")
def foundations() -> tuple[Model, dict[str, Model]]:
    """A base and three models made from it."""
    rng = np.random.default_rng(3)
    base = llama_like(rng, layers=3)
    return base, {name: perturbed(base, rng, scale=0.05) for name in "xyz"}


@pytest.fixture(scope="module")
def lineage(foundations: tuple[Model, dict[str, Model]]) -> Lineage:
    """The family, by recipes alone."""
    found = Lineage(stats_of(*foundations))
    for name, (template, one, two) in FAMILY.items():
        found.add(name, named(template, one, two), base="b")
    return found


@pytest.fixture(scope="module")
def children(
    lineage: Lineage, foundations: tuple[Model, dict[str, Model]]
) -> tuple[Model, dict[str, Model]]:
    """The family in weights, each child made from its parents' weights in float64."""
    base, models = foundations
    family = dict(models)
    for name, (template, one, two) in FAMILY.items():
        own = Lineage(stats_of(base, family))
        own.add(name, named(template, one, two), base="b")
        family[name] = dense(base, family, own.flat(name))
    return base, family


def test_statistics_are_those_of_the_weights(
    lineage: Lineage, children: tuple[Model, dict[str, Model]]
) -> None:
    """Three generations deep, the predicted statistics are those of the children's weights."""
    assert_same(lineage.statistics(), stats_of(*children))


def test_some_members_in_any_order(lineage: Lineage) -> None:
    """The statistics of some are those of all, cut out."""
    some = ["3-1", "x", "2-2"]
    assert_same(lineage.statistics(some), lineage.statistics().select(some))


def test_the_whole_is_the_sum_over_tensors(lineage: Lineage) -> None:
    """What is kept for all members is the sum of their statistics over tensors."""
    each, whole = lineage.statistics(), lineage.whole
    assert whole.models == each.models
    for field in ("sum_TN", "cross_TN", "gram_TNN", "distance_TNN"):
        np.testing.assert_allclose(
            getattr(whole, field)[0], getattr(each, field).sum(axis=0), rtol=1e-9, atol=1e-12
        )


def test_the_flat_recipe_makes_the_same_child(
    lineage: Lineage,
    foundations: tuple[Model, dict[str, Model]],
    children: tuple[Model, dict[str, Model]],
) -> None:
    """One linear recipe over the foundations makes a great-grandchild's weights."""
    base, models = foundations
    for name in FAMILY:
        recipe = flat_recipe(
            lineage.flat(name),
            {one: f"/{one}" for one in models},
            base="/b",
            donor="y",
            dtypes={"dtype": "float32"},
        )
        assert recipe["models"][0]["model"] == "/y"
        plan = compile_recipe(recipe, tensors=tuple(base))
        assert isinstance(plan, Blend)
        assert plan.weight_TM is not None
        sources = {f"/{one}": model for one, model in {**models, "b": base}.items()}
        for t, tensor in enumerate(base):
            made = sum(
                plan.weight_TM[t, m] * sources[source][tensor]
                for m, source in enumerate(plan.models)
            )
            np.testing.assert_allclose(made, children[1][name][tensor], rtol=0, atol=1e-12)


def test_a_name_within_another_gets_its_own_weight() -> None:
    """A tensor whose name is part of another's has its own factor in a flat recipe."""
    tensors = ("norm", "layers.0.norm", "norm.bias")
    c = Coefficients(("x",), tensors, np.zeros(3), np.array([[0.1], [0.2], [0.3]]))
    recipe = flat_recipe(c, {"x": "/x"}, base="/b", donor="x", dtypes={})
    plan = compile_recipe(recipe, tensors=tensors)
    assert isinstance(plan, Blend)
    assert plan.weight_TM is not None
    assert plan.weight_TM[:, 0].tolist() == [0.1, 0.2, 0.3]


def test_a_twin_of_a_model_is_at_distance_zero(foundations: tuple[Model, dict[str, Model]]) -> None:
    """A child that is its first parent again is exactly that, not nearly."""
    lineage = Lineage(stats_of(*foundations))
    only_one = {**SLERP, "parameters": {"t": 0}}
    lineage.add("1-1", named(only_one, "x", "y"), base="b")
    stats = lineage.statistics(["x", "1-1"])
    # The factors of SLERP are quotients, which may miss 1 by their last digit.
    assert np.all(stats.distance_TNN[:, 0, 1] <= 1e-28 * stats.base_T)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**SLERP, "merge_method": "ties"}, "merge_method ties is none of"),
        (named(SLERP, "x", "stranger"), "names stranger, which is no member"),
    ],
)
def test_what_cannot_be_predicted_is_said(
    foundations: tuple[Model, dict[str, Model]], config: Mapping[str, Any], said: str
) -> None:
    """A recipe that is not linear, or names a model from outside, is an error that says so."""
    with pytest.raises(MergeError, match=said):
        Lineage(stats_of(*foundations)).add("1-1", config, base="b")
