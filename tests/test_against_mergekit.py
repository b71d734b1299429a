"""Where a native child and mergekit's differ, and why: mergekit's rounding on the way.

`by_steps` is each method as a sequence of steps on whole tensors, in the order in which mergekit
takes them. Done in the format in which mergekit computes, each step rounded to it, they give
mergekit's child bit by bit. Done in float64 and rounded once, the same steps give the native child.
So whatever differs between the two is what mergekit rounds on the way, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Array, Dtype, llama_like, perturbed, write_checkpoint
from test_blend_mergekit import CASES, LAYERS, OPTIONS, weights
from test_native_merge import (
    KINDS,
    NEAR,
    assert_half_a_unit,
    filled,
    terms,
    unit,
    write_family,
)

from modelkin.blend import Blend, compile_recipe
from modelkin.checkpoint import open_checkpoint
from modelkin.measuring import streaming
from modelkin.merging import Mergekit, Native
from modelkin.merging.writing import DTYPE_NAMES

torch = pytest.importorskip("torch")
pytest.importorskip("mergekit")

Parameters = Mapping[str, float]

# Methods as steps. `inputs` are the models that are no base, each with its weight.


def wide(tensor: Any) -> Any:
    """In float32, or in float64 where it is: what mergekit widens for some steps."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def linear(base: Any, inputs: list[Any], weight: list[float], shared: Parameters) -> Any:
    """Summed in float32."""
    total = torch.zeros_like(wide(inputs[0]))
    given = torch.tensor(weight, dtype=total.dtype)
    for tensor, factor in zip(inputs, given, strict=True):
        total.addcmul_(tensor, factor)
    return total / given.sum() if shared["normalize"] else total


def task_arithmetic(base: Any, inputs: list[Any], weight: list[float], shared: Parameters) -> Any:
    """Differences, scaled differences and their sum are rounded each."""
    if not inputs:
        return base
    given = torch.tensor(weight, dtype=base.dtype)
    scaled = torch.stack([(tensor - base) * w for tensor, w in zip(inputs, given, strict=True)])
    change = scaled.sum(dim=0)
    if shared["normalize"] and abs(given.sum()) >= 1e-8:
        change = change / given.sum()
    return base + change * shared["lambda"] if shared["lambda"] != 1 else base + change


def slerp(base: Any, inputs: list[Any], weight: list[float], shared: Parameters) -> Any:
    """In float32; the straight line where the angle is small."""
    # Rows, as there: sums over all elements need not be added up in the order of sums over a row.
    one, other = (wide(tensor).reshape(1, -1) for tensor in (base, *inputs))
    t = torch.tensor(shared["t"], dtype=one.dtype)
    norms = [torch.linalg.vector_norm(tensor, dim=1) for tensor in (one, other)]
    units = [
        tensor / (norm if norm > 1e-8 else 1)
        for tensor, norm in zip((one, other), norms, strict=True)
    ]
    cosine = (units[0] * units[1]).sum(dim=1).clamp(-1, 1)
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * other
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    return torch.sin((1 - t) * angle) / sine * one + torch.sin(t * angle) / sine * other


def nuslerp(base: Any, inputs: list[Any], weight: list[float], shared: Parameters) -> Any:
    """The angle too is of the format that is computed in."""
    one, other = (
        tensor.flatten() if base is None else (tensor - base).flatten() for tensor in inputs
    )
    t = 0.5 if abs(sum(weight)) < 1e-6 else weight[1] / sum(weight)
    units = [tensor / torch.norm(tensor).clamp(min=1e-7) for tensor in (one, other)]
    cosine = (units[0] * units[1]).sum().clamp(-1, 1)
    if 1 - cosine.square() <= 1e-16:
        between = (1 - t) * one + t * other
    else:
        angle = torch.acos(cosine)
        mixed = torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other
        between = mixed / torch.sin(angle)
    return between if base is None else base.flatten() + between


def multislerp(base: Any, inputs: list[Any], weight: list[float], shared: Parameters) -> Any:
    """To the sphere, to the tangents at the mean direction, and back."""
    if len(inputs) == 1:
        return inputs[0]
    rows = torch.stack([tensor.flatten() for tensor in inputs])
    if base is not None:
        rows = rows - base.flatten()
    given = torch.tensor(weight, dtype=rows.dtype)
    if shared["normalize_weights"]:
        given = given / given.sum()
    norms = torch.norm(rows, dim=-1, keepdim=True)
    units = rows / (norms + shared["eps"])
    mean = (units * given[:, None]).sum(0)
    mean = mean / torch.norm(mean)
    tangents = units - (units * mean).sum(-1, keepdim=True) * mean
    pull = (tangents * given[:, None]).sum(0)
    length = torch.norm(pull) + shared["eps"]
    turned = mean * torch.cos(length) + pull * (torch.sin(length) / length)
    child = turned * (norms[:, 0] * given).sum()
    return child if base is None else child + base.flatten()


def karcher(base: Any, inputs: list[Any], weight: list[float], shared: Parameters) -> Any:
    """Norms in float32; the mean is rounded in each iteration."""
    if len(inputs) == 1:
        return inputs[0]
    format = inputs[0].dtype
    rows = [tensor.flatten() for tensor in inputs]
    norms = [torch.linalg.vector_norm(wide(row)) for row in rows]
    share = 1 / len(rows)
    units = [
        (row / norm).to(format)
        for row, norm in zip(rows, norms, strict=True)
        if norm > shared["tol"]
    ]
    part = share / sum([share] * len(units)) if units else 0
    mean = torch.zeros_like(rows[0])
    for one in units:
        mean = mean + part * one
    mean = (mean / torch.linalg.vector_norm(wide(mean))).to(format)
    for _ in range(int(shared["max_iter"])):
        pull = torch.zeros_like(mean)
        for one in units:
            cosine = torch.dot(mean, one).clamp(-1, 1)
            angle = torch.arccos(cosine)
            if angle >= shared["tol"]:
                pull = pull + part * (angle / torch.sin(angle)) * (one - cosine * mean)
        length = torch.linalg.vector_norm(wide(pull))
        if length < shared["tol"]:
            break
        mean = (torch.cos(length) * mean + torch.sin(length) * (pull / length)).to(format)
        mean = (mean / torch.linalg.vector_norm(wide(mean))).to(format)
    return sum(share * norm for norm in norms) * mean


def model_stock(base: Any, inputs: list[Any], weight: list[float], shared: Parameters) -> Any:
    """The mean cosine of the differences decides where between base and mean."""
    away = [(tensor - base).flatten() for tensor in inputs]
    cosines = [
        (one * other).sum(dim=-1) / (torch.norm(one) * torch.norm(other)).clamp(min=1e-6)
        for position, one in enumerate(away)
        for other in away[position + 1 :]
    ]
    cosine = torch.stack([one.clamp(-1, 1) for one in cosines]).mean()
    divisor = 1 + (len(inputs) - 1) * cosine
    t = (len(inputs) * cosine) / divisor if abs(divisor) >= 1e-6 else torch.zeros_like(cosine)
    # One element each, as mergekit has them: a number without axes would be no bfloat16.
    t = t[None]
    return t * (sum(tensor.flatten() for tensor in inputs) / len(inputs)) + (1 - t) * base.flatten()


STEPS: Mapping[str, Callable[..., Any]] = {
    step.__name__: step
    for step in (linear, task_arithmetic, slerp, nuslerp, multislerp, karcher, model_stock)
}


def by_steps(config: Mapping[str, Any], computed: str, out: str) -> dict[str, Array]:
    """The child of a recipe, each step in the format `computed`, at the end rounded to `out`."""
    format, last = getattr(torch, computed), getattr(torch, out)
    first = config.get("base_model") or config["models"][0]["model"]
    names = tuple(open_checkpoint(first).tensors)
    plan = compile_recipe(config, tensors=names, layers=LAYERS)
    assert isinstance(plan, Blend)
    stored = {model: weights(Path(model)) for model in plan.models}
    # SLERP's base is an input of it, and the first.
    inputs = [model for model in plan.models if model != plan.base]
    found: dict[str, Array] = {}
    for t, name in enumerate(names):
        tensors = {
            model: torch.from_numpy(values[name]).to(format) for model, values in stored.items()
        }
        weight = [1.0] * len(inputs)
        if plan.weight_TM is not None:
            weight = [float(plan.weight_TM[t, plan.models.index(model)]) for model in inputs]
        shared = {key: float(value_T[t]) for key, value_T in plan.shared_T.items()}
        base = tensors[plan.base] if plan.base is not None else None
        child = STEPS[plan.method](base, [tensors[one] for one in inputs], weight, shared)
        # What was widened is of the first format again before it is of the last.
        child = child.to(format).to(last).double().numpy()
        found[name] = child.reshape(stored[first][name].shape)
    return found


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", ["sharded", "mixed"])
def test_each_difference_is_mergekits_rounding(kind: str, dtype: Dtype, tmp_path: Path) -> None:
    """The same steps are mergekit's child in its format, bit by bit, and in float64 the native one.

    So the two children differ by the format of the steps alone; and where by more than one unit,
    mergekit's weight is the one that is far from the steps in float64, ours within half a unit.
    (In float16, 1e-8 is 0: where mergekit guards a division by it, it writes NaN.)
    """
    name = DTYPE_NAMES[dtype]
    folder = write_family(tmp_path / "models", dtype, **KINDS[kind])
    sizes = terms(folder)
    rounding = 0
    for case, config in {**CASES, **{f"near-{case}": one for case, one in NEAR.items()}}.items():
        config = filled({**config, "dtype": name, "out_dtype": name}, folder)
        Native(threads=1).merge(config, tmp_path / "ours" / case)
        Mergekit(OPTIONS).merge(config, tmp_path / "theirs" / case)
        ours, theirs = (weights(tmp_path / side / case) for side in ("ours", "theirs"))
        with np.errstate(invalid="ignore"):
            rounded_steps = by_steps(config, name, name)
        exact_steps = by_steps(config, "float64", "float64")
        for tensor, exact in exact_steps.items():
            here = f"{case}: {tensor}"
            np.testing.assert_array_equal(theirs[tensor], rounded_steps[tensor], here)
            # What float64 itself leaves open; its sums are of all inputs' sizes.
            slack = 1e-12 * sizes[tensor]
            our_error, their_error = (
                np.abs(child[tensor] - exact) / unit(exact, dtype) for child in (ours, theirs)
            )
            assert (our_error <= 0.5 + slack / unit(exact, dtype)).all(), here
            apart = np.abs(ours[tensor] - theirs[tensor])
            far = ~(apart <= unit(ours[tensor], dtype) + slack)
            assert not (their_error[far] <= our_error[far]).any(), here
            rounding += int(far.sum())
    # There is something to be explained.
    assert rounding > 1000


def test_large_tensors_by_every_method(tmp_path: Path) -> None:
    """Tensors that kinship measures in single precision: half a unit of float32 from the steps."""
    rng = np.random.default_rng(3)
    base = llama_like(rng, layers=LAYERS, hidden=128, intermediate=544)
    models = {name: perturbed(base, rng, scale=0.01) for name in "abc"}
    for name, tensors in {"base": base, **models}.items():
        write_checkpoint(tmp_path / name, tensors)
    assert min(base[name].size for name in base if "mlp" in name) > streaming.SMALL
    sizes = {name: sum(np.abs(one[name]) for one in (base, *models.values())) for name in base}
    for case, config in NEAR.items():
        config = filled({**config, "dtype": "float32"}, tmp_path)
        Native().merge(config, tmp_path / "children" / case)
        exact = by_steps(config, "float64", "float64")
        assert_half_a_unit(tmp_path / "children" / case, exact, sizes)
