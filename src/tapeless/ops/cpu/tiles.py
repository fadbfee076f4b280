"""Explicit vectors for matrix products: register tiles, and copies and transposes of blocks.

Each is an intrinsic whose body is written by a Python loop: vectors of `LANES` floats held in LLVM
values, so that accumulators stay in registers. (Accumulators kept in an array would be stored and
loaded again at every step, since Numba's arguments may overlap for all that LLVM knows.) All take
matrices by address, and indices into them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tapeless.ops.cpu.simd import LANES, REGISTERS

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)
_ZERO = ir.Constant(_VEC, [0.0] * LANES)


def _const(n: int) -> ir.Constant:
    return ir.Constant(_I64, n)


def _floats(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _F32.as_pointer())


def _load(builder: Any, data: Any, index: Any) -> Any:
    pointer = builder.bitcast(builder.gep(data, [index]), _VEC.as_pointer())
    return builder.load(pointer, align=4)


def _store(builder: Any, value: Any, data: Any, index: Any) -> None:
    pointer = builder.bitcast(builder.gep(data, [index]), _VEC.as_pointer())
    builder.store(value, pointer, align=4)


def _splat(builder: Any, scalar: Any) -> Any:
    undef = ir.Constant(_VEC, ir.Undefined)
    one = builder.insert_element(undef, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, undef, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


WIDEST = 3 if REGISTERS == 32 else 2
TALLEST = tuple(min(8, (REGISTERS - 2 - vecs) // vecs) for vecs in range(1, WIDEST + 1))


@intrinsic
def tile(typing_context, rows, vecs, keep, y, ldy, start, lds, x, step_row, step_i, w, ldw, k, shift):
    """The register tile  y[r, c] = start[r, c] + Σ_i x[r, i]·w[i, c]  of `rows` rows and `vecs` vectors.

    Each size, up to WIDEST vectors and TALLEST[vecs - 1] rows, has a function of its own. All matrices
    are given by the address of the tile's first number: y, start and w in rows of ldy, lds and ldw
    numbers, x[r, i] being number r·step_row + i·step_i. `start` is 0 to begin from zero. The last
    vector lies `shift` to the left of where it would follow, to end with the row; what it shares with
    the one before is computed twice and stored alike. A tile of the tallest size copies what it reads
    of w to the address `keep`, in rows without gaps, unless that is 0. k ≥ 1.
    """

    def codegen(context, builder, signature, args):
        rows, vecs, keep, *rest = args
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 12)
        name = "tiles"
        tallest = max(TALLEST)
        null = ir.Constant(kind.as_pointer(), None)
        functions = []
        for v, tall in enumerate(TALLEST):
            functions.append(_tile(builder.module, kind, tall, v + 1, True))
            functions += [_tile(builder.module, kind, r + 1, v + 1, False) for r in range(tall)]
            functions += [null] * (tallest - tall)
        table = ir.GlobalVariable(builder.module, ir.ArrayType(kind.as_pointer(), len(functions)), "tiles")
        table.linkage, table.global_constant = "internal", True
        table.initializer = ir.Constant(table.value_type, functions)
        keeping = builder.icmp_signed("!=", keep, _const(0))
        at = builder.add(builder.mul(builder.sub(vecs, _const(1)), _const(tallest + 1)), builder.select(keeping, _const(0), rows))
        function = builder.load(builder.gep(table, [_const(0), at]))
        builder.call(function, [keep, *rest])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 14), codegen


def _tile(module: Any, kind: Any, rows: int, vecs: int, keeps: bool) -> Any:
    """The function for a tile of this size."""
    function = ir.Function(module, kind, f"tile_{rows}x{vecs}{'_keeping' if keeps else ''}")
    function.linkage = "internal"
    keep, y, ldy, start, lds, x, step_row, step_i, w, ldw, k, shift = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    kept, ydata, sdata, xdata, wdata = (_floats(builder, address) for address in (keep, y, start, x, w))
    fma = cgutils.get_or_insert_function(
        module, ir.FunctionType(_VEC, [_VEC] * 3), f"llvm.fmuladd.v{LANES}f32"
    )
    places = [_const(c * LANES) for c in range(vecs)]
    places[-1] = builder.sub(places[-1], shift)
    cells = [(r, c) for r in range(rows) for c in range(vecs)]

    def each(ld: Any) -> list[Any]:
        """Where each vector of a matrix of rows of ld numbers begins."""
        firsts = [builder.mul(ld, _const(r)) for r in range(rows)]
        return [builder.add(firsts[r], places[c]) for r, c in cells]

    before = builder.block
    begin, loop, end = (builder.append_basic_block(name) for name in ("begin", "loop", "end"))
    builder.cbranch(builder.icmp_signed("!=", start, _const(0)), begin, loop)
    builder.position_at_end(begin)
    started = [_load(builder, sdata, at) for at in each(lds)]
    builder.branch(loop)

    builder.position_at_end(loop)
    i, sums = builder.phi(_I64), [builder.phi(_VEC) for _ in cells]
    row_of_w, column_of_x = builder.mul(i, ldw), builder.mul(i, step_i)
    weights = [_load(builder, wdata, builder.add(row_of_w, place)) for place in places]
    if keeps:
        row = builder.mul(i, builder.sub(_const(vecs * LANES), shift))
        for place, value in zip(places, weights, strict=True):
            _store(builder, value, kept, builder.add(row, place))
    factors = []
    for r in range(rows):
        at = builder.add(builder.mul(step_row, _const(r)), column_of_x)
        factors.append(_splat(builder, builder.load(builder.gep(xdata, [at]))))
    new = [builder.call(fma, [factors[r], weights[c], s]) for (r, c), s in zip(cells, sums, strict=True)]
    following = builder.add(i, _const(1))
    i.add_incoming(_const(0), before)
    i.add_incoming(_const(0), begin)
    i.add_incoming(following, loop)
    for s, first, value in zip(sums, started, new, strict=True):
        s.add_incoming(_ZERO, before)
        s.add_incoming(first, begin)
        s.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, k), loop, end)

    builder.position_at_end(end)
    for value, at in zip(new, each(ldy), strict=True):
        _store(builder, value, ydata, at)
    builder.ret_void()
    return function


@intrinsic
def copy_vector(typing_context, y, at, x, first):
    """y[at + c] = x[first + c] for c < LANES."""

    def codegen(context, builder, signature, args):
        y, at, x, first = args
        _store(builder, _load(builder, _floats(builder, x), first), _floats(builder, y), at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def copy_one(typing_context, y, at, x, first):
    """y[at] = x[first]."""

    def codegen(context, builder, signature, args):
        y, at, x, first = args
        value = builder.load(builder.gep(_floats(builder, x), [first]))
        builder.store(value, builder.gep(_floats(builder, y), [at]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def transpose_block(typing_context, y, at, ldy, x, first, ldx):
    """y[c, r] = x[r, c] for a block of LANES × LANES that begins at these indices, in rows of ldy and ldx.

    log₂ LANES rounds of interleaving rows r and r + LANES/2.
    """

    def codegen(context, builder, signature, args):
        ydata, xdata = (_floats(builder, args[i]) for i in (0, 3))
        _, at, ldy, _, first, ldx = args
        rows = [
            _load(builder, xdata, builder.add(first, builder.mul(ldx, _const(r)))) for r in range(LANES)
        ]
        half = LANES // 2
        pairs = [i for k in range(LANES) for i in (k, k + LANES)]
        low, high = (ir.Constant(ir.VectorType(_I32, LANES), part) for part in (pairs[:LANES], pairs[LANES:]))
        for _ in range(LANES.bit_length() - 1):
            rows = [
                builder.shuffle_vector(rows[r], rows[r + half], mask)
                for r in range(half)
                for mask in (low, high)
            ]
        for r, row in enumerate(rows):
            _store(builder, row, ydata, builder.add(at, builder.mul(ldy, _const(r))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@cache
def scratch(floats: int) -> Any:
    """An intrinsic: the address of this many floats on the stack, aligned to a cache line."""

    @intrinsic
    def room(typing_context):
        def codegen(context, builder, signature, args):
            with builder.goto_entry_block():  # Numba's own helper would fill it with zeros
                pointer = builder.alloca(ir.ArrayType(_F32, floats))
            pointer.align = 64
            return builder.ptrtoint(pointer, _I64)

        return types.int64(), codegen

    return room
