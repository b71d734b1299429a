"""mergekit's methods as numbers: the factor of each input of a tensor, from norms and products.

Each function takes the products of the M inputs of one tensor (of the weights, or of their
differences from the merge's `base_model`) and gives the factor of each. Thresholds are those of
mergekit 0.1.5, except where it says otherwise.

Axes: T tensors, M inputs of a merge, N models; K is the statistics' base and the N models.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from modelkin.blend.recipe import Blend
from modelkin.blend.statistics import Coefficients, distances
from modelkin.errors import MergeError
from modelkin.gram import Float64Array, GramStats

# Products are sums of rounded numbers: a sine or sum of unit vectors below this is none.
_ROUNDING = 1e-6


def coefficients(blend: Blend, stats: GramStats, models: Mapping[str, str | None]) -> Coefficients:
    """The factors of base and models that make the child.

    A child of mergekit differs from them by rounding: of the inputs to `dtype`, of what is
    computed in it (all but linear and slerp, which compute in float32 or better), and of the
    child to `out_dtype`.

    Args:
        blend: of the tensors of `stats`, in their order.
        stats: of at least the models that are merged.
        models: the recipe's name of a model -> its name in `stats`, or `None` for their base.

    Raises:
        MergeError: a model or tensor is missing, or the method has no answer for these weights.
    """
    if blend.tensors != stats.tensors:
        raise MergeError(
            f"{blend.method}: expected a recipe for the {len(stats.tensors)} tensors of the "
            f"statistics, found one for {len(blend.tensors)}"
        )
    others = [name for name in blend.models if name != blend.base]
    # All but SLERP take the base as the origin, and turn or mix the differences from it.
    absolute = blend.method == "slerp" or blend.base is None
    inputs = others
    if blend.base is not None and absolute:
        inputs = [blend.base, *others]
    positions = [_position(name, stats, models) for name in inputs]
    origin = None
    if blend.base is not None and not absolute:
        origin = _position(blend.base, stats, models)

    products_TMM = _products(stats, positions, origin)
    weight_TM = np.ones(products_TMM.shape[:2])
    if blend.weight_TM is not None:
        weight_TM = blend.weight_TM[:, [blend.models.index(name) for name in inputs]]
    rule = _RULES[blend.method]
    found_TM = np.zeros_like(weight_TM)
    for t, tensor in enumerate(blend.tensors):
        shared = {name: float(value_T[t]) for name, value_T in blend.shared_T.items()}
        try:
            found_TM[t] = rule(_Tensor(products_TMM[t], weight_TM[t], shared))
        except MergeError as error:
            raise MergeError(f"{blend.method}: {tensor}: {error}") from None
        if not np.all(np.isfinite(found_TM[t])):
            raise MergeError(
                f"{blend.method}: {tensor}: expected finite factors, found {found_TM[t]}"
            )

    c_TK = np.zeros((len(stats.tensors), 1 + len(stats.models)))
    for m, position in enumerate(positions):
        c_TK[:, position] += found_TM[:, m]
    if origin is not None:
        c_TK[:, origin] += 1 - found_TM.sum(axis=1)
    return Coefficients(stats.models, stats.tensors, c_TK[:, 0], c_TK[:, 1:])


def _position(name: str, stats: GramStats, models: Mapping[str, str | None]) -> int:
    """Where a model of the recipe is on the axis K."""
    if name not in models:
        raise MergeError(f"coefficients: expected a model for the recipe's {name}, found none")
    known = models[name]
    if known is None:
        return 0
    if known not in stats.models:
        raise MergeError(f"coefficients: expected {known} in the statistics, found none")
    return 1 + stats.models.index(known)


def _products(stats: GramStats, positions: list[int], origin: int | None) -> Float64Array:
    """Products of the inputs' weights, or of their differences from the origin, T x M x M.

    theta_i . theta_j = b.b + b.delta_i + b.delta_j + delta_i . delta_j
    (theta_i - theta_o) . (theta_j - theta_o) = (d_io + d_jo - d_ij) / 2, d squared distances
    """
    if origin is None:
        cross_TK = np.pad(stats.cross_TN, ((0, 0), (1, 0)))
        gram_TKK = np.pad(stats.gram_TNN, ((0, 0), (1, 0), (1, 0)))
        all_TKK = (
            stats.base_T[:, None, None] + cross_TK[:, :, None] + cross_TK[:, None, :] + gram_TKK
        )
    elif origin == 0:
        all_TKK = np.pad(stats.gram_TNN, ((0, 0), (1, 0), (1, 0)))
    else:
        apart_TKK = distances(stats)
        from_TK = apart_TKK[:, :, origin]
        all_TKK = (from_TK[:, :, None] + from_TK[:, None, :] - apart_TKK) / 2
    return all_TKK[:, positions][:, :, positions]


class _Tensor(NamedTuple):
    """One tensor: the products of its inputs, their weights, and the parameters they share."""

    products_MM: Float64Array
    weight_M: Float64Array
    shared: Mapping[str, float]


def _linear(of: _Tensor) -> Float64Array:
    """sum_i w_i theta_i, over sum_i w_i with `normalize`."""
    return _normalised(of.weight_M) if of.shared["normalize"] else of.weight_M


def _task_arithmetic(of: _Tensor) -> Float64Array:
    """`lambda` sum_i w_i delta_i; with `normalize` over sum_i w_i, unless that is 0."""
    total = float(of.weight_M.sum())
    divisor = total if of.shared["normalize"] and abs(total) >= 1e-8 else 1.0
    return of.weight_M * (of.shared["lambda"] / divisor)


def _slerp(of: _Tensor) -> Float64Array:
    """sin((1 - t) theta) / sin(theta) of the base, sin(t theta) / sin(theta) of the other.

    (1 - t) and t where |cos(theta)| > 0.9995; tensors of zeros are at right angles to all.
    """
    norm_M = _norms(of.products_MM)
    norm_M = np.where(norm_M > 1e-8, norm_M, 1)
    cosine = float(np.clip(of.products_MM[0, 1] / (norm_M[0] * norm_M[1]), -1, 1))
    return _on_the_arc(of.shared["t"], cosine, lerp=abs(cosine) > 0.9995)


def _nuslerp(of: _Tensor) -> Float64Array:
    """SLERP with t = w_1 / (w_0 + w_1), or 0.5 if those cancel.

    mergekit takes the straight line where sin(theta) is below 1e-8, which neither its float32 nor
    our sums resolve; ours is 1e-6. At small angles line and arc are the same, at angles near pi
    what mergekit's rounding makes of them is anyone's guess.
    """
    total = float(of.weight_M.sum())
    t = 0.5 if abs(total) < 1e-6 else float(of.weight_M[1]) / total
    norm_M = np.maximum(_norms(of.products_MM), 1e-7)
    cosine = float(np.clip(of.products_MM[0, 1] / (norm_M[0] * norm_M[1]), -1, 1))
    return _on_the_arc(t, cosine, lerp=1 - cosine**2 <= _ROUNDING**2)


def _multislerp(of: _Tensor) -> Float64Array:
    """The direction of the weighted sum of unit vectors, with the weighted mean of the norms.

        u_i = v_i / (|v_i| + eps),  s = sum_i w_i u_i,  child = cos(eps) sum_i w_i |v_i| s / |s|

    mergekit goes on to mean the tangents at s / |s|. But sum_i w_i (u_i - (u_i.s) s / |s|²) = 0 by
    the definition of s: what it adds is rounding, and the cosine of `eps`.
    """
    if len(of.weight_M) == 1:
        return np.ones(1)
    normalize, eps = of.shared["normalize_weights"], of.shared["eps"]
    weight_M = _normalised(of.weight_M) if normalize else of.weight_M
    norm_M = _norms(of.products_MM)
    if not np.all(norm_M + eps > 0):
        raise MergeError(f"expected eps above 0 for a tensor of zeros, found {eps:g}")
    # What is 0 has no part, rather than a large one.
    unit_M = np.where(norm_M > 0, weight_M / (norm_M + eps), 0)
    length = _length(of.products_MM, unit_M)
    if length < max(eps, _ROUNDING * float(np.abs(weight_M).sum())):
        if len(weight_M) == 2:
            return weight_M
        raise MergeError("expected directions whose weighted sum is not 0, found that they cancel")
    factor_M: Float64Array = unit_M * (np.cos(eps) * float(weight_M @ norm_M) / length)
    return factor_M


def _karcher(of: _Tensor) -> Float64Array:
    """The mean on the sphere, found by `max_iter` steps along the mean of logarithms at it.

        log(u_i) = theta_i / sin(theta_i) (u_i - cos(theta_i) mean),  theta_i = angle(u_i, mean)

    Scaled by the mean of the norms. Tensors no longer than `tol` count for the scale only; if all
    are, the child is 0.
    """
    if len(of.weight_M) == 1:
        return np.ones(1)
    tol = of.shared["tol"]
    norm_M = _norms(of.products_MM)
    long_V = np.flatnonzero(norm_M > tol)
    found_M = np.zeros(len(norm_M))
    if not len(long_V):
        return found_M
    norm_V = norm_M[long_V]
    cosine_VV = of.products_MM[np.ix_(long_V, long_V)] / np.outer(norm_V, norm_V)
    share = 1 / len(long_V)
    mean_V = np.full(len(long_V), share)
    length = _length(cosine_VV, mean_V)
    # Where they cancel the first one is the start.
    mean_V = mean_V / length if length >= max(tol, _ROUNDING) else np.eye(len(long_V))[0]
    for _ in range(int(of.shared["max_iter"])):
        cosine_V = np.clip(cosine_VV @ mean_V, -1, 1)
        angle_V = np.arccos(cosine_V)
        sine_V = np.sin(angle_V)
        # Nothing pulls from the mean itself, nor from the point opposite to it.
        moved_V = (angle_V >= tol) & (sine_V >= _ROUNDING)
        pull_V = np.where(moved_V, angle_V / np.where(moved_V, sine_V, 1), 0) * share
        tangent_V = pull_V - float(pull_V @ cosine_V) * mean_V
        step = _length(cosine_VV, tangent_V)
        if step <= tol:
            break
        mean_V = np.cos(step) * mean_V + np.sin(step) * tangent_V / step
        length = _length(cosine_VV, mean_V)
        if length > tol:
            mean_V = mean_V / length
    found_M[long_V] = mean_V / norm_V * norm_M.mean()
    return found_M


def _model_stock(of: _Tensor) -> Float64Array:
    """t / n of each difference, with t = n c / (1 + (n - 1) c), c the mean cosine of the pairs."""
    count = len(of.weight_M)
    norm_M = _norms(of.products_MM)
    cosine_MM = np.clip(of.products_MM / np.maximum(np.outer(norm_M, norm_M), 1e-6), -1, 1)
    cosine = float(cosine_MM[np.triu_indices(count, k=1)].mean())
    divisor = 1 + (count - 1) * cosine
    return np.full(count, 0.0 if abs(divisor) < 1e-6 else cosine / divisor)


_RULES: Mapping[str, Callable[[_Tensor], Float64Array]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
}


def _on_the_arc(t: float, cosine: float, *, lerp: bool) -> Float64Array:
    if lerp:
        return np.array([1 - t, t])
    angle = np.arccos(cosine)
    factor_M: Float64Array = np.array([np.sin((1 - t) * angle), np.sin(t * angle)]) / np.sin(angle)
    return factor_M


def _normalised(weight_M: Float64Array) -> Float64Array:
    """Weights that sum to 1. mergekit would write infinities where they cancel."""
    total = float(weight_M.sum())
    if abs(total) <= 1e-7 * float(np.abs(weight_M).sum()):
        raise MergeError(
            "expected weights whose sum is not 0, to be normalised, found "
            + ", ".join(f"{weight:g}" for weight in weight_M)
        )
    return weight_M / total


def _norms(products_MM: Float64Array) -> Float64Array:
    norm_M: Float64Array = np.sqrt(np.maximum(np.diag(products_MM), 0))
    return norm_M


def _length(products_MM: Float64Array, factor_M: Float64Array) -> float:
    """The norm of a sum of vectors."""
    return float(np.sqrt(max(float(factor_M @ products_MM @ factor_M), 0)))
