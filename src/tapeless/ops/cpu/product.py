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
ROUTINES = {"product": 11, "transpose": 4}


def make_routine(name: str) -> Callable:
    """The routine to compile.

    product(y, ldy, x, w, ldw, m, n, k, step_row, step_i, add): y[r, c] (+)= Σ_i x[r, i]·w[i, c] for m
    rows and n ≥ LANES columns, in rows of ldy and ldw numbers; x[r, i] is number r·step_row + i·step_i
    of x, so the steps are (C, 1) for an x [·, C] as it is and (1, C) for its transpose.
    transpose(y, x, m, n): y becomes xᵀ for an x [m, n].
    """
    from tapeless.ops.cpu import simd

    return _product(simd) if name == "product" else _transpose(simd)


def _product(simd: Any) -> Callable:
    LANES = simd.LANES
    widest = 4 if simd.REGISTERS == 32 else 2

    def make_panel(vecs: int) -> Any:
        """All rows of a panel of columns, in tiles that fill the registers, then in smaller ones."""
        tall = min(8, (simd.REGISTERS - 2 - vecs) // vecs)
        big, two, one = (simd.tile(rows, vecs) for rows in (tall, 2, 1))

        def panel(y, ldy, c, x, w, ldw, m, k, step_row, step_i, shift, add):
            r = 0
            while r + tall <= m:
                big(y, r * ldy + c, ldy, x, r * step_row, step_row, step_i, w, c, ldw, k, shift, add)
                r += tall
            while r + 2 <= m:
                two(y, r * ldy + c, ldy, x, r * step_row, step_row, step_i, w, c, ldw, k, shift, add)
                r += 2
            if r < m:
                one(y, r * ldy + c, ldy, x, r * step_row, step_row, step_i, w, c, ldw, k, shift, add)

        return jit(panel, inline="always")

    panels = [make_panel(vecs) for vecs in range(1, widest + 1)]
    panel1, panel2, panel3, panel4 = panels[0], panels[1], panels[2 % widest], panels[3 % widest]

    def product(y, ldy, x, w, ldw, m, n, k, step_row, step_i, add):
        left = (n + LANES - 1) // LANES
        shift = left * LANES - n
        c = 0
        while left > 0:
            vecs = min(left, widest)
            # A vector that is shifted back must have its neighbour in the same tile.
            if left - vecs == 1 and shift > 0:
                vecs -= 1
            moved = shift if left == vecs else 0
            if vecs == 1:
                panel1(y, ldy, c, x, w, ldw, m, k, step_row, step_i, moved, add)
            elif vecs == 2:
                panel2(y, ldy, c, x, w, ldw, m, k, step_row, step_i, moved, add)
            elif widest > 2 and vecs == 3:
                panel3(y, ldy, c, x, w, ldw, m, k, step_row, step_i, moved, add)
            elif widest > 2:
                panel4(y, ldy, c, x, w, ldw, m, k, step_row, step_i, moved, add)
            c += vecs * LANES
            left -= vecs

    return product


def _transpose(simd: Any) -> Callable:
    LANES, transpose_block, copy_one = simd.LANES, simd.transpose_block, simd.copy_one

    def transpose(y, x, m, n):
        whole_m, whole_n = m - m % LANES, n - n % LANES
        for r in range(0, whole_m, LANES):
            for c in range(0, whole_n, LANES):
                transpose_block(y, c * m + r, m, x, r * n + c, n)
        for r in range(m):
            for c in range(whole_n if r < whole_m else 0, n):
                copy_one(y, c * m + r, x, r * n + c)

    return transpose


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
