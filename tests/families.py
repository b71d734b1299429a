"""Families of small checkpoints on disk, their statistics, and whether those are the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    MINIMAL_CONFIG,
    Array,
    Dtype,
    perturbed,
    write_checkpoint,
)

from modelkin.checkpoint import open_checkpoint
from modelkin.gram import GramStats
from modelkin.gram.kernel import Sums, sums
from modelkin.measuring import measure, streaming

Tensors = Mapping[str, Array]
SUMS = ("base_T", "base_sum_T", "sum_TN", "cross_TN", "gram_TNN", "distance_TNN")
BIAS = "lm_head.bias"
NORM = "model.norm.weight"


def write(folder: Path, models: Sequence[Tensors], dtype: Dtype = "F32") -> list[Path]:
    """The base's folder m0, then each model's: m1, m2, ..."""
    return [
        write_checkpoint(folder / f"m{n}", one, dtype=dtype, config=MINIMAL_CONFIG)
        for n, one in enumerate(models)
    ]


def family(seed: int, models: int, sizes: Mapping[str, int]) -> list[Tensors]:
    """A base and models of it whose changes are related."""
    rng = np.random.default_rng(seed)
    base = {name: rng.normal(0, 0.02, size) for name, size in sizes.items()}
    shared = perturbed(base, rng)
    return [base, *(perturbed(shared, rng) for _ in range(models))]


def measured(folders: Sequence[Path], **how: Any) -> GramStats:
    base, *models = (open_checkpoint(folder) for folder in folders)
    return measure(base, models, **how)


def assert_same(found: GramStats, expected: GramStats, *, distance: float = 1e-9) -> None:
    """Equal up to the rounding of float64 sums, on the scale of what was summed."""
    assert (found.models, found.tensors) == (expected.models, expected.tensors)
    np.testing.assert_array_equal(found.count_T, expected.count_T)
    for field in SUMS:
        want = getattr(expected, field)
        rtol = distance if field == "distance_TNN" else 1e-9
        np.testing.assert_allclose(
            getattr(found, field), want, rtol=rtol, atol=1e-13 * np.abs(want).max(), err_msg=field
        )


def spy(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> list[int]:
    """Call `before` with a running number before each slice is summed; lists these numbers."""
    numbers: list[int] = []
    lock = threading.Lock()

    def spied(*arguments: Any, **more: Any) -> Sums:
        with lock:
            number = len(numbers)
            numbers.append(number)
        before(number)
        return sums(*arguments, **more)

    monkeypatch.setattr(streaming, "sums", spied)
    return numbers
