"""Optimisers over the flat buffers."""

import numpy as np

_f32 = np.float32


def global_norm(grads):
    total = 0.0
    for i in range(grads.shape[0]):
        total += np.float64(grads[i]) * np.float64(grads[i])
    return np.sqrt(total)


def round_weights(rounded, params):
    """bfloat16, the upper half of a float32: the nearest, of two as near the even one; NaN stays NaN."""
    bits = params.view(np.uint32)
    for i in range(params.shape[0]):
        word = bits[i]
        nearest = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (word >> np.uint32(16)) | np.uint32(0x40)
        rounded[i] = np.uint16(nearest if (word & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000) else quiet)


def sgd(params, grads, m, lr, momentum, scale):
    rate, keep, factor = _f32(lr), _f32(momentum), _f32(scale)
    if m.size:
        for i in range(params.shape[0]):
            m[i] = keep * m[i] + factor * grads[i]
            params[i] -= rate * m[i]
    else:
        for i in range(params.shape[0]):
            params[i] -= rate * (factor * grads[i])


def adamw(params, grads, m, v, powers, segments, lr, beta1, beta2, eps, weight_decay, scale):
    powers[0] *= beta1
    powers[1] *= beta2
    # √(v/(1 − β₂ᵗ)) + ε is (√v + ε·√(1 − β₂ᵗ))/√(1 − β₂ᵗ): all but √v is the same for every element.
    root = np.sqrt(1 - powers[1])
    rate, tiny = _f32(lr / (1 - powers[0]) * root), _f32(eps * root)
    b1, b2, factor = _f32(beta1), _f32(beta2), _f32(scale)
    a1, a2 = _f32(1 - beta1), _f32(1 - beta2)
    for s in range(segments.shape[0]):
        first, end = segments[s, 0], segments[s, 1]
        shrink = _f32(1 - lr * weight_decay * segments[s, 2])
        # Slices start at 0, so no index can be negative, which the vectoriser could not know.
        P, G, M, V = params[first:end], grads[first:end], m[first:end], v[first:end]
        for i in range(end - first):
            g = factor * G[i]
            M[i] = b1 * M[i] + a1 * g
            V[i] = b2 * V[i] + a2 * g * g
            P[i] = shrink * P[i] - rate * M[i] / (np.sqrt(V[i]) + tiny)
