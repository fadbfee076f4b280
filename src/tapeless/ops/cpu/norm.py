"""RMSNorm and LayerNorm."""

import numpy as np

_f32 = np.float32


def rmsnorm_forward(y, mean, rstd, x, w, b, n, eps):
    C = x.shape[1]
    for t in range(n):
        total = _f32(0)
        for c in range(C):
            total += x[t, c] * x[t, c]
        r = _f32(1) / np.sqrt(total / _f32(C) + _f32(eps))
        rstd[t] = r
        for c in range(C):
            y[t, c] = x[t, c] * r * w[c] if w.size else x[t, c] * r


def rmsnorm_backward(dx, dw, db, dy, x, mean, rstd, w, n):
    C = x.shape[1]
    for t in range(n):
        r = rstd[t]
        along = _f32(0)
        for c in range(C):
            g = dy[t, c] * w[c] if w.size else dy[t, c]
            along += g * x[t, c]
        along *= r * r / _f32(C)
        for c in range(C):
            g = dy[t, c] * w[c] if w.size else dy[t, c]
            dx[t, c] += r * (g - x[t, c] * along)
        if w.size:
            for c in range(C):
                dw[c] += dy[t, c] * x[t, c] * r


def layernorm_forward(y, mean, rstd, x, w, b, n, eps):
    C = x.shape[1]
    for t in range(n):
        m = _f32(0)
        for c in range(C):
            m += x[t, c]
        m /= _f32(C)
        total = _f32(0)
        for c in range(C):
            total += (x[t, c] - m) * (x[t, c] - m)
        r = _f32(1) / np.sqrt(total / _f32(C) + _f32(eps))
        mean[t] = m
        rstd[t] = r
        for c in range(C):
            z = (x[t, c] - m) * r
            if w.size:
                z *= w[c]
            if b.size:
                z += b[c]
            y[t, c] = z


def layernorm_backward(dx, dw, db, dy, x, mean, rstd, w, n):
    C = x.shape[1]
    for t in range(n):
        r, m = rstd[t], mean[t]
        along_mean, along_x = _f32(0), _f32(0)
        for c in range(C):
            g = dy[t, c] * w[c] if w.size else dy[t, c]
            along_mean += g
            along_x += g * (x[t, c] - m)
        along_mean /= _f32(C)
        along_x *= r * r / _f32(C)
        for c in range(C):
            g = dy[t, c] * w[c] if w.size else dy[t, c]
            dx[t, c] += r * (g - along_mean - (x[t, c] - m) * along_x)
        if w.size:
            for c in range(C):
                dw[c] += dy[t, c] * (x[t, c] - m) * r
        if db.size:
            for c in range(C):
                db[c] += dy[t, c]
