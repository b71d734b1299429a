"""Measuring: what is compared, how files are read, and what is remembered of it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    EMBEDDING,
    HEAD,
    MINIMAL_CONFIG,
    Array,
    Dtype,
    delta_matrix,
    perturbed,
    write_checkpoint,
)

import modelkin as mk
from modelkin.checkpoint import MappedTensor, WeightFile, open_checkpoint
from modelkin.errors import CheckpointError, ConfigError, IncomparableError
from modelkin.gram import GramStats
from modelkin.gram.kernel import Sums, sums
from modelkin.gram.precision import BLOCK
from modelkin.measuring import Comparison, compare, measure, overlap, stored, streaming

Tensors = Mapping[str, Array]
SUMS = ("base_T", "base_sum_T", "sum_TN", "cross_TN", "gram_TNN", "distance_TNN")
BIAS = "lm_head.bias"
NORM = "model.norm.weight"


def _write(folder: Path, models: Sequence[Tensors], dtype: Dtype = "F32") -> list[Path]:
    """The base's folder m0, then each model's: m1, m2, ..."""
    return [
        write_checkpoint(folder / f"m{n}", one, dtype=dtype, config=MINIMAL_CONFIG)
        for n, one in enumerate(models)
    ]


def _family(seed: int, models: int, sizes: Mapping[str, int]) -> list[Tensors]:
    """A base and models of it whose changes are related."""
    rng = np.random.default_rng(seed)
    base = {name: rng.normal(0, 0.02, size) for name, size in sizes.items()}
    shared = perturbed(base, rng)
    return [base, *(perturbed(shared, rng) for _ in range(models))]


def _measured(folders: Sequence[Path], **how: Any) -> GramStats:
    base, *models = (open_checkpoint(folder) for folder in folders)
    return measure(base, models, **how)


def _assert_same(found: GramStats, expected: GramStats, *, distance: float = 1e-9) -> None:
    """Equal up to the rounding of float64 sums, on the scale of what was summed."""
    assert (found.models, found.tensors) == (expected.models, expected.tensors)
    np.testing.assert_array_equal(found.count_T, expected.count_T)
    for field in SUMS:
        want = getattr(expected, field)
        rtol = distance if field == "distance_TNN" else 1e-9
        np.testing.assert_allclose(
            getattr(found, field), want, rtol=rtol, atol=1e-13 * np.abs(want).max(), err_msg=field
        )


# What is compared


def _overlap(folder: Path, models: Sequence[Tensors], **patterns: Any) -> Comparison:
    base, *others = (open_checkpoint(one) for one in _write(folder, models))
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
    folders = _write(tmp_path, models, "F64")
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
    stats = _measured(_write(tmp_path / "measured", models))
    assert stats.tensors == ("none", "scalar", "w")
    np.testing.assert_array_equal(stats.gram_TNN[:, 0, 1], [0, 2, 8])
    np.testing.assert_array_equal(stats.distance_TNN[:, 0, 1], [0, 1, 4])


def test_a_vocabulary_without_common_rows_is_compared_in_none(tmp_path: Path) -> None:
    """An embedding that is empty in one model has no rows in common: nothing of it is compared."""
    models: list[Tensors] = [
        {EMBEDDING: np.ones((rows, 2)), "w": np.arange(30.0) * (n + 1)}
        for n, rows in enumerate((3, 0, 5))
    ]
    folders = _write(tmp_path, models)
    found = mk.kinship(folders[0], folders[1:], min_coverage=0.8)
    assert found.compared_parameters == 30
    assert found.cs_NN[0, 1] == pytest.approx(1)


def test_patterns_say_what_is_compared(tmp_path: Path) -> None:
    """Excluded tensors are neither compared nor left out, nor part of what there is."""
    models: list[Tensors] = [
        {EMBEDDING: np.ones((rows, 2)), "layers.0.w": np.ones(7), "layers.10.w": np.ones(3)}
        for rows in (3, 5)
    ]
    folders = _write(tmp_path, models)
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
    base, *others = (open_checkpoint(one) for one in _write(tmp_path, models))
    with pytest.raises(IncomparableError, match=r"90%.*9\.1%"):
        compare(base, others)
    assert compare(base, others, exclude=["b"]).coverage == 1
    assert compare(base, others, min_coverage=0.09).coverage == pytest.approx(1 / 11)
    # Even where any coverage will do, something must be compared.
    with pytest.raises(IncomparableError, match="b: m0"):
        compare(base, others, include=["b"], min_coverage=0)


# How files are read


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job for every slice of a block, and single precision for all but the least tensors."""
    monkeypatch.setattr(streaming, "SLICE_BYTES", 1)
    monkeypatch.setattr(streaming, "SMALL", 2 * BLOCK)


Spied = Callable[..., Sums]


def _spy(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> list[int]:
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


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_an_error_stops_all_threads(
    error: type[BaseException], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one thread raises ends the others after their slice, and reaches the caller."""

    def fail(number: int) -> None:
        if number == 5:
            raise error("the sixth")
        if number > 5:
            time.sleep(0.001)  # lets the thread that raised go on

    folders = _write(tmp_path, _family(0, 2, {"w": 100 * BLOCK}))
    numbers = _spy(monkeypatch, fail)
    alive = threading.active_count()
    with pytest.raises(error, match="the sixth"):
        _measured(folders, threads=threads)
    assert len(numbers) < 100
    assert threading.active_count() == alive


@pytest.mark.parametrize("slice_bytes", [1, 10**9])
def test_an_interrupt_while_waiting_stops_the_others(
    slice_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while it waits for the last of the others, no thread reads on to the end."""
    # One job of many tensors, or many of one; the first waits for the interrupt.
    monkeypatch.setattr(streaming, "SLICE_BYTES", slice_bytes)
    folders = _write(tmp_path, _family(0, 2, {f"w{n}": 10 for n in range(200)}))
    interrupted = threading.Event()
    main = threading.current_thread()
    taken = threading.Event()

    def hold(_: int) -> None:
        if threading.current_thread() is main:
            raise AssertionError("the other thread should have everything")
        taken.set()
        interrupted.wait(10)

    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            taken.wait(10)
            if slice_bytes == 1:
                raise KeyboardInterrupt

        def join(self, timeout: float | None = None) -> None:
            if not interrupted.is_set():
                interrupted.set()
                if slice_bytes > 1:
                    raise KeyboardInterrupt
            super().join(timeout)

    numbers = _spy(monkeypatch, hold)
    alive = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            _measured(folders, threads=2)
    interrupted.set()
    assert len(numbers) < 200
    for thread in threading.enumerate():
        if thread is not main and thread.daemon:
            thread.join(10)
    assert threading.active_count() == alive


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_given_back_between_slices(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Giving memory back after every slice, of every file, changes no bit."""
    models = _family(0, 3, {"a": 20 * BLOCK + 1, "b": 5})
    # Shifted: summed again in double precision, for which memory is given back too.
    models = [models[0], *({**one, "a": one["a"] + 1} for one in models[1:])]
    folders = _write(tmp_path, models)
    expected = _measured(folders, threads=1)
    released: list[Path] = []
    release = WeightFile.release

    def spied(file: WeightFile) -> None:
        released.append(file.path)
        release(file)

    monkeypatch.setattr(WeightFile, "release", spied)
    monkeypatch.setattr(streaming, "RESIDENT_BYTES", 1)
    found = _measured(folders, threads=threads)
    for field in SUMS:
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    # 21 slices of `a`, twice, and one of `b`.
    assert len(released) == 43 * 4
    assert {file.parent for file in released} == set(folders)


_PEAK = """
import sys
from pathlib import Path
from modelkin.checkpoint import open_checkpoint
from modelkin.measuring import measure, streaming

def peak():
    # Of this program alone; what getrusage says is inherited from whoever started it.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

streaming.RESIDENT_BYTES = 30_000_000
streaming.SLICE_BYTES = 6_000_000
folder = Path(sys.argv[1])

def run(*names):
    base, *models = (open_checkpoint(folder / name) for name in names)
    measure(base, models, threads=2)

run("small0", "small1", "small2")
before = peak()
run("large0", "large1", "large2")
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak")
def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    """Files of 300 MB are measured in a small part of that."""
    for n in range(3):
        for size, count in (("small", 1 << 17), ("large", 50_000_000)):
            folder = write_checkpoint(
                tmp_path / f"{size}{n}", {}, dtype="BF16", config=MINIMAL_CONFIG
            )
            entry = {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}
            header = json.dumps({"w": entry}).encode()
            with (folder / "model.safetensors").open("wb") as stream:
                stream.write(len(header).to_bytes(8, "little") + header)
                # Takes no room on the disk.
                stream.truncate(8 + len(header) + 2 * count)
    ran = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 100_000_000


def test_quantised_weights_are_read_in_small_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice is as large as what is handed out, however little of it is stored."""
    folders = _write(tmp_path, _family(0, 2, {"w": 64 * BLOCK}))
    base, *models = (open_checkpoint(folder) for folder in folders)
    expected = measure(base, models)
    monkeypatch.setattr(streaming, "SLICE_BYTES", 16 * BLOCK * 3 * 4)
    monkeypatch.setattr(MappedTensor, "bytes", property(lambda tensor: tensor.count // 2))
    numbers = _spy(monkeypatch, lambda _: None)
    _assert_same(measure(base, models), expected)
    assert len(numbers) == 4


class _Bar:
    """Stands in for rich's progress."""

    def __init__(self) -> None:
        self.totals: list[float] = []
        self.done = 0.0
        self.removed = 0
        self._lock = threading.Lock()

    def add_task(self, description: str, total: float) -> int:
        self.totals.append(total)
        return len(self.totals) - 1

    def advance(self, task: int, advance: float) -> None:
        with self._lock:
            self.done += advance

    def remove_task(self, task: int) -> None:
        self.removed += 1


@pytest.mark.usefixtures("small_slices")
def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    """The bar counts the bytes that are read of all files, to the last one."""
    models = [
        {**one, EMBEDDING: np.ones((5 + n, 3))}
        for n, one in enumerate(_family(0, 2, {"a": 9 * BLOCK + 7, "b": 3, "c": 0}))
    ]
    bar = _Bar()
    _measured(_write(tmp_path, models), threads=2, progress=bar)
    assert len(bar.totals) == bar.removed == 1
    assert bar.done == pytest.approx(bar.totals[0])
    # The rows that are left out count as read.
    assert bar.totals[0] == pytest.approx(sum(4 * one["a"].size for one in models), rel=0.01)


@pytest.mark.usefixtures("small_slices")
def test_an_error_takes_the_bar_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bar is left behind by a pass that fails."""

    def fail(_: int) -> None:
        raise RuntimeError("no")

    folders = _write(tmp_path, _family(0, 2, {"a": 10}))
    _spy(monkeypatch, fail)
    bar = _Bar()
    with pytest.raises(RuntimeError):
        _measured(folders, progress=bar)
    assert bar.removed == 1


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads: int, tmp_path: Path) -> None:
    """At least one thread must work."""
    folders = _write(tmp_path, _family(0, 2, {"w": 5}))
    with pytest.raises(ConfigError, match=f"threads: expected at least 1, found {threads}"):
        mk.kinship(folders[0], folders[1:], threads=threads)


def test_a_nan_of_any_kind_is_named(tmp_path: Path) -> None:
    """A signalling NaN, on which NumPy remarks when it is widened, is an error like others."""
    folders = _write(tmp_path, _family(0, 2, {"w": 5}), "BF16")
    file = folders[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + bytes([0x81, 0x7F]))
    with pytest.raises(CheckpointError, match=r"m1.*'w'.*found nan at element 4"):
        mk.kinship(folders[0], folders[1:])


def test_an_overflowing_difference_is_named(tmp_path: Path) -> None:
    """Where only the difference of two models has no finite square, one of them is named."""
    folders = _write(
        tmp_path, [{"w": np.array([value, 1.0])} for value in (0.0, 1e154, 1.0, -1e154)], "F64"
    )
    with pytest.raises(CheckpointError, match=r"m1.*overflows float64"):
        mk.kinship(folders[0], folders[1:])


# Statistics that are known


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("order", [[1, 2, 3], [5, 2], [4], [5, 4, 3, 2, 1], [3, 9, 1], [8, 9]])
def test_known_statistics_in_any_order_are_used(
    order: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of any of the models, among those of others, give what measuring all gives.

    But for distances in single precision: few models are measured by another kernel than many,
    which takes them from the differences instead of the products.
    """
    folders = _write(tmp_path, _family(0, 9, {"a": 3 * BLOCK, "b": 4}))
    expected = _measured(folders[:6])
    known = _measured([folders[0], *(folders[n] for n in order)])
    asked: list[int] = []

    def spied(*arguments: Any, new: int, **more: Any) -> Sums:
        asked.append(new)
        return sums(*arguments, new=new, **more)

    monkeypatch.setattr(streaming, "sums", spied)
    _assert_same(_measured(folders[:6], known=known), expected, distance=1e-6)
    new = 5 - len({1, 2, 3, 4, 5} & set(order))
    assert set(asked) == ({new} if new else set())


def test_known_statistics_of_other_tensors_are_not_used(tmp_path: Path) -> None:
    """Statistics of fewer tensors, or of fewer rows, say nothing of these."""
    models: list[Tensors] = [
        {"a": np.arange(4.0) * n, EMBEDDING: np.ones((2 + (n == 3), 2)) * n} for n in (1, 2, 3)
    ]
    folders = _write(tmp_path, models)
    expected = _measured(folders)
    base, *others = (open_checkpoint(folder) for folder in folders)
    fewer = _measured(folders, comparison=overlap(base, others, exclude=["a"]))
    _assert_same(_measured(folders, known=fewer), expected)
    more_rows = _measured([folders[2], folders[2], folders[2]][:2])
    _assert_same(_measured(folders, known=more_rows), expected)


# Statistics that are remembered


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled as soon as they are written."""
    monkeypatch.setattr(stored, "SETTLED", -1.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that weights are read from, one for each slice."""
    found: list[Path] = []
    read = MappedTensor.read

    def spied(tensor: MappedTensor, start: int, stop: int) -> Any:
        found.append(tensor.file)
        return read(tensor, start, stop)

    monkeypatch.setattr(MappedTensor, "read", spied)
    return found


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A base and six models."""
    return _write(tmp_path / "models", _family(0, 6, {"a": 50, "b.c": 7}))


def _kinship(folders: Sequence[Path], **how: Any) -> dict[str, Any]:
    return mk.kinship(folders[0], folders[1:], **how).as_dict("tensor")


def _close(found: Any, expected: Any) -> bool:
    """Whether two results are the same but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _close(found[key], expected[key]) for key in expected
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(
            _close(one, other) for one, other in zip(found, expected, strict=True)
        )
    return bool(found == (pytest.approx(expected) if isinstance(expected, float) else expected))


def _entries() -> Iterator[Path]:
    """The files of the cache of statistics."""
    return (Path(os.environ["MODELKIN_CACHE"]) / "statistics").rglob("*.*")


@pytest.mark.usefixtures("settled")
def test_the_second_call_reads_no_weights(folders: list[Path], reads: list[Path]) -> None:
    """What was measured once is answered from memory: the same numbers, to the bit."""
    first = _kinship(folders[:4])
    assert {file.parent for file in reads} == set(folders[:4])
    reads.clear()
    assert _kinship(folders[:4]) == first
    assert reads == []
    assert len(list(_entries())) == 2


@pytest.mark.usefixtures("settled")
def test_without_the_cache_nothing_is_remembered(folders: list[Path], reads: list[Path]) -> None:
    """A call that is told so neither asks the cache nor leaves anything there."""
    _kinship(folders[:3], cache=False)
    assert list(_entries()) == []
    _kinship(folders[:3])
    reads.clear()
    _kinship(folders[:3], cache=False)
    assert reads


@pytest.mark.usefixtures("settled")
def test_models_in_another_order_are_known(folders: list[Path], reads: list[Path]) -> None:
    """The order of the models makes no difference to what is known, nor does asking for fewer."""
    base, a, b, c, d, *_ = folders
    expected = [_kinship(some, cache=False) for some in ([base, c, a, d, b], [base, d, b])]
    _kinship([base, a, b, c, d])
    reads.clear()
    assert _close(_kinship([base, c, a, d, b]), expected[0])
    assert _close(_kinship([base, d, b]), expected[1])
    assert reads == []
    assert len(list(_entries())) == 2


@pytest.mark.usefixtures("settled")
def test_what_is_known_is_extended(folders: list[Path], reads: list[Path]) -> None:
    """Of more models than are known the pairs of known ones are not computed again."""
    expected = _kinship(folders, cache=False)
    _kinship(folders[:3])
    _kinship([folders[0], folders[5], folders[2], folders[3]])
    assert _close(_kinship(folders), expected)
    reads.clear()
    assert _close(_kinship(folders), expected)
    assert reads == []


@pytest.mark.usefixtures("settled")
def test_other_patterns_are_other_statistics(folders: list[Path], reads: list[Path]) -> None:
    """What is known of some tensors is not taken for what is asked of others."""
    patterns: list[dict[str, Any]] = [{}, {"exclude": ["a"]}, {"include": ["a"]}]
    expected = [_kinship(folders[:4], cache=False, **some) for some in patterns]
    assert len({repr(one) for one in expected}) == 3
    for some, one in zip(patterns, expected, strict=True):
        reads.clear()
        assert _kinship(folders[:4], **some) == one
        assert reads
    reads.clear()
    for some, one in zip(patterns, expected, strict=True):
        assert _kinship(folders[:4], **some) == one
    # Another pattern for the same tensors.
    assert _kinship(folders[:4], exclude=["b"]) == expected[2]
    assert reads == []


@pytest.mark.usefixtures("settled")
def test_the_base_is_part_of_what_is_known(folders: list[Path], reads: list[Path]) -> None:
    """The same models against another base are other statistics."""
    _kinship(folders[:4])
    expected = _kinship([folders[4], *folders[1:4]], cache=False)
    reads.clear()
    assert _kinship([folders[4], *folders[1:4]]) == expected
    assert reads


@pytest.mark.usefixtures("settled")
def test_a_folder_that_is_given_twice_is_known(folders: list[Path], reads: list[Path]) -> None:
    """One model under two names is two models, and both are known the next time."""
    base, a, b, *_ = folders
    expected = _kinship([base, a, b, a], cache=False)
    assert expected["ed"][0][2] == 0
    for some in ([base, a, b, a], [base, a, b]):
        assert _kinship(some)
    reads.clear()
    assert _close(_kinship([base, a, b, a]), expected)
    assert _close(_kinship([base, a, a]), _kinship([base, a, a], cache=False))
    assert set(reads) == {folder / "model.safetensors" for folder in (base, a)}


@pytest.mark.usefixtures("settled")
def test_one_model_that_is_known_is_known_twice(folders: list[Path], reads: list[Path]) -> None:
    """What is known of a model answers for it under any number of names."""
    base, a, b, *_ = folders
    expected = _kinship([base, a, b, a, b], cache=False)
    _kinship([base, a, b])
    reads.clear()
    assert _close(_kinship([base, a, b, a, b]), expected)
    assert reads == []


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_changed_file_is_never_trusted(which: int, how: str, folders: list[Path]) -> None:
    """Other weights in a file of the same size and time are other weights."""
    before = _kinship(folders[:4])
    file = folders[which] / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-100:] = np.arange(25, dtype="<f4").tobytes()
    if how == "replaced":
        new = file.with_name("new")
        new.write_bytes(content)
        os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
        new.replace(file)
    else:
        file.write_bytes(content)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = _kinship(folders[:4])
    assert after == _kinship(folders[:4], cache=False)
    assert not _close(after["pcc"], before["pcc"])


def test_young_files_are_not_remembered(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was changed just now may change again within a tick: it is not remembered."""
    monkeypatch.setattr(stored, "SETTLED", 3600.0)
    assert _kinship(folders[:3])
    assert list(_entries()) == []


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("which", [0, 1])
def test_a_file_that_changes_meanwhile_is_not_remembered(
    which: int, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files that changed while they were measured nobody knows what was measured."""

    def touch(_: int) -> None:
        os.utime(folders[which] / "model.safetensors", (0, 0))

    _spy(monkeypatch, touch)
    assert _kinship(folders[:3])
    assert list(_entries()) == []


@pytest.mark.usefixtures("settled")
def test_a_file_that_goes_away_is_not_remembered(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is deleted while it is measured, or before, is no error of the cache."""

    def delete(_: int) -> None:
        (folders[1] / "model.safetensors").unlink(missing_ok=True)

    base, *models = (open_checkpoint(folder) for folder in folders[:3])
    with monkeypatch.context() as patch:
        _spy(patch, delete)
        # It is mapped before it goes away.
        assert measure(base, models, cache=True).models == ("m1", "m2")
    assert list(_entries()) == []
    base, *models = (open_checkpoint(folder) for folder in folders[2:5])
    (folders[3] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        measure(base, models, cache=True)


_DAMAGES: Mapping[str, tuple[str, Callable[[bytes], bytes]]] = {
    "empty list": (".json", lambda _: b""),
    "no JSON": (".json", lambda _: b"\xff\x00 {"),
    "other JSON": (".json", lambda _: b"[1, 2]"),
    "no list": (".json", lambda _: b'{"models": 5}'),
    "no names": (".json", lambda _: b'{"models": [1, null]}'),
    "one more": (".json", lambda raw: raw.replace(b"[", b'["x", ')),
    "one less": (
        ".json",
        lambda raw: json.dumps({"models": json.loads(raw)["models"][1:]}).encode(),
    ),
    "no arrays": (".npz", lambda _: b""),
    "half of them": (".npz", lambda raw: raw[: len(raw) // 2]),
    "another bit": (".npz", lambda raw: raw.replace(raw[200:208], b"\x7f" * 8)),
    "something else": (".npz", lambda _: b"PK\x03\x04 no archive"),
}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", _DAMAGES)
def test_damaged_statistics_are_replaced(
    damage: str, folders: list[Path], reads: list[Path]
) -> None:
    """What cannot be read in the cache is measured again, and whole the next time."""
    expected = _kinship(folders[:4])
    kind, change = _DAMAGES[damage]
    (file,) = (file for file in _entries() if file.suffix == kind)
    file.write_bytes(change(file.read_bytes()))
    reads.clear()
    assert _kinship(folders[:4]) == expected
    assert reads
    reads.clear()
    assert _kinship(folders[:4]) == expected
    assert reads == []


@pytest.mark.usefixtures("settled")
def test_arrays_of_another_shape_or_kind_are_not_used(folders: list[Path]) -> None:
    """Arrays are looked at before they are believed; pickled ones are never loaded."""
    expected = _kinship(folders[:4])
    (file,) = (file for file in _entries() if file.suffix == ".npz")
    with np.load(file) as loaded:
        arrays = dict(loaded)
    for changed in (
        {**arrays, "gram_TNN": arrays["gram_TNN"][:, :2, :2]},
        {**arrays, "sum_TN": arrays["sum_TN"].astype(np.float32)},
        {**arrays, "base_T": np.array([object(), None])},
        {name: array for name, array in arrays.items() if name != "cross_TN"},
    ):
        np.savez(file, **changed)
        assert _kinship(folders[:4]) == expected


@pytest.mark.usefixtures("settled")
def test_a_worse_entry_answers_for_a_damaged_one(folders: list[Path], reads: list[Path]) -> None:
    """Where the entry that knows most cannot be read, the next one is asked."""
    expected = _kinship(folders[:3])
    _kinship(folders)
    for file in _entries():
        if file.suffix == ".npz" and file.stat().st_size > 2500:
            file.write_bytes(b"")
    assert sum(file.stat().st_size == 0 for file in _entries()) == 1
    reads.clear()
    assert _kinship(folders[:3]) == expected
    assert reads == []


@pytest.mark.usefixtures("settled")
def test_a_cache_that_cannot_be_written_answers(
    folders: list[Path], reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that may only be read is as good for what it knows, and silent about the rest."""
    expected = _kinship(folders[:4])
    before = {file: file.read_bytes() for file in _entries()}

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EROFS, "read-only")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    reads.clear()
    assert _kinship(folders[:4]) == expected
    assert reads == []
    assert _kinship(folders)
    assert {file: file.read_bytes() for file in _entries()} == before


@pytest.mark.usefixtures("settled")
def test_a_file_in_place_of_the_cache_is_no_error(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache cannot be, everything is measured."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MODELKIN_CACHE", str(tmp_path / "file"))
    assert _kinship(folders[:4]) == _kinship(folders[:4])


@pytest.mark.usefixtures("settled")
def test_an_entry_that_another_process_deletes_is_not_half_there(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that goes away while it is read leaves no list without statistics behind."""
    expected = _kinship(folders[:4])
    load = np.load

    def deleting(*arguments: Any, **more: Any) -> Any:
        found = load(*arguments, **more)
        for file in list(_entries()):
            file.unlink()
        return found

    monkeypatch.setattr(np, "load", deleting)
    assert _kinship(folders[:4]) == expected
    assert list(_entries()) == []


@pytest.mark.usefixtures("settled")
def test_what_was_used_longest_ago_makes_room(
    folders: list[Path], reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the cache is full, the entry that was asked longest ago goes, and no other."""
    base, *models = folders
    pairs = [[base, models[n], models[n + 1]] for n in range(4)]
    for pair in pairs[:3]:
        _kinship(pair)
    lists = [file for file in _entries() if file.suffix == ".json"]
    for file in lists:
        os.utime(file, (1, 1))
    _kinship(pairs[0])
    _kinship(pairs[2])
    size = max(file.stat().st_size for file in _entries() if file.suffix == ".npz")
    monkeypatch.setattr(stored, "ROOM", 3 * size)
    # Left behind by a process that was killed: no list, and older than all.
    orphan = lists[0].with_name("orphan.npz")
    orphan.write_bytes(b"x" * size)
    os.utime(orphan, (0, 0))
    _kinship(pairs[3])
    assert not orphan.exists()
    assert len(list(_entries())) == 6
    for number, known in enumerate([True, False, True, True]):
        reads.clear()
        mk.kinship(pairs[number][0], pairs[number][1:])
        assert (reads == []) == known
        if not known:
            # Measured again and remembered, it takes the room of another.
            break


@pytest.mark.usefixtures("settled")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_that_are_no_text_are_no_obstacle(
    folders: list[Path], reads: list[Path], tmp_path: Path
) -> None:
    """Files whose names are no text are remembered like others."""
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    models = [{"w": np.arange(5.0) * n} for n in range(3)]
    written = _write(strange, models)
    expected = mk.kinship(written[0], written[1:]).ed_NN
    reads.clear()
    np.testing.assert_array_equal(mk.kinship(written[0], written[1:]).ed_NN, expected)
    assert reads == []
