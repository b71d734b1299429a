"""The kernel: slices of weights to sums, as machine code made for the formats at hand.

Knows arrays only: no files, names of tensors, or similarities.

Weights are widened in registers, exactly. Within a block of `BLOCK` elements sums are kept in the
working precision, across blocks in float64. Blocks are counted from the start of a slice, and
within a block a product is summed in the same order whatever the pair and the kernel: identical
models get identical bits.

Two kernels give the same sums:

- `_fused` keeps all sums of up to three models in registers and reads each vector of weights once;
  it is as fast as memory.
- `_tiled` first widens a block of every model into a scratch that stays in the core's cache, then
  multiplies four models by four, so that a pair costs little more than its multiplications.

Axes: N models, R = N + 1 rows (the base first), P = N rounded up to whole tiles, C = P / 4 tiles.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from modelkin.gram.codegen import (
    DOUBLE,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    POINTER,
    Builder,
    Compiled,
    Processor,
    Value,
    host,
    new_function,
)

Float64Array = NDArray[np.float64]
Precision = Literal["single", "double"]

# Elements whose sums are kept in the working precision: 64 additions a lane on the widest vectors.
BLOCK = 1024
# Additions to a sum before it is added to that of the block. Where deltas are all of one size, as
# after a step along their signs, each addition is rounded the same way: long sums would drift.
RUN = 16
# Elements from row to row of the scratch: a power of two would put all rows into the same few lines
# of the cache.
STRIDE = BLOCK + 16
# The most models whose sums fit into the registers.
FUSED = 3
# Below this share of their squares the squared distance of two deltas is summed over the
# differences themselves: taken from the products it would be rounding error.
NEAR = {"single": 1 / 32, "double": 1e-8}
# Models along each side of a tile: 16 sums and 8 rows fit into 32 registers.
TILE = 4
# How far ahead of the sums memory is asked for, in bytes of a tensor.
AHEAD = 2048

# Formats of stored weights -> bytes of an element.
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}

# Below this share of its square a delta's variance has lost the digits of single precision.
SHIFTED = 0.5
# Below this root mean square, squares fall below what single precision can hold.
TINY = 1e-15

# LLVM code is made once for all threads.
_compiling = threading.Lock()


@dataclass(frozen=True)
class Sums:
    """Sums over the elements of a slice, in float64.

    Attributes:
        moments_R3: the base's sum of b, an unused one, and of b²; each model's sums of delta, of
            b * delta and of delta².
        products_NN: sums of delta_i * delta_j, in the upper triangle.
        distances_NN: sums of (theta_i - theta_j)², above the diagonal.
    """

    moments_R3: Float64Array
    products_NN: Float64Array
    distances_NN: Float64Array

    def __add__(self, other: "Sums") -> "Sums":
        with np.errstate(invalid="ignore", over="ignore"):  # `finite` tells
            return Sums(
                self.moments_R3 + other.moments_R3,
                self.products_NN + other.products_NN,
                self.distances_NN + other.distances_NN,
            )

    @classmethod
    def zero(cls, models: int) -> "Sums":
        """The sums over no elements."""
        return cls(
            np.zeros((models + 1, 3)), np.zeros((models, models)), np.zeros((models, models))
        )

    @property
    def finite(self) -> bool:
        """Whether all weights were finite, and their squares and those of differences too."""
        apart = np.triu(self.distances_NN, 1)
        return bool(np.isfinite(self.moments_R3).all() and np.isfinite(apart).all())

    def kept_digits(self, count: int) -> bool:
        """Whether single precision was enough for these sums over `count` elements.

        It is not where a delta is mostly one shift of all weights, so that its variance is the
        small difference of large sums, or where squares leave the range of float32.
        """
        if not self.finite:
            return False
        sum_R, square_R = self.moments_R3[:, 0], self.moments_R3[:, 2]
        shifted_N = (square_R - sum_R**2 / count < SHIFTED * square_R)[1:]
        tiny_R = (square_R < TINY**2 * count) & ((square_R > 0) | (sum_R != 0))
        # Above the diagonal, of models that are not identical.
        apart = np.triu(self.distances_NN, 1)
        tiny_NN = (apart > 0) & (apart < TINY**2 * count)
        return not (shifted_N.any() or tiny_R.any() or tiny_NN.any())


def sums(
    weights_R: Sequence[NDArray[Any]],
    formats_R: Sequence[str],
    *,
    new: int,
    precision: Precision,
    processor: Processor | None = None,
) -> Sums:
    """The sums over one slice of a tensor, of the base (first) and N models.

    Args:
        weights_R: the stored bits, contiguous, of one length above zero.
        formats_R: what the bits mean: keys of `ITEMSIZE`.
        new: pairs without one of the last `new` models may be left out.
        precision: of deltas, products and their sums within a block.
        processor: what to make code for; default: this one.
    """
    models = len(weights_R) - 1
    processor = processor or host()
    parts = _parts(weights_R)
    if models <= FUSED:
        with _compiling:
            call = _fused(tuple(formats_R), precision, processor)
        moments_R3 = np.zeros((models + 1, 3))
        products_NN = np.zeros((models, models))
        distances_NN = np.zeros((models, models))
        for blocks, part in parts:
            call(part, blocks, moments_R3, products_NN, distances_NN)
        np.fill_diagonal(products_NN, moments_R3[1:, 2])
        return Sums(moments_R3, products_NN, distances_NN)
    with _compiling:
        call = _tiled(tuple(sorted(set(formats_R))), precision, processor)
    tiles = -(-models // TILE)
    moments_R3 = np.zeros((models + 1, 3))
    products_PP = np.zeros((TILE * tiles, TILE * tiles))
    wanted_CC = np.zeros((tiles, tiles), np.bool_)
    wanted_CC[:, (models - new) // TILE :] = True
    for blocks, part in parts:
        call(part, formats_R, blocks, wanted_CC, moments_R3, products_PP, differences=False)
    norm_P = np.zeros(TILE * tiles)
    norm_P[:models] = moments_R3[1:, 2]
    with np.errstate(invalid="ignore", over="ignore"):  # `Sums.finite` tells
        both_PP = np.add.outer(norm_P, norm_P)
        distances_PP = both_PP - 2 * products_PP
    near_PP = np.triu(distances_PP < NEAR[precision] * both_PP, 1)
    near_CC = near_PP.reshape(tiles, TILE, tiles, TILE).any(axis=(1, 3)) & wanted_CC
    if near_CC.any():
        again_PP = np.zeros_like(products_PP)
        unused = np.zeros_like(moments_R3)
        for blocks, part in parts:
            call(part, formats_R, blocks, near_CC, unused, again_PP, differences=True)
        # Whether a pair is near does not depend on what else is in its tile: nor do its digits.
        distances_PP[near_PP] = again_PP[near_PP]
    return Sums(moments_R3, products_PP[:models, :models], distances_PP[:models, :models])


def _parts(weights_R: Sequence[NDArray[Any]]) -> list[tuple[int, Sequence[NDArray[Any]]]]:
    """The whole blocks of a slice, and what is left, filled up to a block."""
    count = weights_R[0].size
    whole = count // BLOCK
    parts: list[tuple[int, Sequence[NDArray[Any]]]] = [(whole, weights_R)] if whole else []
    if whole * BLOCK < count:
        # Zeros add nothing to any sum; all formats spell zero with zero bits.
        rest_R = [np.zeros(BLOCK, weights.dtype) for weights in weights_R]
        for rest, weights in zip(rest_R, weights_R, strict=True):
            rest[: count - whole * BLOCK] = weights[whole * BLOCK :]
        parts.append((1, rest_R))
    return parts


def _pointers(weights_R: Sequence[NDArray[Any]]) -> Any:
    return (ctypes.c_void_p * len(weights_R))(*(weights.ctypes.data for weights in weights_R))


class _Numbers:
    """The working precision: how stored numbers become vectors of it."""

    def __init__(self, precision: Precision, processor: Processor) -> None:
        self.kind = FLOAT if precision == "single" else DOUBLE
        self.lanes = processor.lanes if precision == "single" else processor.lanes // 2
        self.halves = processor.halves
        self.itemsize = 4 if precision == "single" else 8

    @property
    def zero(self) -> Value:
        return ir.Constant(ir.VectorType(self.kind, self.lanes), [0.0] * self.lanes)

    def added(
        self,
        code: Builder,
        count: int,
        totals: Sequence[Value],
        step: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """`totals` and what comes of `step` for each of `count` numbers, a run at a time."""

        def run(number: Value, totals: list[Value]) -> list[Value]:
            first = code.mul(number, I64(RUN))
            zeros = [self.zero] * len(totals)
            found = code.repeat(
                I64(RUN), zeros, lambda turn, sums: step(code.add(first, turn), sums)
            )
            return [code.fadd(total, one) for total, one in zip(totals, found, strict=True)]

        return code.repeat(I64(count // RUN), totals, run)

    def widen(self, code: Builder, stored: Value, format: str, index: Value) -> Value:
        """The vector of weights from element `index` of `stored`, exactly.

        (A float64 weight is rounded where the working precision is single.)
        """
        lanes = self.lanes

        def as_integers(bits: ir.Type, wide: ir.Type) -> Value:
            small = code.read(stored, bits, index, lanes=lanes)
            return code.zext(small, ir.VectorType(wide, lanes))

        def shifted(value: Value, by: int) -> Value:
            return code.shl(value, ir.Constant(value.type, [by] * lanes))

        match format:
            case "BF16":  # the upper half of a float32
                number = code.bitcast(
                    shifted(as_integers(I16, I32), 16), ir.VectorType(FLOAT, lanes)
                )
            case "F16":
                number = self._widen_half(code, code.read(stored, I16, index, lanes=lanes))
            case "F8_E5M2":  # the upper half of a float16
                number = self._widen_half(code, shifted(as_integers(I8, I16), 8))
            case "F8_E4M3":
                number = self._widen_e4m3(code, as_integers(I8, I16))
            case "F32":
                number = code.read(stored, FLOAT, index, lanes=lanes)
            case "F64":
                number = code.read(stored, DOUBLE, index, lanes=lanes)
        wanted = ir.VectorType(self.kind, lanes)
        if number.type == wanted:
            return number
        if number.type.element == DOUBLE:
            return code.fptrunc(number, wanted)
        return code.fpext(number, wanted)

    def _widen_half(self, code: Builder, bits: Value) -> Value:
        lanes = self.lanes
        if self.halves:
            return code.bitcast(bits, ir.VectorType(ir.HalfType(), lanes))
        # Read as a float32, whose bias is 127 and not 15, it is 2**112 times too small, also where
        # denormal. Infinity and NaN keep the highest exponent.
        integers, single = ir.VectorType(I32, lanes), ir.VectorType(FLOAT, lanes)

        def constant(value: int) -> Value:
            return ir.Constant(integers, [value] * lanes)

        wide = code.zext(bits, integers)
        magnitude = code.shl(code.and_(wide, constant(0x7FFF)), constant(13))
        sign = code.shl(code.and_(wide, constant(0x8000)), constant(16))
        scale = ir.Constant(single, [2.0**112] * lanes)
        finite = code.bitcast(code.fmul(code.bitcast(magnitude, single), scale), integers)
        special = code.or_(magnitude, constant(0xFF << 23))
        is_special = code.icmp_unsigned(">=", magnitude, constant(0x1F << 23))
        return code.bitcast(code.or_(code.select(is_special, special, finite), sign), single)

    def _widen_e4m3(self, code: Builder, bits: Value) -> Value:
        # Sign, four bits of exponent with bias 7, three of mantissa; no infinities, and all ones
        # is NaN. Read as a float16, whose bias is 15, it is 2**8 times too small, also where
        # denormal.
        lanes = self.lanes

        def constant(value: int) -> Value:
            return ir.Constant(bits.type, [value] * lanes)

        magnitude = code.and_(bits, constant(0x7F))
        sign = code.shl(code.and_(bits, constant(0x80)), constant(8))
        half = code.or_(sign, code.shl(magnitude, constant(7)))
        single = ir.VectorType(FLOAT, lanes)
        number = self._widen_half(code, half)
        if number.type != single:
            number = code.fpext(number, single)
        number = code.fmul(number, ir.Constant(single, [256.0] * lanes))
        is_nan = code.icmp_unsigned("==", magnitude, constant(0x7F))
        return code.select(is_nan, ir.Constant(single, [float("nan")] * lanes), number)


# Three or fewer models: everything in registers.


@cache
def _fused(
    formats_R: tuple[str, ...], precision: Precision, processor: Processor
) -> Callable[..., None]:
    models = len(formats_R) - 1
    module = ir.Module()
    code = new_function(module, "sums", [POINTER, I64, POINTER, POINTER, POINTER])
    sources, blocks, moments, products, distances = code.function.args
    numbers = _Numbers(precision, processor)
    stored_R = [code.read(sources, POINTER, I64(row)) for row in range(models + 1)]
    pairs = [(i, j) for i in range(models) for j in range(i + 1, models)]
    targets = [(moments, cell) for cell in range(3 * (models + 1)) if cell != 1]
    for i, j in pairs:
        targets += [(products, i * models + j), (distances, i * models + j)]

    def block(number: Value, _: list[Value]) -> list[Value]:
        first = code.mul(number, I64(BLOCK))

        def step(vector: Value, totals: list[Value]) -> list[Value]:
            at = code.add(first, code.mul(vector, I64(numbers.lanes)))
            for stored, form in zip(stored_R, formats_R, strict=True):
                size = ITEMSIZE[form]
                code.prefetch(code.at(stored, I8, code.add(code.mul(at, I64(size)), I64(AHEAD))))
            base, *thetas = (
                numbers.widen(code, stored, form, at)
                for stored, form in zip(stored_R, formats_R, strict=True)
            )
            deltas = [code.fsub(theta, base) for theta in thetas]
            totals.reverse()
            sums = [code.fadd(totals.pop(), base), code.multiply_add(base, base, totals.pop())]
            for delta in deltas:
                sums += [
                    code.fadd(totals.pop(), delta),
                    code.multiply_add(base, delta, totals.pop()),
                    code.multiply_add(delta, delta, totals.pop()),
                ]
            for i, j in pairs:
                apart = code.fsub(thetas[i], thetas[j])
                sums += [
                    code.multiply_add(deltas[i], deltas[j], totals.pop()),
                    code.multiply_add(apart, apart, totals.pop()),
                ]
            return sums

        steps = BLOCK // numbers.lanes
        totals = numbers.added(code, steps, [numbers.zero] * len(targets), step)
        for total, (array, cell) in zip(totals, targets, strict=True):
            before = code.read(array, DOUBLE, I64(cell))
            code.write(code.fadd(before, code.sum_of(total)), array, DOUBLE, I64(cell))
        return []

    code.repeat(blocks, [], block)
    code.ret_void()
    compiled = Compiled(module, processor)
    pointer = ctypes.c_void_p
    function = compiled.function("sums", pointer, ctypes.c_int64, pointer, pointer, pointer)

    def call(weights_R: Sequence[NDArray[Any]], blocks: int, *results: Float64Array) -> None:
        function(_pointers(weights_R), blocks, *(array.ctypes.data for array in results))

    return call


# More models: widen a block of each, then multiply tile by tile.


@cache
def _tiled(
    formats: tuple[str, ...], precision: Precision, processor: Processor
) -> Callable[..., None]:
    module = ir.Module()
    numbers = _Numbers(precision, processor)
    row = _row_function(module, numbers, formats)
    for differences in (False, True):
        tiles = [
            _tile_function(module, numbers, processor, differences=differences, triangle=triangle)
            for triangle in (False, True)
        ]
        _tiles_function(module, numbers, row, *tiles, differences=differences)
    compiled = Compiled(module, processor)
    arguments = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 3]
    functions = {
        differences: compiled.function(name, *arguments)
        for differences, name in ((False, "products"), (True, "differences"))
    }

    def call(
        weights_R: Sequence[NDArray[Any]],
        formats_R: Sequence[str],
        blocks: int,
        wanted_CC: NDArray[np.bool_],
        moments_R3: Float64Array,
        totals_PP: Float64Array,
        *,
        differences: bool,
    ) -> None:
        # A row of zeros, and one for the base and each model.
        scratch = np.zeros((len(totals_PP) + 2) * STRIDE * numbers.itemsize + 64, np.uint8)
        codes_R = np.array([formats.index(form) for form in formats_R], np.int32)
        sizes_R = np.array([BLOCK * ITEMSIZE[form] for form in formats_R], np.int64)
        functions[differences](
            _pointers(weights_R),
            codes_R.ctypes.data,
            sizes_R.ctypes.data,
            wanted_CC.ctypes.data,
            len(weights_R),
            len(wanted_CC),
            blocks,
            scratch.ctypes.data + -scratch.ctypes.data % 64,
            moments_R3.ctypes.data,
            totals_PP.ctypes.data,
        )

    return call


def _row_function(module: ir.Module, numbers: _Numbers, formats: Sequence[str]) -> Value:
    """Widens one block of one row, subtracts another and adds up the moments.

    Arguments: stored bits, format, the row to subtract, where the result goes, the three sums.
    """
    code = new_function(module, "row", [POINTER, I32, *[POINTER] * 3])
    stored, which, base, deltas, moments = code.function.args
    done = code.function.append_basic_block("widened")
    choice = code.switch(which, done)
    kind, lanes = numbers.kind, numbers.lanes
    for number, form in enumerate(formats):
        case = code.function.append_basic_block(form)
        choice.add_case(I32(number), case)
        code.position_at_end(case)

        def step(turn: Value, totals: list[Value], form: str = form) -> list[Value]:
            sums = []
            for half in range(2):
                vector = code.add(code.add(turn, turn), I64(half))
                at = code.mul(vector, I64(lanes))
                weight = code.read(base, kind, at, lanes=lanes)
                delta = code.fsub(numbers.widen(code, stored, form, at), weight)
                code.write(delta, deltas, kind, at)
                before = totals[3 * half :]
                sums += [
                    code.fadd(before[0], delta),
                    code.multiply_add(weight, delta, before[1]),
                    code.multiply_add(delta, delta, before[2]),
                ]
            return sums

        # Two at a time: a sum would wait for the addition before it.
        totals = numbers.added(code, BLOCK // lanes // 2, [numbers.zero] * 6, step)
        for cell in range(3):
            found = code.sum_of(code.fadd(totals[cell], totals[cell + 3]))
            code.write(
                code.fadd(code.read(moments, DOUBLE, I64(cell)), found), moments, DOUBLE, I64(cell)
            )
        code.branch(done)
    code.position_at_end(done)
    code.ret_void()
    return code.function


def _tile_function(
    module: ir.Module,
    numbers: _Numbers,
    processor: Processor,
    *,
    differences: bool,
    triangle: bool,
) -> Value:
    """Four rows by four: adds sums of x * y, or of (x - y)², over one block.

    A tile on the diagonal, whose rows are its columns, takes its upper triangle only. On the way
    it asks for memory that will be needed later: multiplying leaves the memory idle.

    Arguments: the first of four rows x, of four rows y, where the 16 sums go, the length of a row
    of those, and two stretches of memory.
    """
    name = (
        f"{'triangle' if triangle else 'square'}_of_{'differences' if differences else 'products'}"
    )
    code = new_function(module, name, [POINTER, POINTER, POINTER, I64, POINTER, POINTER])
    xs, ys, results, length, *later = code.function.args
    kind, lanes = numbers.kind, numbers.lanes
    cells = [(i, j) for i in range(TILE) for j in range(TILE) if j >= i or not triangle]
    # As many sums at a time as there are registers for, with room for the rows.
    room = processor.registers // 2
    for first in range(0, len(cells), room):
        some = cells[first : first + room]

        def step(
            turn: Value, totals: list[Value], some: list[tuple[int, int]] = some, half: int = 0
        ) -> list[Value]:
            code.prefetch(code.at(later[half], I8, code.mul(turn, I64(64))))
            at = code.mul(code.add(turn, I64(half * (BLOCK // lanes // 2))), I64(lanes))

            def row(pointer: Value, number: int) -> Value:
                return code.read(pointer, kind, code.add(at, I64(number * STRIDE)), lanes=lanes)

            x = {i: row(xs, i) for i, _ in some}
            y = x if triangle else {}
            y = {j: y[j] if j in y else row(ys, j) for _, j in some}
            sums = []
            for (i, j), total in zip(some, totals, strict=True):
                if differences:
                    apart = code.fsub(x[i], y[j])
                    sums.append(code.multiply_add(apart, apart, total))
                else:
                    sums.append(code.multiply_add(x[i], y[j], total))
            return sums

        half = BLOCK // lanes // 2
        totals = numbers.added(code, half, [numbers.zero] * len(some), step)
        totals = numbers.added(code, half, totals, lambda turn, sums: step(turn, sums, half=1))
        for (i, j), total in zip(some, totals, strict=True):
            cell = code.add(code.mul(length, I64(i)), I64(j))
            before = code.read(results, DOUBLE, cell)
            code.write(code.fadd(before, code.sum_of(total)), results, DOUBLE, cell)
    code.ret_void()
    return code.function


def _tiles_function(
    module: ir.Module,
    numbers: _Numbers,
    row: Value,
    square: Value,
    triangle: Value,
    *,
    differences: bool,
) -> None:
    """Block after block: all rows, then all wanted tiles.

    Arguments: each row's stored bits, format and bytes in a block; which tiles are wanted; the
    number of rows, of tiles along one side, of blocks; scratch, the sums of the rows, the sums of
    the pairs.
    """
    name = "differences" if differences else "products"
    code = new_function(module, name, [*[POINTER] * 4, *[I64] * 3, *[POINTER] * 3])
    (
        sources,
        formats,
        sizes,
        wanted,
        rows,
        tiles,
        blocks,
        scratch,
        moments,
        totals,
    ) = code.function.args
    kind = numbers.kind
    zeros, base = scratch, code.at(scratch, kind, I64(STRIDE))
    first = code.at(base, kind, I64(STRIDE))
    length = code.mul(tiles, I64(TILE))

    def block(number: Value, _: list[Value]) -> list[Value]:
        def stored(row: Value, block: Value) -> Value:
            place = code.mul(code.read(sizes, I64, row), block)
            return code.at(code.read(sources, POINTER, row), I8, place)

        def widen(index: Value, _: list[Value]) -> list[Value]:
            # Differences are taken between the weights themselves.
            is_base = code.icmp_unsigned("==", index, I64(0))
            subtrahend = zeros if differences else code.select(is_base, zeros, base)
            code.call(
                row,
                [
                    stored(index, number),
                    code.read(formats, I32, index),
                    subtrahend,
                    code.at(base, kind, code.mul(index, I64(STRIDE))),
                    code.at(moments, DOUBLE, code.mul(index, I64(3))),
                ],
            )
            return []

        code.repeat(rows, [], widen)

        def column(j: Value, later: list[Value]) -> list[Value]:
            def tile(i: Value, later: list[Value]) -> list[Value]:
                def place(index: Value) -> Value:
                    return code.at(first, kind, code.mul(index, I64(TILE * STRIDE)))

                # Two rows of the next block.
                ahead = later[0]
                following = []
                for index in (ahead, code.add(ahead, I64(1))):
                    exists = code.icmp_unsigned("<", index, rows)
                    existing = code.select(exists, index, I64(0))
                    following.append(stored(existing, code.add(number, I64(1))))
                corner = code.add(code.mul(code.mul(i, I64(TILE)), length), code.mul(j, I64(TILE)))
                target = code.at(totals, DOUBLE, corner)
                arguments = [place(i), place(j), target, length, *following]
                on = code.read(wanted, I8, code.add(code.mul(i, tiles), j))
                with (
                    code.if_then(code.icmp_unsigned("!=", on, I8(0))),
                    code.if_else(code.icmp_unsigned("==", i, j)) as (on_diagonal, elsewhere),
                ):
                    with on_diagonal:
                        code.call(triangle, arguments)
                    with elsewhere:
                        code.call(square, arguments)
                return [code.add(ahead, I64(2))]

            return code.repeat(code.add(j, I64(1)), later, tile)

        code.repeat(tiles, [I64(0)], column)
        return []

    code.repeat(blocks, [], block)
    code.ret_void()
