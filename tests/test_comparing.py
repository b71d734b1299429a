"""What can be compared, decided from headers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    EMBEDDING,
    HEAD,
    delta_matrix,
)
from families import BIAS, NORM, Tensors, measured, write

import modelkin as mk
from modelkin.checkpoint import open_checkpoint
from modelkin.errors import ConfigError, IncomparableError
from modelkin.measuring import Comparison, compare, overlap


def _overlap(folder: Path, models: Sequence[Tensors], **patterns: Any) -> Comparison:
    base, *others = (open_checkpoint(one) for one in write(folder, models))
    return overlap(base, others, **patterns)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("rows", [(4, 6, 6), (6, 4, 6), (6, 6, 4), (4, 4, 6), (4, 6, 9), (9, 6, 4)])
def test_common_rows_of_vocabularies_are_compared(
    rows: tuple[int, int, int], name: str, tmp_path: Path
) -> None:
    """Whoever has more tokens, base or model: the rows that all have are compared."""
    rng = np.random.default_rng(0)
    models: list[Tensors] = [
        {name: rng.standard_normal((count, 3)), NORM: rng.standard_normal(40)} for count in rows
    ]
    folders = write(tmp_path, models, "F64")
    base, *others = (open_checkpoint(one) for one in folders)
    found = overlap(base, others)
    assert dict(found.counts) == {name: 12, NORM: 40}
    assert dict(found.rows_left_out) == {name: max(rows) - 4}
    assert found.left_out == ()
    assert list(found.reasons) == [name]
    assert f"{name}: m0 [{rows[0]}, 3], m1 [{rows[1]}, 3], m2 [{rows[2]}, 3]" in found.reasons[name]
    assert found.total_parameters == rows[0] * 3 + 40
    assert found.compared_parameters == 52
    kinship = mk.kinship(folders[0], folders[1:], min_coverage=0.5)
    common: list[Tensors] = [{**one, name: one[name][:4]} for one in models]
    deltas = delta_matrix(common[0], common[1:], sorted(common[0]))
    np.testing.assert_allclose(kinship.pcc_NN, np.corrcoef(deltas), rtol=0, atol=1e-12)
    assert kinship.compared_parameters == 52
    assert kinship.left_out == ()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (BIAS, [(4,), (6,)]),
        (EMBEDDING, [(4, 3), (4, 5)]),
        (EMBEDDING, [(4, 3), (6, 5)]),
        (EMBEDDING, [(4, 3), (4, 3, 1)]),
        (HEAD, [(4, 3, 2), (6, 3, 2)]),
        (HEAD, [(4, 3), ()]),
        ("model.layers.0.mlp.up_proj.weight", [(4, 3), (6, 3)]),
        (NORM, [(4,), (6,)]),
    ],
)
def test_other_shapes_are_left_out(
    name: str, shapes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Rows in common are compared of matrices over a vocabulary only, and of one width."""
    models: list[Tensors] = [{name: np.ones(shape), "w": np.ones(5)} for shape in shapes]
    found = _overlap(tmp_path, models)
    assert found.tensors == ("w",)
    assert found.left_out == (name,)
    assert dict(found.rows_left_out) == {}
    assert f"m0 {list(shapes[0])}, m1 {list(shapes[1])}" in found.reasons[name]
    assert found.total_parameters == models[0][name].size + 5


def test_tensors_of_one_side_are_left_out(tmp_path: Path) -> None:
    """What the base lacks costs no coverage, what a model lacks does; reasons say who."""
    models: list[Tensors] = [
        {"both": np.ones(6), "base": np.ones(4), EMBEDDING: np.ones((2, 2))},
        {"both": np.ones(6), "model": np.ones(9)},
        {"both": np.ones(6), EMBEDDING: np.ones((2, 2))},
    ]
    found = _overlap(tmp_path, models)
    assert found.tensors == ("both",)
    assert found.left_out == ("base", "model", EMBEDDING)
    assert found.reasons["base"] == "base: m0 [4], m1 none, m2 none"
    assert found.reasons["model"] == "model: m0 none, m1 [9], m2 none"
    assert found.reasons[EMBEDDING] == f"{EMBEDDING}: m0 [2, 2], m1 none, m2 [2, 2]"
    assert found.total_parameters == 14
    assert found.coverage == pytest.approx(6 / 14)


def test_scalars_and_empty_tensors_are_compared(tmp_path: Path) -> None:
    """A tensor without axes is one element, one without elements none; both are compared."""
    models: list[Tensors] = [
        {"scalar": np.array(float(n)), "none": np.ones((0, 3)), "w": n * np.ones(4)}
        for n in range(3)
    ]
    found = _overlap(tmp_path / "overlap", models)
    assert dict(found.counts) == {"none": 0, "scalar": 1, "w": 4}
    assert found.left_out == ()
    stats = measured(write(tmp_path / "measured", models))
    assert stats.tensors == ("none", "scalar", "w")
    np.testing.assert_array_equal(stats.gram_TNN[:, 0, 1], [0, 2, 8])
    np.testing.assert_array_equal(stats.distance_TNN[:, 0, 1], [0, 1, 4])


def test_a_vocabulary_without_common_rows_is_compared_in_none(tmp_path: Path) -> None:
    """An embedding that is empty in one model has no rows in common: nothing of it is compared."""
    models: list[Tensors] = [
        {EMBEDDING: np.ones((rows, 2)), "w": np.arange(30.0) * (n + 1)}
        for n, rows in enumerate((3, 0, 5))
    ]
    folders = write(tmp_path, models)
    found = mk.kinship(folders[0], folders[1:], min_coverage=0.8)
    assert found.compared_parameters == 30
    assert found.cs_NN[0, 1] == pytest.approx(1)


def test_patterns_say_what_is_compared(tmp_path: Path) -> None:
    """Excluded tensors are neither compared nor left out, nor part of what there is."""
    models: list[Tensors] = [
        {EMBEDDING: np.ones((rows, 2)), "layers.0.w": np.ones(7), "layers.10.w": np.ones(3)}
        for rows in (3, 5)
    ]
    folders = write(tmp_path, models)
    base, model = (open_checkpoint(one) for one in folders)

    def found(**patterns: Any) -> tuple[dict[str, int], int, dict[str, int]]:
        some = overlap(base, [model], **patterns)
        assert some.left_out == ()
        assert some.coverage == 1
        return dict(some.counts), some.total_parameters, dict(some.rows_left_out)

    everything = {EMBEDDING: 6, "layers.0.w": 7, "layers.10.w": 3}
    assert found() == (everything, 16, {EMBEDDING: 2})
    assert found(include=["layers.1*"]) == ({"layers.10.w": 3}, 3, {})
    assert found(include=["layers"], exclude=["layers.0"]) == ({"layers.10.w": 3}, 3, {})
    assert found(exclude=["layers"]) == ({EMBEDDING: 6}, 6, {EMBEDDING: 2})


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option: str, tmp_path: Path) -> None:
    """A pattern that matches no tensor is a mistake, and named."""
    models: list[Tensors] = [{"w": np.ones(3)}] * 2
    with pytest.raises(ConfigError, match=f"{option}.*'q_proj'"):
        _overlap(tmp_path, models, **{option: ["q_proj"]})


def test_patterns_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    """At least one tensor must be left."""
    with pytest.raises(ConfigError, match="at least one tensor"):
        _overlap(tmp_path, [{"w": np.ones(3)}] * 2, exclude=["*"])


def test_coverage_is_counted_after_exclusion(tmp_path: Path) -> None:
    """Whoever excludes what cannot be compared has full coverage of the rest."""
    models: list[Tensors] = [
        {"a": np.ones(90), "b": np.ones(900)},
        {"a": np.arange(90.0), "b": np.ones(800)},
        {"a": np.arange(90.0) ** 2, "b": np.ones(900)},
    ]
    base, *others = (open_checkpoint(one) for one in write(tmp_path, models))
    with pytest.raises(IncomparableError, match=r"90%.*9\.1%"):
        compare(base, others)
    assert compare(base, others, exclude=["b"]).coverage == 1
    assert compare(base, others, min_coverage=0.09).coverage == pytest.approx(1 / 11)
    # Even where any coverage will do, something must be compared.
    with pytest.raises(IncomparableError, match="b: m0"):
        compare(base, others, include=["b"], min_coverage=0)
