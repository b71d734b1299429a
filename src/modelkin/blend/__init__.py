"""Merges that are linear in each tensor, predicted from Gram statistics alone. Pure.

    plan = compile_recipe(config, tensors=stats.tensors)      # Blend, or NotLinear with the reason
    c = coefficients(plan, stats, {"/models/a": "a", "/models/b": "b"})
    row = child_statistics(stats, c)                          # the child against every model
    stats = row.joined(stats, "1-1")                          # and on to its own children

`Lineage` does so for a whole family, and keeps each child as factors over the foundations.

Many of mergekit's methods make each tensor of a child as theta_child = c_0 b + sum_i c_i theta_i,
with numbers c that depend on the tensor, but not on the element. Even where they depend on the
weights (SLERP's on an angle), they do so through norms and products of whole tensors, which
`GramStats` has. So the child's kinship with every other model is known before it is made.

Knows mergekit's configuration as a mapping, and nothing of files, weights or mergekit itself.

Axes: T tensors, M inputs of a merge, N models of the statistics.
"""

from modelkin.blend.lineage import Lineage, flat_recipe
from modelkin.blend.methods import coefficients
from modelkin.blend.recipe import Blend, NotLinear, compile_recipe
from modelkin.blend.statistics import ChildStatistics, Coefficients, child_statistics, flatten

__all__ = [
    "Blend",
    "ChildStatistics",
    "Coefficients",
    "Lineage",
    "NotLinear",
    "child_statistics",
    "coefficients",
    "compile_recipe",
    "flat_recipe",
    "flatten",
]
