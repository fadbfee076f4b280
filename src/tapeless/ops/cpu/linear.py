"""Linear layers and the tied head, on the products of `product.py`; narrow ones by plain loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapeless.ops.cpu.product import make_products

_f32 = np.float32
# Turning a large matrix costs about as much as multiplying this many rows by it.
FEW = 4


def make_ops() -> dict[str, Callable]:
    """The ops by name, to be compiled."""
    from tapeless.ops.cpu.simd import LANES

    product, transpose = make_products()

    def linear_forward(y, x, w, b, n):
        I, O = w.shape
        if O >= LANES:
            if b.size:
                for t in range(n):
                    for o in range(O):
                        y[t, o] = b[o]
            product(y, O, x, w, O, n, O, I, I, 1, 1 if b.size else 0)
        else:
            for t in range(n):
                for o in range(O):
                    y[t, o] = b[o] if b.size else _f32(0)
                for i in range(I):
                    for o in range(O):
                        y[t, o] += x[t, i] * w[i, o]

    def linear_backward(dx, dw, db, turned, dy, x, w, n):
        I, O = w.shape
        if I >= LANES:
            transpose(turned, w, I, O)
            product(dx, I, dy, turned, I, n, I, O, O, 1, 0)
        else:
            for t in range(n):
                for i in range(I):
                    total = _f32(0)
                    for o in range(O):
                        total += dy[t, o] * w[i, o]
                    dx[t, i] = total
        if O >= LANES:
            product(dw, O, x, dy, O, I, O, n, 1, I, 1)
        else:
            for i in range(I):
                for t in range(n):
                    for o in range(O):
                        dw[i, o] += x[t, i] * dy[t, o]
        if db.size:
            for t in range(n):
                for o in range(O):
                    db[o] += dy[t, o]

    def tied_head_forward(logits, turned, x, wte, n):
        V, C = wte.shape
        if V >= LANES and n > FEW:
            transpose(turned, wte, V, C)
            product(logits, V, x, turned, V, n, V, C, C, 1, 0)
        else:
            for t in range(n):
                for v in range(V):
                    total = _f32(0)
                    for c in range(C):
                        total += x[t, c] * wte[v, c]
                    logits[t, v] = total

    def tied_head_backward(dx, dwte, dlogits, x, wte, n):
        V, C = wte.shape
        if C >= LANES:
            product(dx, C, dlogits, wte, C, n, C, V, V, 1, 0)
            product(dwte, C, dlogits, x, C, V, C, n, 1, V, 1)
        else:
            for t in range(n):
                for c in range(C):
                    dx[t, c] = 0
                for v in range(V):
                    for c in range(C):
                        dx[t, c] += dlogits[t, v] * wte[v, c]
                        dwte[v, c] += dlogits[t, v] * x[t, c]

    return {
        "linear_forward": linear_forward,
        "linear_backward": linear_backward,
        "tied_head_forward": tied_head_forward,
        "tied_head_backward": tied_head_backward,
    }
