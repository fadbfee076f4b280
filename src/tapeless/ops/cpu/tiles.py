"""Explicit vectors for matrix products: register tiles, and transposes of blocks.

Their code is written by Python loops: vectors of `LANES` floats held in LLVM values, so that
accumulators stay in registers. (Accumulators kept in an array would be stored and loaded again at
every step, since Numba's arguments may overlap for all that LLVM knows.) Matrices are given by address.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from tapeless.ops.cpu.simd import (
    F32,
    I32,
    I64,
    LANES,
    REGISTERS,
    VEC,
    ZERO,
    broadcast,
    call,
    constant,
    intrinsic,
    multiply_add,
    transposed,
)


def _floats(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, F32.as_pointer())


def _after(builder: Any, address: Any, numbers: Any) -> Any:
    return builder.add(address, builder.mul(numbers, constant(4)))


def _load(builder: Any, data: Any, index: Any) -> Any:
    pointer = builder.bitcast(builder.gep(data, [index]), VEC.as_pointer())
    return builder.load(pointer, align=4)


def _store(builder: Any, value: Any, data: Any, index: Any) -> None:
    pointer = builder.bitcast(builder.gep(data, [index]), VEC.as_pointer())
    builder.store(value, pointer, align=4)


# The largest tiles whose accumulators fit the registers, beside a row of w and a number of x.
WIDEST = 3 if REGISTERS == 32 else 2
TALLEST = tuple(min(8, (REGISTERS - 2 - vecs) // vecs) for vecs in range(1, WIDEST + 1))


LINE = 64  # bytes that memory delivers together


class Arithmetic(NamedTuple):
    """What a kind of tile does with vectors; `name` is its functions'."""

    name: str
    multiply: Callable[..., Any]  # (builder, x, w, sum): x·w + sum
    aside: Callable[..., None]  # (builder, a row's address, where each vector begins in it, vectors of w)
    fence: bool = False  # whether the rows' instructions must be kept apart, lest registers run out
    fetch: bool = False  # whether to fetch the rows of y below the tile, where the next tile will begin


def _keep(builder: Any, row: Any, places: list[Any], weights: list[Any]) -> None:
    for place, value in zip(places, weights, strict=True):
        _store(builder, value, _floats(builder, row), place)


FLOATS = Arithmetic("floats", multiply_add, _keep)


def fetch(builder: Any, address: Any, write: bool) -> None:
    """Have a line of memory brought to the caches, if there is one at this address: L1 to write, or L2."""
    place = builder.inttoptr(address, ir.IntType(8).as_pointer())
    how = [ir.Constant(I32, value) for value in ((1, 3, 1) if write else (0, 2, 1))]
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, *how])


def make_tile(arithmetic: Arithmetic) -> Any:
    """An intrinsic: the register tile  y[r, c] = start[r, c] + Σ_i x[r, i]·w[i, c].

    tile(rows, vecs, aside, ld_aside, y, ldy, start, ld_start, x, row, term, w, ldw, k, shift): `rows` rows
    and `vecs` vectors. Each size, up to WIDEST vectors and TALLEST[vecs - 1] rows, has a function of its
    own. All matrices are given by the address of the tile's first number: rows of y, start and w are ldy,
    ld_start and ldw numbers apart, and x[r, i] is number r·row + i·term. `start` is 0 to begin from zero.
    The last vector lies `shift` to the left of where it would follow, to end with the row; what it shares
    with the one before is computed twice and stored alike. k ≥ 1.

    Unless `aside` is 0, the tile must be of the tallest size; it does something aside with each row of w,
    and with an address that begins as `aside` and goes on by ld_aside numbers: tiles of FLOATS copy the
    row to there, those of pairs of bfloat16s fetch what is there.
    """

    @intrinsic
    def tile(context, rows, vecs, aside, ld_aside, y, ldy, start, ld_start, x, row, term, w, ldw, k, shift):
        def codegen(context, builder, signature, args):
            rows, vecs, *rest = args
            beside = builder.icmp_signed("!=", rest[0], constant(0))
            column = builder.mul(builder.sub(vecs, constant(1)), constant(max(TALLEST) + 1))
            at = builder.add(column, builder.select(beside, constant(0), rows))
            table = _tiles(builder.module, arithmetic)
            builder.call(builder.load(builder.gep(table, [constant(0), at])), rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 15), codegen

    return tile


def _tiles(module: Any, arithmetic: Arithmetic) -> Any:
    """The functions of all sizes as a table in this module: for each width the one that does something
    aside, then those of 1, 2, … rows."""
    if arithmetic.name in module.globals:
        return module.get_global(arithmetic.name)
    kind = ir.FunctionType(ir.VoidType(), [I64] * 13)
    functions = []
    for vecs, tallest in enumerate(TALLEST, 1):
        functions.append(_tile(module, kind, arithmetic, tallest, vecs, aside=True))
        heights = [_tile(module, kind, arithmetic, rows, vecs) for rows in range(1, tallest + 1)]
        functions += heights + heights[-1:] * (max(TALLEST) - tallest)
    table = ir.GlobalVariable(module, ir.ArrayType(kind.as_pointer(), len(functions)), arithmetic.name)
    table.linkage, table.global_constant = "internal", True
    table.initializer = ir.Constant(table.value_type, functions)
    return table


def _tile(module: Any, kind: Any, how: Arithmetic, rows: int, vecs: int, aside: bool = False) -> Any:
    """The function for a tile of this size."""
    function = ir.Function(module, kind, f"{how.name}_{rows}x{vecs}{'_aside' if aside else ''}")
    function.linkage = "internal"
    other, ld_other, y, ldy, start, ld_start, x, row, term, w, ldw, k, shift = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    ydata, sdata, xdata, wdata = (_floats(builder, address) for address in (y, start, x, w))
    places = [constant(c * LANES) for c in range(vecs)]
    places[-1] = builder.sub(places[-1], shift)
    cells = [(r, c) for r in range(rows) for c in range(vecs)]

    def each(ld: Any) -> list[Any]:
        """Where each vector of a matrix of rows of ld numbers begins."""
        firsts = [builder.mul(ld, constant(r)) for r in range(rows)]
        return [builder.add(firsts[r], places[c]) for r, c in cells]

    if how.fetch:
        below = builder.mul(ldy, constant(rows))
        for at in each(ldy):
            fetch(builder, _after(builder, y, builder.add(at, below)), write=True)
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
    if aside:
        how.aside(builder, _after(builder, other, builder.mul(i, ld_other)), places, weights)
    new = []
    for r in range(rows):
        at = builder.add(builder.mul(row, constant(r)), column_of_x)
        factor = broadcast(builder, builder.load(builder.gep(xdata, [at])))
        new += [how.multiply(builder, factor, weights[c], sums[r * vecs + c]) for c in range(vecs)]
        if how.fence:
            builder.fence("acq_rel", "singlethread")  # orders nothing but the compiler
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
