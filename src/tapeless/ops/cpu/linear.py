"""Linear layers and the tied head, on the products of `product.py`; narrow ones by plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.product import make_product

_f32 = np.float32
# For up to this many rows, multiplying by wᵀ costs less than turning w first.
FEW = 2
# Up to this many rows, threads share the columns of a product rather than its rows.
SHARED = 8


def make_ops(precision: str, streams: bool) -> dict[str, Callable]:
    """The ops by name, whose products read numbers of this precision. Those for decoding do the same as
    forward for a row or a few: `streams` says whether matrices may be read from memory each time then."""
    from tapeless.ops.cpu.share import meet, part
    from tapeless.ops.cpu.simd import LANES, load, matrix, store
    from tapeless.ops.cpu.streams import row_product, row_product_turned

    product = make_product(precision)
    if precision == "bf16":
        from tapeless.ops.cpu.bfloat import nearest as read
    else:
        read = jit(lambda x: x)

    @jit
    def multiply(y, x, w, b, top, bottom, left, right):
        """y = x·w + b, or without b if that is empty: rows top … bottom and columns left … right of it."""
        I, O = w.shape
        n, m = bottom - top, right - left
        if m >= LANES:
            target, source = matrix(y, top * O + left, n, m, O), matrix(x, top * I, n, I, I)
            factor = matrix(w, left, I, m, O)
            if b.size:
                product(target, O, matrix(b, left, 1, m, m), 0, source, I, 1, factor, O, 1, n, m, I)
            else:
                product(target, O, 0, 0, source, I, 1, factor, O, 1, n, m, I)
        else:
            for t in range(top, bottom):
                for o in range(left, right):
                    total = b[o] if b.size else _f32(0)
                    for i in range(I):
                        total += read(x[t, i]) * read(w[i, o])
                    y[t, o] = total

    @jit
    def multiply_turned(y, x, w, top, bottom, left, right):
        """y = x·wᵀ: rows top … bottom and columns left … right of it."""
        I, O = w.shape
        n, m = bottom - top, right - left
        if m >= LANES and n > FEW:
            target, source = matrix(y, top * I + left, n, m, I), matrix(x, top * O, n, O, O)
            product(target, I, 0, 0, source, O, 1, matrix(w, left * O, m, O, O), 1, O, n, m, O)
        else:
            for t in range(top, bottom):
                for i in range(left, right):
                    total = _f32(0)
                    for o in range(O):
                        total += read(x[t, o]) * read(w[i, o])
                    y[t, i] = total

    @jit
    def add_outer(w, x, y, rows):
        """w += xᵀ·y over all rows of the batch, this thread's rows of w"""
        I, O = w.shape
        begin, end = part(rows, I)
        if O >= LANES:
            m = end - begin
            target = matrix(w, begin * O, m, O, O)
            if m > 0:
                product(target, O, target, O, matrix(x, begin, m, 1, 1), 1, I, y, O, 1, m, O, rows.n)
        else:
            for i in range(begin, end):
                for t in range(rows.n):
                    for o in range(O):
                        w[i, o] += read(x[t, i]) * read(y[t, o])

    @jit
    def linear_forward(y, x, w, b, rows):
        multiply(y, x, w, b, rows.begin, rows.end, 0, w.shape[1])

    @jit
    def linear_backward(dx, dw, db, dy, x, w, rows):
        multiply_turned(dx, dy, w, rows.begin, rows.end, 0, w.shape[0])
        meet(rows)
        add_outer(dw, x, dy, rows)
        if db.size:
            begin, end = part(rows, w.shape[1])
            for t in range(rows.n):
                for o in range(begin, end, LANES):
                    store(load(db, o) + load(dy, t, o), db, o)
        meet(rows)

    @jit
    def tied_head_forward(logits, x, wte, rows):
        multiply_turned(logits, x, wte, rows.begin, rows.end, 0, wte.shape[0])

    @jit
    def tied_head_backward(dx, dwte, dlogits, x, wte, rows):
        multiply(dx, dlogits, wte, wte[0, :0], rows.begin, rows.end, 0, wte.shape[1])
        meet(rows)
        add_outer(dwte, dlogits, x, rows)

    @jit
    def few(rows):
        return rows.threads > 1 and rows.n <= SHARED

    @jit
    def streamed(rows, w):
        """Whether this is one row times a matrix that is read from memory each time."""
        return rows.n == 1 and rows.partial.shape[1] >= w.shape[1] and w.shape[1] % LANES == 0

    @jit
    def linear_shared(y, x, w, b, rows):
        if few(rows):
            meet(rows)
            begin, end = part(rows, w.shape[1])
            multiply(y, x, w, b, 0, rows.n, begin, end)
            meet(rows)
        else:
            multiply(y, x, w, b, rows.begin, rows.end, 0, w.shape[1])

    @jit
    def tied_head_shared(logits, x, wte, rows):
        if few(rows):
            meet(rows)
            begin, end = part(rows, wte.shape[0])
            multiply_turned(logits, x, wte, 0, rows.n, begin, end)
            meet(rows)
        else:
            multiply_turned(logits, x, wte, rows.begin, rows.end, 0, wte.shape[0])

    @jit
    def linear_decode(y, x, w, b, rows):
        if streamed(rows, w):
            row_product(y, x, w, b, rows)
        else:
            linear_shared(y, x, w, b, rows)

    @jit
    def tied_head_decode(logits, x, wte, rows):
        if streamed(rows, wte):
            row_product_turned(logits, x, wte, rows)
        else:
            tied_head_shared(logits, x, wte, rows)

    return {
        "linear_forward": linear_forward,
        "linear_backward": linear_backward,
        "linear_decode": linear_decode if streams else linear_shared,
        "tied_head_forward": tied_head_forward,
        "tied_head_backward": tied_head_backward,
        "tied_head_decode": tied_head_decode if streams else tied_head_shared,
    }
