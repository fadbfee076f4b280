"""Linear layers and the tied head, on the products of `product.py`; narrow ones by plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.product import make_product

_f32 = np.float32
# For up to this many rows, multiplying by wᵀ costs less than turning w first.
FEW = 2


def make_ops() -> dict[str, Callable]:
    """The ops by name, to be compiled."""
    from tapeless.ops.cpu.simd import LANES

    product = make_product()

    @jit
    def multiply(y, x, w, b, n):
        """y = x·w + b, or without b if that is empty."""
        I, O = w.shape
        if O < LANES:
            for t in range(n):
                for o in range(O):
                    y[t, o] = b[o] if b.size else _f32(0)
                for i in range(I):
                    for o in range(O):
                        y[t, o] += x[t, i] * w[i, o]
        elif b.size:
            product(y, O, b, 0, x, I, 1, w, O, 1, n, O, I)
        else:
            product(y, O, 0, 0, x, I, 1, w, O, 1, n, O, I)

    @jit
    def multiply_turned(y, x, w, n):
        """y = x·wᵀ"""
        I, O = w.shape
        if I >= LANES and n > FEW:
            product(y, I, 0, 0, x, O, 1, w, 1, O, n, I, O)
        else:
            for t in range(n):
                for i in range(I):
                    total = _f32(0)
                    for o in range(O):
                        total += x[t, o] * w[i, o]
                    y[t, i] = total

    @jit
    def add_outer(w, x, y, n):
        """w += xᵀ·y"""
        I, O = w.shape
        if O >= LANES:
            product(w, O, w, O, x, 1, I, y, O, 1, I, O, n)
        else:
            for i in range(I):
                for t in range(n):
                    for o in range(O):
                        w[i, o] += x[t, i] * y[t, o]

    def linear_forward(y, x, w, b, n):
        multiply(y, x, w, b, n)

    def linear_backward(dx, dw, db, dy, x, w, n):
        multiply_turned(dx, dy, w, n)
        add_outer(dw, x, dy, n)
        if db.size:
            for t in range(n):
                for o in range(w.shape[1]):
                    db[o] += dy[t, o]

    def tied_head_forward(logits, x, wte, n):
        multiply_turned(logits, x, wte, n)

    def tied_head_backward(dx, dwte, dlogits, x, wte, n):
        multiply(dx, dlogits, wte, wte[0, :0], n)
        add_outer(dwte, dlogits, x, n)

    return {
        "linear_forward": linear_forward,
        "linear_backward": linear_backward,
        "tied_head_forward": tied_head_forward,
        "tied_head_backward": tied_head_backward,
    }
