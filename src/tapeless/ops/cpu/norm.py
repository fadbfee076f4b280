"""RMSNorm and LayerNorm, a row at a time in vectors."""

import numpy as np

from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.share import meet, part
from tapeless.ops.cpu.simd import LANES, first, fma, hsum, load, splat, store

_f32 = np.float32


@jit
def rstd_of(squares, C, eps):
    """In float64, as it is one number for a whole row."""
    return _f32(1 / np.sqrt(np.float64(squares) / C + eps))


def rmsnorm_forward(y, mean, rstd, x, w, b, rows, eps):
    C = x.shape[1]
    for t in range(rows.begin, rows.end):
        squares = splat(0.0)
        for c in range(0, C, LANES):
            v = load(x, t, c)
            squares = fma(v, v, squares)
        r = rstd_of(hsum(squares), C, eps)
        rstd[t] = r
        for c in range(0, C, LANES):
            z = load(x, t, c) * r
            if w.size:
                z = z * load(w, c)
            store(z, y, t, c)


def rmsnorm_backward(dx, dw, db, dy, x, mean, rstd, w, rows):
    C = x.shape[1]
    for t in range(rows.begin, rows.end):
        r = rstd[t]
        products = splat(0.0)
        for c in range(0, C, LANES):
            g = load(dy, t, c)
            if w.size:
                g = g * load(w, c)
            products = fma(g, load(x, t, c), products)
        along = hsum(products) * r * r / _f32(C)
        for c in range(0, C, LANES):
            g, v = load(dy, t, c), load(x, t, c)
            if w.size:
                g = g * load(w, c)
            store(fma(g - v * along, r, load(dx, t, c)), dx, t, c)
    if w.size:
        meet(rows)
        begin, end = part(rows, C)
        for t in range(rows.n):
            for c in range(begin, end, LANES):
                store(fma(load(dy, t, c), load(x, t, c) * rstd[t], load(dw, c)), dw, c)
        meet(rows)


def layernorm_forward(y, mean, rstd, x, w, b, rows, eps):
    C = x.shape[1]
    for t in range(rows.begin, rows.end):
        total = splat(0.0)
        for c in range(0, C, LANES):
            total = total + load(x, t, c)
        m = hsum(total) / _f32(C)
        squares = splat(0.0)
        for c in range(0, C, LANES):
            v = first(C - c, load(x, t, c) - m, 0.0)
            squares = fma(v, v, squares)
        r = rstd_of(hsum(squares), C, eps)
        mean[t] = m
        rstd[t] = r
        for c in range(0, C, LANES):
            z = (load(x, t, c) - m) * r
            if w.size:
                z = z * load(w, c)
            if b.size:
                z = z + load(b, c)
            store(z, y, t, c)


def layernorm_backward(dx, dw, db, dy, x, mean, rstd, w, rows):
    C = x.shape[1]
    for t in range(rows.begin, rows.end):
        r, m = rstd[t], mean[t]
        total, products = splat(0.0), splat(0.0)
        for c in range(0, C, LANES):
            g = load(dy, t, c)
            if w.size:
                g = g * load(w, c)
            total = total + g
            products = fma(g, load(x, t, c) - m, products)
        along_mean = hsum(total) / _f32(C)
        along_x = hsum(products) * r * r / _f32(C)
        for c in range(0, C, LANES):
            g, v = load(dy, t, c), load(x, t, c) - m
            if w.size:
                g = g * load(w, c)
            store(fma(g - along_mean - v * along_x, r, load(dx, t, c)), dx, t, c)
    if w.size or db.size:
        meet(rows)
        begin, end = part(rows, C)
        for t in range(rows.n):
            for c in range(begin, end, LANES):
                g = load(dy, t, c)
                if db.size:
                    store(load(db, c) + g, db, c)
                if w.size:
                    store(fma(g, (load(x, t, c) - mean[t]) * rstd[t], load(dw, c)), dw, c)
        meet(rows)
