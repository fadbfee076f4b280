"""Optimisers over the flat buffers."""

import numpy as np

_f32 = np.float32


def adam(params, grads, m, v, powers, lr, beta1, beta2, eps):
    powers[0] *= beta1
    powers[1] *= beta2
    rate = _f32(lr / (1 - powers[0]))
    inverse = _f32(1 / (1 - powers[1]))
    b1, b2, tiny = _f32(beta1), _f32(beta2), _f32(eps)
    a1, a2 = _f32(1 - beta1), _f32(1 - beta2)
    for i in range(params.shape[0]):
        g = grads[i]
        m[i] = b1 * m[i] + a1 * g
        v[i] = b2 * v[i] + a2 * g * g
        params[i] -= rate * m[i] / (np.sqrt(v[i] * inverse) + tiny)
