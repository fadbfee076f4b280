"""Linear layers and the tied head."""

import numpy as np

_f32 = np.float32


def linear_forward(y, x, w, b, n):
    I, O = w.shape
    for t in range(n):
        for o in range(O):
            y[t, o] = b[o] if b.size else _f32(0)
        for i in range(I):
            for o in range(O):
                y[t, o] += x[t, i] * w[i, o]


def linear_backward(dx, dw, db, dy, x, w, n):
    I, O = w.shape
    for t in range(n):
        for i in range(I):
            total = _f32(0)
            for o in range(O):
                total += dy[t, o] * w[i, o]
            dx[t, i] = total
    for i in range(I):
        for t in range(n):
            for o in range(O):
                dw[i, o] += x[t, i] * dy[t, o]
    if db.size:
        for t in range(n):
            for o in range(O):
                db[o] += dy[t, o]


def tied_head_forward(logits, x, wte, n):
    V, C = wte.shape
    for t in range(n):
        for v in range(V):
            total = _f32(0)
            for c in range(C):
                total += x[t, c] * wte[v, c]
            logits[t, v] = total


def tied_head_backward(dx, dwte, dlogits, x, wte, n):
    V, C = wte.shape
    for t in range(n):
        for c in range(C):
            dx[t, c] = 0
        for v in range(V):
            for c in range(C):
                dx[t, c] += dlogits[t, v] * wte[v, c]
    for v in range(V):
        for t in range(n):
            for c in range(C):
                dwte[v, c] += dlogits[t, v] * x[t, c]
