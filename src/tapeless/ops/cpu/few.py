"""Products of one or few rows by a matrix larger than the caches, as fast as memory delivers it.

Generating a token multiplies one row by every weight of the model: what counts is that each weight is
read once, in an order that memory likes, and nothing is waited for. Where rows of w lie one after the
other, y = x·wᵀ and y = x·w with a short y read them so; with a long one, or some columns of a wider w,
GROUP rows at a time are multiplied while the next ones are fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.routines import make_call

# Rows that share one reading of w; more come in turns.
MOST = 8
# Columns of y, or terms of x, in a buffer: 128 KB on the stack. Rows of w by which x is kept: 32 KB.
WIDTH, DEPTH = 4096, 1024
# Bytes of w that stay in L2 for the next rows of x; and of a row of w whose y stays in L1.
AGAIN, SHORT = 1 << 18, 6144


def make_few(storage: str = "float32") -> Any:
    """An intrinsic that calls the routine, with arrays in place of addresses. With "bfloat16", w is an
    array of uint16, the numbers' upper halves; x and y are float32 all the same."""
    return make_call({"float32": "few", "bfloat16": "few_stored"}[storage])


def make_routine(stored: bool) -> Callable:
    """The routine to compile: few(…) takes what `product` (see `product.py`) does, and any n ≥ 1.

    Some columns of y alone are those columns of w (or rows, of wᵀ); each comes out the same, bit for bit,
    whatever the others are.
    """
    from tapeless.ops.cpu.streams import BFLOAT, FLOAT, GROUP, ROWS, SIDE, UNIT, make_movers, make_streams
    from tapeless.ops.cpu.tiles import copy_one, scratch

    storage = BFLOAT if stored else FLOAT
    size = storage.size
    stream_down, stream_along = make_streams(storage)
    arrange, restore, copy = make_movers(storage)
    buffer, x_buffer = scratch(MOST * WIDTH), scratch(MOST * DEPTH)

    @jit
    def padded(n):
        return (n + SIDE * UNIT - 1) // (SIDE * UNIT) * (SIDE * UNIT)

    @jit
    def down(y, ldy, start, ld_start, x, row, term, w, w_term, m, n, k):
        """x·w: columns of y in the buffer, rows of w passing by."""
        sums, kept = buffer(), x_buffer()
        ld = padded(n)
        for r in range(m):
            for c in range(0, ld, UNIT):
                source = start + 4 * (r * ld_start + c) if start else 0
                arrange(sums + 4 * (r * ld + c), source, n - c)
        alone = m == 1 and n == w_term
        deep = DEPTH if m <= ROWS else max(GROUP, AGAIN // (n * size * GROUP) * GROUP)
        i = 0
        while i < k:
            here = min(deep, DEPTH, k - i)
            groups = 0 if alone else here // GROUP
            first = groups * GROUP
            for top in range(0, m, ROWS):
                rows = min(ROWS, m - top)
                for t in range(here):
                    for r in range(rows):
                        copy_one(kept, t * rows + r, x, (top + r) * row + (i + t) * term)
                to, wi = sums + 4 * top * ld, w + size * i * w_term
                stream_down(rows, 1, to, ld, kept, wi, w_term, n, groups)
                wi += size * first * w_term
                stream_down(rows, 0, to, ld, kept + 4 * first * rows, wi, w_term, n, here - first)
            i += here
        for r in range(m):
            for c in range(0, n, UNIT):
                restore(y + 4 * (r * ldy + c), sums + 4 * (r * ld + c), n - c)

    @jit
    def along(y, ldy, start, ld_start, x, row, term, w, column, m, n, k):
        """x·wᵀ: x in the buffer, rows of w passing by."""
        kept = buffer()
        ld = padded(k)
        for r in range(m):
            for i in range(k):
                copy_one(kept, r * ld + i, x, r * row + i * term)
            for i in range(0, ld, UNIT):
                arrange(kept + 4 * (r * ld + i), kept + 4 * (r * ld + i), k - i)
            for c in range(0, n, UNIT):
                copy(y + 4 * (r * ldy + c), start + 4 * (r * ld_start + c) if start else 0, n - c)
        high = n if m <= ROWS else max(1, AGAIN // (k * size))
        for c in range(0, n, high):
            rows_of_w = min(high, n - c)
            for top in range(0, m, ROWS):
                to, xr = y + 4 * (top * ldy + c), kept + 4 * top * ld
                stream_along(min(ROWS, m - top), to, ldy, xr, ld, w + size * c * column, column, rows_of_w, k)

    def few(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k):
        while m > 0:
            rows = min(m, MOST)
            if column == 1:
                for c in range(0, n, WIDTH):
                    sc, wc, width = start + 4 * c if start else 0, w + size * c, min(WIDTH, n - c)
                    down(y + 4 * c, ldy, sc, ld_start, x, row, term, wc, w_term, rows, width, k)
            else:
                source, ld_source = start, ld_start
                for i in range(0, k, WIDTH):
                    xi, wi, terms = x + 4 * i * term, w + size * i, min(WIDTH, k - i)
                    along(y, ldy, source, ld_source, xi, row, term, wi, column, rows, n, terms)
                    source, ld_source = y, ldy
            y += 4 * rows * ldy
            start += 4 * rows * ld_start
            x += 4 * rows * row
            m -= rows

    return few
