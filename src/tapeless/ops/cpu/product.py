"""Matrix products by register tiles: one routine for y = x·w, dx = dy·wᵀ and dw += xᵀ·dy."""

from __future__ import annotations

from functools import cache
from typing import Any

from tapeless.ops.cpu.native import jit


@cache
def make_products() -> tuple[Any, Any]:
    """(product, transpose), compiled on first use.

    product(y, ldy, x, w, ldw, m, n, k, step_row, step_i, add): y[r, c] (+)= Σ_i x[r, i]·w[i, c] for m
    rows and n ≥ LANES columns, in rows of ldy and ldw numbers; x[r, i] is number r·step_row + i·step_i
    of x, so the steps are (C, 1) for an x [·, C] as it is and (1, C) for its transpose.
    transpose(y, x, m, n): the flat y becomes x[:m, :n]ᵀ, in rows of m.
    """
    from tapeless.ops.cpu import simd

    LANES, REGISTERS, tile = simd.LANES, simd.REGISTERS, simd.tile
    transpose_block: Any = simd.transpose_block  # an intrinsic's signature is not a type checker's

    widest = 4 if REGISTERS == 32 else 2

    def make_panel(vecs: int) -> Any:
        """All rows of a panel of columns, in tiles that fill the registers, then in smaller ones."""
        tall = min(8, (REGISTERS - 2 - vecs) // vecs)
        big, four, two, one = tile(tall, vecs), tile(4, vecs), tile(2, vecs), tile(1, vecs)

        def panel(y, ldy, c, x, w, ldw, m, k, step_row, step_i, shift, add):
            r = 0
            while r + tall <= m:
                big(y, r * ldy + c, ldy, x, r * step_row, step_row, step_i, w, c, ldw, k, shift, add)
                r += tall
            while r + 4 <= m:
                four(y, r * ldy + c, ldy, x, r * step_row, step_row, step_i, w, c, ldw, k, shift, add)
                r += 4
            if r + 2 <= m:
                two(y, r * ldy + c, ldy, x, r * step_row, step_row, step_i, w, c, ldw, k, shift, add)
                r += 2
            if r < m:
                one(y, r * ldy + c, ldy, x, r * step_row, step_row, step_i, w, c, ldw, k, shift, add)

        return jit(panel, forceinline=False)

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
            elif vecs == 3:
                panel3(y, ldy, c, x, w, ldw, m, k, step_row, step_i, moved, add)
            else:
                panel4(y, ldy, c, x, w, ldw, m, k, step_row, step_i, moved, add)
            c += vecs * LANES
            left -= vecs

    def transpose(y, x, m, n):
        ldx = x.shape[1]
        whole_m, whole_n = m - m % LANES, n - n % LANES
        for r in range(0, whole_m, LANES):
            for c in range(0, whole_n, LANES):
                transpose_block(y, c * m + r, m, x, r * ldx + c, ldx)
        for r in range(m):
            for c in range(whole_n if r < whole_m else 0, n):
                y[c * m + r] = x[r, c]

    return jit(product, forceinline=False), jit(transpose, forceinline=False)
