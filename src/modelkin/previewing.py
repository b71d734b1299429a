"""Children that nobody has made: the kinship that every pair's child would have with every model.

One pass over the weights gives the statistics; from them a child follows without another look.
Knows nothing of scores, and makes no child.

Axes: T tensors, N models.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from modelkin.blend import (
    Blend,
    NotLinear,
    child_statistics,
    coefficients,
    compile_recipe,
)
from modelkin.config import load_yaml
from modelkin.errors import ConfigError, MergeError
from modelkin.gram import GramStats
from modelkin.measuring import kinship
from modelkin.merging import PRESETS, MergeSettings
from modelkin.records import Metric, Similarity
from modelkin.similarity import Kinship, kinship_from, similarities

if TYPE_CHECKING:
    from rich.progress import Progress

_PAIR: Mapping[str, Any] = {
    "models": [{"model": "{parent_1}"}, {"model": "{parent_2}"}],
    "dtype": "bfloat16",
}
_CHANGES: Mapping[str, Any] = {**_PAIR, "base_model": "{base}"}
# What `method` may be: a template for each, with equal parts of both parents. Where mergekit leaves
# the base open it is given: without it, nuslerp and multislerp make about what slerp makes.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    **PRESETS,
    "linear": {"merge_method": "linear", **_PAIR, "parameters": {"weight": 0.5}},
    # The sum of both changes; their mean would be the child of linear.
    "task_arithmetic": {"merge_method": "task_arithmetic", **_CHANGES, "parameters": {"weight": 1}},
    "nuslerp": {"merge_method": "nuslerp", **_CHANGES, "parameters": {"weight": 0.5}},
    "multislerp": {"merge_method": "multislerp", **_CHANGES, "parameters": {"weight": 0.5}},
    "karcher": {"merge_method": "karcher", **_PAIR},
    "model_stock": {"merge_method": "model_stock", **_CHANGES},
}
_PARENT_1, _PARENT_2, _BASE = "{parent_1}", "{parent_2}", "{base}"


class ChildRow(NamedTuple):
    """A child and one of the models, a line of the long table.

    `parents_*` is the kinship of the parents; `change` the length of the child's delta and `ed` a
    distance, in units of the weights; `None` where a similarity is undefined.
    """

    parent_1: str
    parent_2: str
    parents_pcc: float | None
    parents_cs: float | None
    parents_ed: float
    change: float
    model: str
    pcc: float | None
    cs: float | None
    ed: float


@dataclass(frozen=True)
class Child:
    """A child that was not made, before its weights are rounded.

    Attributes:
        parents: their names, `{parent_1}` first.
        of_parents: the kinship of the parents.
        change: the length of its delta, in units of the weights.
        kinship: its own kinship with each model, parents included.
    """

    parents: tuple[str, str]
    of_parents: Similarity
    change: float
    kinship: Mapping[str, Similarity]

    def others(self, metric: Metric) -> list[tuple[str, float]]:
        """The models besides its parents and its kinship with each, the nearest first.

        Without those to which it is undefined.
        """
        known = [
            (name, value)
            for name, similarity in self.kinship.items()
            if name not in self.parents and (value := getattr(similarity, metric)) is not None
        ]
        return sorted(known, key=lambda entry: distance(entry[1], metric))


@dataclass(frozen=True)
class Preview:
    """The children of all pairs of N models, by one recipe.

    Attributes:
        recipe: mergekit's configuration, with the placeholders that stand for the models.
        parents: the measured kinship of the models.
        children: one for each pair, in the order of the models.
        impossible: pairs for whose weights the method has no answer -> the reason.
    """

    recipe: Mapping[str, Any]
    parents: Kinship
    children: tuple[Child, ...]
    impossible: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def ranked(self, metric: Metric = "pcc") -> list[Child]:
        """The children of the least kin parents first; those of undefined kinship last."""

        def order(child: Child) -> tuple[bool, float]:
            value = getattr(child.of_parents, metric)
            return value is None, 0 if value is None else -distance(value, metric)

        return sorted(self.children, key=order)

    def rows(self, metric: Metric = "pcc") -> Iterator[ChildRow]:
        """The long table: one row for each child and model, children as in `ranked`."""
        for child in self.ranked(metric):
            parents = child.of_parents
            for name, own in child.kinship.items():
                yield ChildRow(
                    *child.parents,
                    parents_pcc=parents.pcc,
                    parents_cs=parents.cs,
                    parents_ed=parents.ed,
                    change=child.change,
                    model=name,
                    pcc=own.pcc,
                    cs=own.cs,
                    ed=own.ed,
                )

    def as_dict(self, metric: Metric = "pcc") -> dict[str, Any]:
        """What `modelkin preview --json` prints; undefined values are `None`."""
        return {
            "base": self.parents.base,
            "models": list(self.parents.models),
            "recipe": dict(self.recipe),
            "compared_parameters": self.parents.compared_parameters,
            "total_parameters": self.parents.total_parameters,
            "strangers": list(self.parents.strangers),
            "children": [
                {
                    "parents": list(child.parents),
                    "kinship_of_parents": child.of_parents._asdict(),
                    "change": child.change,
                    "kinship": {name: one._asdict() for name, one in child.kinship.items()},
                }
                for child in self.ranked(metric)
            ],
            "impossible": [
                {"parents": list(pair), "reason": reason}
                for pair, reason in self.impossible.items()
            ],
        }


class Crossing:
    """One recipe, for any two of the models of some statistics."""

    def __init__(self, recipe: Mapping[str, Any], stats: GramStats) -> None:
        """Compile a recipe once, for all pairs.

        Args:
            recipe: mergekit's configuration, with `{parent_1}`, `{parent_2}` and perhaps `{base}`
                for its models.
            stats: of N models with distinct names.

        Raises:
            ConfigError: the recipe is none, has other models, or is not linear in each tensor.
        """
        self._plan = _compiled(recipe, stats.tensors)
        self._stats = stats
        self._whole = _whole(stats)
        self._parents = kinship_from(
            self._whole, base="", total_parameters=int(stats.count_T.sum())
        )

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the N models."""
        return self._stats.models

    def child(self, one: str, other: str) -> Child:
        """The child of `one` as `{parent_1}` and `other` as `{parent_2}`.

        Raises:
            MergeError: the method has no answer for their weights.
        """
        meant = {_PARENT_1: one, _PARENT_2: other, _BASE: None}
        c = coefficients(self._plan, self._stats.select([one, other]), meant)
        row = child_statistics(self._stats, c)
        square = float(row.square_T.sum())
        return Child(
            parents=(one, other),
            of_parents=self._parents.similarity(one, other),
            change=math.sqrt(square),
            kinship=similarities(
                self._whole,
                total=float(row.sum_T.sum()),
                square=square,
                gram_N=row.gram_TN.sum(axis=0),
                distance_N=row.distance_TN.sum(axis=0),
            ),
        )


def preview(
    base: str | os.PathLike[str],
    models: Sequence[str | os.PathLike[str]],
    *,
    method: str = "slerp",
    recipe: Mapping[str, Any] | None = None,
    threads: int | None = None,
    cache: bool = True,
    allow_pickle: bool = False,
    progress: "Progress | None" = None,
) -> Preview:
    """The children of every pair of models, without making any.

    The weights are read once, as by `kinship`. What is predicted is the child before rounding, in
    the tensors that all models share: a child in float32 is measured to be as kin to 1e-6, one in
    bfloat16 has the noise of rounding in its delta. A recipe's angles are those of the shared
    tensors and rows.

    Args:
        base: folder, GGUF file or Hub id of the common pre-trained model.
        models: folders, GGUF files or Hub ids of at least two models that were made from it, or
            of LoRA adapters to it. Of each pair the one named earlier is `{parent_1}`.
        method: a key of `RECIPES`: a merge method of mergekit's with equal parts of both parents,
            or a preset.
        recipe: a mergekit configuration instead, with `{parent_1}`, `{parent_2}` and perhaps
            `{base}` for its models.
        threads: how many cores to use; default: all that this process may.
        cache: keep the statistics, and use those of earlier calls on the same files.
        allow_pickle: also read pickled weights, through PyTorch's weights-only loader.
        progress: where to show a bar, in bytes.

    Raises:
        ConfigError: the recipe is none or is not linear in each tensor, or an option is none.
        CheckpointError: a path is no readable model, or a tensor holds NaN or infinity.
        IncomparableError: the models share too little of the base, see `kinship`.
    """
    if recipe is None:
        recipe = template_of(method)
    # What is wrong with a recipe is found before a weight is read.
    _compiled(recipe, ())
    parents = kinship(
        base,
        models,
        threads=threads,
        cache=cache,
        allow_pickle=allow_pickle,
        progress=progress,
    )
    assert parents.stats is not None  # as of every kinship that was measured
    crossing = Crossing(recipe, parents.stats)
    children: list[Child] = []
    impossible: dict[tuple[str, str], str] = {}
    for one, other in combinations(parents.models, 2):
        try:
            children.append(crossing.child(one, other))
        except MergeError as error:
            impossible[one, other] = str(error)
    return Preview(recipe, parents, tuple(children), impossible)


def template_of(method: str) -> Mapping[str, Any]:
    """The recipe with equal parts of both parents.

    Raises:
        ConfigError: there is none by that method whose children can be predicted.
    """
    if method in RECIPES:
        return RECIPES[method]
    found = compile_recipe({"merge_method": method, **_CHANGES}, tensors=())
    reason = found.reason if isinstance(found, NotLinear) else "it has no template"
    raise ConfigError(f"method: the children cannot be predicted: {reason}")


def load_recipe(method: str | None, file: Path | None) -> Mapping[str, Any]:
    """The recipe by a method's name or in a YAML file; of slerp where neither is given.

    Raises:
        ConfigError: both are given, or see `template_of`; or the file holds no keys and values.
    """
    if file is None:
        return template_of(method or "slerp")
    if method is not None:
        raise ConfigError(f"--method, --recipe: expected one of them, found {method} and {file}")
    found = load_yaml(file)
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected keys and values, found {type(found).__name__}")
    return found


def distance(value: float, metric: Metric) -> float:
    """What orders similarities by any metric: the greater, the less kin."""
    return value if metric == "ed" else -value


def _compiled(recipe: Mapping[str, Any], tensors: Sequence[str]) -> Blend:
    """What a template does to each tensor, for any models in the place of its placeholders."""
    try:
        MergeSettings(template=dict(recipe))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"recipe: {message.removeprefix('template: ')}") from error
    plan = compile_recipe(recipe, tensors=tensors)
    if isinstance(plan, NotLinear):
        raise ConfigError(f"recipe: the children cannot be predicted: {plan.reason}")
    for name in plan.models:
        if name not in (_PARENT_1, _PARENT_2, _BASE):
            raise ConfigError(
                f"recipe: expected no models but {_PARENT_1}, {_PARENT_2} and {_BASE}, found {name}"
            )
    return plan


def _whole(stats: GramStats) -> GramStats:
    """The same summed over tensors, as if they were one."""
    per_tensor = (
        *("count_T", "base_T", "base_sum_T", "sum_TN", "cross_TN"),
        *("gram_TNN", "distance_TNN"),
    )
    summed = {name: getattr(stats, name).sum(axis=0, keepdims=True) for name in per_tensor}
    return replace(stats, tensors=("model",), **summed)
