"""More models: widen a block of each into a scratch, then multiply four models by four.

The scratch stays in the core's cache, so a pair costs little more than its multiplications.

Axes: N models, R = N + 1 rows (the base first), P = N rounded up to whole tiles, C = P / 4 tiles.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from modelkin.gram.codegen import (
    DOUBLE,
    I8,
    I32,
    I64,
    POINTER,
    Compiled,
    Processor,
    Value,
    new_function,
)
from modelkin.gram.precision import BLOCK, ITEMSIZE, Numbers, Precision, pointers

# Models along each side of a tile: 16 sums and 8 rows fit into 32 registers.
TILE = 4
# Elements from row to row of the scratch: a power of two would put all rows into the same few lines
# of the cache.
STRIDE = BLOCK + 16


@cache
def tiled(
    formats: tuple[str, ...], precision: Precision, processor: Processor
) -> Callable[..., None]:
    module = ir.Module()
    numbers = Numbers(precision, processor)
    theta_row, delta_row = (
        _row_function(module, numbers, formats, minus_base=minus_base)
        for minus_base in (False, True)
    )
    for differences in (False, True):
        tiles = [
            _tile_function(module, numbers, processor, differences=differences, triangle=triangle)
            for triangle in (False, True)
        ]
        # Differences are taken between the weights themselves.
        row = theta_row if differences else delta_row
        _tiles_function(module, numbers, theta_row, row, *tiles, differences=differences)
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
        moments_R2: NDArray[np.float64],
        totals_PP: NDArray[np.float64],
        *,
        differences: bool,
    ) -> None:
        # A row for the base and each model; rows that fill up a tile stay zero.
        scratch = np.zeros((len(totals_PP) + 1) * STRIDE * numbers.itemsize + 64, np.uint8)
        codes_R = np.array([formats.index(form) for form in formats_R], np.int32)
        sizes_R = np.array([BLOCK * ITEMSIZE[form] for form in formats_R], np.int64)
        functions[differences](
            pointers(weights_R),
            codes_R.ctypes.data,
            sizes_R.ctypes.data,
            wanted_CC.ctypes.data,
            len(weights_R),
            len(wanted_CC),
            blocks,
            scratch.ctypes.data + -scratch.ctypes.data % 64,
            moments_R2.ctypes.data,
            totals_PP.ctypes.data,
        )

    return call


def _row_function(
    module: ir.Module, numbers: Numbers, formats: Sequence[str], *, minus_base: bool
) -> Value:
    """Widens one block of one row, subtracts the base if asked to, and adds up the moments.

    Those are the sums of delta and of b * delta; where nothing is subtracted, of theta and theta².

    Arguments: stored bits, format, the base's row, where the result goes, the two sums.
    """
    name = "delta_row" if minus_base else "theta_row"
    code = new_function(module, name, [POINTER, I32, *[POINTER] * 3])
    stored, which, base, row, moments = code.function.args
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
                value = factor = numbers.widen(code, stored, form, at)
                if minus_base:
                    factor = code.read(base, kind, at, lanes=lanes)
                    value = code.fsub(value, factor)
                code.write(value, row, kind, at)
                sums += [
                    code.fadd(totals[2 * half], value),
                    code.multiply_add(factor, value, totals[2 * half + 1]),
                ]
            return sums

        # Two at a time: a sum would wait for the addition before it.
        totals = numbers.added(code, BLOCK // lanes // 2, [numbers.zero] * 4, step)
        for cell in range(2):
            found = code.sum_of(code.fadd(totals[cell], totals[cell + 2]))
            before = code.read(moments, DOUBLE, I64(cell))
            code.write(code.fadd(before, found), moments, DOUBLE, I64(cell))
        code.branch(done)
    code.position_at_end(done)
    code.ret_void()
    return code.function


def _tile_function(
    module: ir.Module,
    numbers: Numbers,
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
    # As many rows of sums at a time as there are registers for, with room for the rows of weights.
    steps = BLOCK // lanes
    height = min(processor.registers // 2 // TILE, TILE)
    for first in range(0, TILE, height):
        cells = [
            (i, j)
            for i in range(first, first + height)
            for j in range(TILE)
            if j >= i or not triangle
        ]

        def step(
            turn: Value, totals: list[Value], cells: list[tuple[int, int]] = cells
        ) -> list[Value]:
            # A line of the one stretch in the first half of the turns, of the other in the second.
            half = code.and_(turn, I64(steps // 2 - 1))
            stretch = code.select(code.icmp_unsigned("==", turn, half), *later)
            code.prefetch(code.at(stretch, I8, code.mul(half, I64(64))))
            at = code.mul(turn, I64(lanes))

            def row(pointer: Value, number: int) -> Value:
                return code.read(pointer, kind, code.add(at, I64(number * STRIDE)), lanes=lanes)

            x = {i: row(xs, i) for i, _ in cells}
            y = x if triangle else {}
            y = {j: y[j] if j in y else row(ys, j) for _, j in cells}
            sums = []
            for (i, j), total in zip(cells, totals, strict=True):
                if differences:
                    apart = code.fsub(x[i], y[j])
                    sums.append(code.multiply_add(apart, apart, total))
                else:
                    sums.append(code.multiply_add(x[i], y[j], total))
            return sums

        totals = numbers.added(code, steps, [numbers.zero] * len(cells), step)
        total = dict(zip(cells, totals, strict=True))
        for i in range(first, first + height):
            found = code.sums_of([total.get((i, j), numbers.zero) for j in range(TILE)])
            line = code.mul(length, I64(i))
            before = code.read(results, DOUBLE, line, lanes=TILE)
            code.write(code.fadd(before, found), results, DOUBLE, line)
    code.ret_void()
    return code.function


def _tiles_function(
    module: ir.Module,
    numbers: Numbers,
    base_row: Value,
    model_row: Value,
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
    base, first = scratch, code.at(scratch, kind, I64(STRIDE))
    length = code.mul(tiles, I64(TILE))

    def block(number: Value, _: list[Value]) -> list[Value]:
        def stored(row: Value, block: Value) -> Value:
            place = code.mul(code.read(sizes, I64, row), block)
            return code.at(code.read(sources, POINTER, row), I8, place)

        def widen(function: Value, index: Value) -> None:
            code.call(
                function,
                [
                    stored(index, number),
                    code.read(formats, I32, index),
                    base,
                    code.at(base, kind, code.mul(index, I64(STRIDE))),
                    code.at(moments, DOUBLE, code.mul(index, I64(2))),
                ],
            )

        def model(index: Value, _: list[Value]) -> list[Value]:
            widen(model_row, code.add(index, I64(1)))
            return []

        widen(base_row, I64(0))
        code.repeat(code.sub(rows, I64(1)), [], model)

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
