"""What a child costs that nobody makes.

    python benchmarks/preview.py                 # the figures of docs/performance.md, a minute
    python benchmarks/preview.py --quick         # fewer models, to see that it works

Makes up statistics of models with 290 tensors (a Llama of 32 layers) and measures the time of one
child of two of them, its kinship with all models included. Then whole commands: `modelkin preview`
of all pairs of small random checkpoints, whose statistics are kept from an earlier call, against
`modelkin kinship` of the same. Times are medians; the methods take turns. Prints tables and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from kinship import make_models, whole_command

from modelkin.gram import GramStats
from modelkin.previewing import RECIPES, Crossing

TENSORS = 290
ELEMENTS = 64  # of a tensor: what a child costs does not depend on them
METHODS = ("linear", "slerp", "karcher")


def made_up(models: int) -> GramStats:
    """Statistics of random weights, whose changes have a part in common."""
    rng = np.random.default_rng(0)
    base_TB = rng.standard_normal((TENSORS, ELEMENTS))
    common_T1B = rng.standard_normal((TENSORS, 1, ELEMENTS))
    delta_TNB = 0.1 * (common_T1B + rng.standard_normal((TENSORS, models, ELEMENTS)))
    gram_TNN = delta_TNB @ delta_TNB.swapaxes(1, 2)
    square_TN = np.diagonal(gram_TNN, axis1=1, axis2=2)
    apart_TNN = square_TN[:, :, None] + square_TN[:, None, :] - 2 * gram_TNN
    return GramStats(
        models=tuple(f"m{n}" for n in range(models)),
        tensors=tuple(f"model.layers.{t}.mlp.up_proj.weight" for t in range(TENSORS)),
        count_T=np.full(TENSORS, ELEMENTS),
        base_T=(base_TB**2).sum(axis=1),
        base_sum_T=base_TB.sum(axis=1),
        sum_TN=delta_TNB.sum(axis=2),
        cross_TN=(delta_TNB @ base_TB[:, :, None])[:, :, 0],
        gram_TNN=gram_TNN,
        distance_TNN=np.maximum(apart_TNN, 0) * (1 - np.eye(models)),
    )


def milliseconds(models: int, children: int) -> dict[str, float]:
    """The median time of a child, by method."""
    stats = made_up(models)
    crossings = {method: Crossing(RECIPES[method], stats) for method in METHODS}
    rng = np.random.default_rng(1)
    taken: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(children):
        one, other = (f"m{n}" for n in rng.choice(models, 2, replace=False))
        for method, crossing in crossings.items():
            start = time.perf_counter()
            crossing.child(one, other)
            taken[method].append(1000 * (time.perf_counter() - start))
    return {method: statistics.median(times) for method, times in taken.items()}


def commands(folders: Sequence[Path], rounds: int) -> dict[str, float]:
    """Seconds of whole commands on these checkpoints, the base first."""
    base, *models = map(str, folders)
    words = [*models, "--base", base]
    script = str(Path(sys.executable).with_name("modelkin"))
    # The statistics are kept from here on.
    whole_command([script, "kinship", *words], 1)
    return {
        name: whole_command([script, name, *words], rounds)["seconds"]
        for name in ("kinship", "preview")
    }


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer models and children")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    sizes, children = ((10,), 20) if chosen.quick else ((10, 30, 100), 300)
    found = {models: milliseconds(models, children) for models in sizes}
    print(f"{'ms a child':12}" + "".join(f"{method:>10}" for method in METHODS))
    for models, times in found.items():
        print(f"{models:<4} models " + "".join(f"{times[method]:10.2f}" for method in METHODS))
    with tempfile.TemporaryDirectory(prefix="modelkin-") as scratch:
        os.environ["MODELKIN_CACHE"] = f"{scratch}/cache"
        whole = commands(make_models(Path(scratch), "tiny", sizes[-1]), chosen.rounds)
    for name, seconds in whole.items():
        print(f"modelkin {name} of {sizes[-1]} models: {seconds:.2f} s")
    print(json.dumps({"ms": found, "s": whole}))


if __name__ == "__main__":
    main()
