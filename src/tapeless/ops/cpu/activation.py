"""ReLU and GELU."""

from tapeless.ops.cpu.simd import LANES, fma, load, maximum, store, tanh, where
from tapeless.ops.reference import GELU_CUBIC, GELU_SCALE


def relu_forward(v, u, rows):
    for t in range(rows.begin, rows.end):
        for f in range(0, u.shape[1], LANES):
            store(maximum(load(u, t, f), 0.0), v, t, f)


def relu_backward(du, dv, u, rows):
    for t in range(rows.begin, rows.end):
        for f in range(0, u.shape[1], LANES):
            store(where(load(u, t, f) > 0.0, load(dv, t, f), 0.0), du, t, f)


def gelu_forward(v, u, rows):
    for t in range(rows.begin, rows.end):
        for f in range(0, u.shape[1], LANES):
            z = load(u, t, f)
            h = tanh(GELU_SCALE * z * fma(z * z, GELU_CUBIC, 1.0))
            half = 0.5 * z
            store(fma(half, h, half), v, t, f)


def gelu_backward(du, dv, u, rows):
    for t in range(rows.begin, rows.end):
        for f in range(0, u.shape[1], LANES):
            z = load(u, t, f)
            h = tanh(GELU_SCALE * z * fma(z * z, GELU_CUBIC, 1.0))
            slope = GELU_SCALE * fma(z * z, 3 * GELU_CUBIC, 1.0)
            half = fma(h, 0.5, 0.5)
            store(load(dv, t, f) * fma(z * half * (1.0 - h), slope, half), du, t, f)
