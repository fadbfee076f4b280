"""The whole model family once more, forward only, for HIPS autograd to differentiate.

Written from the design's formulas, document by document and head by head, sharing nothing with the
package but the names of the parameters. Slow and plain on purpose.
"""

from __future__ import annotations

import itertools
from typing import Any

import autograd.numpy as np
from autograd import value_and_grad


def norm(kind: str, x: Any, gain: Any, bias: Any, eps: float) -> Any:
    if kind == "layer":
        x = x - np.mean(x, axis=1, keepdims=True)
    x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps)
    if gain is not None:
        x = x * gain
    return x if bias is None else x + bias


def doubly_stochastic(mix: Any, streams: int) -> Any:
    if streams == 2:
        t = 1 / (1 + np.exp(-mix[0]))
        return np.array([[t, 1 - t], [1 - t, t]])
    m = np.exp(mix)
    for _ in range(20):
        m = m / np.sum(m, axis=0, keepdims=True)
        m = m / np.sum(m, axis=1, keepdims=True)
    return m


def attention(qkv: Any, heads: int) -> Any:
    n, width = qkv.shape[0], qkv.shape[1] // 3
    size = width // heads
    out = []
    for h in range(heads):
        q, k, v = (qkv[:, i * width + h * size : i * width + (h + 1) * size] for i in range(3))
        rows = []
        for t in range(n):
            scores = np.dot(k[: t + 1], q[t]) / np.sqrt(size)
            weights = np.exp(scores - np.max(scores))
            rows.append(np.dot(weights / np.sum(weights), v[: t + 1]))
        out.append(np.array(rows))
    return np.concatenate(out, axis=1)


def activate(kind: str, u: Any) -> Any:
    if kind == "relu":
        return np.maximum(u, 0)
    return 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))


def document_logits(p: dict[str, Any], config: Any, tokens: Any) -> Any:
    c, S = config, config.n_streams

    def normed(which: str, here: bool, x: Any, *index: int) -> Any:
        if not here:
            return x
        gain, bias = p.get(f"norm{which}_w"), p.get(f"norm{which}_b")
        if index:
            gain, bias = (None if v is None else v[index] for v in (gain, bias))
        return norm(c.norm, x, gain, bias, c.norm_eps)

    def linear(x: Any, weight: str, bias: str, l: int) -> Any:
        y = np.dot(x, p[weight][l])
        return y + p[bias][l] if bias in p else y

    def around(streams: list[Any], number: int, l: int, sublayer: Any) -> list[Any]:
        if c.residual == "add":
            return [streams[0] + sublayer(streams[0])]
        A = doubly_stochastic(p[f"mix{number}"][l], S)
        mixed = [sum(A[i, j] * streams[j] for j in range(S)) for i in range(S)]
        f = sublayer(sum(p[f"alpha{number}"][l][i] * mixed[i] for i in range(S)))
        return [mixed[i] + p[f"beta{number}"][l][i] * f for i in range(S)]

    x = p["wte"][tokens] + p["wpe"][: len(tokens)]
    x = normed("e", c.norm_embed, x)
    streams = [x] * S
    for l in range(c.n_layer):

        def attend(x: Any, l: int = l) -> Any:
            h = normed("1", c.norm_attn, x, l)
            return linear(attention(linear(h, "wqkv", "bqkv", l), c.n_head), "wo", "bo", l)

        def think(y: Any, l: int = l) -> Any:
            h = normed("2", c.norm_mlp, y, l)
            return linear(activate(c.activation, linear(h, "w1", "b1", l)), "w2", "b2", l)

        streams = around(streams, 1, l, attend)
        streams = around(streams, 2, l, think)
    x = streams[0] if c.residual == "add" else sum(p["contract"][i] * streams[i] for i in range(S))
    x = normed("f", c.norm_final, x)
    return np.dot(x, p["wte"].T if c.tied else p["head"])


def loss(p: dict[str, Any], config: Any, tokens: Any, targets: Any, starts: Any) -> Any:
    total = 0.0
    for first, end in itertools.pairwise(starts):
        logits = document_logits(p, config, tokens[first:end])
        top = np.max(logits, axis=1, keepdims=True)
        logs = logits - top - np.log(np.sum(np.exp(logits - top), axis=1, keepdims=True))
        total = total - np.sum(logs[np.arange(end - first), targets[first:end]])
    return total / len(tokens)


def loss_and_grad(params: Any, config: Any, tokens: Any, targets: Any, starts: Any) -> Any:
    """Loss and a dict of gradients, by automatic differentiation."""
    p = {name: np.array(value) for name, value in params.items()}
    return value_and_grad(lambda q: loss(q, config, tokens, targets, starts))(p)
