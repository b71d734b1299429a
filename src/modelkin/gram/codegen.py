"""LLVM code from Python: vectors, loops, and the way from a module to a function to call.

Knows nothing of models or statistics. The code is built with explicit vectors of the processor's
own width, so its speed does not depend on what an optimiser recognises, and compiling takes
milliseconds.
"""

import ctypes
import hashlib
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from modelkin.errors import DiskFullError
from modelkin.files import cache_folder, whole_file

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
POINTER = ir.PointerType()

# LLVM makes code for one thread at a time.
compiling = threading.Lock()

Value = Any
"""A value of LLVM's intermediate language; llvmlite has no types for type checkers."""


@dataclass(frozen=True)
class Processor:
    """What code is made for.

    Attributes:
        name: LLVM's name of the model.
        features: LLVM's list of what it can do.
        lanes: float32 numbers in one vector.
        registers: vector registers; sums that do not fit are kept in memory, slowly.
        halves: whether it widens float16 itself. Where it does not, LLVM would call a function
            that nobody provides.
    """

    name: str
    features: str
    lanes: int
    registers: int
    halves: bool


@cache
def host() -> Processor:
    """The processor that this runs on."""
    features = llvm.get_host_cpu_features()
    name = llvm.get_host_cpu_name()
    flat = features.flatten()
    if features.get("avx512f"):
        # LLVM prefers vectors of half the width on such processors, for the sake of code that
        # seldom uses vectors. This code uses nothing else.
        return Processor(name, f"{flat},-prefer-256-bit", lanes=16, registers=32, halves=True)
    halves = bool(features.get("f16c") or features.get("neon"))
    if features.get("avx2"):
        return Processor(name, flat, lanes=8, registers=16, halves=halves)
    registers = 32 if features.get("neon") else 16
    return Processor(name, flat, lanes=4, registers=registers, halves=halves)


class Builder(ir.IRBuilder):  # type: ignore[misc]
    """llvmlite's builder, with what vector code needs: vectors, loops, fused sums."""

    def at(self, pointer: Value, kind: ir.Type, index: Value) -> Value:
        """The address of element `index` of an array of `kind`."""
        return self.gep(pointer, [index], source_etype=kind)

    def read(self, pointer: Value, kind: ir.Type, index: Value, *, lanes: int = 0) -> Value:
        """Element `index` of an array of `kind`, or `lanes` elements from there on."""
        wanted = ir.VectorType(kind, lanes) if lanes else kind
        # Tensors may begin at any byte of a file.
        return self.load(self.at(pointer, kind, index), typ=wanted, align=1)

    def write(self, value: Value, pointer: Value, kind: ir.Type, index: Value) -> None:
        """Store a number or vector at element `index` of an array of `kind`."""
        self.store(value, self.at(pointer, kind, index), align=1)

    def splat(self, value: Value, lanes: int) -> Value:
        """A vector with the same number in all lanes."""
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self.insert_element(undefined, value, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.shuffle_vector(first, undefined, zeros)

    def multiply_add(self, one: Value, other: Value, total: Value) -> Value:
        """one * other + total, rounded once where the processor can."""
        return self._intrinsic("fmuladd", one.type, one, other, total)

    def sum_of(self, vector: Value) -> Value:
        """The sum of a vector's lanes, in float64."""
        lanes = vector.type.count
        if vector.type.element == FLOAT:
            vector = self.fpext(vector, ir.VectorType(DOUBLE, lanes))
        name = f"llvm.vector.reduce.fadd.v{lanes}f64"
        function = _declared(self.module, name, DOUBLE, [DOUBLE, vector.type])
        # Without leave to reassociate it would add the lanes one after the other.
        return self.call(function, [DOUBLE(0), vector], fastmath=("reassoc",))

    def sums_of(self, vectors: Sequence[Value]) -> Value:
        """A vector with the sum of each of the vectors' lanes, in float64.

        Two vectors at a time are folded into one, which takes a third of the steps of folding each
        by itself. The additions are in the vectors' precision, and the same for each vector.

        Args:
            vectors: as many as a power of two.
        """
        if len(vectors) > vectors[0].type.count:
            middle = len(vectors) // 2
            halves = self.sums_of(vectors[:middle]), self.sums_of(vectors[middle:])
            mask = ir.Constant(ir.VectorType(I32, len(vectors)), list(range(len(vectors))))
            return self.shuffle_vector(*halves, mask)
        current, width = list(vectors), vectors[0].type.count
        while len(current) > 1:
            width //= 2
            current = [
                self._folded(one, other, width)
                for one, other in zip(current[::2], current[1::2], strict=True)
            ]
        only = current[0]
        while width > 1:
            width //= 2
            only = self._folded(only, None, width)
        if only.type.element == FLOAT:
            only = self.fpext(only, ir.VectorType(DOUBLE, len(vectors)))
        return only

    def _folded(self, one: Value, other: Value | None, width: int) -> Value:
        """Groups of `2 * width` lanes, halved: each lane plus the one `width` further."""
        count = one.type.count if other is None else 2 * one.type.count
        starts = range(0, count, 2 * width)
        lower = [start + lane for start in starts for lane in range(width)]
        second = ir.Constant(one.type, ir.Undefined) if other is None else other

        def taken(places: list[int]) -> Value:
            mask = ir.Constant(ir.VectorType(I32, len(places)), places)
            return self.shuffle_vector(one, second, mask)

        return self.fadd(taken(lower), taken([place + width for place in lower]))

    def prefetch(self, pointer: Value) -> None:
        """Ask for the memory at `pointer`, which will be read once."""
        function = _declared(
            self.module, "llvm.prefetch.p0", ir.VoidType(), [POINTER, I32, I32, I32]
        )
        self.call(function, [pointer, I32(0), I32(3), I32(1)])

    def repeat(
        self,
        count: Value,
        carried: Sequence[Value],
        body: Callable[[Value, list[Value]], Sequence[Value]],
    ) -> list[Value]:
        """`for i in range(count): carried = body(i, carried)`, for a count of at least one."""
        before = self.block
        inside = self.function.append_basic_block("loop")
        after = self.function.append_basic_block("done")
        self.branch(inside)
        self.position_at_end(inside)
        index = self.phi(I64)
        index.add_incoming(I64(0), before)
        arriving = [self.phi(value.type) for value in carried]
        for phi, value in zip(arriving, carried, strict=True):
            phi.add_incoming(value, before)
        leaving = list(body(index, list(arriving)))
        following = self.add(index, I64(1))
        index.add_incoming(following, self.block)
        for phi, value in zip(arriving, leaving, strict=True):
            phi.add_incoming(value, self.block)
        self.cbranch(self.icmp_unsigned("<", following, count), inside, after)
        self.position_at_end(after)
        return leaving

    def _intrinsic(self, name: str, kind: ir.Type, *arguments: Value) -> Value:
        suffix = f"v{kind.count}{'f32' if kind.element == FLOAT else 'f64'}"
        function = _declared(
            self.module, f"llvm.{name}.{suffix}", kind, [value.type for value in arguments]
        )
        return self.call(function, arguments)


def _declared(module: ir.Module, name: str, result: ir.Type, arguments: list[ir.Type]) -> Value:
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def new_function(module: ir.Module, name: str, arguments: Sequence[ir.Type]) -> Builder:
    """A builder at the start of a new function that returns nothing."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
    return Builder(function.append_basic_block())


class Compiled:
    """Machine code of a module; taken from the cache where it was made before."""

    def __init__(self, module: ir.Module, processor: Processor) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=processor.name, features=processor.features, opt=3
        )
        text = str(module)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
        identity = repr((text, processor, llvmlite.__version__))
        file = cache_folder("code") / hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._engine.set_object_cache(lambda _, code: _save(file, code), lambda _: _saved(file))
        self._engine.finalize_object()

    def function(self, name: str, *arguments: Any) -> Callable[..., None]:
        """The function of that name; calling it leaves other threads running."""
        function = ctypes.CFUNCTYPE(None, *arguments)(self._engine.get_function_address(name))
        function.code = self  # type: ignore[attr-defined]  # the code lives as long as the function
        return function


def _saved(file: Path) -> bytes | None:
    """Machine code from the cache, where it is there and whole."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _save(file: Path, code: bytes) -> None:
    # Where there is no cache to write to, compiling again takes some hundredths of a second.
    with suppress(OSError, DiskFullError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial:
            partial.write_bytes(hashlib.sha256(code).digest() + code)
