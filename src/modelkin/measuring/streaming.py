"""The pass over the weights: every file is read once, from front to back, by all threads.

Knows which slices to read and when to let go of them; what is done with them is the kernel's.

Axes: T tensors, N models.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from modelkin.checkpoint import Checkpoint, as_float64
from modelkin.errors import CheckpointError
from modelkin.gram import Float64Array, GramStats
from modelkin.gram.kernel import Sums, lost_digits, sums
from modelkin.gram.precision import BLOCK, ITEMSIZE, Precision
from modelkin.measuring.comparing import Comparison

if TYPE_CHECKING:
    from rich.progress import Progress

# Bytes of weights, of all models together, that one thread takes at a time: enough that taking
# costs nothing, little enough that threads end together.
SLICE_BYTES = 48_000_000
# Mapped pages count as resident memory until they are let go of; that is dear, so not too often.
# This much may be resident, what threads are reading included.
RESIDENT_BYTES = 440_000_000
# Tensors of fewer elements are summed in double precision throughout: it costs nothing, and few
# elements average out fewer rounding errors.
SMALL = 1 << 16


@dataclass(frozen=True)
class _Slice:
    tensor: int  # position in T
    start: int
    stop: int


@dataclass
class _TensorSums:
    """Sums of one tensor, added in the order of its slices, whichever is ready first."""

    slices: int
    total: Sums | None = None
    added: int = 0
    waiting: dict[int, Sums] = field(default_factory=dict)

    def add(self, start: int, found: Sums, size: int) -> None:
        self.waiting[start // size] = found
        while self.added in self.waiting:
            found = self.waiting.pop(self.added)
            self.total = found if self.total is None else self.total + found
            self.added += 1


def stream(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    comparison: Comparison,
    *,
    known: GramStats | None,
    threads: int | None,
    progress: "Progress | None",
    label: str,
    double: bool,
) -> GramStats:
    """What `modelkin.measuring.measure` does, without looking into the cache."""
    names = tuple(model.name for model in models)
    if known is not None:
        known = known.select([name for name in known.models if name in names])
        if not known.models or not _same_tensors(known, comparison):
            known = None
    old = known.models if known else ()
    if set(old) == set(names):
        assert known is not None
        return known.select(names)
    by_name = dict(zip(names, models, strict=True))
    # The known ones first: the kernel leaves out pairs of those.
    ordered = [*old, *(name for name in names if name not in old)]
    reading = _Pass(
        [base, *(by_name[name] for name in ordered)],
        comparison,
        new=len(names) - len(old),
        double=double,
    )
    reading.run(threads or _cores(), progress, label)
    return _assemble(ordered, comparison, reading.found(), known).select(names)


def _same_tensors(known: GramStats, comparison: Comparison) -> bool:
    return known.tensors == comparison.tensors and known.count_T.tolist() == list(
        comparison.counts.values()
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Pass:
    """One pass over the base (first) and the models: who reads what, and what came of it."""

    def __init__(
        self, everyone: Sequence[Checkpoint], comparison: Comparison, *, new: int, double: bool
    ) -> None:
        self._everyone = everyone
        self._names = comparison.tensors
        self._counts = list(comparison.counts.values())
        self._new = new
        self._double = double
        self._tensors = [[one.tensors[name] for one in everyone] for name in self._names]
        self._formats = [[tensor.format for tensor in row] for row in self._tensors]
        # What an element costs to read, in bytes of all models.
        self._widths = [
            sum(tensor.bytes for tensor in row) / max(row[0].count, 1) for row in self._tensors
        ]
        self._slice_sizes = [self._slice_size(t) for t in range(len(self._names))]
        self._sums = [self._empty(t) for t in range(len(self._names))]
        self._doubled: set[int] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self._since_release = 0.0
        self._release_after = 0.0
        self._advance: Callable[[float], object] = lambda _: None

    def found(self) -> list[Sums]:
        """The sums of each tensor, after the pass."""
        models = len(self._everyone) - 1
        return [tensor.total or Sums.zero(models) for tensor in self._sums]

    def run(self, threads: int, progress: "Progress | None", label: str) -> None:
        """Read everything."""
        total = sum(count * width for count, width in zip(self._counts, self._widths, strict=True))
        task = progress.add_task(label, total=total) if progress else None
        if progress is not None and task is not None:
            self._advance = lambda done: progress.advance(task, done)
        try:
            # In the order of the base's file, so that a disk reads forward.
            base_T = [(str(row[0].file), row[0].offset) for row in self._tensors]
            order = sorted(range(len(base_T)), key=lambda t: base_T[t])
            self._release_after = max(RESIDENT_BYTES - threads * SLICE_BYTES, SLICE_BYTES)
            self._work(self._jobs(order), threads)
            self._regain_digits()
        finally:
            if progress is not None and task is not None:
                progress.remove_task(task)

    def _precision(self, t: int) -> Precision:
        double = self._double or self._counts[t] < SMALL or "F64" in self._formats[t]
        return "double" if double else "single"

    def _slice_size(self, t: int) -> int:
        # What is handed out can be many times what is stored, as where weights are quantised.
        width = max(self._widths[t], sum(ITEMSIZE[form] for form in self._formats[t]))
        return BLOCK * max(int(SLICE_BYTES / width / BLOCK), 1)

    def _empty(self, t: int) -> _TensorSums:
        return _TensorSums(slices=-(-self._counts[t] // self._slice_sizes[t]))

    def _jobs(self, order: Sequence[int]) -> Iterator[list[_Slice]]:
        """Slices, large tensors cut and small ones put together."""
        job: list[_Slice] = []
        size = 0.0
        for t in order:
            for start in range(0, self._counts[t], self._slice_sizes[t]):
                stop = min(start + self._slice_sizes[t], self._counts[t])
                job.append(_Slice(t, start, stop))
                size += (stop - start) * self._widths[t]
                if size > SLICE_BYTES / 2:
                    yield job
                    job, size = [], 0.0
        if job:
            yield job

    def _work(self, jobs: Iterator[list[_Slice]], threads: int) -> None:
        errors: list[BaseException] = []

        def loop() -> None:
            try:
                while True:
                    with self._lock:
                        job = None if self._stopped else next(jobs, None)
                    if job is None:
                        return
                    for one in job:
                        if self._stopped:
                            return
                        self._read(one)
            except BaseException as error:
                errors.append(error)
                self._stopped = True

        others: list[threading.Thread] = []
        try:
            for _ in range(threads - 1):
                other = threading.Thread(target=loop, daemon=True)
                other.start()
                others.append(other)
            # This thread works too: waiting for results would cost it more than working.
            loop()
            for other in others:
                other.join()
        finally:
            # Interrupted here, the others still read: none outlives the pass by more than a slice.
            self._stopped = True
            for other in others:
                other.join()
        if errors:
            raise errors[0]

    def _read(self, one: _Slice) -> None:
        t = one.tensor
        found = self._sum(one, self._precision(t))
        with self._lock:
            tensor = self._sums[t]
            tensor.add(one.start, found, self._slice_sizes[t])
            complete = tensor.added == tensor.slices
        self._advance(self._size(one))
        if complete:
            self._check(t)

    def _size(self, one: _Slice) -> float:
        return (one.stop - one.start) * self._widths[one.tensor]

    def _sum(self, one: _Slice, precision: Precision) -> Sums:
        weights = [tensor.read(one.start, one.stop) for tensor in self._tensors[one.tensor]]
        found = sums(weights, self._formats[one.tensor], new=self._new, precision=precision)
        with self._lock:
            self._since_release += self._size(one)
            release = self._since_release > self._release_after
            if release:
                self._since_release = 0
        if release:
            for checkpoint in self._everyone:
                checkpoint.release()
        return found

    def _check(self, t: int) -> None:
        """Name what is no finite number, as soon as it is met."""
        # Squares of finite numbers can leave the range of float32.
        if not self._total(t).finite and self._precision(t) == "single":
            self._sum_again(t)
        if not self._total(t).finite:
            self._name_the_guilty(t)

    def _regain_digits(self) -> None:
        """Sum those tensors again for which single precision was too little."""
        single = [
            t
            for t, count in enumerate(self._counts)
            if count and self._precision(t) == "single" and t not in self._doubled
        ]
        if single:
            totals = [self._total(t) for t in single]
            lost_T = lost_digits(totals, [self._counts[t] for t in single])
            for t, lost in zip(single, lost_T, strict=True):
                if lost:
                    self._sum_again(t)

    def _sum_again(self, t: int) -> None:
        tensor = self._empty(t)
        size = self._slice_sizes[t]
        for start in range(0, self._counts[t], size):
            part = _Slice(t, start, min(start + size, self._counts[t]))
            tensor.add(start, self._sum(part, "double"), size)
        self._sums[t] = tensor
        self._doubled.add(t)

    def _total(self, t: int) -> Sums:
        total = self._sums[t].total
        assert total is not None
        return total

    def _name_the_guilty(self, t: int) -> None:
        # A base that is not finite spoils every delta: it is named first.
        for one in self._everyone:
            tensor = one.tensors[self._names[t]]
            for start in range(0, self._counts[t], SMALL):
                stored = tensor.read(start, min(start + SMALL, self._counts[t]))
                with np.errstate(invalid="ignore"):  # NumPy remarks on some NaN
                    weights = as_float64(stored, tensor.format)
                bad = np.flatnonzero(~np.isfinite(weights))
                if bad.size:
                    raise CheckpointError(
                        f"{tensor.file}: tensor {self._names[t]!r}: expected finite numbers, "
                        f"found {weights[bad[0]]} at element {start + bad[0]}"
                    )
        total = self._total(t)
        # All numbers are finite, but a square is not: the base's own, that of the first delta, or
        # that of the first difference.
        sizes_R = np.abs(total.moments_R3).max(axis=1)
        if np.isfinite(sizes_R).all():
            sizes_R[1:] = np.triu(total.distances_NN, 1).max(axis=1)
        guilty = self._everyone[int(np.argmin(np.isfinite(sizes_R)))].tensors[self._names[t]]
        raise CheckpointError(
            f"{guilty.file}: tensor {self._names[t]!r}: its square overflows float64"
        )


def _assemble(
    models: Sequence[str],
    comparison: Comparison,
    sums_T: Sequence[Sums],
    known: GramStats | None,
) -> GramStats:
    moments_TR3 = np.array([found.moments_R3 for found in sums_T])
    gram_TNN = _mirrored(np.array([found.products_NN for found in sums_T]))
    distance_TNN = _mirrored(np.array([found.distances_NN for found in sums_T]))
    diagonal = np.arange(len(models))
    distance_TNN[:, diagonal, diagonal] = 0.0
    if known is not None:
        old = len(known.models)
        gram_TNN[:, :old, :old] = known.gram_TNN
        distance_TNN[:, :old, :old] = known.distance_TNN
    return GramStats(
        models=tuple(models),
        tensors=comparison.tensors,
        count_T=np.array(list(comparison.counts.values()), np.int64),
        base_T=moments_TR3[:, 0, 2],
        base_sum_T=moments_TR3[:, 0, 0],
        sum_TN=moments_TR3[:, 1:, 0],
        cross_TN=moments_TR3[:, 1:, 1],
        gram_TNN=gram_TNN,
        distance_TNN=distance_TNN,
    )


def _mirrored(upper_TNN: Float64Array) -> Float64Array:
    lower_TNN: Float64Array = np.triu(upper_TNN, 1).swapaxes(1, 2)
    return np.triu(upper_TNN) + lower_TNN
