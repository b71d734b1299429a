"""mergekit's configuration to a `Blend`: which method, which inputs, which parameters where.

Axes: T tensors, M inputs of the merge.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from modelkin.errors import ConfigError
from modelkin.gram import Float64Array
from modelkin.tensor_names import group

Kind = Literal["number", "whole number", "yes or no"]


class Shared(NamedTuple):
    """A parameter that all inputs share; without default it is required."""

    name: str
    kind: Kind
    default: float | None = None


class Method(NamedTuple):
    """What a merge method takes.

    Attributes:
        base: whether `base_model` is "required", "optional", or "an input" like any other.
        others: least and greatest number of inputs besides the base.
        weighted: whether each input has a `weight` (the base only where it is "an input").
        shared: the parameters that all inputs share.
    """

    base: Literal["required", "optional", "an input"]
    others: tuple[int, float]
    weighted: bool
    shared: tuple[Shared, ...]


# mergekit 0.1.5. Parameters that change nothing are left out, such as `density` or `int8_mask` of
# task_arithmetic; mergekit passes over names that a method does not know.
METHODS: Mapping[str, Method] = {
    "linear": Method("an input", (1, math.inf), True, (Shared("normalize", "yes or no", True),)),
    "task_arithmetic": Method(
        "required",
        (0, math.inf),
        True,
        (Shared("normalize", "yes or no", False), Shared("lambda", "number", 1)),
    ),
    "slerp": Method("required", (1, 1), False, (Shared("t", "number"),)),
    "nuslerp": Method("optional", (2, 2), True, (Shared("nuslerp_flatten", "yes or no", True),)),
    "multislerp": Method(
        "optional",
        (1, math.inf),
        True,
        (Shared("normalize_weights", "yes or no", True), Shared("eps", "number", 1e-8)),
    ),
    "karcher": Method(
        "an input",
        (1, math.inf),
        False,
        (Shared("max_iter", "whole number", 10), Shared("tol", "number", 1e-5)),
    ),
    "model_stock": Method(
        "required", (2, math.inf), False, (Shared("filter_wise", "yes or no", False),)
    ),
}
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_YES_OR_NO = {
    **dict.fromkeys(("1", "true", "t", "yes", "y", "on"), True),
    **dict.fromkeys(("0", "false", "f", "no", "n", "off"), False),
}


@dataclass(frozen=True)
class NotLinear:
    """The recipe makes no child by one number a tensor and input, or it is not known that it does.

    Attributes:
        reason: in words, to be shown.
    """

    reason: str


@dataclass(frozen=True)
class Blend:
    """A recipe that is linear in each tensor, with its parameters for each of them.

    Attributes:
        method: mergekit's `merge_method`.
        models: the recipe's names of the inputs, the axis M, in mergekit's order: those of
            `models`, then `base_model` where it is not among them.
        base: the recipe's `base_model`, where the method does not take it as an input like any
            other.
        tensors: the tensors' names, the axis T.
        weight_TM: `weight` of each input; NaN for `base`. `None` where the method has no weights.
        shared_T: parameter that all inputs share -> its values; 1 and 0 for true and false.
    """

    method: str
    models: tuple[str, ...]
    base: str | None
    tensors: tuple[str, ...]
    weight_TM: Float64Array | None
    shared_T: Mapping[str, Float64Array]


def compile_recipe(
    config: Mapping[str, Any],
    *,
    tensors: Sequence[str],
    layers: int | None = None,
    same_vocabulary: bool = False,
) -> Blend | NotLinear:
    """See what a recipe does to each tensor, before anything is known of the weights.

    mergekit's rules: a parameter is taken from the model's own `parameters`, else from those of
    the recipe, else it is the default. In a list of conditions the first counts whose `filter` is
    part of the tensor's name. A list of numbers is a gradient, interpolated at the depth of the
    tensor: 0 in the first layer, 1 in the last. What is in no layer is at depth 0: embeddings,
    but also the last norm and the head.

    Args:
        config: mergekit's configuration; the names of its models are not looked at.
        tensors: the names of the tensors that the child will have.
        layers: number of layers; default: what the names say.
        same_vocabulary: all models have the same tokenizer, and embeddings of its length: then
            `tokenizer_source` changes no weight.

    Raises:
        ConfigError: the recipe is none that mergekit would carry out.
    """
    name = config.get("merge_method")
    if not isinstance(name, str):
        raise _wrong("merge_method", "a name", name)
    if reason := _elsewhere(config, name, same_vocabulary):
        return NotLinear(reason)
    method = METHODS[name]
    entries = _models(config.get("models"))
    base = config.get("base_model")
    if isinstance(base, Mapping) or any(isinstance(model, Mapping) for model, _ in entries):
        return NotLinear("a model is given in parts, not by its name")
    models = _inputs([model for model, _ in entries], base, name, method)
    origin = base if method.base != "an input" else None

    everyone = _settings(config.get("parameters"), "parameters")
    own = dict(entries)
    used = ["weight"] * method.weighted + [parameter.name for parameter in method.shared]
    depth_T: Sequence[float] = [0.0] * len(tensors)
    if any(
        _is_gradient(scope[key])
        for scope in (everyone, *own.values())
        for key in used
        if key in scope
    ):
        found = _depths(tensors, layers)
        if isinstance(found, NotLinear):
            return found
        depth_T = found

    weight_TM = None
    if method.weighted:
        weight = Shared("weight", "number")
        nan = np.full(len(tensors), np.nan)
        weight_TM = np.stack(
            [
                nan
                if model == origin
                else _resolve(weight, [own.get(model, {}), everyone], tensors, depth_T, of=model)
                for model in models
            ],
            axis=1,
        )
    shared_T = {
        parameter.name: _resolve(parameter, [everyone], tensors, depth_T)
        for parameter in method.shared
    }
    if np.any(shared_T.get("filter_wise", 0)):
        return NotLinear("model_stock with filter_wise has a factor for each row")
    if not np.all(shared_T.get("nuslerp_flatten", 1)):
        return NotLinear("nuslerp without nuslerp_flatten has an angle for each row or column")
    return Blend(name, models, origin, tuple(tensors), weight_TM, shared_T)


def _elsewhere(config: Mapping[str, Any], name: str, same_vocabulary: bool) -> str | None:
    """Why a recipe is mergekit's alone, as far as its keys say."""
    if name not in METHODS:
        return f"merge_method {name} is none of {', '.join(METHODS)}"
    for key, reason in {
        "slices": "takes layers apart",
        "modules": "has a recipe for each module",
        "tokenizer": "makes a new vocabulary",
        "chat_template": "is written by mergekit",
    }.items():
        if config.get(key):
            return f"{key}: {reason}"
    if config.get("tokenizer_source") and not same_vocabulary:
        return "tokenizer_source: may move rows of embeddings and head"
    for key in ("dtype", "out_dtype"):
        dtype = config.get(key)
        if dtype and str(dtype).removeprefix("torch.") not in _FLOATS:
            return f"{key}: {dtype!r} is none of {', '.join(_FLOATS)}"
    return None


def _models(entries: Any) -> list[tuple[Any, Mapping[str, Any]]]:
    """The model and the parameters of each entry of `models`."""
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise _wrong("models", "a list of models", entries)
    found: list[tuple[Any, Mapping[str, Any]]] = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str | Mapping):
            raise _wrong(f"models[{position}]", "a mapping with the key 'model'", entry)
        where = f"models[{position}].parameters"
        found.append((entry["model"], _settings(entry.get("parameters"), where)))
    return found


def _inputs(models: list[str], base: Any, name: str, method: Method) -> tuple[str, ...]:
    """All inputs of the merge, in mergekit's order."""
    if base is not None and not isinstance(base, str):
        raise _wrong("base_model", "a name", base)
    if base is None and method.base == "required":
        raise _wrong("base_model", f"a model, as {name} has it", None)
    if len(set(models)) < len(models):
        raise _wrong("models", "different models", ", ".join(models))
    inputs = (*models, base) if base is not None and base not in models else tuple(models)
    besides = base is not None and method.base != "an input"
    count = len(inputs) - besides
    least, greatest = method.others
    if not least <= count <= greatest:
        expected = f"{least}" if least == greatest else f"at least {least}"
        kind = " besides the base" if besides else ""
        raise _wrong("models", f"{expected} for {name}{kind}", count)
    return inputs


def _settings(settings: Any, where: str) -> Mapping[str, Any]:
    """Parameters as they were given, once each is a value, conditions, or a list of either."""
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise _wrong(where, "a mapping", settings)
    for name, setting in settings.items():
        parts = setting if _is_list(setting) else [setting]
        conditions = [part for part in parts if isinstance(part, Mapping)]
        for part in parts:
            if conditions and not isinstance(part, Mapping):
                raise _wrong(f"{where}.{name}", "only conditions with a value", part)
            value = part.get("value") if conditions else part
            scalars = value if conditions and _is_list(value) else [value]
            if not all(isinstance(scalar, bool | int | float | str) for scalar in scalars):
                raise _wrong(f"{where}.{name}", "a value, conditions, or a list of them", part)
            if conditions and not isinstance(part.get("filter"), str | None):
                raise _wrong(f"{where}.{name}.filter", "a part of a name", part["filter"])
    return settings


def _is_gradient(setting: Any) -> bool:
    """Whether the depth of a tensor decides about its value."""
    if isinstance(setting, Mapping):
        return _is_gradient(setting.get("value"))
    if not _is_list(setting):
        return False
    return any(_is_gradient(part) for part in setting) or (
        len(setting) > 1 and not isinstance(setting[0], Mapping)
    )


def _depths(tensors: Sequence[str], layers: int | None) -> list[float] | NotLinear:
    """Where each tensor is: 0 in the first layer, 1 in the last, 0 outside of them."""
    if not tensors:
        return []
    outside = ("embeddings", "norm", "head", "other")
    groups = group(tensors, "layer")
    inside = {label: found for label, found in groups.items() if label not in outside}
    if not inside or not all(label.isdecimal() for label in inside):
        found = "none" if not inside else "more than one stack of them"
        return NotLinear(
            f"a gradient needs one stack of layers, and the tensors' names have {found}"
        )
    last = max(map(int, inside))
    count = layers or last + 1
    if last >= count:
        return NotLinear(f"a gradient needs layers 0 to {count - 1}, and there is a layer {last}")
    depth_T = [0.0] * len(tensors)
    for label, positions in inside.items():
        for position in positions:
            # A single layer is the last one.
            depth_T[position] = int(label) / (count - 1) if count > 1 else 1.0
    return depth_T


def _resolve(
    parameter: Shared,
    scopes: Sequence[Mapping[str, Any]],
    tensors: Sequence[str],
    depth_T: Sequence[float],
    *,
    of: str | None = None,
) -> Float64Array:
    """A parameter's value for each tensor: of the first scope that has one, else the default."""
    given = [scope[parameter.name] for scope in scopes if parameter.name in scope]
    values: list[float] = []
    for tensor, depth in zip(tensors, depth_T, strict=True):
        found = (_evaluate(setting, tensor, depth, parameter) for setting in given)
        value = next((value for value in found if value is not None), parameter.default)
        if value is None:
            whose = f" of {of}" if of else ""
            raise _wrong(f"parameters.{parameter.name}{whose}", f"a value for {tensor}", None)
        values.append(value)
    return np.array(values, np.float64)


def _evaluate(setting: Any, tensor: str, depth: float, parameter: Shared) -> float | None:
    """What a setting says about a tensor; `None` if nothing."""
    if not _is_list(setting):
        setting = [setting]
    if any(isinstance(part, Mapping) for part in setting):
        matching = (
            part["value"]
            for part in setting
            if part.get("filter") in (None, "*") or part["filter"] in tensor
        )
        # The first that matches decides, even if it says nothing.
        first: Any = next(matching, [])
        return _evaluate(first, tensor, depth, parameter)
    if not setting:
        return None
    values = [_number(part, parameter) for part in setting]
    at = depth * (len(values) - 1)
    low = int(at)
    if parameter.kind == "yes or no":
        return values[low]
    high = min(low + 1, len(values) - 1)
    return _number((1 - (at - low)) * values[low] + (at - low) * values[high], parameter)


def _number(value: Any, parameter: Shared) -> float:
    """A value as mergekit reads it: text and yes or no are numbers too, where they can be."""
    found: float | None = None
    if isinstance(value, str) and parameter.kind == "yes or no":
        found = _YES_OR_NO.get(value.lower())
    elif isinstance(value, bool | int | float | str):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = None
    if (
        found is None
        or not math.isfinite(found)
        or (parameter.kind == "whole number" and found != int(found))
        or (parameter.kind == "yes or no" and found not in (0, 1))
    ):
        raise _wrong(f"parameters.{parameter.name}", f"a {parameter.kind}", value)
    return float(found)


def _is_list(setting: Any) -> bool:
    return isinstance(setting, Sequence) and not isinstance(setting, str)


def _wrong(key: str, expected: str, found: Any) -> ConfigError:
    shown = "none" if found is None else " ".join(str(found).split())
    return ConfigError(f"recipe: {key}: expected {expected}, found {shown}")
