"""Weighted sums of weights, rounded once: slices of several models to the slice of a child.

Sums are taken in float64 registers: memory is what takes the time. The sum is rounded to the
child's format to nearest even, and never twice: on the way from float64 to a half width it is a
float32 that was rounded to odd, which keeps what decides the last rounding.

Axes: M inputs.
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
    compiling,
    host,
    new_function,
)
from modelkin.gram.fused import AHEAD
from modelkin.gram.precision import BLOCK, ITEMSIZE, Numbers, pointers, whole_blocks

# What a sum can be rounded to.
OUTPUTS = ("BF16", "F16", "F32", "F64")


def combine(
    weights_M: Sequence[NDArray[Any]],
    formats_M: Sequence[str],
    c_M: Sequence[float] | NDArray[np.float64],
    out: NDArray[Any],
    out_format: str,
    *,
    processor: Processor | None = None,
) -> None:
    """Write sum_i c_i * weights_i into `out`.

    An input whose factor is 0 is not read: what is no number there stays out of the sum.

    Args:
        weights_M: the stored bits, contiguous, of one length.
        formats_M: what the bits mean: keys of `ITEMSIZE`.
        c_M: the factors.
        out: room for as many bits, contiguous.
        out_format: one of `OUTPUTS`.
        processor: what to make code for; default: this one.
    """
    used = [m for m, factor in enumerate(c_M) if factor != 0]
    if not used:
        out.fill(0)
        return
    with compiling:
        call = _combiner(tuple(formats_M[m] for m in used), out_format, processor or host())
    factors = np.array([c_M[m] for m in used], np.float64)
    whole = out.size // BLOCK * BLOCK
    for blocks, part in whole_blocks([*(weights_M[m] for m in used), out]):
        call(part, blocks, factors)
        if part[-1] is not out:
            out[whole:] = part[-1][: out.size - whole]


@cache
def _combiner(
    formats_M: tuple[str, ...], out_format: str, processor: Processor
) -> Callable[..., None]:
    module = ir.Module()
    code = new_function(module, "combine", [POINTER, I64, POINTER])
    arrays, blocks, factors = code.function.args
    numbers = Numbers("double", processor)
    stored_M = [code.read(arrays, POINTER, I64(m)) for m in range(len(formats_M))]
    out = code.read(arrays, POINTER, I64(len(formats_M)))
    factor_M = [
        code.splat(code.read(factors, DOUBLE, I64(m)), numbers.lanes) for m in range(len(formats_M))
    ]

    def step(vector: Value, _: list[Value]) -> list[Value]:
        at = code.mul(vector, I64(numbers.lanes))
        total = None
        for stored, form, factor in zip(stored_M, formats_M, factor_M, strict=True):
            ahead = code.add(code.mul(at, I64(ITEMSIZE[form])), I64(AHEAD))
            code.prefetch(code.at(stored, I8, ahead))
            theta = numbers.widen(code, stored, form, at)
            # No zero to begin with: it would take the sign of a zero.
            total = (
                code.fmul(factor, theta)
                if total is None
                else code.multiply_add(factor, theta, total)
            )
        rounded, kind = _round(code, total, out_format, processor)
        code.write(rounded, out, kind, at)
        return []

    code.repeat(code.mul(blocks, I64(BLOCK // numbers.lanes)), [], step)
    code.ret_void()
    pointer = ctypes.c_void_p
    function = Compiled(module, processor).function("combine", pointer, ctypes.c_int64, pointer)

    def call(arrays: Sequence[NDArray[Any]], blocks: int, factors: NDArray[np.float64]) -> None:
        function(pointers(arrays), blocks, factors.ctypes.data)

    return call


def _round(
    code: Builder, number: Value, format: str, processor: Processor
) -> tuple[Value, ir.Type]:
    """A vector of float64 in another format, and the type of its elements."""
    match format:
        case "F64":
            return number, DOUBLE
        case "F32":
            return code.fptrunc(number, ir.VectorType(FLOAT, number.type.count)), FLOAT
        case "BF16":
            return _to_bfloat16(code, _to_odd(code, number)), I16
        case _ if processor.halves:
            half = ir.HalfType()
            odd = code.bitcast(_to_odd(code, number), ir.VectorType(FLOAT, number.type.count))
            return code.fptrunc(odd, ir.VectorType(half, number.type.count)), half
        case _:
            return _to_half(code, _to_odd(code, number)), I16


def _to_odd(code: Builder, number: Value) -> Value:
    """The bits of float64 numbers as float32: towards zero, with the last bit set if inexact.

    (An odd last bit is on no border between two numbers of 22 bits or less: rounding it again
    gives what rounding the number itself gives.)
    """
    lanes = number.type.count
    wide, bits = number.type, ir.VectorType(I64, lanes)
    single, integers = ir.VectorType(FLOAT, lanes), ir.VectorType(I32, lanes)
    nearest = code.fptrunc(number, single)
    back = code.fpext(nearest, wide)
    # Both are false for NaN, which stays what it is.
    sign_off = ir.Constant(bits, [(1 << 63) - 1] * lanes)
    size, size_back = (code.and_(code.bitcast(one, bits), sign_off) for one in (number, back))
    beyond = code.fcmp_ordered(">", code.bitcast(size_back, wide), code.bitcast(size, wide))
    inexact = code.fcmp_ordered("!=", back, number)
    # One step towards zero is one less for either sign, and from infinity to the largest number.
    stepped = code.sub(code.bitcast(nearest, integers), code.zext(beyond, integers))
    return code.or_(stepped, code.zext(inexact, integers))


def _to_bfloat16(code: Builder, bits: Value) -> Value:
    """The upper halves of the bits of float32, rounded to nearest even."""

    def constant(value: int) -> Value:
        return ir.Constant(bits.type, [value] * bits.type.count)

    upper = code.lshr(bits, constant(16))
    even = code.add(constant(0x7FFF), code.and_(upper, constant(1)))
    rounded = code.lshr(code.add(bits, even), constant(16))
    is_nan = code.icmp_unsigned(">", code.and_(bits, constant(0x7FFFFFFF)), constant(0xFF << 23))
    # Set, so that a NaN of low bits only does not become infinity.
    quiet = code.or_(upper, constant(0x40))
    return code.trunc(code.select(is_nan, quiet, rounded), ir.VectorType(I16, bits.type.count))


def _to_half(code: Builder, bits: Value) -> Value:
    """The bits of float32 as those of float16, rounded to nearest even."""
    lanes = bits.type.count
    single = ir.VectorType(FLOAT, lanes)

    def constant(value: int) -> Value:
        return ir.Constant(bits.type, [value] * lanes)

    size = code.and_(bits, constant(0x7FFFFFFF))
    # The bias is 15 instead of 127, and 13 bits go. Beyond the largest number comes infinity.
    even = code.and_(code.lshr(size, constant(13)), constant(1))
    rebased = code.sub(size, constant((127 - 15) << 23))
    normal = code.lshr(code.add(code.add(rebased, constant(0xFFF)), even), constant(13))
    # Added to 1/2, whose last bit is that of denormal numbers, the processor rounds them.
    half = ir.Constant(single, [0.5] * lanes)
    moved = code.fadd(code.bitcast(size, single), half)
    denormal = code.sub(code.bitcast(moved, bits.type), constant(126 << 23))
    is_nan = code.icmp_unsigned(">", size, constant(0xFF << 23))
    special = code.select(is_nan, constant(0x7E00), constant(0x7C00))
    found = code.select(
        code.icmp_unsigned("<", size, constant(113 << 23)),
        denormal,
        code.select(code.icmp_unsigned(">=", size, constant(143 << 23)), special, normal),
    )
    sign = code.and_(code.lshr(bits, constant(16)), constant(0x8000))
    return code.trunc(code.or_(found, sign), ir.VectorType(I16, lanes))
