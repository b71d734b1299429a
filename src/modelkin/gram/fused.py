"""Three or fewer models: all sums in registers, each vector of weights read once.

As fast as memory. Axes: N models, R = N + 1 rows, the base first.
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

# The most models whose sums fit into the registers.
FUSED = 3
# How far ahead of the sums memory is asked for, in bytes of a tensor.
AHEAD = 2048


@cache
def fused(
    formats_R: tuple[str, ...], precision: Precision, processor: Processor
) -> Callable[..., None]:
    models = len(formats_R) - 1
    module = ir.Module()
    code = new_function(module, "sums", [POINTER, I64, POINTER, POINTER, POINTER])
    sources, blocks, moments, products, distances = code.function.args
    numbers = Numbers(precision, processor)
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
        for first_total in range(0, len(totals), 4):
            some = totals[first_total : first_total + 4]
            found = code.sums_of([*some, *[numbers.zero] * (4 - len(some))])
            for lane, (array, cell) in enumerate(targets[first_total : first_total + 4]):
                before = code.read(array, DOUBLE, I64(cell))
                one = code.extract_element(found, I32(lane))
                code.write(code.fadd(before, one), array, DOUBLE, I64(cell))
        return []

    code.repeat(blocks, [], block)
    code.ret_void()
    compiled = Compiled(module, processor)
    pointer = ctypes.c_void_p
    function = compiled.function("sums", pointer, ctypes.c_int64, pointer, pointer, pointer)

    def call(weights_R: Sequence[NDArray[Any]], blocks: int, *results: NDArray[np.float64]) -> None:
        function(pointers(weights_R), blocks, *(array.ctypes.data for array in results))

    return call
