"""ReLU and GELU."""

import numpy as np

from tapeless.ops.cpu.elementary import tanh
from tapeless.ops.reference import GELU_CUBIC, GELU_SCALE

_f32 = np.float32
_SCALE, _CUBIC = _f32(GELU_SCALE), _f32(GELU_CUBIC)


def relu_forward(v, u, n):
    for t in range(n):
        for f in range(u.shape[1]):
            v[t, f] = u[t, f] if u[t, f] > 0 else _f32(0)


def relu_backward(du, dv, u, n):
    for t in range(n):
        for f in range(u.shape[1]):
            du[t, f] = dv[t, f] if u[t, f] > 0 else _f32(0)


def gelu_forward(v, u, n):
    for t in range(n):
        for f in range(u.shape[1]):
            z = u[t, f]
            v[t, f] = _f32(0.5) * z * (_f32(1) + tanh(_SCALE * (z + _CUBIC * z * z * z)))


def gelu_backward(du, dv, u, n):
    for t in range(n):
        for f in range(u.shape[1]):
            z = u[t, f]
            h = tanh(_SCALE * (z + _CUBIC * z * z * z))
            slope = _SCALE * (_f32(1) + _f32(3) * _CUBIC * z * z)
            left = _f32(0.5) * (_f32(1) + h)
            right = _f32(0.5) * z * (_f32(1) - h * h) * slope
            du[t, f] = dv[t, f] * (left + right)
