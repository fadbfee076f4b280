"""Matrix products by register tiles: one routine for y = x·w, dx = dy·wᵀ and dw += xᵀ·dy.

The routines are compiled once for the processor, into object code of their own that every program
is linked with; what programs call are `product` and `transpose`, as made by `make_products`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tapeless.ops.cpu.native import jit

# The routines by name, and their number of arguments, all int64 (arrays by address).
ROUTINES = {"product": 13}
import os
DEPTH = 768
LARGE = int(os.environ.get("LARGE", 1 << 16))
MANY = 32


def make_routine(name: str) -> Callable:
    from tapeless.ops.cpu.simd import LANES
    from tapeless.ops.cpu.tiles import TALLEST, WIDEST, copy_one, scratch, tile, transpose_block

    make_room = scratch(DEPTH * WIDEST * LANES)

    @jit
    def width(left):
        """vectors of the next panel, when this many are left: a vector that is shifted back must
        have its neighbour in the same panel, so a panel of one comes alone or first."""
        if WIDEST == 2:
            return 2 - left % 2
        if left >= 5 or left == 3:
            return 3
        return min(left, 2)

    @jit
    def turn(y, x, ldx, m, n):
        """y[i, c] = x[c, i], y [m, n]"""
        if m >= LANES:
            for c in range(0, n, LANES):
                c = min(c, n - LANES)
                for i in range(0, m, LANES):
                    i = min(i, m - LANES)
                    transpose_block(y, i * n + c, n, x, i + c * ldx, ldx)
        else:
            for c in range(n):
                for i in range(m):
                    copy_one(y, i * n + c, x, i + c * ldx)

    def product(y, ldy, start, lds, x, step_row, step_i, w, w_i, w_c, m, n, k):
        room = make_room()
        turns = w_c != 1
        packs = not turns and m >= MANY and k * n > LARGE
        blocks = (k + DEPTH - 1) // DEPTH if turns or packs else 1
        while blocks > 0:
            deep = (k + blocks - 1) // blocks
            left = (n + LANES - 1) // LANES
            end = left * LANES - n
            c = 0
            while left > 0:
                vecs = width(left)
                left -= vecs
                shift = 0 if left else end
                high = TALLEST[vecs - 1]
                columns = vecs * LANES - shift
                wc, ldw, keep = w + 4 * c * w_c, w_i, 0
                todo = (m + high - 1) // high
                rows = (m + todo - 1) // todo
                if turns:
                    turn(room, wc, w_c, deep, columns)
                    wc, ldw = room, columns
                elif packs:
                    keep, rows = room, high
                r = 0
                while todo > 0:
                    yr = y + 4 * (r * ldy + c)
                    sr = start + 4 * (r * lds + c) if start else 0
                    tile(rows, vecs, keep, yr, ldy, sr, lds, x + 4 * r * step_row, step_row, step_i, wc, ldw, deep, shift)
                    r += rows
                    todo -= 1
                    if keep:
                        wc, ldw, keep = room, columns, 0
                    if todo:
                        rows = (m - r + todo - 1) // todo
                c += columns
            x += 4 * deep * step_i
            w += 4 * deep * w_i
            start, lds = y, ldy
            k -= deep
            blocks -= 1

    return product


@cache
def make_products() -> tuple[Any, ...]:
    """Intrinsics that call the routines, arrays in place of addresses: (product, transpose)."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
    from numba.np import arrayobj

    word = ir.IntType(64)

    def call(name: str, kinds: tuple[Any, ...]) -> Any:
        def codegen(context, builder, signature, args):
            numbers = []
            for kind, wanted, value in zip(kinds, signature.args, args, strict=True):
                if isinstance(kind, types.Array):
                    data = arrayobj.make_array(wanted)(context, builder, value).data
                    numbers.append(builder.ptrtoint(data, word))
                else:
                    numbers.append(value)
            routine = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [word] * len(numbers)), f"tapeless_{name}"
            )
            builder.call(routine, numbers)
            return context.get_dummy_value()

        return types.void(*(k if isinstance(k, types.Array) else types.int64 for k in kinds)), codegen

    @intrinsic
    def product(typing_context, y, ldy, x, w, ldw, m, n, k, step_row, step_i, add):
        return call("product", (y, ldy, x, w, ldw, m, n, k, step_row, step_i, add))

    @intrinsic
    def transpose(typing_context, y, x, m, n):
        return call("transpose", (y, x, m, n))

    return product, transpose
