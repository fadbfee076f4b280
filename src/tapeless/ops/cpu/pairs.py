"""Matrix products with bfloat16 operands: `product` of `product.py` with sums of pairs of terms.

Operands are rounded to bfloat16 as they are packed, in pairs along the sum (see `bfloat.py`); sums are
float32. A block of x is packed once and stays in the L2 cache while all panels of w pass by.
"""

from __future__ import annotations

from collections.abc import Callable

from tapeless.ops.cpu.native import jit

# Pairs of terms at a time, and pairs in a block of x: 72 KB and 384 KB on the stack with AVX-512.
DEPTH = 384
BLOCK = 96 << 10


def make_routine() -> Callable:
    """The routine to compile: `product`, where one of x's steps must be 1, too.

    A row comes out the same in any company and on any thread, as there: each y[r, c] is one chain of
    multiply-adds in the order of the sum, but for the second of each pair of terms, which comes first.
    """
    from tapeless.ops.cpu.bfloat import PAIRS, flush, make_packers, restore
    from tapeless.ops.cpu.product import make_panel
    from tapeless.ops.cpu.simd import LANES
    from tapeless.ops.cpu.tiles import LINE, TALLEST, WIDEST, scratch

    tile, panel, panel_width = make_panel(PAIRS)
    between, along, turned = make_packers()
    x_scratch, w_scratch = scratch(BLOCK), scratch(DEPTH * WIDEST * LANES)
    tallest = max(TALLEST)
    # Lines that hold the columns of a panel, wherever they begin, of the two rows that a pair is of.
    lines = 2 * ((WIDEST * LANES * 4 - 1) // LINE + 2)

    @jit
    def parts(n, most):
        return (n + most - 1) // most

    @jit
    def pack_x(to, x, row, term, m, terms, ld):
        """The pairs of m rows: in rows of `ld`, or where x is turned, in columns."""
        if term == 1:
            for r in range(m):
                for p in range(0, ld, LANES):
                    along(to + 4 * (r * ld + p), x + 4 * (r * row + 2 * p), terms - 2 * p)
        else:
            for p in range(parts(terms, 2)):
                above, both = x + 8 * p * term, 2 * p + 1 < terms
                for r in range(0, m, LANES):
                    between(to + 4 * (p * ld + r), above + 4 * r, above + 4 * (r + term), m - r, both)

    @jit
    def pack_w(to, w, w_term, column, columns, terms):
        """The pairs of a panel, in rows of `columns`; the last blocks overlap their neighbours."""
        for block in range(0, columns, LANES):
            c = min(block, columns - LANES)
            if column == 1:
                for p in range(parts(terms, 2)):
                    above, both = w + 4 * (2 * p * w_term + c), 2 * p + 1 < terms
                    between(to + 4 * (p * columns + c), above, above + 4 * w_term, LANES, both)
            else:
                for p in range(0, parts(terms, 2), LANES):
                    above = w + 4 * (2 * p + c * column)
                    turned(to + 4 * (p * columns + c), columns, above, column, terms - 2 * p)

    @jit
    def block(y, ldy, start, ld_start, x, x_row, x_term, w, w_term, column, m, n, terms):
        """m rows of y from packed x."""
        packed, pairs = w_scratch(), parts(terms, 2)
        left = parts(n, LANES)
        over = left * LANES - n
        while left > 0:
            vecs = panel_width(left)
            left -= vecs
            shift = 0 if left else over
            columns = vecs * LANES - shift
            pack_w(packed, w, w_term, column, columns, terms)
            w += 4 * columns * column
            ld, yr, sr, xr, rows = columns, y, start, x, m
            if column == 1 and left > 0:  # while the first tiles compute, the next panel is fetched
                tall = TALLEST[vecs - 1]
                for line in range(min(lines, m // tall - 1)):
                    ahead, step = w + 4 * (line % 2) * w_term + LINE * (line // 2), 4 * w_term // 2
                    tile(
                        tall,
                        vecs,
                        ahead,
                        step,
                        yr,
                        ldy,
                        sr,
                        ld_start,
                        xr,
                        x_row,
                        x_term,
                        packed,
                        ld,
                        pairs,
                        shift,
                    )
                    yr, sr, xr = yr + 4 * tall * ldy, sr + 4 * tall * ld_start, xr + 4 * tall * x_row
                    rows -= tall
            panel(vecs, yr, ldy, sr, ld_start, xr, x_row, x_term, packed, ld, rows, pairs, shift)
            y += 4 * columns
            start += 4 * columns if start else 0

    def product(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k):
        packed, before = x_scratch(), flush()
        depths = parts(parts(k, 2), DEPTH)
        while depths > 0:
            terms = min(k, 2 * parts(parts(k, 2), depths))
            pairs = parts(parts(terms, 2), LANES) * LANES
            most = BLOCK // pairs // LANES * LANES
            done, blocks = 0, parts(m, most)
            while blocks > 0:
                rows = min(m - done, parts(parts(m - done, blocks), tallest) * tallest)
                ld = pairs if term == 1 else parts(rows, LANES) * LANES
                pack_x(packed, x + 4 * done * row, row, term, rows, terms, ld)
                yr, sr = y + 4 * done * ldy, start + 4 * done * ld_start
                x_row, x_term = (ld, 1) if term == 1 else (1, ld)
                block(yr, ldy, sr, ld_start, packed, x_row, x_term, w, w_term, column, rows, n, terms)
                done += rows
                blocks -= 1
            x += 4 * terms * term
            w += 4 * terms * w_term
            start, ld_start = y, ldy
            k -= terms
            depths -= 1
        restore(before)

    return product
