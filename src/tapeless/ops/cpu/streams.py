"""Vectors for products of a few rows by a large matrix, whose numbers pass by once, from memory.

The matrix w is of floats, or of bfloat16s as they are stored. Its columns are taken in units of 2·LANES.
A unit of bfloat16s is one vector, which two operations make into the floats of its even and of its odd
columns. So that these need no sorting, what they are multiplied with or added to is kept *arranged*:
each unit's even columns before its odd ones. Beside floats everything is arranged as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from tapeless.ops.cpu.simd import (
    F32,
    I16,
    I64,
    LANES,
    VEC,
    WORDS,
    ZERO,
    broadcast,
    constant,
    fold,
    intrinsic,
    load_first,
    multiply_add,
    store_first,
)
from tapeless.ops.cpu.tiles import LINE, fetch

UNIT = 2 * LANES
# Rows of x that pass w together, and rows of w that pass y together.
ROWS, GROUP = 4, 8
# Units side by side of a row of w that passes alone: memory likes some lines in a row, undisturbed.
SIDE = 2

# ---------------------------------------------------------------- addresses and vectors


def _at(builder: Any, address: Any, numbers: Any, size: int = 4) -> Any:
    return builder.add(address, builder.mul(numbers, constant(size)))


def _place(builder: Any, kind: Any, address: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, count: Any = None) -> list[Any]:
    """A unit of floats, or its first `count` ones with zeros after them."""
    places = [_place(builder, VEC, _at(builder, address, constant(i))) for i in (0, LANES)]
    if count is None:
        return [builder.load(place, align=4) for place in places]
    counts = count, builder.sub(count, constant(LANES))
    return [load_first(builder, VEC, place, n) for place, n in zip(places, counts, strict=True)]


def _load_stored(builder: Any, address: Any, count: Any = None) -> list[Any]:
    """The same of bfloat16s, arranged."""
    kind = ir.VectorType(I16, UNIT)
    place = _place(builder, kind, address)
    both = builder.load(place, align=2) if count is None else load_first(builder, kind, place, count)
    words = builder.bitcast(both, WORDS)
    even = builder.shl(words, ir.Constant(WORDS, [16] * LANES))
    odd = builder.and_(words, ir.Constant(WORDS, [0xFFFF0000] * LANES))
    return [builder.bitcast(half, VEC) for half in (even, odd)]


def _store(builder: Any, unit: list[Any], address: Any, count: Any = None) -> None:
    for i, value in enumerate(unit):
        place = _place(builder, VEC, _at(builder, address, constant(i * LANES)))
        if count is None:
            builder.store(value, place, align=4)
        else:
            store_first(builder, value, place, builder.sub(count, constant(i * LANES)))


class Storage(NamedTuple):
    """How the numbers of w are stored: their size, how a unit is loaded, and where the numbers of an
    arranged unit come from, and those of one that was."""

    name: str
    size: int
    load: Callable[..., list[Any]]
    arranged: list[int]
    restored: list[int]


_NATURAL = list(range(UNIT))
FLOAT = Storage("float", 4, _load, _NATURAL, _NATURAL)
BFLOAT = Storage(
    "bfloat", 2, _load_stored,
    [*range(0, UNIT, 2), *range(1, UNIT, 2)], [i // 2 + i % 2 * LANES for i in range(UNIT)],
)  # fmt: skip


def _units(builder: Any, storage: Storage, row: Any, starts: list[Any], counts: list[Any]) -> list[Any]:
    """The vectors of units of a row of w, by where they begin; see `_blocks` for the counts."""
    places = [_at(builder, row, start, storage.size) for start in starts]
    return [v for at, n in zip(places, counts, strict=True) for v in storage.load(builder, at, n)]


def _sorted(builder: Any, unit: list[Any], lanes: list[int]) -> list[Any]:
    halves = (ir.Constant(WORDS, half) for half in (lanes[:LANES], lanes[LANES:]))
    return [builder.shuffle_vector(*unit, half) for half in halves]


# ---------------------------------------------------------------- loops


def _variable(builder: Any, value: Any) -> Any:
    """A place in memory for a value that changes; it becomes a register."""
    with builder.goto_entry_block():
        place = builder.alloca(value.type)
    builder.store(value, place)
    return place


def _loop(builder: Any, end: Any, step: int, body: Callable[[Any], None]) -> None:
    """body(i) for i = 0, step, … below `end`."""
    before = builder.block
    loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed("<", constant(0), end), loop, after)
    builder.position_at_end(loop)
    i = builder.phi(I64)
    body(i)
    following = builder.add(i, constant(step))
    i.add_incoming(constant(0), before)
    i.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
    builder.position_at_end(after)


def _blocks(builder: Any, count: Any, units: int, body: Callable[[list[Any], list[Any]], None]) -> None:
    """body(beginnings, counts) for the units of each block of so many. Where they are whole, which loads
    faster, the counts are None; the last block's are the numbers left from each beginning on."""
    left = builder.and_(count, constant(units * UNIT - 1))
    whole = builder.sub(count, left)
    steps = [constant(u * UNIT) for u in range(units)]
    _loop(
        builder,
        whole,
        units * UNIT,
        lambda i: body([builder.add(i, step) for step in steps], [None] * units),
    )
    with builder.if_then(builder.icmp_signed(">", left, constant(0))):
        body([builder.add(whole, step) for step in steps], [builder.sub(left, step) for step in steps])


# ---------------------------------------------------------------- y = x·w


def _down(storage: Storage, rows: int, group: int, builder: Any, args: list[Any]) -> None:
    """y += x·w for some rows of x and any number of groups of `group` rows of w.

    y is arranged, in rows of ldy numbers; x is kept as [row of w][row of x]. While a group of several rows
    passes, the next one is fetched, in the order of memory.
    """
    y, ldy, x, w, ldw, n, groups = args
    units = SIDE if group == 1 else 1
    ld, run = (builder.mul(length, constant(storage.size)) for length in (ldw, n))  # bytes
    lines = group * UNIT * storage.size // LINE

    def pass_by(g: Any) -> None:
        first = builder.mul(g, constant(group))
        tops = [builder.add(w, builder.mul(builder.add(first, constant(i)), ld)) for i in range(group)]
        x_group = _at(builder, x, builder.mul(first, constant(rows)))

        def factor(i: int, r: int) -> Any:
            place = _place(builder, F32, _at(builder, x_group, constant(i * rows + r)))
            return broadcast(builder, builder.load(place))

        kept = [factor(i, 0) for i in range(group)] if rows == 1 else []
        last = builder.icmp_signed("==", builder.add(g, constant(1)), groups)
        following = builder.add(tops[0], builder.mul(ld, constant(group)))
        row = _variable(builder, builder.select(last, tops[0], following))  # that of the next line to fetch
        offset = _variable(builder, constant(0))

        def fetch_lines() -> None:
            top, at = builder.load(row), builder.load(offset)
            for i in range(lines):
                fetch(builder, builder.add(builder.add(top, at), constant(i * LINE)), write=False)
            at = builder.add(at, constant(lines * LINE))
            over = builder.icmp_signed(">=", at, run)
            builder.store(builder.select(over, builder.add(top, ld), top), row)
            builder.store(builder.select(over, builder.sub(at, run), at), offset)

        def weights(i: int, starts: list[Any], counts: list[Any]) -> list[Any]:
            units = zip(starts, counts, strict=True)
            return [
                v
                for at, n in units
                for v in storage.load(builder, _at(builder, tops[i], at, storage.size), n)
            ]

        def block(starts: list[Any], counts: list[Any]) -> None:
            if group > 1:
                fetch_lines()
            values = _units(builder, storage, tops[0], starts, counts)  # before y
            heads = [_at(builder, y, builder.mul(ldy, constant(r))) for r in range(rows)]
            places = [[_at(builder, head, start) for start in starts] for head in heads]
            sums = [[v for place in row for v in _load(builder, place)] for row in places]
            for i in range(group):
                if i:
                    values = _units(builder, storage, tops[i], starts, counts)
                for r in range(rows):
                    f = kept[i] if kept else factor(i, r)
                    pairs = zip(values, sums[r], strict=True)
                    sums[r] = [multiply_add(builder, f, v, s) for v, s in pairs]
            for row_places, row_sums in zip(places, sums, strict=True):
                for u, place in enumerate(row_places):
                    _store(builder, row_sums[2 * u : 2 * u + 2], place)

        _blocks(builder, n, units, block)

    _loop(builder, groups, 1, pass_by)


# ---------------------------------------------------------------- y = x·wᵀ


def _along(storage: Storage, rows: int, builder: Any, args: list[Any]) -> None:
    """y += x·wᵀ for some rows of x, arranged, in rows of ldx numbers, and n rows of w."""
    y, ldy, x, ldx, w, ldw, n, k = args

    def pass_by(c: Any) -> None:
        top = _at(builder, w, builder.mul(c, ldw), storage.size)
        sums = [[_variable(builder, ZERO) for _ in range(2 * SIDE)] for _ in range(rows)]

        def block(starts: list[Any], counts: list[Any]) -> None:
            values = _units(builder, storage, top, starts, counts)
            for r in range(rows):
                head = _at(builder, x, builder.mul(ldx, constant(r)))
                factors = [f for start in starts for f in _load(builder, _at(builder, head, start))]
                for f, v, s in zip(factors, values, sums[r], strict=True):
                    builder.store(multiply_add(builder, f, v, builder.load(s)), s)

        _blocks(builder, k, SIDE, block)
        for r in range(rows):
            total = builder.load(sums[r][0])
            for s in sums[r][1:]:
                total = builder.fadd(total, builder.load(s))
            place = _place(builder, F32, _at(builder, y, builder.add(builder.mul(ldy, constant(r)), c)))
            builder.store(builder.fadd(builder.load(place), fold(builder, total, builder.fadd)), place)

    _loop(builder, n, 1, pass_by)


# ---------------------------------------------------------------- calling these


def _table(module: Any, name: str, writers: Mapping[str, Callable[..., None]], arguments: int) -> Any:
    """Functions of int64s as a table in this module, each written by (builder, arguments)."""
    if name in module.globals:
        return module.get_global(name)
    kind = ir.FunctionType(ir.VoidType(), [I64] * arguments)
    functions = []
    for each, write in writers.items():
        function = ir.Function(module, kind, each)
        function.linkage = "internal"
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        write(builder, list(function.args))
        builder.ret_void()
        functions.append(function)
    table = ir.GlobalVariable(module, ir.ArrayType(kind.as_pointer(), len(functions)), name)
    table.linkage, table.global_constant = "internal", True
    table.initializer = ir.Constant(table.value_type, functions)
    return table


def make_streams(storage: Storage) -> tuple[Any, Any]:
    """Intrinsics on addresses.

    down(rows, grouped, y, ldy, x, w, ldw, n, groups): y += x·w for 1 … ROWS rows of x, and `groups` times
    GROUP rows of w or, unless `grouped`, 1 row. y is arranged and padded to SIDE units; x is kept as
    [row of w][row of x].
    along(rows, y, ldy, x, ldx, w, ldw, n, k): y += x·wᵀ for 1 … ROWS rows of x, which are arranged and
    padded with zeros to SIDE units, and n rows of w of k numbers.
    """
    heights = range(1, ROWS + 1)

    @intrinsic
    def down(typing_context, rows, grouped, y, ldy, x, w, ldw, n, groups):
        def codegen(context, builder, signature, args):
            rows, grouped, *rest = args
            name = f"{storage.name}_down"
            sizes = [(r, group) for group in (1, GROUP) for r in heights]
            writers = {f"{name}_{r}x{group}": partial(_down, storage, r, group) for r, group in sizes}
            at = builder.sub(rows, constant(1))
            other = builder.icmp_signed("!=", grouped, constant(0))
            at = builder.select(other, builder.add(at, constant(ROWS)), at)
            table = _table(builder.module, name, writers, len(rest))
            builder.call(builder.load(builder.gep(table, [constant(0), at])), rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    @intrinsic
    def along(typing_context, rows, y, ldy, x, ldx, w, ldw, n, k):
        def codegen(context, builder, signature, args):
            rows, *rest = args
            name = f"{storage.name}_along"
            writers = {f"{name}_{r}": partial(_along, storage, r) for r in heights}
            table = _table(builder.module, name, writers, len(rest))
            at = builder.sub(rows, constant(1))
            builder.call(builder.load(builder.gep(table, [constant(0), at])), rest)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return down, along


def make_movers(storage: Storage) -> tuple[Any, Any, Any]:
    """Intrinsics that move a unit of floats at most.

    arrange(y, x, count): a unit y, arranged, from `count` floats x, or from zeros if x is 0.
    restore(y, x, count): `count` floats y from an arranged unit x.
    copy(y, x, count): `count` floats y from as many floats x, or from zeros if x is 0.
    """

    def mover(lanes: list[int], part_in: bool, part_out: bool) -> Any:
        @intrinsic
        def move(typing_context, y, x, count):
            def codegen(context, builder, signature, args):
                y, x, count = args
                there = builder.select(builder.icmp_signed("!=", x, constant(0)), count, constant(0))
                unit = _load(builder, x, there if part_in else None)
                _store(builder, _sorted(builder, unit, lanes), y, count if part_out else None)
                return context.get_dummy_value()

            return types.void(*[types.int64] * 3), codegen

        return move

    arrange = mover(storage.arranged, True, False)
    return arrange, mover(storage.restored, False, True), mover(_NATURAL, True, True)
