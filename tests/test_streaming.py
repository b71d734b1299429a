"""How files are read: slices, threads, memory, errors, progress, and what is known already."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    EMBEDDING,
    MINIMAL_CONFIG,
    write_checkpoint,
)
from families import SUMS, Tensors, assert_same, family, measured, spy, write

import modelkin as mk
from modelkin.checkpoint import MappedTensor, WeightFile, open_checkpoint
from modelkin.errors import CheckpointError, ConfigError
from modelkin.gram.kernel import Sums, sums
from modelkin.gram.precision import BLOCK
from modelkin.measuring import measure, overlap, streaming


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job for every slice of a block, and single precision for all but the least tensors."""
    monkeypatch.setattr(streaming, "SLICE_BYTES", 1)
    monkeypatch.setattr(streaming, "SMALL", 2 * BLOCK)


Spied = Callable[..., Sums]


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

    folders = write(tmp_path, family(0, 2, {"w": 100 * BLOCK}))
    numbers = spy(monkeypatch, fail)
    alive = threading.active_count()
    with pytest.raises(error, match="the sixth"):
        measured(folders, threads=threads)
    assert len(numbers) < 100
    assert threading.active_count() == alive


@pytest.mark.parametrize("slice_bytes", [1, 10**9])
def test_an_interrupt_while_waiting_stops_the_others(
    slice_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while it waits for the last of the others, no thread reads on to the end."""
    # One job of many tensors, or many of one; the first waits for the interrupt.
    monkeypatch.setattr(streaming, "SLICE_BYTES", slice_bytes)
    folders = write(tmp_path, family(0, 2, {f"w{n}": 10 for n in range(200)}))
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

    numbers = spy(monkeypatch, hold)
    alive = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            measured(folders, threads=2)
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
    models = family(0, 3, {"a": 20 * BLOCK + 1, "b": 5})
    # Shifted: summed again in double precision, for which memory is given back too.
    models = [models[0], *({**one, "a": one["a"] + 1} for one in models[1:])]
    folders = write(tmp_path, models)
    expected = measured(folders, threads=1)
    released: list[Path] = []
    release = WeightFile.release

    def spied(file: WeightFile) -> None:
        released.append(file.path)
        release(file)

    monkeypatch.setattr(WeightFile, "release", spied)
    monkeypatch.setattr(streaming, "RESIDENT_BYTES", 1)
    found = measured(folders, threads=threads)
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
    folders = write(tmp_path, family(0, 2, {"w": 64 * BLOCK}))
    base, *models = (open_checkpoint(folder) for folder in folders)
    expected = measure(base, models)
    monkeypatch.setattr(streaming, "SLICE_BYTES", 16 * BLOCK * 3 * 4)
    monkeypatch.setattr(MappedTensor, "bytes", property(lambda tensor: tensor.count // 2))
    numbers = spy(monkeypatch, lambda _: None)
    assert_same(measure(base, models), expected)
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
        for n, one in enumerate(family(0, 2, {"a": 9 * BLOCK + 7, "b": 3, "c": 0}))
    ]
    bar = _Bar()
    measured(write(tmp_path, models), threads=2, progress=bar)
    assert len(bar.totals) == bar.removed == 1
    assert bar.done == pytest.approx(bar.totals[0])
    # The rows that are left out count as read.
    assert bar.totals[0] == pytest.approx(sum(4 * one["a"].size for one in models), rel=0.01)


@pytest.mark.usefixtures("small_slices")
def test_an_error_takes_the_bar_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bar is left behind by a pass that fails."""

    def fail(_: int) -> None:
        raise RuntimeError("no")

    folders = write(tmp_path, family(0, 2, {"a": 10}))
    spy(monkeypatch, fail)
    bar = _Bar()
    with pytest.raises(RuntimeError):
        measured(folders, progress=bar)
    assert bar.removed == 1


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads: int, tmp_path: Path) -> None:
    """At least one thread must work."""
    folders = write(tmp_path, family(0, 2, {"w": 5}))
    with pytest.raises(ConfigError, match=f"threads: expected at least 1, found {threads}"):
        mk.kinship(folders[0], folders[1:], threads=threads)


def test_a_nan_of_any_kind_is_named(tmp_path: Path) -> None:
    """A signalling NaN, on which NumPy remarks when it is widened, is an error like others."""
    folders = write(tmp_path, family(0, 2, {"w": 5}), "BF16")
    file = folders[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + bytes([0x81, 0x7F]))
    with pytest.raises(CheckpointError, match=r"m1.*'w'.*found nan at element 4"):
        mk.kinship(folders[0], folders[1:])


def test_an_overflowing_difference_is_named(tmp_path: Path) -> None:
    """Where only the difference of two models has no finite square, one of them is named."""
    folders = write(
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
    folders = write(tmp_path, family(0, 9, {"a": 3 * BLOCK, "b": 4}))
    expected = measured(folders[:6])
    known = measured([folders[0], *(folders[n] for n in order)])
    asked: list[int] = []

    def spied(*arguments: Any, new: int, **more: Any) -> Sums:
        asked.append(new)
        return sums(*arguments, new=new, **more)

    monkeypatch.setattr(streaming, "sums", spied)
    assert_same(measured(folders[:6], known=known), expected, distance=1e-6)
    new = 5 - len({1, 2, 3, 4, 5} & set(order))
    assert set(asked) == ({new} if new else set())


def test_known_statistics_of_other_tensors_are_not_used(tmp_path: Path) -> None:
    """Statistics of fewer tensors, or of fewer rows, say nothing of these."""
    models: list[Tensors] = [
        {"a": np.arange(4.0) * n, EMBEDDING: np.ones((2 + (n == 3), 2)) * n} for n in (1, 2, 3)
    ]
    folders = write(tmp_path, models)
    expected = measured(folders)
    base, *others = (open_checkpoint(folder) for folder in folders)
    fewer = measured(folders, comparison=overlap(base, others, exclude=["a"]))
    assert_same(measured(folders, known=fewer), expected)
    more_rows = measured([folders[2], folders[2], folders[2]][:2])
    assert_same(measured(folders, known=more_rows), expected)
