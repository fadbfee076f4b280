"""Explicit vectors for matrix products: register tiles, and transposes of blocks.

Their code is written by Python loops: vectors of `LANES` floats held in LLVM values, so that
accumulators stay in registers. (Accumulators kept in an array would be stored and loaded again at
every step, since Numba's arguments may overlap for all that LLVM knows.) Matrices are given by address.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from tapeless.ops.cpu.simd import (
    F32,
    I64,
    LANES,
    REGISTERS,
    VEC,
    ZERO,
    broadcast,
    constant,
    intrinsic,
    multiply_add,
    transposed,
)


def _floats(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, F32.as_pointer())


def _load(builder: Any, data: Any, index: Any) -> Any:
    pointer = builder.bitcast(builder.gep(data, [index]), VEC.as_pointer())
    return builder.load(pointer, align=4)


def _store(builder: Any, value: Any, data: Any, index: Any) -> None:
    pointer = builder.bitcast(builder.gep(data, [index]), VEC.as_pointer())
    builder.store(value, pointer, align=4)


# The largest tiles whose accumulators fit the registers, beside a row of w and a number of x.
WIDEST = 3 if REGISTERS == 32 else 2
TALLEST = tuple(min(8, (REGISTERS - 2 - vecs) // vecs) for vecs in range(1, WIDEST + 1))


@intrinsic
def tile(typing_context, rows, vecs, keep, y, ldy, start, ld_start, x, row, term, w, ldw, k, shift):
    """The register tile  y[r, c] = start[r, c] + Σ_i x[r, i]·w[i, c]  of `rows` rows and `vecs` vectors.

    Each size, up to WIDEST vectors and TALLEST[vecs - 1] rows, has a function of its own. All matrices
    are given by the address of the tile's first number: rows of y, start and w are ldy, ld_start and
    ldw numbers apart, and x[r, i] is number r·row + i·term. `start` is 0 to begin from zero. The last
    vector lies `shift` to the left of where it would follow, to end with the row; what it shares with
    the one before is computed twice and stored alike. Unless `keep` is 0, the tile must be of the tallest
    size, and copies what it reads of w to that address, in rows without gaps. k ≥ 1.
    """

    def codegen(context, builder, signature, args):
        rows, vecs, *rest = args
        keeping = builder.icmp_signed("!=", rest[0], constant(0))
        column = builder.mul(builder.sub(vecs, constant(1)), constant(max(TALLEST) + 1))
        at = builder.add(column, builder.select(keeping, constant(0), rows))
        function = builder.load(builder.gep(_tiles(builder.module), [constant(0), at]))
        builder.call(function, rest)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 14), codegen


def _tiles(module: Any) -> Any:
    """The functions of all sizes as a table in this module: for each width the one that keeps what it
    reads of w, then those of 1, 2, … rows."""
    if "tiles" in module.globals:
        return module.get_global("tiles")
    kind = ir.FunctionType(ir.VoidType(), [I64] * 12)
    functions = []
    for vecs, tallest in enumerate(TALLEST, 1):
        functions.append(_tile(module, kind, tallest, vecs, keeps=True))
        heights = [_tile(module, kind, rows, vecs) for rows in range(1, tallest + 1)]
        functions += heights + heights[-1:] * (max(TALLEST) - tallest)
    table = ir.GlobalVariable(module, ir.ArrayType(kind.as_pointer(), len(functions)), "tiles")
    table.linkage, table.global_constant = "internal", True
    table.initializer = ir.Constant(table.value_type, functions)
    return table


def _tile(module: Any, kind: Any, rows: int, vecs: int, keeps: bool = False) -> Any:
    """The function for a tile of this size."""
    function = ir.Function(module, kind, f"tile_{rows}x{vecs}{'_keeping' if keeps else ''}")
    function.linkage = "internal"
    keep, y, ldy, start, ld_start, x, row, term, w, ldw, k, shift = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    kept, ydata, sdata, xdata, wdata = (_floats(builder, address) for address in (keep, y, start, x, w))
    places = [constant(c * LANES) for c in range(vecs)]
    places[-1] = builder.sub(places[-1], shift)
    cells = [(r, c) for r in range(rows) for c in range(vecs)]

    def each(ld: Any) -> list[Any]:
        """Where each vector of a matrix of rows of ld numbers begins."""
        firsts = [builder.mul(ld, constant(r)) for r in range(rows)]
        return [builder.add(firsts[r], places[c]) for r, c in cells]

    before = builder.block
    begin, loop, end = (builder.append_basic_block(name) for name in ("begin", "loop", "end"))
    builder.cbranch(builder.icmp_signed("!=", start, constant(0)), begin, loop)
    builder.position_at_end(begin)
    started = [_load(builder, sdata, at) for at in each(ld_start)]
    builder.branch(loop)

    builder.position_at_end(loop)
    i, sums = builder.phi(I64), [builder.phi(VEC) for _ in cells]
    row_of_w, column_of_x = builder.mul(i, ldw), builder.mul(i, term)
    weights = [_load(builder, wdata, builder.add(row_of_w, place)) for place in places]
    if keeps:
        row_of_kept = builder.mul(i, builder.sub(constant(vecs * LANES), shift))
        for place, value in zip(places, weights, strict=True):
            _store(builder, value, kept, builder.add(row_of_kept, place))
    factors = []
    for r in range(rows):
        at = builder.add(builder.mul(row, constant(r)), column_of_x)
        factors.append(broadcast(builder, builder.load(builder.gep(xdata, [at]))))
    new = [multiply_add(builder, factors[r], weights[c], s) for (r, c), s in zip(cells, sums, strict=True)]
    following = builder.add(i, constant(1))
    i.add_incoming(constant(0), before)
    i.add_incoming(constant(0), begin)
    i.add_incoming(following, loop)
    for s, first, value in zip(sums, started, new, strict=True):
        s.add_incoming(ZERO, before)
        s.add_incoming(first, begin)
        s.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, k), loop, end)

    builder.position_at_end(end)
    for value, at in zip(new, each(ldy), strict=True):
        _store(builder, value, ydata, at)
    builder.ret_void()
    return function


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
    """y[c, r] = x[r, c] for a block of LANES × LANES that begins at these indices, in rows of ldy and ldx."""

    def codegen(context, builder, signature, args):
        ydata, xdata = (_floats(builder, args[i]) for i in (0, 3))
        _, at, ldy, _, first, ldx = args
        rows = [
            _load(builder, xdata, builder.add(first, builder.mul(ldx, constant(r)))) for r in range(LANES)
        ]
        for r, row in enumerate(transposed(builder, rows)):
            _store(builder, row, ydata, builder.add(at, builder.mul(ldy, constant(r))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


@cache
def scratch(floats: int) -> Any:
    """An intrinsic: the address of this many floats on the stack, on a cache-line boundary."""

    @intrinsic
    def room(typing_context):
        def codegen(context, builder, signature, args):
            with builder.goto_entry_block():  # Numba's own helper would fill it with zeros
                pointer = builder.alloca(ir.ArrayType(F32, floats))
            pointer.align = 64
            return builder.ptrtoint(pointer, I64)

        return types.int64(), codegen

    return room
