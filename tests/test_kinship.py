"""Kinship: equal to a float64 NumPy oracle on concatenated deltas, whatever the layout on disk."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    DTYPES,
    EMBEDDING,
    HEAD,
    Array,
    Dtype,
    delta_matrix,
    llama_config,
    llama_like,
    perturbed,
    stored,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import modelkin as mk
from modelkin.checkpoint import Checkpoint, open_checkpoint
from modelkin.errors import CheckpointError, ConfigError, IncomparableError
from modelkin.gram import GramStats
from modelkin.gram.precision import BLOCK
from modelkin.measuring import compare, measure, streaming
from modelkin.similarity import kinship_from

Tensors = Mapping[str, Array]
SUMS = ("base_T", "base_sum_T", "sum_TN", "cross_TN", "gram_TNN", "distance_TNN")


def _rounded(tensors: Tensors, dtype: Dtype | Mapping[str, Dtype]) -> dict[str, Array]:
    return {
        name: stored(values, dtype if isinstance(dtype, str) else dtype[name])
        for name, values in tensors.items()
    }


def _assert_equals_oracle(
    found: mk.Kinship, base: Tensors, models: Sequence[Tensors], names: Sequence[str] | None = None
) -> None:
    """PCC and cosine to 1e-6, Euclidean distance to 1e-5 of its value."""
    deltas_NP = delta_matrix(base, models, sorted(names or base))
    norm_N = np.linalg.norm(deltas_NP, axis=1)
    np.testing.assert_allclose(found.pcc_NN, np.corrcoef(deltas_NP), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        found.cs_NN, deltas_NP @ deltas_NP.T / np.outer(norm_N, norm_N), rtol=0, atol=1e-6
    )
    distance_NN = np.array(
        [[np.linalg.norm(one - other) for other in deltas_NP] for one in deltas_NP]
    )
    np.testing.assert_allclose(found.ed_NN, distance_NN, rtol=1e-5, atol=0)
    assert found.compared_parameters == deltas_NP.shape[1]


def _family(
    seed: int, models: int, **shape: Any
) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """A base and fine-tunes of it that share a part of their change, so that they are related."""
    rng = np.random.default_rng(seed)
    base = llama_like(rng, **shape)
    shared = perturbed(base, rng, scale=0.004)
    return base, [perturbed(shared, rng, scale=0.002 * (1 + n)) for n in range(models)]


def _write(folder: Path, base: Tensors, models: Sequence[Tensors], **how: Any) -> list[Path]:
    """The base's folder, then each model's: m0, m1, ..."""
    return [
        write_checkpoint(folder / name, tensors, **how)
        for name, tensors in zip(
            ("base", *(f"m{n}" for n in range(len(models)))), (base, *models), strict=True
        )
    ]


def _measured(base: Path, models: Sequence[Path], known: GramStats | None = None) -> GramStats:
    return measure(open_checkpoint(base), [open_checkpoint(one) for one in models], known=known)


def _assert_same_sums(found: GramStats, expected: GramStats) -> None:
    """Equal up to the rounding of float64 sums, on the scale of what was summed."""
    assert (found.models, found.tensors) == (expected.models, expected.tensors)
    np.testing.assert_array_equal(found.count_T, expected.count_T)
    for field in SUMS:
        want = getattr(expected, field)
        scale = max(float(np.abs(want).max()), 1e-30)
        np.testing.assert_allclose(
            getattr(found, field), want, rtol=1e-9, atol=1e-13 * scale, err_msg=field
        )


# Against the oracle


@pytest.mark.parametrize("models", [2, 3, 4, 5, 6])
def test_kinship_equals_the_oracle(models: int, tmp_path: Path) -> None:
    """Kinship of two to six models equals the float64 oracle on concatenated deltas."""
    base, tuned = _family(models, models)
    folder, *others = _write(tmp_path, base, tuned, dtype="F64")
    found = mk.kinship(folder, others)
    _assert_equals_oracle(found, base, tuned)
    assert found.models == tuple(f"m{n}" for n in range(models))
    assert found.base == "base"
    assert found.coverage == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_exactly(dtype: Dtype, tmp_path: Path) -> None:
    """Kinship is that of the numbers as stored, in each of the four dtypes."""
    base, tuned = _family(1, 3)
    folder, *others = _write(tmp_path, base, tuned, dtype=dtype)
    _assert_equals_oracle(
        mk.kinship(folder, others), _rounded(base, dtype), [_rounded(one, dtype) for one in tuned]
    )


@pytest.mark.parametrize("base_dtype", DTYPES)
def test_dtypes_may_differ_between_base_and_models(base_dtype: Dtype, tmp_path: Path) -> None:
    """A base of any dtype can be compared with models of every dtype at once."""
    base, tuned = _family(2, 4)
    folder = write_checkpoint(tmp_path / "base", base, dtype=base_dtype)
    others = [
        write_checkpoint(tmp_path / dtype, one, dtype=dtype)
        for dtype, one in zip(DTYPES, tuned, strict=True)
    ]
    _assert_equals_oracle(
        mk.kinship(folder, others),
        _rounded(base, base_dtype),
        [_rounded(one, dtype) for one, dtype in zip(tuned, DTYPES, strict=True)],
    )


def test_dtypes_may_differ_within_one_file(tmp_path: Path) -> None:
    """Norms kept in float32 beside bfloat16 matrices are read as what they are."""
    base, tuned = _family(3, 2)
    dtype: dict[str, Dtype] = {name: "F32" if "norm" in name else "BF16" for name in base}
    folder, *others = _write(tmp_path, base, tuned, dtype=dtype)
    _assert_equals_oracle(
        mk.kinship(folder, others), _rounded(base, dtype), [_rounded(one, dtype) for one in tuned]
    )


def test_more_elements_than_a_block(tmp_path: Path) -> None:
    """A tensor of several blocks and a bit is summed whole."""
    rng = np.random.default_rng(4)
    base = {"w": rng.standard_normal(2 * BLOCK + 7)}
    tuned = [perturbed(base, rng) for _ in range(3)]
    folder, *others = _write(tmp_path, base, tuned, dtype="F64")
    _assert_equals_oracle(mk.kinship(folder, others), base, tuned)


def test_a_shifted_delta_keeps_its_correlation(tmp_path: Path) -> None:
    """Deltas whose mean is a thousand times their spread keep a Pearson correlation to 1e-6."""
    rng = np.random.default_rng(5)
    base = {"w": rng.standard_normal(5000)}
    spread = rng.standard_normal((2, 5000))
    tuned = [{"w": base["w"] + 1 + 1e-3 * row} for row in (spread[0], spread[0] + spread[1])]
    folder, *others = _write(tmp_path, base, tuned, dtype="F64")
    _assert_equals_oracle(mk.kinship(folder, others), base, tuned)


def test_kinship_is_not_the_mean_over_tensors(tmp_path: Path) -> None:
    """The similarity of the whole is taken from summed statistics, not averaged over tensors."""
    base = {"large": np.zeros(90), "small": np.zeros(10)}
    one = {"large": np.ones(90), "small": np.ones(10)}
    other = {"large": np.ones(90), "small": -np.ones(10)}
    folder, *others = _write(tmp_path, base, [one, other])
    assert mk.kinship(folder, others).cs_NN[0, 1] == pytest.approx(0.8)


# The layout on disk


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_shards_do_not_matter(dtype: Dtype, tmp_path: Path) -> None:
    """Sharded and unsharded copies of the same weights give identical statistics."""
    base, tuned = _family(6, 3)
    whole = _write(tmp_path / "whole", base, tuned, dtype=dtype)
    sharded = _write(tmp_path / "sharded", base, tuned, dtype=dtype, shards=4)
    one, other = (_measured(folder, others) for folder, *others in (whole, sharded))
    assert (one.models, one.tensors) == (other.models, other.tensors)
    for field in ("count_T", *SUMS):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field), err_msg=field)


def test_the_order_in_the_file_does_not_matter(tmp_path: Path) -> None:
    """Tensors are matched by name, not by their place in the file."""
    base, tuned = _family(7, 2)
    folder, first, _ = _write(tmp_path, base, tuned, dtype="F64")
    backwards = write_checkpoint(
        tmp_path / "backwards", dict(reversed(tuned[1].items())), dtype="F64"
    )
    _assert_equals_oracle(mk.kinship(folder, [first, backwards]), base, tuned)


def test_an_untied_head_counts(tmp_path: Path) -> None:
    """The output head of an untied model is part of its kinship."""
    base, tuned = _family(8, 2)
    folder, *others = _write(tmp_path, base, tuned, dtype="F64")
    found = mk.kinship(folder, others)
    assert found.compared_parameters == sum(values.size for values in base.values())
    _assert_equals_oracle(found, base, tuned)


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    """A tied head that some models store a second time changes nothing."""
    base, tuned = _family(9, 2, tied=True)
    config = llama_config(base)
    folder = write_checkpoint(tmp_path / "base", base, dtype="F64")
    once = [
        write_checkpoint(tmp_path / "once" / f"m{n}", one, dtype="F64")
        for n, one in enumerate(tuned)
    ]
    twice = [
        write_checkpoint(
            tmp_path / "twice" / f"m{n}", {**one, HEAD: one[EMBEDDING]}, dtype="F64", config=config
        )
        for n, one in enumerate(tuned)
    ]
    expected = mk.kinship(folder, once)
    _assert_equals_oracle(expected, base, tuned)
    for others in (twice, [once[0], twice[1]]):
        found = mk.kinship(folder, others)
        assert found.as_dict() == expected.as_dict()
        assert found.left_out == ()


def test_a_tied_head_of_the_base_is_counted_once(tmp_path: Path) -> None:
    """A base that stores its tied head twice has no more parameters than one that does not."""
    base, tuned = _family(10, 2, tied=True)
    folder, *others = _write(tmp_path, base, tuned, dtype="F64")
    twice = write_checkpoint(
        tmp_path / "twice", {**base, HEAD: base[EMBEDDING]}, dtype="F64", config=llama_config(base)
    )
    assert mk.kinship(twice, others).total_parameters == mk.kinship(folder, others).total_parameters


# Properties


class _Written:
    """A family in a folder of its own, for Hypothesis, whose examples share no fixture."""

    def __init__(self, seed: int, models: int, dtype: Dtype) -> None:
        self._seed, self._models, self._dtype = seed, models, dtype

    def __enter__(self) -> tuple[Path, list[Path]]:
        self._folder = tempfile.TemporaryDirectory()
        base, tuned = _family(self._seed, self._models, layers=1)
        folder, *others = _write(Path(self._folder.name), base, tuned, dtype=self._dtype)
        return folder, others

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, dtype=dtypes, order=st.permutations(range(4)))
def test_the_order_of_models_permutes_the_matrices(
    seed: int, dtype: Dtype, order: list[int]
) -> None:
    """Naming the models in another order permutes rows and columns and changes no value."""
    with _Written(seed, 4, dtype) as (base, models):
        straight = mk.kinship(base, models)
        permuted = mk.kinship(base, [models[n] for n in order])
    assert permuted.models == tuple(straight.models[n] for n in order)
    for metric in ("pcc", "cs", "ed"):
        np.testing.assert_allclose(
            permuted.matrix(metric), straight.matrix(metric)[np.ix_(order, order)], rtol=1e-9
        )
        assert permuted.mean(metric) == pytest.approx(straight.mean(metric), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    seed=seeds,
    dtype=dtypes,
    size=st.integers(1, 6 * BLOCK),
    slice_bytes=st.integers(1, 8 * BLOCK * 4),
    resident_bytes=st.integers(1, 40_000),
)
def test_the_size_of_a_slice_does_not_matter(
    seed: int, dtype: Dtype, size: int, slice_bytes: int, resident_bytes: int
) -> None:
    """Slices of any size give the same statistics, up to the rounding of float64 sums."""
    rng = np.random.default_rng(seed)
    base = {"w": rng.standard_normal(size), "norm": rng.standard_normal(8)}
    tuned = [perturbed(base, rng) for _ in range(3)]
    with tempfile.TemporaryDirectory() as name:
        folder, *others = _write(Path(name), base, tuned, dtype=dtype)
        usual = _measured(folder, others)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streaming, "SLICE_BYTES", slice_bytes)
            patch.setattr(streaming, "RESIDENT_BYTES", resident_bytes)
            small = _measured(folder, others)
    _assert_same_sums(small, usual)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, dtype=dtypes, split=st.integers(1, 5))
def test_known_statistics_can_be_extended(seed: int, dtype: Dtype, split: int) -> None:
    """Measuring a prefix first and the rest later equals measuring all at once."""
    with _Written(seed, 5, dtype) as (base, models):
        at_once = _measured(base, models)
        in_two = _measured(base, models, known=_measured(base, models[:split]))
    _assert_same_sums(in_two, at_once)


def test_known_statistics_of_other_models_are_not_used(tmp_path: Path) -> None:
    """Statistics of models that are no prefix of those asked for are measured afresh."""
    base, tuned = _family(11, 3)
    folder, *others = _write(tmp_path, base, tuned)
    known = _measured(folder, [others[2], others[0]])
    _assert_same_sums(_measured(folder, others, known=known), _measured(folder, others))


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_statistics_add_up_over_tensors(seed: int) -> None:
    """Statistics of a model are the sum of those of models that hold one of its tensors each."""
    rng = np.random.default_rng(seed)
    base = {"a": rng.standard_normal((3, 5)), "b": rng.standard_normal(7), "c": np.ones((2, 2, 2))}
    tuned = [perturbed(base, rng) for _ in range(2)]
    with tempfile.TemporaryDirectory() as name:
        folder, *others = _write(Path(name) / "all", base, tuned, dtype="F64")
        whole = _measured(folder, others)
        parts = [
            _measured(folder, others)
            for tensor in base
            for folder, *others in [
                _write(
                    Path(name) / tensor,
                    {tensor: base[tensor]},
                    [{tensor: one[tensor]} for one in tuned],
                    dtype="F64",
                )
            ]
        ]
    for field in ("count_T", *SUMS):
        np.testing.assert_array_equal(
            getattr(whole, field), np.concatenate([getattr(part, field) for part in parts])
        )


# Special models


@settings(max_examples=25, deadline=None)
@given(seed=seeds, dtype=dtypes, size=st.integers(2, 300), models=st.integers(2, 5))
def test_identical_models_have_kinship_one_and_distance_zero(
    seed: int, dtype: Dtype, size: int, models: int
) -> None:
    """Copies of one model have a distance of exactly 0 and a kinship of exactly 1."""
    rng = np.random.default_rng(seed)
    base = {"w": rng.standard_normal(size)}
    copy = perturbed(base, rng, scale=0.5)
    with tempfile.TemporaryDirectory() as name:
        folder, *others = _write(Path(name), base, [copy] * models, dtype=dtype)
        found = mk.kinship(folder, others)
    np.testing.assert_array_equal(found.ed_NN, np.zeros((models, models)))
    np.testing.assert_array_equal(found.cs_NN, np.ones((models, models)))
    np.testing.assert_array_equal(found.pcc_NN, np.ones((models, models)))


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9])
def test_a_difference_in_one_element_is_the_distance(step: float, tmp_path: Path) -> None:
    """Two models that differ in one element are exactly as far apart as that element, to 1e-5."""
    rng = np.random.default_rng(12)
    base = {"w": rng.standard_normal(20_000)}
    one = perturbed(base, rng, scale=0.1)
    other = {"w": one["w"].copy()}
    other["w"][1234] += step
    folder, *others = _write(tmp_path, base, [one, other], dtype="F64")
    expected = abs(other["w"][1234] - one["w"][1234])
    assert mk.kinship(folder, others).ed_NN[0, 1] == pytest.approx(expected, rel=1e-5)


def test_opposite_deltas_have_cosine_minus_one(tmp_path: Path) -> None:
    """Opposite deltas have cosine and correlation -1, and twice a delta's length between them."""
    rng = np.random.default_rng(13)
    base = {"w": rng.integers(-8, 8, 100).astype(np.float64)}
    delta = rng.integers(-8, 8, 100).astype(np.float64)
    folder, *others = _write(
        tmp_path, base, [{"w": base["w"] + delta}, {"w": base["w"] - delta}], dtype="BF16"
    )
    found = mk.kinship(folder, others)
    assert found.cs_NN[0, 1] == -1.0
    assert found.pcc_NN[0, 1] == pytest.approx(-1.0, abs=1e-12)
    assert found.ed_NN[0, 1] == pytest.approx(2 * np.linalg.norm(delta))


def test_cosine_is_signed(tmp_path: Path) -> None:
    """A cosine is negative where deltas point away from each other; it is no absolute value."""
    base = {"w": np.zeros(2)}
    folder, *others = _write(
        tmp_path, base, [{"w": np.array([1.0, 0.0])}, {"w": np.array([-1.0, 1.0])}]
    )
    assert mk.kinship(folder, others).cs_NN[0, 1] == pytest.approx(-np.sqrt(0.5))


def test_a_model_equal_to_the_base_is_undefined(tmp_path: Path) -> None:
    """A model without a delta is NaN in arrays, None elsewhere, and JSON never says NaN."""
    base, tuned = _family(14, 2)
    folder, *others = _write(tmp_path, base, [tuned[0], base, tuned[1]])
    found = mk.kinship(folder, others)
    assert found.undefined == ("m1",)
    for metric in ("pcc", "cs"):
        matrix = found.matrix(metric)
        assert np.isnan(matrix[1]).all()
        assert np.isnan(matrix[:, 1]).all()
        assert not np.isnan(matrix[np.ix_([0, 2], [0, 2])]).any()
        assert found.mean(metric) is None
    said = found.as_dict()
    assert said["pcc"][1] == said["cs"][1] == [None] * 3
    assert said["mean"]["pcc"] is None
    assert said["mean"]["ed"] == pytest.approx(found.mean("ed"))
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    pair = found.similarity("m0", "m1")
    assert (pair.pcc, pair.cs) == (None, None)
    assert pair.ed == pytest.approx(np.linalg.norm(_delta(_rounded(base, "F32"), tuned[0])), 1e-4)


def _delta(base: Tensors, model: Tensors) -> Array:
    row: Array = delta_matrix(base, [_rounded(model, "F32")], sorted(base))[0]
    return row


def test_a_constant_delta_has_no_correlation(tmp_path: Path) -> None:
    """A delta that is the same everywhere has a cosine, but its correlation is undefined."""
    rng = np.random.default_rng(15)
    base = {"w": rng.integers(-4, 4, 64).astype(np.float64)}
    folder, *others = _write(
        tmp_path, base, [{"w": base["w"] + 1}, {"w": base["w"] + rng.standard_normal(64)}]
    )
    found = mk.kinship(folder, others)
    assert np.isnan(found.pcc_NN[0]).all()
    assert found.cs_NN[0, 0] == 1.0
    assert found.undefined == ()


def test_the_mean_is_over_unordered_pairs(tmp_path: Path) -> None:
    """The mean kinship is the mean over pairs of different models, each pair once."""
    base, tuned = _family(16, 4)
    folder, *others = _write(tmp_path, base, tuned)
    found = mk.kinship(folder, others)
    for metric in ("pcc", "cs", "ed"):
        pairs = [found.matrix(metric)[i, j] for i, j in combinations(range(4), 2)]
        assert found.mean(metric) == pytest.approx(np.mean(pairs))


def test_similarity_of_a_pair_is_its_entry(tmp_path: Path) -> None:
    """The similarity of two models by name is the entry of each matrix."""
    base, tuned = _family(17, 3)
    folder, *others = _write(tmp_path, base, tuned)
    found = mk.kinship(folder, others)
    pair = found.similarity("m2", "m0")
    assert (pair.pcc, pair.cs, pair.ed) == (
        found.pcc_NN[2, 0],
        found.cs_NN[2, 0],
        found.ed_NN[2, 0],
    )


def test_models_with_one_folder_name_are_told_apart(tmp_path: Path) -> None:
    """Two folders of the same name in different places are two models."""
    base, tuned = _family(18, 2)
    folder = write_checkpoint(tmp_path / "base", base, dtype="F64")
    others = [
        write_checkpoint(tmp_path / place / "final", one, dtype="F64")
        for place, one in zip("ab", tuned, strict=True)
    ]
    found = mk.kinship(folder, others)
    assert len(set(found.models)) == 2
    _assert_equals_oracle(found, base, tuned)


def test_empty_and_scalar_tensors_can_be_compared(tmp_path: Path) -> None:
    """A tensor without elements adds nothing; one without axes adds one element."""
    base = {"none": np.zeros((0, 4)), "scalar": np.array(1.0), "w": np.arange(4.0)}
    tuned = [{**base, "w": base["w"] + shift} for shift in ([0, 0, 1, 0], [0, 1, 1, 0])]
    folder, *others = _write(tmp_path, base, tuned)
    found = mk.kinship(folder, others)
    assert found.compared_parameters == 5
    assert found.cs_NN[0, 1] == pytest.approx(np.sqrt(0.5))


# What is compared


def _enlarged(tensors: Tensors, rows: int) -> dict[str, Array]:
    """With tokens added at the end of the vocabulary."""
    more = {
        name: np.concatenate([tensors[name], np.ones((rows, tensors[name].shape[1]))])
        for name in (EMBEDDING, HEAD)
        if name in tensors
    }
    return {**tensors, **more}


def test_a_tensor_of_another_shape_is_left_out(tmp_path: Path) -> None:
    """A tensor of another shape is left out of the comparison, and the coverage says so."""
    name = "model.layers.0.self_attn.k_proj.weight"
    base, tuned = _family(19, 2)
    wider = {**tuned[1], name: np.ones((5, 8))}
    folder, *others = _write(tmp_path, base, [tuned[0], wider], dtype="F64")
    found = mk.kinship(folder, others)
    assert found.left_out == (name,)
    total = sum(values.size for values in base.values())
    assert found.total_parameters == total
    assert found.coverage == pytest.approx(1 - base[name].size / total)
    assert 0.9 < found.coverage < 1
    _assert_equals_oracle(found, base, tuned, [other for other in base if other != name])


def test_added_tokens_are_left_out(tmp_path: Path) -> None:
    """Of an embedding and head with added tokens, the rows that all models have are compared."""
    base, tuned = _family(19, 2, vocab=8)
    folder, *others = _write(tmp_path, base, [tuned[0], _enlarged(tuned[1], 3)], dtype="F64")
    found = mk.kinship(folder, others)
    assert found.left_out == ()
    assert found.total_parameters == sum(values.size for values in base.values())
    assert found.coverage == 1.0
    _assert_equals_oracle(found, base, tuned)


def test_tokens_that_a_model_lacks_cost_coverage(tmp_path: Path) -> None:
    """Where a model has fewer rows than the base, those rows count as not compared."""
    base, tuned = _family(19, 2, vocab=8)
    fewer = {**base, **{name: base[name][:6] for name in (EMBEDDING, HEAD)}}
    short = {**tuned[1], **{name: tuned[1][name][:6] for name in (EMBEDDING, HEAD)}}
    folder, *others = _write(tmp_path, base, [tuned[0], short], dtype="F64")
    found = mk.kinship(folder, others)
    assert found.left_out == ()
    assert found.total_parameters - found.compared_parameters == 2 * 2 * 8
    common = {**tuned[0], **{name: tuned[0][name][:6] for name in (EMBEDDING, HEAD)}}
    _assert_equals_oracle(found, fewer, [common, short])


def test_a_tensor_that_the_base_lacks_is_left_out(tmp_path: Path) -> None:
    """A tensor that only one model has is left out and costs no coverage."""
    base, tuned = _family(20, 2)
    extra = {**tuned[0], "model.layers.0.extra": np.ones(5)}
    folder, *others = _write(tmp_path, base, [extra, tuned[1]], dtype="F64")
    found = mk.kinship(folder, others)
    assert found.left_out == ("model.layers.0.extra",)
    assert found.coverage == 1.0
    _assert_equals_oracle(found, base, tuned)


def test_too_little_in_common_is_refused(tmp_path: Path) -> None:
    """Where missing tokens leave less than 0.9 of the base, the error names the tensor."""
    base, tuned = _family(21, 2, vocab=64)
    short = {**tuned[1], **{name: tuned[1][name][:20] for name in (EMBEDDING, HEAD)}}
    folder, *others = _write(tmp_path, base, [tuned[0], short])
    with pytest.raises(IncomparableError) as caught:
        mk.kinship(folder, others)
    message = str(caught.value)
    assert HEAD in message
    assert "base [64, 8], m0 [64, 8], m1 [20, 8]" in message
    assert "90%" in message
    assert "\n" not in message


def test_other_shapes_that_leave_too_little_are_refused(tmp_path: Path) -> None:
    """Embeddings of another width have no rows in common: they are left out, however large."""
    base, tuned = _family(21, 2, vocab=64)
    wider = {name: np.ones((64, 16)) for name in (EMBEDDING, HEAD)}
    folder, *others = _write(tmp_path, base, [tuned[0], {**tuned[1], **wider}])
    with pytest.raises(IncomparableError, match=r"90%.*m1 \[64, 16\]"):
        mk.kinship(folder, others)


@pytest.mark.parametrize(("kept", "comparable"), [(90, True), (89, False)])
def test_coverage_is_needed_to_the_element(kept: int, comparable: bool, tmp_path: Path) -> None:
    """Ninety of a hundred elements in common are enough, eighty-nine are not."""
    base = {"kept": np.zeros(kept), "other": np.zeros(100 - kept)}
    models = [{"kept": np.ones(kept)}, {"kept": np.arange(float(kept))}]
    folder, *others = _write(tmp_path, base, models)
    opened = [open_checkpoint(one) for one in others]
    if comparable:
        found = compare(open_checkpoint(folder), opened)
        assert (found.compared_parameters, found.total_parameters) == (90, 100)
        assert found.left_out == ("other",)
    else:
        with pytest.raises(IncomparableError, match="other"):
            compare(open_checkpoint(folder), opened)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    """A model of another architecture is incomparable, and the error names both."""
    base, tuned = _family(22, 2)
    folder, first, _ = _write(tmp_path, base, tuned)
    other = write_checkpoint(
        tmp_path / "other",
        tuned[1],
        config={**llama_config(base), "architectures": ["MistralForCausalLM"]},
    )
    with pytest.raises(IncomparableError) as caught:
        mk.kinship(folder, [first, other])
    for part in (str(other), "LlamaForCausalLM", "MistralForCausalLM"):
        assert part in str(caught.value)


def test_one_model_has_no_kinship(tmp_path: Path) -> None:
    """Kinship of fewer than two models is a ConfigError."""
    base, tuned = _family(23, 1)
    folder, one = _write(tmp_path, base, tuned)
    with pytest.raises(ConfigError, match="at least 2 models, found 1"):
        mk.kinship(folder, [one])


def test_models_that_are_measured_need_distinct_names(tmp_path: Path) -> None:
    """`measure` refuses models that share a name, as its result could not tell them apart."""
    base, tuned = _family(24, 1)
    folder, one = _write(tmp_path, base, tuned)
    with pytest.raises(ConfigError, match="distinct names"):
        _measured(folder, [one, one])


# Numbers that cannot be compared


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("guilty", ["base", "m0", "m1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_not_finite_is_named(
    value: float, guilty: str, dtype: Dtype, tmp_path: Path
) -> None:
    """NaN or infinity in base or model is an error that names file, tensor and element."""
    rng = np.random.default_rng(25)
    models = {name: {"v": np.ones(3), "w": rng.standard_normal((4, 5))} for name in _NAMES}
    models[guilty]["w"][2, 3] = value
    folder, *others = (
        write_checkpoint(tmp_path / name, tensors, dtype=dtype) for name, tensors in models.items()
    )
    with pytest.raises(CheckpointError) as caught:
        mk.kinship(folder, others)
    message = str(caught.value)
    for part in (str(tmp_path / guilty / "model.safetensors"), "'w'", f"found {value}", "13"):
        assert part in message


_NAMES = ("base", "m0", "m1")


def test_a_nan_far_into_a_tensor_is_found(tmp_path: Path) -> None:
    """The element is counted from the start of the tensor, not of the block."""
    size = streaming.SMALL + 10
    base = {"w": np.zeros(size)}
    bad = {"w": np.ones(size)}
    bad["w"][size - 2] = np.nan
    folder, *others = _write(tmp_path, base, [{"w": np.ones(size)}, bad])
    with pytest.raises(CheckpointError, match=f"element {size - 2}$"):
        mk.kinship(folder, others)


@pytest.mark.parametrize("guilty", ["base", "m1"])
def test_a_square_that_overflows_is_named(guilty: str, tmp_path: Path) -> None:
    """Finite numbers whose square is beyond float64 are an error, not an infinite distance."""
    models = {name: {"w": np.arange(4.0) + n} for n, name in enumerate(_NAMES)}
    models[guilty]["w"][1] = 1e200
    folder, *others = (
        write_checkpoint(tmp_path / name, tensors, dtype="F64") for name, tensors in models.items()
    )
    with pytest.raises(CheckpointError, match="overflows float64") as caught:
        mk.kinship(folder, others)
    assert str(tmp_path / guilty) in str(caught.value)


def test_a_model_without_shared_weights_is_refused(tmp_path: Path) -> None:
    """A base that holds no weights can be compared with nothing."""
    folder, *others = _write(tmp_path, {}, [{"w": np.ones(2)}, {"w": np.ones(2)}])
    with pytest.raises(IncomparableError, match="base"):
        mk.kinship(folder, others)


def test_measuring_reads_only_what_it_was_given(tmp_path: Path) -> None:
    """Opened checkpoints are enough to measure: names and places are theirs."""
    base, tuned = _family(26, 2)
    folder, *others = _write(tmp_path, base, tuned, dtype="F64")
    opened: list[Checkpoint] = [
        open_checkpoint(one, name=f"renamed {n}") for n, one in enumerate(others)
    ]
    stats = measure(open_checkpoint(folder), opened)
    assert stats.models == ("renamed 0", "renamed 1")
    found = kinship_from(stats, base="b", total_parameters=int(stats.count_T.sum()))
    _assert_equals_oracle(found, base, tuned)


# Of the same family?


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 5e-3])
def test_descendants_are_no_strangers(scale: float, tmp_path: Path) -> None:
    """Models whose weights moved by a part of their size are taken for the base's descendants."""
    rng = np.random.default_rng(30)
    base = llama_like(rng, hidden=16, intermediate=32, vocab=64)
    tuned = [perturbed(base, rng, scale=scale) for _ in range(2)]
    folder, *others = _write(tmp_path, base, tuned)
    assert mk.kinship(folder, others).strangers == ()


def test_a_model_of_another_base_is_a_stranger(tmp_path: Path) -> None:
    """A model trained from scratch is named, although its norms are like the base's."""
    rng = np.random.default_rng(31)
    base, other = (llama_like(rng, hidden=16, intermediate=32, vocab=64) for _ in range(2))
    tuned = perturbed(base, rng, scale=1e-3)
    folder, *others = _write(tmp_path, base, [tuned, perturbed(other, rng, scale=1e-3)])
    found = mk.kinship(folder, others)
    assert found.strangers == ("m1",)
    assert found.as_dict()["strangers"] == ["m1"]


def test_added_tokens_are_counted(tmp_path: Path) -> None:
    """Rows of the vocabulary that not all models have are left out and counted."""
    base, tuned = _family(32, 2)
    folder, *others = _write(tmp_path, base, [tuned[0], _enlarged(tuned[1], 3)], dtype="F64")
    found = mk.kinship(folder, others)
    assert found.rows_left_out == {EMBEDDING: 3, HEAD: 3}
    assert found.coverage == 1.0
    _assert_equals_oracle(found, base, tuned)
