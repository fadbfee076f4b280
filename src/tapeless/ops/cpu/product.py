"""Matrix products by register tiles: one routine for y = x·w + b, dx = dy·wᵀ and dw += xᵀ·dy.

What programs call is the intrinsic that `make_product` makes; `matmul` calls the routine from Python, on
all cores.

Each y[r, c] is one chain of multiply-adds in the order of the sum, however large the product is and
however it is cut into tiles: a row comes out the same, bit for bit, in any company and on any thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.routines import from_python, make_call

# A panel of w is copied to where it lies without gaps, unless w is small enough for the caches or too
# few rows need it. Of a long sum, DEPTH terms at a time: 144 KB on the stack with AVX-512, in L2.
DEPTH = 768
LARGE = 1 << 16
MANY = 32
# Many rows come in blocks of at least ROWS, or of BLOCK numbers of x, 512 KB: they stay in L2 while the
# panels of w pass by.
ROWS, BLOCK = 256, 1 << 17
# Multiply-adds that are worth a part of their own, where threads share a product.
PART = 20_000_000


def make_panel(arithmetic: Any) -> tuple[Any, Any, Any]:
    """What multiplies by one panel of w after the other, with this arithmetic (of `tiles.py`): the tile,
    all tiles of a panel, and the width of the next panel."""
    from tapeless.ops.cpu.tiles import TALLEST, WIDEST, make_tile

    tile = make_tile(arithmetic)

    @jit
    def panel_width(left):
        """Vectors of the next panel. One that is shifted to the left, to end with the row, needs its
        neighbour in the same panel: so a panel of a single vector comes alone or first."""
        if WIDEST == 2:
            return 2 - left % 2
        return 3 if left == 3 or left > 4 else min(left, 2)

    def all_rows(vecs, y, ldy, start, ld_start, x, row, term, w, ldw, m, k, shift):
        """All rows of a panel, by tiles of nearly the same height."""
        count = (m + TALLEST[vecs - 1] - 1) // TALLEST[vecs - 1]
        rows = m // count
        lower = count * (rows + 1) - m
        rows += 1
        while count > 0:
            if count == lower:
                rows -= 1
            tile(rows, vecs, 0, 0, y, ldy, start, ld_start, x, row, term, w, ldw, k, shift)
            y += 4 * rows * ldy
            start += 4 * rows * ld_start
            x += 4 * rows * row
            count -= 1

    # In one module with the routine: each has its own tiles.
    return tile, jit(all_rows, inline="always"), panel_width


def make_routine() -> Callable:
    """The routine to compile.

    product(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k):
    y[r, c] = start[r, c] + Σ_i x[r, i]·w[i, c]  for m rows, n ≥ LANES columns, k ≥ 1 terms. Rows of y
    and start are ldy and ld_start numbers apart: start may be y itself, a bias (ld_start = 0), or begin
    from zero (start = ld_start = 0). x[r, i] is number r·row + i·term of x, and w[i, c] number
    i·w_term + c·column of w, so the steps are (C, 1) for a matrix [·, C] as it is and (1, C) for its
    transpose; one of w's must be 1.
    """
    from tapeless.ops.cpu.simd import LANES
    from tapeless.ops.cpu.tiles import FLOATS, TALLEST, WIDEST, copy_one, scratch, transpose_block

    tile, panel, panel_width = make_panel(FLOATS)
    panel_scratch = scratch(DEPTH * WIDEST * LANES)

    @jit
    def turn(y, x, ldx, m, n):
        """y = xᵀ for y [m, n], n ≥ LANES."""
        if m < LANES:
            for c in range(n):
                for r in range(m):
                    copy_one(y, r * n + c, x, c * ldx + r)
            return
        for column in range(0, n, LANES):
            c = min(column, n - LANES)  # the last blocks overlap their neighbours
            for row in range(0, m, LANES):
                r = min(row, m - LANES)
                transpose_block(y, r * n + c, n, x, c * ldx + r, ldx)

    @jit
    def block(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k):
        kept = panel_scratch()
        turns = column != 1
        keeps = not turns and m >= MANY and k * n > LARGE
        blocks = (k + DEPTH - 1) // DEPTH if turns or keeps else 1
        while blocks > 0:
            deep = (k + blocks - 1) // blocks
            c = 0
            left = (n + LANES - 1) // LANES
            over = left * LANES - n
            while left > 0:
                vecs = panel_width(left)
                left -= vecs
                shift = 0 if left else over
                columns = vecs * LANES - shift
                yc, sc, xr, rows = y + 4 * c, start + 4 * c if start else 0, x, m
                wc, ldw = w + 4 * c * column, w_term
                if turns:
                    turn(kept, wc, column, deep, columns)
                    wc, ldw = kept, columns
                elif keeps:  # the first tile copies what it reads
                    tall = TALLEST[vecs - 1]
                    ld = columns
                    tile(tall, vecs, kept, ld, yc, ldy, sc, ld_start, xr, row, term, wc, ldw, deep, shift)
                    yc, sc, xr = yc + 4 * tall * ldy, sc + 4 * tall * ld_start, xr + 4 * tall * row
                    rows -= tall
                    wc, ldw = kept, columns
                panel(vecs, yc, ldy, sc, ld_start, xr, row, term, wc, ldw, rows, deep, shift)
                c += columns
            x += 4 * deep * term
            w += 4 * deep * w_term
            start, ld_start = y, ldy
            k -= deep
            blocks -= 1

    def product(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k):
        most = max(ROWS, BLOCK // min(k, DEPTH))
        blocks = (m + most - 1) // most
        while blocks > 0:
            rows = (m + blocks - 1) // blocks
            block(y, ldy, start, ld_start, x, row, term, w, w_term, column, rows, n, k)
            y += 4 * rows * ldy
            start += 4 * rows * ld_start
            x += 4 * rows * row
            m -= rows
            blocks -= 1

    return product


def make_product(precision: str = "float32") -> Any:
    """An intrinsic that calls the routine, with arrays (or 0) in place of addresses. With precision
    "bf16" operands are rounded to that (see `pairs.py`)."""
    return make_call({"float32": "product", "bf16": "product_bf16"}[precision])


# ---------------------------------------------------------------- from Python


def matmul(y: np.ndarray, x: np.ndarray, w: np.ndarray, threads: int | None = None) -> None:
    """y = x·w on some threads, by default as many as there are cores. The number changes no bit of y.

    **Arguments:** y [m, n], x [m, k] and w [k, n] of float32; m, k ≥ 1 and n ≥ LANES, the numbers in a
    vector. The rows of y must be contiguous, and those of w or of wᵀ; x may have any strides. y must not
    overlap x or w. Raises `ValueError` for anything else but an overlap, and for threads < 1.
    """
    from tapeless.ops.cpu.simd import LANES

    _check(y, x, w, LANES)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}.")
    (m, k), n = x.shape, w.shape[1]
    ldy, row, term, w_term, column = (s // 4 for s in (y.strides[0], *x.strides, *w.strides))
    addresses = y.ctypes.data, x.ctypes.data, w.ctypes.data
    routine = from_python("product")

    def part(r: int, c: int, rows: int, columns: int) -> None:
        ya, xa, wa = (
            addresses[0] + 4 * (r * ldy + c),
            addresses[1] + 4 * r * row,
            addresses[2] + 4 * c * column,
        )
        routine(ya, ldy, 0, 0, xa, row, term, wa, w_term, column, rows, columns, k)

    # Of the longer side, in whole vectors of columns, each thread takes the next part when it is ready.
    size, unit = (m, 1) if m > n else (n // LANES, LANES)
    threads = min(threads or os.cpu_count() or 1, size)
    count = min(size, threads * max(1, min(8, m * n * k // (threads * PART))))
    edges = [unit * (size * i // count) for i in range(count)] + [max(m, n)]
    parts = ((a, 0, b - a, n) if m > n else (0, a, m, b - a) for a, b in pairwise(edges))
    queue = iter(list(parts))

    def work() -> None:
        for each in queue:
            part(*each)

    others = [_pool(threads).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def _check(y: np.ndarray, x: np.ndarray, w: np.ndarray, lanes: int) -> None:
    """Native code trusts what it is given."""
    fits = all(a.dtype == np.float32 and a.ndim == 2 for a in (y, x, w))
    fits = fits and y.shape == (x.shape[0], w.shape[1]) and x.shape[1] == w.shape[0]
    fits = fits and 0 not in x.shape and w.shape[1] >= lanes and y.flags.writeable
    if (
        not fits
        or y.strides[1] != 4
        or 4 not in w.strides
        or any(s % 4 for a in (y, x, w) for s in a.strides)
    ):
        got = "; ".join(f"{a.dtype} {a.shape} in steps of {a.strides} bytes" for a in (y, x, w))
        raise ValueError(
            f"expected float32 y [m, n], x [m, k] and w [k, n] with m, k ≥ 1 and n ≥ {lanes}, the rows of y "
            f"and of w or wᵀ contiguous, y writeable; got {got}."
        )


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "product")


if hasattr(os, "register_at_fork"):  # a child process has its parent's pools, but not their threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
