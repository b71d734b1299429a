"""Blends against the real mergekit: the dense child of our factors is the child that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Array, Dtype, llama_like, perturbed, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_blend import dense, stats_of

from modelkin.blend import Blend, NotLinear, child_statistics, coefficients, compile_recipe
from modelkin.checkpoint import as_float64, open_checkpoint
from modelkin.errors import ConfigError, MergeError
from modelkin.measuring import measure
from modelkin.merging import Mergekit, fill
from modelkin.records import METRICS
from modelkin.similarity import kinship_from

pytest.importorskip("mergekit")

LAYERS = 4
MODELS = ("a", "b", "c", "far")
OPTIONS = {"write_model_card": False, "copy_tokenizer": False}
DEPTH = [0, 0.5, 0.3, 0.7, 1]
PAPER = [
    {"filter": "self_attn", "value": DEPTH},
    {"filter": "mlp", "value": DEPTH[::-1]},
    {"value": 0.5},
]


def family(*, tied: bool = False) -> dict[str, dict[str, Array]]:
    """A base, three models near it, and one at wide angles to all of them."""
    rng = np.random.default_rng(7)
    base = llama_like(rng, layers=LAYERS, tied=tied)
    models = {name: perturbed(base, rng) for name in "abc"}
    far = {name: values + rng.standard_normal(values.shape) for name, values in base.items()}
    # One tensor that b has left as it was, one that is zero in two models.
    models["b"]["model.layers.1.mlp.up_proj.weight"] = base["model.layers.1.mlp.up_proj.weight"]
    for zero in (base, models["c"]):
        zero["model.layers.2.self_attn.o_proj.weight"] = np.zeros((8, 8))
    return {"base": base, **models, "far": far}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Kind of family -> its folder, in which each model has a folder by its name."""
    formats: Mapping[str, tuple[bool, Mapping[str, Dtype]]] = {
        "float32": (False, {}),
        "tied": (True, {}),
        "mixed": (False, {"a": "BF16", "b": "F16"}),
    }
    found = {}
    for kind, (tied, dtypes) in formats.items():
        folder = tmp_path_factory.mktemp(kind)
        for name, tensors in family(tied=tied).items():
            write_checkpoint(folder / name, tensors, dtype=dtypes.get(name, "F32"))
        found[kind] = folder
    return found


def weights(folder: Path) -> dict[str, Array]:
    """All tensors of a model on disk."""
    return {
        name: as_float64(tensor.read(0, tensor.count), tensor.format)
        for name, tensor in open_checkpoint(folder).tensors.items()
    }


def recipe(method: str, *models: str | dict[str, Any], **keys: Any) -> dict[str, Any]:
    """mergekit's configuration; a model is a name, or a name with its parameters."""
    entries = [
        {"model": f"{{{model}}}"}
        if isinstance(model, str)
        else {"model": f"{{{model.pop('model')}}}", "parameters": model}
        for model in ({**model} if isinstance(model, dict) else model for model in models)
    ]
    if base := keys.pop("base", None):
        keys["base_model"] = f"{{{base}}}"
    return {"merge_method": method, "models": entries, **keys}


def on(model: str, weight: Any) -> dict[str, Any]:
    """A model with a weight of its own."""
    return {"model": model, "weight": weight}


# Method and what is special; "tied" and "mixed" are families of their own.
CASES: Mapping[str, dict[str, Any]] = {
    "linear": recipe("linear", on("a", 0.3), on("b", 0.9), on("far", "1e-1")),
    "linear-sum": recipe("linear", on("a", 0.3), on("b", -0.4), parameters={"normalize": False}),
    "linear-base-is-an-input": recipe(
        "linear", on("a", 3), "b", base="c", parameters={"weight": 1}
    ),
    "linear-gradients": recipe(
        "linear",
        on("a", [0, 1]),
        on("b", [{"filter": "mlp", "value": [1, 0.2, 5]}, {"filter": "norm", "value": 2}]),
        parameters={"weight": 0.5, "normalize": [{"filter": "q_proj", "value": "no"}]},
    ),
    "linear-one": recipe("linear", on("a", 2)),
    "task_arithmetic": recipe("task_arithmetic", on("a", 0.6), on("b", 0.8), base="base"),
    "task_arithmetic-normalize": recipe(
        "task_arithmetic",
        *(on("a", 0.6), on("b", -0.2), "base", on("far", 0.1)),
        base="base",
        parameters={"normalize": True, "lambda": 0.7, "int8_mask": True, "density": 0.1},
    ),
    "task_arithmetic-weights-cancel": recipe(
        "task_arithmetic",
        *(on("a", 0.3), on("b", -0.3)),
        base="far",
        parameters={"normalize": True, "lambda": [0, 2]},
    ),
    "task_arithmetic-alone": recipe("task_arithmetic", "a", base="a"),
    "slerp": recipe("slerp", "a", "b", base="a", parameters={"t": 0.3}),
    "slerp-far": recipe("slerp", "far", base="c", parameters={"t": 0.5}),
    "slerp-paper": recipe("slerp", "far", "b", base="b", parameters={"t": PAPER}),
    "slerp-outside": recipe("slerp", "base", "far", base="base", parameters={"t": 1.25}),
    "nuslerp": recipe("nuslerp", on("a", 1), on("far", 3)),
    "nuslerp-near": recipe("nuslerp", on("a", 1), on("b", 3)),
    "nuslerp-base": recipe("nuslerp", on("a", 0.2), on("b", 0.6), base="base"),
    "nuslerp-gradient": recipe(
        "nuslerp",
        on("a", DEPTH),
        on("far", [{"filter": "mlp", "value": 0.5}]),
        base="c",
        parameters={"weight": 1, "nuslerp_row_wise": True},
    ),
    "nuslerp-weights-cancel": recipe("nuslerp", on("a", 1), on("far", -1)),
    "nuslerp-same": recipe("nuslerp", on("a", 1), on("a2", 3), base="base"),
    "multislerp": recipe("multislerp", on("a", 0.2), on("b", 0.5), on("far", 0.4)),
    "multislerp-base": recipe(
        "multislerp", on("a", [1, 3]), "b", on("c", 2), base="base", parameters={"weight": 0.5}
    ),
    "multislerp-parameters": recipe(
        "multislerp",
        *(on("a", 0.2), on("b", 0.5), on("far", -0.1)),
        base="c",
        parameters={"normalize_weights": False, "eps": 0.01},
    ),
    "multislerp-one": recipe("multislerp", on("a", 0.2), base="base"),
    "karcher": recipe("karcher", "a", "b", "far"),
    "karcher-near": recipe("karcher", "a", "b"),
    "karcher-base-is-an-input": recipe(
        "karcher", "a", "far", base="base", parameters={"max_iter": 3, "tol": "1e-9"}
    ),
    "karcher-one": recipe("karcher", "a"),
    "model_stock": recipe("model_stock", "a", "b", "c", base="base"),
    "model_stock-far": recipe("model_stock", "far", "a", "base", base="base"),
    "model_stock-other-base": recipe("model_stock", "a", "b", base="c"),
    "tied": recipe("slerp", "a", "far", base="a", parameters={"t": PAPER}),
    "tied-linear": recipe("linear", on("a", [0, 1]), on("b", [1, 0.5])),
    "mixed-slerp": recipe("slerp", "a", "far", base="a", parameters={"t": PAPER}),
    "mixed-model_stock": recipe("model_stock", "a", "b", "c", base="base"),
    "mixed-karcher": recipe("karcher", "a", "b", "far", dtype="float32"),
}


# Greatest error, as a share of the tensor's largest weight: the rounding of mergekit's own steps.
TOLERANCE: Mapping[str, float] = {"float32": 1e-6, "float64": 1e-13}


def prepared(case: str, folders: Mapping[str, Path]) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of a case, its configuration, and which model of the statistics is meant."""
    folder = folders.get(case.split("-")[0], folders["float32"])
    paths = {name: str(folder / name) for name in ("base", *MODELS)}
    # Another way to the same model.
    paths["a2"] = f"{folder}/./a"
    meant = {path: None if name == "base" else name[0] for name, path in paths.items()}
    meant[paths["far"]] = "far"
    return folder, fill(CASES[case], paths), meant


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_the_child_is_mergekits(
    case: str, dtype: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """Our factors make mergekit's child, but for rounding in the format that it computes in."""
    folder, config, meant = prepared(case, folders)
    if dtype == "float64":
        config |= {"dtype": dtype, "out_dtype": dtype}
    Mergekit(OPTIONS).merge(config, tmp_path / "child")
    found = weights(tmp_path / "child")

    base, *others = (weights(folder / name) for name in ("base", *MODELS))
    models = dict(zip(MODELS, others, strict=True))
    stats = stats_of(base, models)
    plan = compile_recipe(config, tensors=stats.tensors, layers=LAYERS)
    assert isinstance(plan, Blend)
    child = dense(base, models, coefficients(plan, stats, meant))
    assert set(found) == set(child)
    errors = {
        name: float(np.abs(found[name] - values).max() / (np.abs(values).max() or 1))
        for name, values in child.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < TOLERANCE[dtype], worst


def test_the_predicted_kinship_is_that_of_mergekits_child(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """From real statistics to a real child, measured: as kin to all as was said before."""
    _, config, meant = prepared("slerp-paper", folders)
    base, *parents = (open_checkpoint(folders["float32"] / name) for name in ("base", *MODELS))
    stats = measure(base, parents)
    plan = compile_recipe(config, tensors=stats.tensors)
    assert isinstance(plan, Blend)
    row = child_statistics(stats, coefficients(plan, stats, meant))
    Mergekit(OPTIONS).merge(config, tmp_path / "child")
    measured = measure(base, [*parents, open_checkpoint(tmp_path / "child")])
    found, expected = (
        kinship_from(each, base="base", total_parameters=1)
        for each in (row.joined(stats, "child"), measured)
    )
    for metric in METRICS:
        assert np.allclose(found.matrix(metric), expected.matrix(metric), rtol=1e-5, atol=1e-6)


# Parameters, as mergekit's planner resolves them for each tensor, without a merge.

numbers = st.one_of(
    st.floats(-2, 2), st.integers(-3, 3), st.booleans(), st.sampled_from(["0.25", "1e-3", " 2 "])
)
gradients = st.one_of(numbers, st.lists(numbers, max_size=5))
parts = st.sampled_from(["mlp", "self_attn", "norm", "layers.1", "lm_head", "*", "", "nowhere"])
conditions = st.fixed_dictionaries({"value": gradients}, optional={"filter": parts})
anything = st.one_of(gradients, conditions, st.lists(conditions, max_size=4))


def planned(config: dict[str, Any]) -> dict[str, Any]:
    """The tensors of the child and mergekit's tasks for them."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    parsed, options = MergeConfiguration.model_validate(config), MergeOptions()
    architecture = get_architecture_info(parsed, options)
    out_config = parsed.referenced_models()[0].config()
    # Planned is not done: nothing is written.
    tasks = MergePlanner(parsed, architecture, options, out_config).plan_to_disk("nowhere")
    return {task.tensor_name: task.tensor_task for task in tasks if hasattr(task, "tensor_name")}


@given(own=st.lists(anything, min_size=2, max_size=2), everyone=anything, shared=anything)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_parameters_are_resolved_as_mergekit_resolves_them(
    method: str, own: list[Any], everyone: Any, shared: Any, folders: Mapping[str, Path]
) -> None:
    """Lists, filters, gradients, texts, precedence: the same number for each tensor and input."""
    config = recipe(
        method,
        *(on(model, setting) for model, setting in zip("ab", own, strict=True)),
        base="c",
        parameters={"weight": everyone, "lambda": shared},
    )
    config = fill(config, {name: str(folders["float32"] / name) for name in "abc"})
    tensors = tuple(family()["base"])
    try:
        tasks = planned(config)
    except RuntimeError:  # no value for some tensor
        with pytest.raises(ConfigError, match=r"expected a value for \S+, found none$"):
            compile_recipe(config, tensors=tensors)
        return
    plan = compile_recipe(config, tensors=tensors)
    assert isinstance(plan, Blend)
    assert plan.weight_TM is not None
    for t, name in enumerate(tensors):
        task = tasks[name]
        assert tuple(map(str, task.model_order)) == plan.models
        for m, model in enumerate(task.model_order):
            value = task.input_parameters[model]
            expected = dict(value.items()).get("weight", np.nan)
            assert plan.weight_TM[t, m] == pytest.approx(expected, rel=1e-15, nan_ok=True)
        for key, values_T in plan.shared_T.items():
            assert values_T[t] == pytest.approx(float(task.parameters[key]), rel=1e-15)


REFUSED: Mapping[str, dict[str, Any]] = {
    "no model": recipe("linear"),
    "no t": recipe("slerp", "a", "b", base="a"),
    "no base": recipe("slerp", "a", "b", parameters={"t": 0.5}),
    "too many": recipe("slerp", "a", "b", base="c", parameters={"t": 0.5}),
    "too few": recipe("model_stock", "a", base="base"),
    "twice": recipe("linear", on("a", 1), on("a", 1)),
    "no weight": recipe("task_arithmetic", on("a", 1), "b", base="base"),
    "no weight of an input": recipe("linear", on("a", 1), base="base"),
    "no number": recipe("linear", on("a", "much")),
    "no whole number": recipe("karcher", "a", "b", parameters={"max_iter": [1, 2]}),
    "neither yes nor no": recipe("linear", on("a", 1), parameters={"normalize": 3}),
    "conditions and numbers": recipe("linear", on("a", [{"value": 1}, 2])),
    "no value": recipe("linear", on("a", [{"filter": "mlp"}])),
    "nothing": recipe("linear", on("a", None)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_by_mergekit(
    case: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """A recipe that is a ConfigError here is an error there."""
    names = ("base", *MODELS)
    config = fill(REFUSED[case], {name: str(folders["float32"] / name) for name in names})
    with pytest.raises(ConfigError):
        compile_recipe(config, tensors=tuple(family()["base"]))
    with pytest.raises(MergeError):
        Mergekit(OPTIONS).merge(config, tmp_path / "child")


@pytest.mark.parametrize("method", ["linear", "multislerp"])
def test_where_mergekit_divides_by_zero(
    method: str, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    """Weights that cancel are refused; mergekit writes a model without a finite weight."""
    folder = folders["float32"]
    config = recipe(method, on("a", 1), on("b", -1))
    config = fill(config, {name: str(folder / name) for name in "ab"})
    models = {name: weights(folder / name) for name in ("base", "a", "b")}
    stats = stats_of(models.pop("base"), models)
    plan = compile_recipe(config, tensors=stats.tensors)
    assert isinstance(plan, Blend)
    with pytest.raises(MergeError, match="expected weights whose sum is not 0"):
        coefficients(plan, stats, {str(folder / name): name for name in "ab"})
    Mergekit(OPTIONS).merge(config, tmp_path / "child")
    assert not np.isfinite(weights(tmp_path / "child")["model.norm.weight"]).any()


def test_rows_have_factors_of_their_own(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """What is declared to be not linear is no mixture of its inputs, by one number a tensor."""
    for number, config in enumerate(
        [
            recipe("nuslerp", on("a", 1), on("far", 2), parameters={"nuslerp_flatten": False}),
            recipe("model_stock", "a", "far", base="base", parameters={"filter_wise": True}),
            recipe("ties", on("a", 1), on("far", 1), base="base", parameters={"density": 0.5}),
        ]
    ):
        names = ("base", *MODELS)
        filled = fill(config, {name: str(folders["float32"] / name) for name in names})
        name = "model.layers.0.mlp.up_proj.weight"
        assert isinstance(compile_recipe(filled, tensors=[name]), NotLinear)
        Mergekit(OPTIONS).merge(filled, tmp_path / str(number))
        inputs = [weights(folders["float32"] / model)[name].ravel() for model in names]
        child_B = weights(tmp_path / str(number))[name].ravel()
        _, (left,), *_ = np.linalg.lstsq(np.transpose(inputs), child_B)
        assert left > 1e-6 * (child_B @ child_B)
