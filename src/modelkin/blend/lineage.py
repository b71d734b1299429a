"""A family of which only the foundations were ever read: its children are numbers over them.

A child of children is still a weighted sum of the foundations, tensor by tensor. So from the
foundations' statistics alone follow every descendant's factors, its kinship with everyone, and one
recipe that makes it from the foundations in one pass, rounded once.

Knows nothing of scores and generations, of files, and of whether a child was ever made.

Axes: T tensors, F foundations, K the base and the foundations, N models of the family.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from modelkin.blend.methods import coefficients
from modelkin.blend.recipe import NotLinear, compile_recipe
from modelkin.blend.statistics import ChildStatistics, Coefficients, distances, flatten
from modelkin.errors import MergeError
from modelkin.gram import Float64Array, GramStats


class Lineage:
    """Foundations and their descendants, as factors over the foundations."""

    def __init__(self, foundations: GramStats, *, layers: int | None = None) -> None:
        """A family without children.

        Args:
            foundations: statistics of the F foundations, of all tensors that a child has.
            layers: number of layers, for gradients; default: what the tensors' names say.
        """
        self._foundations = foundations
        self._layers = layers
        self._apart_TKK = distances(foundations)
        zero_T = np.zeros(len(foundations.tensors))
        self._members = {
            name: Coefficients((name,), foundations.tensors, zero_T, 1 + zero_T[:, None])
            for name in foundations.models
        }
        self._whole = replace(
            foundations,
            tensors=("model",),
            **{
                name: getattr(foundations, name).sum(axis=0, keepdims=True)
                for name in (
                    *("count_T", "base_T", "base_sum_T", "sum_TN", "cross_TN"),
                    *("gram_TNN", "distance_TNN"),
                )
            },
        )

    @property
    def whole(self) -> GramStats:
        """The statistics of all members summed over tensors, as if they were one tensor."""
        return self._whole

    def add(self, name: str, config: Mapping[str, Any], *, base: str) -> None:
        """Take a child in, by its recipe.

        Args:
            name: the child's.
            config: mergekit's configuration, with members' names for its models.
            base: what the recipe calls the base.

        Raises:
            MergeError: the recipe is not linear in each tensor, has a model that is no member, or
                no answer for these weights.
            ConfigError: the recipe is none.
        """
        plan = compile_recipe(config, tensors=self._foundations.tensors, layers=self._layers)
        if isinstance(plan, NotLinear):
            raise MergeError(plan.reason)
        parents = [model for model in plan.models if model != base]
        for parent in parents:
            if parent not in self._members:
                raise MergeError(f"the recipe names {parent}, which is no member of the family")
        meant = {parent: parent for parent in parents}
        c = coefficients(plan, self.statistics(parents), {**meant, base: None})
        flat = flatten(c, self._members_but_foundations())
        row = self._row(flat, list(self._members))
        summed = ChildStatistics(
            **{field: value.sum(axis=0, keepdims=True) for field, value in vars(row).items()}
        )
        self._whole = summed.joined(self._whole, name)
        self._members[name] = flat

    def statistics(self, names: Sequence[str] | None = None) -> GramStats:
        """The statistics of some members, or of all, as predicted: of children before rounding."""
        names = list(self._members) if names is None else list(names)
        known = [name for name in names if name in self._foundations.models]
        stats = self._foundations.select(known)
        for name in names:
            if name not in known:
                row = self._row(self._members[name], stats.models)
                stats = row.joined(stats, name)
        return stats.select(names)

    def flat(self, name: str) -> Coefficients:
        """The factors of base and foundations that make a member."""
        return self._members[name]

    def _members_but_foundations(self) -> dict[str, Coefficients]:
        foundations = self._foundations.models
        return {name: c for name, c in self._members.items() if name not in foundations}

    def _row(self, c: Coefficients, names: Sequence[str]) -> ChildStatistics:
        """A child's statistics against members, all of them given by factors over foundations.

        With e_x = sum_i c_xi delta_i and s_x, the share of b itself that x's factors leave over,
        delta_x = e_x + s_x b. The distance of e_x and e_y is taken from those of the foundations:
        with w the difference of their shares, that of the base included, which sums to 0,

            |e_x - e_y|² = - 1/2 sum_kl w_k w_l |delta_k - delta_l|²
        """
        stats = self._foundations
        share_TK, left_T = self._shares(c)
        of_others = [self._shares(self._members[name]) for name in names]
        share_TNK = np.empty((len(stats.tensors), len(names), share_TK.shape[1]))
        left_TN = np.empty(share_TNK.shape[:2])
        for n, (other_TK, other_T) in enumerate(of_others):
            share_TNK[:, n], left_TN[:, n] = other_TK, other_T

        crossed_T = np.sum(share_TK[:, 1:] * stats.cross_TN, axis=1)
        crossed_TN = (share_TNK[:, :, 1:] @ stats.cross_TN[:, :, None])[:, :, 0]
        product_TF = (share_TK[:, None, 1:] @ stats.gram_TNN)[:, 0]
        gram_TN = (share_TNK[:, :, 1:] @ product_TF[:, :, None])[:, :, 0]
        base_T = stats.base_T
        return ChildStatistics(
            sum_T=np.sum(share_TK[:, 1:] * stats.sum_TN, axis=1) + left_T * stats.base_sum_T,
            cross_T=crossed_T + left_T * base_T,
            square_T=self._distance(share_TK[:, None], left_T[:, None])[:, 0],
            gram_TN=gram_TN
            + left_T[:, None] * crossed_TN
            + left_TN * (crossed_T + left_T * base_T)[:, None],
            distance_TN=self._distance(
                share_TK[:, None] - share_TNK, left_T[:, None] - left_TN, shares_of_base=False
            ),
        )

    def _shares(self, c: Coefficients) -> tuple[Float64Array, Float64Array]:
        """Shares of the deltas, T x K, the base's own first, which make 1; what is left of b."""
        stats = self._foundations
        share_TK = np.zeros((len(stats.tensors), 1 + len(stats.models)))
        for position, name in enumerate(c.models):
            share_TK[:, 1 + stats.models.index(name)] += c.model_TN[:, position]
        total_T = share_TK.sum(axis=1)
        share_TK[:, 0] = 1 - total_T
        return share_TK, c.base_T + total_T - 1

    def _distance(
        self, share_TNK: Float64Array, left_TN: Float64Array, *, shares_of_base: bool = True
    ) -> Float64Array:
        """Squared lengths of sum_k share_k delta_k + left b; of deltas, or of their differences."""
        stats = self._foundations
        if shares_of_base:
            # The distance to the base itself, whose only share is its own.
            share_TNK = share_TNK.copy()
            share_TNK[:, :, 0] -= 1
        apart_TN = -np.sum((share_TNK @ self._apart_TKK) * share_TNK, axis=2) / 2
        crossed_TN = (share_TNK[:, :, 1:] @ stats.cross_TN[:, :, None])[:, :, 0]
        leftover_TN = left_TN**2 * stats.base_T[:, None]
        # Rounding may take a length of 0 below it.
        square_TN = np.maximum(apart_TN, 0) + 2 * left_TN * crossed_TN + leftover_TN
        found_TN: Float64Array = np.maximum(square_TN, 0)
        return found_TN


def flat_recipe(
    c: Coefficients,
    sources: Mapping[str, str],
    *,
    base: str,
    donor: str | None,
    dtypes: Mapping[str, Any],
) -> dict[str, Any]:
    """A descendant as one recipe over the foundations, which mergekit reads too.

    A `linear` merge with a weight for each tensor. Of two names of tensors one may be part of the
    other, and the first `filter` that matches decides: the longest come first.

    Args:
        c: its factors over base and foundations.
        sources: foundation -> folder or Hub id.
        base: folder or Hub id of the base.
        donor: the foundation whose config and tokenizer the child gets; `None` is the base.
        dtypes: the keys `dtype` and `out_dtype`, where the child's own recipe has them.

    >>> c = Coefficients(("a",), ("norm", "head"), np.array([0.0, 0.5]), np.array([[1.0], [0.5]]))
    >>> recipe = flat_recipe(c, {"a": "/a"}, base="/b", donor="a", dtypes={"dtype": "bfloat16"})
    >>> [model["model"] for model in recipe["models"]]
    ['/a', '/b']
    >>> recipe["models"][0]["parameters"]
    {'weight': [{'filter': 'norm', 'value': 1.0}, {'filter': 'head', 'value': 0.5}]}
    """
    factors: dict[str | None, Float64Array] = {None: c.base_T}
    factors |= {name: c.model_TN[:, position] for position, name in enumerate(c.models)}
    # The first of a recipe's models is the donor, whatever its share.
    ordered = [donor, *(name for name in factors if name != donor and np.any(factors[name]))]
    order = sorted(range(len(c.tensors)), key=lambda t: -len(c.tensors[t]))

    def weight(name: str | None) -> Any:
        factor_T = factors.get(name, np.zeros(len(c.tensors)))
        if np.all(factor_T == factor_T[0]):
            return float(factor_T[0])
        return [{"filter": c.tensors[t], "value": float(factor_T[t])} for t in order]

    return {
        "merge_method": "linear",
        "models": [
            {
                "model": base if name is None else sources[name],
                "parameters": {"weight": weight(name)},
            }
            for name in ordered
        ],
        "parameters": {"normalize": False},
        **dtypes,
    }
