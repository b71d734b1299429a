"""The working precision: stored numbers to vectors of it, and sums that keep its digits."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from modelkin.gram.codegen import DOUBLE, FLOAT, I8, I16, I32, I64, Builder, Processor, Value

Precision = Literal["single", "double"]

# Elements whose sums are kept in the working precision. So few that a block of a score of models
# fits into a core's first cache.
BLOCK = 512
# Additions to a sum before it is added to that of the block. Where deltas are all of one size, as
# after a step along their signs, each addition is rounded the same way: long sums would drift.
RUN = 32

# Formats of stored weights -> bytes of an element.
ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


def pointers(weights_R: Sequence[NDArray[Any]]) -> Any:
    """Where each array begins, as an argument of machine code."""
    return (ctypes.c_void_p * len(weights_R))(*(weights.ctypes.data for weights in weights_R))


def whole_blocks(weights_R: Sequence[NDArray[Any]]) -> list[tuple[int, Sequence[NDArray[Any]]]]:
    """The whole blocks of a slice, and what is left, filled up to a block in arrays of its own."""
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


class Numbers:
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

        if count <= RUN:
            return code.repeat(I64(count), totals, step)

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
