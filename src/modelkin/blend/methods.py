"""mergekit's methods as numbers: the factor of each input of a tensor, from norms and products.

Each function takes the products of the M inputs of every tensor (of the weights, or of their
differences from the merge's `base_model`) and gives the factor of each, for all tensors at once.
Thresholds are those of mergekit 0.1.5, except where it says otherwise.

Axes: T tensors, M inputs of a merge, N models; K is the statistics' base and the N models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

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
    given = _Inputs(products_TMM, weight_TM, blend.shared_T)
    # What is not finite is refused by name.
    with np.errstate(all="ignore"):
        found_TM = _RULES[blend.method](given)
    odd_T = ~np.all(np.isfinite(found_TM), axis=1)
    given.refuse(odd_T, lambda t: f"expected finite factors, found {found_TM[t]}")
    if given.refused:
        t, complaint = min(given.refused, key=itemgetter(0))
        raise MergeError(f"{blend.method}: {blend.tensors[t]}: {complaint}")

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
        cross_TK = np.zeros((len(stats.tensors), 1 + len(stats.models)))
        cross_TK[:, 1:] = stats.cross_TN
        all_TKK = stats.base_T[:, None, None] + cross_TK[:, :, None] + cross_TK[:, None, :]
        all_TKK[:, 1:, 1:] += stats.gram_TNN
    elif origin == 0:
        # The base's own difference from itself is in no product.
        all_TKK = np.zeros((len(stats.tensors), 1 + len(stats.models), 1 + len(stats.models)))
        all_TKK[:, 1:, 1:] = stats.gram_TNN
    else:
        apart_TKK = distances(stats)
        from_TK = apart_TKK[:, :, origin]
        all_TKK = (from_TK[:, :, None] + from_TK[:, None, :] - apart_TKK) / 2
    return all_TKK[:, positions][:, :, positions]


@dataclass(frozen=True)
class _Inputs:
    """All tensors: the products of their inputs, the weights, and the parameters they share.

    `refused` has positions on the axis T that the method has no answer for, and what is wrong.
    """

    products_TMM: Float64Array
    weight_TM: Float64Array
    shared_T: Mapping[str, Float64Array]
    refused: list[tuple[int, str]] = field(default_factory=list)

    def refuse(self, wrong_T: NDArray[np.bool_], complaint: Callable[[int], str]) -> None:
        """Note the first tensor that is wrong, if one is; what it is given is of no account."""
        if np.any(wrong_T):
            t = int(np.argmax(wrong_T))
            self.refused.append((t, complaint(t)))


def _linear(of: _Inputs) -> Float64Array:
    """sum_i w_i theta_i, over sum_i w_i with `normalize`."""
    return _normalised(of, of.shared_T["normalize"])


def _task_arithmetic(of: _Inputs) -> Float64Array:
    """`lambda` sum_i w_i delta_i; with `normalize` over sum_i w_i, unless that is 0."""
    total_T = of.weight_TM.sum(axis=1)
    divided_T = (of.shared_T["normalize"] != 0) & (np.abs(total_T) >= 1e-8)
    scale_T = of.shared_T["lambda"] / np.where(divided_T, total_T, 1)
    factor_TM: Float64Array = of.weight_TM * scale_T[:, None]
    return factor_TM


def _slerp(of: _Inputs) -> Float64Array:
    """sin((1 - t) theta) / sin(theta) of the base, sin(t theta) / sin(theta) of the other.

    (1 - t) and t where |cos(theta)| > 0.9995; tensors of zeros are at right angles to all.
    """
    norm_TM = _norms(of.products_TMM)
    cosine_T = _cosine(of, np.where(norm_TM > 1e-8, norm_TM, 1))
    return _on_the_arc(of.shared_T["t"], cosine_T, lerp_T=np.abs(cosine_T) > 0.9995)


def _nuslerp(of: _Inputs) -> Float64Array:
    """SLERP with t = w_1 / (w_0 + w_1), or 0.5 if those cancel.

    mergekit takes the straight line where sin(theta) is below 1e-8, which neither its float32 nor
    our sums resolve; ours is 1e-6. At small angles line and arc are the same, at angles near pi
    what mergekit's rounding makes of them is anyone's guess.
    """
    total_T = of.weight_TM.sum(axis=1)
    cancel_T = np.abs(total_T) < 1e-6
    t_T = np.where(cancel_T, 0.5, of.weight_TM[:, 1] / np.where(cancel_T, 1, total_T))
    cosine_T = _cosine(of, np.maximum(_norms(of.products_TMM), 1e-7))
    return _on_the_arc(t_T, cosine_T, lerp_T=1 - cosine_T**2 <= _ROUNDING**2)


def _multislerp(of: _Inputs) -> Float64Array:
    """The direction of the weighted sum of unit vectors, with the weighted mean of the norms.

        u_i = v_i / (|v_i| + eps),  s = sum_i w_i u_i,  child = cos(eps) sum_i w_i |v_i| s / |s|

    mergekit goes on to mean the tangents at s / |s|. But sum_i w_i (u_i - (u_i.s) s / |s|²) = 0 by
    the definition of s: what it adds is rounding, and the cosine of `eps`.
    """
    if of.weight_TM.shape[1] == 1:
        return np.ones_like(of.weight_TM)
    weight_TM = _normalised(of, of.shared_T["normalize_weights"])
    eps_T = of.shared_T["eps"]
    norm_TM = _norms(of.products_TMM)
    reach_TM = norm_TM + eps_T[:, None]
    of.refuse(
        np.any(reach_TM <= 0, axis=1),
        lambda t: f"expected eps above 0 for a tensor of zeros, found {eps_T[t]:g}",
    )
    # What is 0 has no part, rather than a large one.
    unit_TM = np.where(norm_TM > 0, weight_TM / reach_TM, 0)
    length_T = _lengths(of.products_TMM, unit_TM)
    cancel_T = length_T < np.maximum(eps_T, _ROUNDING * np.abs(weight_TM).sum(axis=1))
    if weight_TM.shape[1] > 2:
        of.refuse(
            cancel_T,
            lambda _: "expected directions whose weighted sum is not 0, found that they cancel",
        )
    mean_T = np.sum(weight_TM * norm_TM, axis=1)
    scale_T = np.cos(eps_T) * mean_T / np.where(cancel_T, 1, length_T)
    return np.where(cancel_T[:, None], weight_TM, unit_TM * scale_T[:, None])


def _karcher(of: _Inputs) -> Float64Array:
    """The mean on the sphere, found by `max_iter` steps along the mean of logarithms at it.

        log(u_i) = theta_i / sin(theta_i) (u_i - cos(theta_i) mean),  theta_i = angle(u_i, mean)

    Scaled by the mean of the norms. Inputs no longer than `tol` count for the scale only; if all
    are, the child is 0.
    """
    if of.weight_TM.shape[1] == 1:
        return np.ones_like(of.weight_TM)
    tol_T, turns_T = of.shared_T["tol"], of.shared_T["max_iter"]
    norm_TM = _norms(of.products_TMM)
    long_TM = norm_TM > tol_T[:, None]
    length_TM = np.where(long_TM, norm_TM, 1)
    cosine_TMM = of.products_TMM / (length_TM[:, :, None] * length_TM[:, None, :])
    share_TM = long_TM / np.maximum(long_TM.sum(axis=1), 1)[:, None]
    length_T = _lengths(cosine_TMM, share_TM)
    # Where they cancel the first one is the start.
    cancel_T = length_T < np.maximum(tol_T, _ROUNDING)
    first_TM = np.eye(long_TM.shape[1])[np.argmax(long_TM, axis=1)]
    mean_TM = share_TM / np.where(cancel_T, 1, length_T)[:, None]
    mean_TM = np.where(cancel_T[:, None], first_TM, mean_TM)
    moving_T = np.any(long_TM, axis=1)
    for turn in range(int(turns_T.max(initial=0))):
        cosine_TM = np.clip((cosine_TMM @ mean_TM[:, :, None])[:, :, 0], -1, 1)
        angle_TM = np.arccos(cosine_TM)
        sine_TM = np.sin(angle_TM)
        # Nothing pulls from the mean itself, nor from the point opposite to it.
        pulled_TM = (angle_TM >= tol_T[:, None]) & (sine_TM >= _ROUNDING)
        pull_TM = np.where(pulled_TM, angle_TM / np.where(pulled_TM, sine_TM, 1), 0) * share_TM
        tangent_TM = pull_TM - np.sum(pull_TM * cosine_TM, axis=1)[:, None] * mean_TM
        step_T = _lengths(cosine_TMM, tangent_TM)
        # A tensor that has arrived stays where it is.
        moving_T &= (step_T > tol_T) & (turn < turns_T)
        if not np.any(moving_T):
            break
        step_T1 = np.where(moving_T, step_T, 1)[:, None]
        moved_TM = np.cos(step_T1) * mean_TM + np.sin(step_T1) * tangent_TM / step_T1
        length_T = _lengths(cosine_TMM, moved_TM)
        moved_TM /= np.where(length_T > tol_T, length_T, 1)[:, None]
        mean_TM = np.where(moving_T[:, None], moved_TM, mean_TM)
    return np.where(long_TM, mean_TM / length_TM * norm_TM.mean(axis=1)[:, None], 0)


def _model_stock(of: _Inputs) -> Float64Array:
    """t / n of each difference, with t = n c / (1 + (n - 1) c), c the mean cosine of the pairs."""
    count = of.weight_TM.shape[1]
    norm_TM = _norms(of.products_TMM)
    pairs_TMM = np.maximum(norm_TM[:, :, None] * norm_TM[:, None, :], 1e-6)
    one, other = np.triu_indices(count, k=1)
    cosine_TP = np.clip(of.products_TMM / pairs_TMM, -1, 1)[:, one, other]
    cosine_T = cosine_TP.mean(axis=1)
    divisor_T = 1 + (count - 1) * cosine_T
    none_T = np.abs(divisor_T) < 1e-6
    share_T = np.where(none_T, 0, cosine_T / np.where(none_T, 1, divisor_T))
    return np.repeat(share_T[:, None], count, axis=1)


_RULES: Mapping[str, Callable[[_Inputs], Float64Array]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
}


def _on_the_arc(
    t_T: Float64Array, cosine_T: Float64Array, *, lerp_T: NDArray[np.bool_]
) -> Float64Array:
    """The factors of two inputs at an angle, or on the straight line between them."""
    angle_T = np.arccos(cosine_T)
    share_T2 = np.stack([1 - t_T, t_T], axis=1)
    sine_T = np.where(lerp_T, 1, np.sin(angle_T))
    arc_T2 = np.sin(share_T2 * angle_T[:, None]) / sine_T[:, None]
    return np.where(lerp_T[:, None], share_T2, arc_T2)


def _cosine(of: _Inputs, norm_TM: Float64Array) -> Float64Array:
    """The cosine of two inputs of these norms."""
    cosine_T = of.products_TMM[:, 0, 1] / (norm_TM[:, 0] * norm_TM[:, 1])
    return np.clip(cosine_T, -1, 1)


def _normalised(of: _Inputs, asked_T: Float64Array) -> Float64Array:
    """Weights that sum to 1, where asked. mergekit would write infinities where they cancel."""
    total_T = of.weight_TM.sum(axis=1)
    asked_T = asked_T != 0
    of.refuse(
        asked_T & (np.abs(total_T) <= 1e-7 * np.abs(of.weight_TM).sum(axis=1)),
        lambda t: (
            "expected weights whose sum is not 0, to be normalised, found "
            + ", ".join(f"{weight:g}" for weight in of.weight_TM[t])
        ),
    )
    return of.weight_TM / np.where(asked_T, total_T, 1)[:, None]


def _norms(products_TMM: Float64Array) -> Float64Array:
    norm_TM: Float64Array = np.sqrt(np.maximum(np.diagonal(products_TMM, axis1=1, axis2=2), 0))
    return norm_TM


def _lengths(products_TMM: Float64Array, factor_TM: Float64Array) -> Float64Array:
    """The norms of sums of vectors."""
    square_T = (factor_TM[:, None, :] @ products_TMM @ factor_TM[:, :, None])[:, 0, 0]
    length_T: Float64Array = np.sqrt(np.maximum(square_T, 0))
    return length_T
