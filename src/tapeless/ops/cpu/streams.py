"""One row times a large matrix, as fast as memory gives the matrix: what generating a token consists of.

Threads share the matrix by its rows, so that each reads one stretch of memory from end to end. For
y = x·w + b each has a sum of its rows, in its row of `partial`, and all sums add up to y; for y = x·wᵀ
each has numbers of y of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np import arrayobj

from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.share import meet, part
from tapeless.ops.cpu.simd import (
    I16,
    LANES,
    VEC,
    WORDS,
    ZERO,
    broadcast,
    constant,
    fold,
    intrinsic,
    load,
    multiply_add,
    store,
    vector,
)

# Streams that are read at a time: rows of w that lie a quarter of the whole apart. Of rows one after the
# other, the processor would see several streams in one page of memory, and fetch none of them in time.
STREAMS = 4


def _vector(builder: Any, base: Any, index: Any) -> Any:
    """The vector from number `index` on; numbers of 16 bits are bfloat16, the upper half of a float32."""
    place = builder.gep(base, [index])
    if base.type.pointee == I16:
        kind = ir.VectorType(I16, LANES)
        halves = builder.zext(builder.load(builder.bitcast(place, kind.as_pointer()), align=2), WORDS)
        return builder.bitcast(builder.shl(halves, ir.Constant(WORDS, [16] * LANES)), VEC)
    return builder.load(builder.bitcast(place, VEC.as_pointer()), align=4)


def _open(context: Any, builder: Any, signature: Any, args: Any, tall: int) -> tuple[Any, ...]:
    """Of a kernel's arguments (y, x, w, first, step, O): the addresses of y and x, the numbers of `tall`
    rows of w and where they begin, and a loop over the vectors of O columns."""
    y, x, w = (
        arrayobj.make_array(kind)(context, builder, array).data
        for kind, array in zip(signature.args[:3], args[:3], strict=True)
    )
    first, step, O = args[3:]
    rows = [builder.add(first, builder.mul(step, constant(r))) for r in range(tall)]
    starts = [builder.gep(w, [builder.mul(row, O)]) for row in rows]
    return y, x, rows, starts, cgutils.for_range(builder, builder.udiv(O, constant(LANES)))


@intrinsic
def load_stored(typing_context, w, row, c):
    """The vector from w[row, c] on, widened if w is in bfloat16."""

    def codegen(context, builder, signature, args):
        w, row, c = args
        made = arrayobj.make_array(signature.args[0])(context, builder, w)
        _, columns = cgutils.unpack_tuple(builder, made.shape, 2)
        return _vector(builder, made.data, builder.add(builder.mul(row, columns), c))

    n = types.int64
    return vector(w, n, n), codegen


@cache
def _make_sweep(tall: int) -> Any:
    @intrinsic
    def sweep(typing_context, y, x, w, i, step, O):
        """y[c] += Σ_r x[0, r]·w[r, c] for the `tall` rows i, i + step, …, and all O columns c."""

        def codegen(context, builder, signature, args):
            y, x, rows, starts, vectors = _open(context, builder, signature, args, tall)
            xs = [broadcast(builder, builder.load(builder.gep(x, [row]))) for row in rows]
            with vectors as loop:
                c = builder.mul(loop.index, constant(LANES))
                place = builder.bitcast(builder.gep(y, [c]), VEC.as_pointer())
                total = builder.load(place, align=4)
                for start, factor in zip(starts, xs, strict=True):
                    total = multiply_add(builder, factor, _vector(builder, start, c), total)
                builder.store(total, place, align=4)
            return context.get_dummy_value()

        n = types.int64
        return types.void(y, x, w, n, n, n), codegen

    return sweep


@cache
def _make_dots(tall: int) -> Any:
    @intrinsic
    def dots(typing_context, y, x, w, v, step, O):
        """y[0, r] = Σ_c x[0, c]·w[r, c] for the `tall` rows v, v + step, …, and all O columns c."""

        def codegen(context, builder, signature, args):
            y, x, rows, starts, vectors = _open(context, builder, signature, args, tall)
            sums = [cgutils.alloca_once_value(builder, ZERO) for _ in rows]
            for total in sums:
                builder.store(ZERO, total)
            with vectors as loop:
                c = builder.mul(loop.index, constant(LANES))
                factor = _vector(builder, x, c)
                for start, total in zip(starts, sums, strict=True):
                    term = _vector(builder, start, c)
                    builder.store(multiply_add(builder, factor, term, builder.load(total)), total)
            for row, total in zip(rows, sums, strict=True):
                builder.store(fold(builder, builder.load(total), builder.fadd), builder.gep(y, [row]))
            return context.get_dummy_value()

        n = types.int64
        return types.void(y, x, w, n, n, n), codegen

    return dots


_sweep, _sweep_one = _make_sweep(STREAMS), _make_sweep(1)
_dots, _dots_one = _make_dots(STREAMS), _make_dots(1)


@jit
def row_product(y, x, w, b, rows):
    """y = x·w + b, or without b if that is empty: of one row."""
    I, O = w.shape
    own = rows.partial[rows.me]
    for c in range(0, O, LANES):
        store(0.0, own, c)
    meet(rows)
    i, end = rows.me * I // rows.threads, (rows.me + 1) * I // rows.threads
    step = (end - i) // STREAMS
    for j in range(i, i + step):
        _sweep(own, x, w, j, step, O)
    for j in range(i + STREAMS * step, end):
        _sweep_one(own, x, w, j, 0, O)
    meet(rows)
    begin, end = part(rows, O)
    for c in range(begin, end, LANES):
        total = load(rows.partial[0], c)
        for thread in range(1, rows.threads):
            total = total + load(rows.partial[thread], c)
        store(total + load(b, c) if b.size else total, y, 0, c)
    meet(rows)


@jit
def row_product_turned(y, x, w, rows):
    """y = x·wᵀ, of one row."""
    V, C = w.shape
    meet(rows)
    v, end = rows.me * V // rows.threads, (rows.me + 1) * V // rows.threads
    step = (end - v) // STREAMS
    for j in range(v, v + step):
        _dots(y, x, w, j, step, C)
    for j in range(v + STREAMS * step, end):
        _dots_one(y, x, w, j, 0, C)
    meet(rows)
