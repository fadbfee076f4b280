"""bfloat16 in LLVM's terms: rounding, pairs, and the dot products of pairs.

A bfloat16 is the upper half of a float32. A *pair* is two of them in 32 bits, the terms 2i and 2i + 1 of
a sum, the first in the lower half; a vector of pairs travels as VEC, whose floats then mean nothing.
AVX512-BF16 multiplies pairs: s + x₁·w₁, then + x₀·w₀, each rounded to the nearest float32. Subnormal
numbers (below 2⁻¹²⁶, 1.2e-38) count as zero, whether it reads them or computes them. Elsewhere two
multiply-adds do the same, and `flush` makes subnormal numbers count as zero: a product of two bfloat16s
is exact in float32, so all processors get the same bits. There is one exception: a result just below 2⁻¹²⁶
that rounding brings up to it is 2⁻¹²⁶ on x86 and zero on ARM.

ARM's own instructions for bfloat16 are not used. BFDOT and BFMMLA round to odd and sum two products first,
which gives other bits (in 32 % of random dot products). BFMLALB and BFMLALT give the same bits, but
multiply no more numbers at a time than multiply-adds of float32 do: they would only save taking pairs apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from tapeless.ops.cpu.native import bf16_path, is_arm
from tapeless.ops.cpu.simd import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    VEC,
    WORDS,
    call,
    constant,
    intrinsic,
    load_first,
    multiply_add,
    transposed,
)
from tapeless.ops.cpu.tiles import Arithmetic, fetch

NATIVE = bf16_path() != "emulated"
HALVES, DOUBLE = ir.VectorType(I16, LANES), ir.VectorType(I16, 2 * LANES)
UPPER = 0xFFFF0000


def _words(value: int) -> ir.Constant:
    return ir.Constant(WORDS, [value] * LANES)


def _indices(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


# ---------------------------------------------------------------- rounding


def rounded(builder: Any, x: Any) -> Any:
    """Words whose upper halves are the floats' bfloat16: the nearest, of two as near the even one; zero for
    subnormal numbers; NaN stays NaN. The lower halves mean nothing. `x` is a vector or one float."""
    kind = WORDS if isinstance(x.type, ir.VectorType) else I32

    def word(value: int) -> ir.Constant:
        return ir.Constant(kind, [value] * LANES if kind is WORDS else value)

    bits = builder.bitcast(x, kind)
    size = builder.and_(bits, word(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(bits, word(16)), word(1))
    nearest = builder.add(builder.add(bits, word(0x7FFF)), odd)
    quiet = builder.or_(bits, word(0x400000))
    nothing = builder.and_(bits, word(0x80000000))
    normal = builder.select(builder.icmp_unsigned(">", size, word(0x7F800000)), quiet, nearest)
    return builder.select(builder.icmp_unsigned("<", size, word(0x800000)), nothing, normal)


@intrinsic
def nearest(typing_context, x):
    """The bfloat16 nearest to a float32, as a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.and_(rounded(builder, args[0]), ir.Constant(I32, UPPER)), F32)

    return types.float32(types.float32), codegen


def paired(builder: Any, x: Any, y: Any) -> Any:
    """LANES pairs (x, y)."""
    if NATIVE:
        lanes = [i for k in range(LANES) for i in (k, k + LANES)]
        both = _both(builder, x, y)
        return builder.bitcast(builder.shuffle_vector(both, both, _indices(lanes)), VEC)
    low = builder.lshr(rounded(builder, x), _words(16))
    return builder.bitcast(builder.or_(low, builder.and_(rounded(builder, y), _words(UPPER))), VEC)


def adjacent(builder: Any, x: Any, y: Any) -> Any:
    """LANES pairs of neighbours in two vectors, one after the other."""
    if NATIVE:
        return builder.bitcast(_both(builder, x, y), VEC)
    even, odd = (builder.shuffle_vector(x, y, _indices(list(range(i, 2 * LANES, 2)))) for i in (0, 1))
    return paired(builder, even, odd)


def _both(builder: Any, x: Any, y: Any) -> Any:
    return call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", DOUBLE, [y, x])


# ---------------------------------------------------------------- arithmetic


def multiply_pairs(builder: Any, x: Any, w: Any, s: Any) -> Any:
    """s + x₁·w₁ + x₀·w₀ for vectors of pairs x and w."""
    x, w = builder.bitcast(x, WORDS), builder.bitcast(w, WORDS)
    if NATIVE:
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", VEC, [s, x, w])
    uppers = [builder.bitcast(builder.and_(words, _words(UPPER)), VEC) for words in (x, w)]
    lowers = [builder.bitcast(builder.shl(words, _words(16)), VEC) for words in (x, w)]
    for a, b in (uppers, lowers):
        s = multiply_add(builder, a, b, s)
    return s


def _fetch_row(builder: Any, row: Any, places: list[Any], weights: list[Any]) -> None:
    fetch(builder, row, write=False)


PAIRS = Arithmetic("pairs", multiply_pairs, _fetch_row, fence=True, fetch=True)


# Bits of a thread's control word that make subnormal numbers count as zero; 0 where none need to be set.
_X86 = llvm.get_default_triple().startswith("x86_64")
FLUSHING = 0 if NATIVE else 0x8040 if _X86 else 1 << 24 if is_arm() else 0


def _control_word(builder: Any) -> Any:
    if not _X86:
        return call(builder, "llvm.aarch64.get.fpcr", I64, [])
    place = cgutils.alloca_once(builder, I32)
    call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [place])
    return builder.zext(builder.load(place), I64)


def _set_control_word(builder: Any, word: Any) -> None:
    if _X86:
        place = cgutils.alloca_once_value(builder, builder.trunc(word, I32))
        call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [place])
    else:
        call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [word])


@intrinsic
def flush(typing_context):
    """Make subnormal numbers count as zero on this thread. Returns what `restore` takes."""

    def codegen(context, builder, signature, args):
        if not FLUSHING:
            return constant(0)
        word = _control_word(builder)
        _set_control_word(builder, builder.or_(word, constant(FLUSHING)))
        return word

    return types.int64(), codegen


@intrinsic
def restore(typing_context, word):
    """Undo `flush`."""

    def codegen(context, builder, signature, args):
        if FLUSHING:
            _set_control_word(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


# ---------------------------------------------------------------- packing


def _load(builder: Any, address: Any, count: Any = None) -> Any:
    """A vector in memory, or its first `count` lanes with zeros after them."""
    place = builder.inttoptr(address, VEC.as_pointer())
    return builder.load(place, align=4) if count is None else load_first(builder, VEC, place, count)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _after(builder: Any, address: Any, count: Any) -> Any:
    """The address of the number that so many others lie before."""
    return builder.add(address, builder.mul(count, constant(4)))


def _whole_or_part(builder: Any, lanes: int, counts: list[Any], body: Callable[..., None]) -> None:
    """body(counts), or body of None for each, whose loads are faster, where all are whole vectors."""
    least = counts[0]
    for count in counts[1:]:
        least = builder.select(builder.icmp_signed("<", count, least), count, least)
    whole = builder.icmp_signed(">=", least, constant(lanes))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            body(*(None for _ in counts))
        with otherwise:
            body(*counts)


@cache
def make_packers() -> tuple[Any, Any, Any]:
    """Intrinsics that turn floats into pairs.

    between(y, x, below, count, both): LANES pairs at y of a number of the row x and the one `below` it,
    for the first `count` of the row; the others are zero, and the second of each pair unless `both`.
    along(y, x, count): LANES pairs at y of the first `count` of 2·LANES neighbours from x on; others zero.
    turned(y, ldy, x, ldx, count): the same for LANES rows, that lie ldx numbers apart, as LANES columns:
    the first pairs of all rows at y, the second ones ldy pairs further, and so on.
    All addresses are in bytes.
    """

    def neighbours(builder: Any, address: Any, count: Any) -> Any:
        second = None if count is None else builder.sub(count, constant(LANES))
        x, y = _load(builder, address, count), _after(builder, address, constant(LANES))
        return adjacent(builder, x, _load(builder, y, second))

    @intrinsic
    def between(typing_context, y, x, below, count, both):
        def codegen(context, builder, signature, args):
            y, x, below, count, both = args

            def body(first, second):
                _store(builder, paired(builder, _load(builder, x, first), _load(builder, below, second)), y)

            second = builder.select(builder.icmp_signed("!=", both, constant(0)), count, constant(0))
            _whole_or_part(builder, LANES, [count, second], body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    @intrinsic
    def along(typing_context, y, x, count):
        def codegen(context, builder, signature, args):
            y, x, count = args

            def body(count):
                _store(builder, neighbours(builder, x, count), y)

            _whole_or_part(builder, 2 * LANES, [count], body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    @intrinsic
    def turned(typing_context, y, ldy, x, ldx, count):
        def codegen(context, builder, signature, args):
            y, ldy, x, ldx, count = args

            def body(count):
                starts = [_after(builder, x, builder.mul(ldx, constant(r))) for r in range(LANES)]
                rows = [neighbours(builder, start, count) for start in starts]
                for r, row in enumerate(transposed(builder, rows)):
                    _store(builder, row, _after(builder, y, builder.mul(ldy, constant(r))))

            _whole_or_part(builder, 2 * LANES, [count], body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return between, along, turned
