"""Recipes to children: with mergekit, or natively where each tensor is a weighted sum.

`recipes` has the templates, `mergekit` the seam to that library, `native` our own pass, `writing`
what is in a child's folder, `engines` the choice. Knows nothing of families, scores or why these
parents were chosen.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from modelkin.merging.engines import ENGINES, Choice, EitherEngine, Engine, choose_engine
from modelkin.merging.mergekit import Mergekit
from modelkin.merging.native import Native, obstacle
from modelkin.merging.recipes import PRESETS, MergeSettings, fill, resolve_models
from modelkin.merging.writing import write_child

__all__ = [
    "ENGINES",
    "PRESETS",
    "Choice",
    "EitherEngine",
    "Engine",
    "MergeSettings",
    "Mergekit",
    "Merger",
    "Native",
    "choose_engine",
    "fill",
    "obstacle",
    "resolve_models",
    "write_child",
]


class Merger(Protocol):
    """Makes models out of models."""

    def merge(self, config: Mapping[str, Any], out: Path, *, seed: int = 0) -> None:
        """Make the folder `out` from a mergekit configuration with real paths.

        `out` appears whole, loadable and with `modelkin.json` in it, or not at all.

        Raises:
            MergeError: the merge did not give a model.
            ConfigError: `out` exists.
            DiskFullError: the disk filled up.
        """
        ...
