"""Causal attention inside documents."""

import numpy as np

from tapeless.ops.cpu.elementary import exp

_f32 = np.float32


def attention_forward(out, probs, qkv, starts, sizes):
    H, C = probs.shape[1], out.shape[1]
    K = C // H
    scale = _f32(1) / np.sqrt(_f32(K))
    for s in range(sizes[1]):
        first = starts[s]
        for t in range(first, starts[s + 1]):
            for h in range(H):
                top = _f32(-np.inf)
                for j in range(t - first + 1):
                    score = _f32(0)
                    for c in range(h * K, (h + 1) * K):
                        score += qkv[t, c] * qkv[first + j, C + c]
                    score *= scale
                    probs[t, h, j] = score
                    top = max(top, score)
                total = _f32(0)
                for j in range(t - first + 1):
                    e = exp(probs[t, h, j] - top)
                    probs[t, h, j] = e
                    total += e
                for c in range(h * K, (h + 1) * K):
                    out[t, c] = 0
                inverse = _f32(1) / total
                for j in range(t - first + 1):
                    p = probs[t, h, j] * inverse
                    probs[t, h, j] = p
                    for c in range(h * K, (h + 1) * K):
                        out[t, c] += p * qkv[first + j, 2 * C + c]


def attention_backward(dqkv, row, dout, probs, qkv, starts, sizes):
    H, C = probs.shape[1], dout.shape[1]
    K = C // H
    scale = _f32(1) / np.sqrt(_f32(K))
    for t in range(sizes[0]):
        for c in range(3 * C):
            dqkv[t, c] = 0
    for s in range(sizes[1]):
        first = starts[s]
        for t in range(first, starts[s + 1]):
            for h in range(H):
                along = _f32(0)
                for j in range(t - first + 1):
                    dp = _f32(0)
                    for c in range(h * K, (h + 1) * K):
                        dp += dout[t, c] * qkv[first + j, 2 * C + c]
                    row[j] = dp
                    along += probs[t, h, j] * dp
                for j in range(t - first + 1):
                    p = probs[t, h, j]
                    ds = p * (row[j] - along) * scale
                    for c in range(h * K, (h + 1) * K):
                        dqkv[t, c] += ds * qkv[first + j, C + c]
                        dqkv[first + j, C + c] += ds * qkv[t, c]
                        dqkv[first + j, 2 * C + c] += p * dout[t, c]


def flash_attention_forward(out, lse, row, qkv, starts, sizes, tile):
    H, C = lse.shape[1], out.shape[1]
    K = C // H
    scale = _f32(1) / np.sqrt(_f32(K))
    for s in range(sizes[1]):
        first = starts[s]
        for t in range(first, starts[s + 1]):
            for h in range(H):
                for c in range(h * K, (h + 1) * K):
                    out[t, c] = 0
                top, total = _f32(-np.inf), _f32(0)
                for begin in range(first, t + 1, tile):
                    end = min(begin + tile, t + 1)
                    new_top = top
                    for j in range(begin, end):
                        score = _f32(0)
                        for c in range(h * K, (h + 1) * K):
                            score += qkv[t, c] * qkv[j, C + c]
                        score *= scale
                        row[j - begin] = score
                        new_top = max(new_top, score)
                    shrink = exp(top - new_top)
                    top = new_top
                    total *= shrink
                    for c in range(h * K, (h + 1) * K):
                        out[t, c] *= shrink
                    for j in range(begin, end):
                        e = exp(row[j - begin] - top)
                        total += e
                        for c in range(h * K, (h + 1) * K):
                            out[t, c] += e * qkv[j, 2 * C + c]
                inverse = _f32(1) / total
                for c in range(h * K, (h + 1) * K):
                    out[t, c] *= inverse
                lse[t, h] = top + np.log(total)


def flash_attention_backward(dqkv, dout, out, lse, qkv, starts, sizes, tile):
    H, C = lse.shape[1], dout.shape[1]
    K = C // H
    scale = _f32(1) / np.sqrt(_f32(K))
    for t in range(sizes[0]):
        for c in range(3 * C):
            dqkv[t, c] = 0
    for s in range(sizes[1]):
        first = starts[s]
        for t in range(first, starts[s + 1]):
            for h in range(H):
                along = _f32(0)
                for c in range(h * K, (h + 1) * K):
                    along += dout[t, c] * out[t, c]
                for j in range(first, t + 1):
                    score, dp = _f32(0), _f32(0)
                    for c in range(h * K, (h + 1) * K):
                        score += qkv[t, c] * qkv[j, C + c]
                        dp += dout[t, c] * qkv[j, 2 * C + c]
                    p = exp(score * scale - lse[t, h])
                    # With one key the softmax is constant; dp and along may round differently.
                    ds = p * (dp - along) * scale if t > first else _f32(0)
                    for c in range(h * K, (h + 1) * K):
                        dqkv[t, c] += ds * qkv[j, C + c]
                        dqkv[j, C + c] += ds * qkv[t, c]
                        dqkv[j, 2 * C + c] += p * dout[t, c]


def attention_decode(out, cache, qkv, positions):
    H, K = cache.shape[2], cache.shape[3]
    C = H * K
    scale = _f32(1) / np.sqrt(_f32(K))
    last = positions[0]
    for h in range(H):
        for c in range(K):
            cache[last, 0, h, c] = qkv[0, C + h * K + c]
            cache[last, 1, h, c] = qkv[0, 2 * C + h * K + c]
            out[0, h * K + c] = 0
        # Running maximum and sum (FlashAttention's): one pass and nothing to keep.
        top, total = _f32(-np.inf), _f32(0)
        for j in range(last + 1):
            score = _f32(0)
            for c in range(K):
                score += qkv[0, h * K + c] * cache[j, 0, h, c]
            score *= scale
            new_top = max(top, score)
            shrink, e = exp(top - new_top), exp(score - new_top)
            total = total * shrink + e
            for c in range(K):
                out[0, h * K + c] = out[0, h * K + c] * shrink + e * cache[j, 1, h, c]
            top = new_top
        for c in range(K):
            out[0, h * K + c] /= total
