"""Linear layers and the tied head, on the products of `product.py`; narrow ones by plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.product import make_products

_f32 = np.float32
# Turning a large matrix costs about as much as multiplying this many rows by it.
FEW = 4


def make_ops() -> dict[str, Callable]:
    """The ops by name, to be compiled."""
    from tapeless.ops.cpu.simd import LANES

    product, transpose = make_products()

    @jit
    def multiply(y, x, w, n, add):
        """y = x·w, or y += x·w."""
        I, O = w.shape
        if O >= LANES:
            product(y, O, x, w, O, n, O, I, I, 1, add)
        else:
            for t in range(n):
                for o in range(O):
                    y[t, o] = y[t, o] if add else _f32(0)
                for i in range(I):
                    for o in range(O):
                        y[t, o] += x[t, i] * w[i, o]

    @jit
    def multiply_turned(y, turned, x, w, n):
        """y = x·wᵀ"""
        I, O = w.shape
        if I >= LANES and n > FEW:
            transpose(turned, w, I, O)
            product(y, I, x, turned, I, n, I, O, O, 1, 0)
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
            product(w, O, x, y, O, I, O, n, 1, I, 1)
        else:
            for i in range(I):
                for t in range(n):
                    for o in range(O):
                        w[i, o] += x[t, i] * y[t, o]

    def linear_forward(y, x, w, b, n):
        if b.size:
            for t in range(n):
                for o in range(w.shape[1]):
                    y[t, o] = b[o]
        multiply(y, x, w, n, 1 if b.size else 0)

    def linear_backward(dx, dw, db, turned, dy, x, w, n):
        multiply_turned(dx, turned, dy, w, n)
        add_outer(dw, x, dy, n)
        if db.size:
            for t in range(n):
                for o in range(w.shape[1]):
                    db[o] += dy[t, o]

    def tied_head_forward(logits, turned, x, wte, n):
        multiply_turned(logits, turned, x, wte, n)

    def tied_head_backward(dx, dwte, dlogits, x, wte, n):
        multiply(dx, dlogits, wte, n, 0)
        add_outer(dwte, dlogits, x, n)

    return {
        "linear_forward": linear_forward,
        "linear_backward": linear_backward,
        "tied_head_forward": tied_head_forward,
        "tied_head_backward": tied_head_backward,
    }
