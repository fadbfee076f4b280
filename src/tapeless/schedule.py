"""The forward pass and the backward pass of every model, written once.

`make_schedule` closes two plain functions over a config's constants and an engine's ops. They call
ops on views of preallocated buffers and allocate nothing, so the same source runs as it stands
under NumPy (`ops.reference`), and compiled to native code (`ops.cpu`). Branches on the config's
constants are decided before anything runs.

    p  parameters              g  their gradients (backward adds to them)
    a  activations             d  gradients of activations
    batch  tokens, targets, positions, weights, starts and sizes = (n tokens, n documents)

Read `forward` from top to bottom, then `backward` from its head line down: it is `forward` in
reverse, line by line. `d.x` is the running gradient of the residual stream: at the top of each
layer's block it is the gradient of that layer's output, at the bottom that of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tapeless.config import GPTConfig


class Schedule(NamedTuple):
    """The passes of one model over one engine's ops."""

    forward: Callable[..., Any]  # (p, a, batch) -> loss, and everything in a
    decode: Callable[..., Any]  # (p, c, batch): logits of one position, from cached keys and values
    backward: Callable[..., Any]  # (p, g, a, d, batch): adds to g


def make_schedule(config: GPTConfig, ops: Any) -> Schedule:
    return Schedule(
        forward=make_forward(config, ops),
        decode=make_forward(config, ops, decoding=True),
        backward=make_backward(config, ops),
    )


def make_forward(config: GPTConfig, ops: Any, decoding: bool = False) -> Callable[..., Any]:
    """The forward pass. With `decoding` the batch is one token at one position: attention reads the
    keys and values cached in `a.cache`, and there is no loss."""
    n_layer, tied = config.n_layer, config.tied
    norm_embed, norm_attn = config.norm_embed, config.norm_attn
    norm_mlp, norm_final, eps = config.norm_mlp, config.norm_final, config.norm_eps

    embed_forward, linear_forward, add_forward = ops.embed_forward, ops.linear_forward, ops.add_forward
    norm_forward = ops.layernorm_forward if config.norm == "layer" else ops.rmsnorm_forward
    activation_forward = ops.gelu_forward if config.activation == "gelu" else ops.relu_forward
    attention_forward, attention_decode = ops.attention_forward, ops.attention_decode
    tied_head_forward, cross_entropy_forward = ops.tied_head_forward, ops.cross_entropy_forward

    def forward(p, a, batch):
        n = batch.sizes[0]
        if norm_embed:
            embed_forward(a.emb, p.wte, p.wpe, batch.tokens, batch.positions, n)
            norm_forward(a.x[0], a.meane, a.rstde, a.emb, p.norme_w, p.norme_b, n, eps)
        else:
            embed_forward(a.x[0], p.wte, p.wpe, batch.tokens, batch.positions, n)

        for l in range(n_layer):
            # y = x + wo · attention(wqkv · norm(x))
            if norm_attn:
                norm_forward(a.h1[l], a.mean1[l], a.rstd1[l], a.x[l], p.norm1_w[l], p.norm1_b[l], n, eps)
            h1 = a.h1[l] if norm_attn else a.x[l]
            linear_forward(a.qkv[l], h1, p.wqkv[l], p.bqkv[l], n)
            if decoding:
                attention_decode(a.att[l], a.cache[l], a.qkv[l], batch.positions)
            else:
                attention_forward(a.att[l], a.probs[l], a.qkv[l], batch.starts, batch.sizes)
            linear_forward(a.f, a.att[l], p.wo[l], p.bo[l], n)
            add_forward(a.y[l], a.x[l], a.f, n)

            # x' = y + w2 · activation(w1 · norm(y))
            if norm_mlp:
                norm_forward(a.h2[l], a.mean2[l], a.rstd2[l], a.y[l], p.norm2_w[l], p.norm2_b[l], n, eps)
            h2 = a.h2[l] if norm_mlp else a.y[l]
            linear_forward(a.u[l], h2, p.w1[l], p.b1[l], n)
            activation_forward(a.v[l], a.u[l], n)
            linear_forward(a.f, a.v[l], p.w2[l], p.b2[l], n)
            add_forward(a.x[l + 1], a.y[l], a.f, n)

        if norm_final:
            norm_forward(a.hf, a.meanf, a.rstdf, a.x[n_layer], p.normf_w, p.normf_b, n, eps)
        hf = a.hf if norm_final else a.x[n_layer]
        if tied:
            tied_head_forward(a.logits, hf, p.wte, n)
        else:
            linear_forward(a.logits, hf, p.head, p.head[0, :0], n)
        if decoding:
            return 0.0
        return cross_entropy_forward(a.loss, a.lse, a.logits, batch.targets, batch.weights, n)

    return forward


def make_backward(config: GPTConfig, ops: Any) -> Callable[..., Any]:
    """The backward pass: `forward` in reverse. Adds to `g`; overwrites `d`."""
    n_layer, tied = config.n_layer, config.tied
    norm_embed, norm_attn = config.norm_embed, config.norm_attn
    norm_mlp, norm_final = config.norm_mlp, config.norm_final

    embed_backward, linear_backward, accumulate = ops.embed_backward, ops.linear_backward, ops.accumulate
    norm_backward = ops.layernorm_backward if config.norm == "layer" else ops.rmsnorm_backward
    activation_backward = ops.gelu_backward if config.activation == "gelu" else ops.relu_backward
    attention_backward, zero = ops.attention_backward, ops.zero
    tied_head_backward, cross_entropy_backward = ops.tied_head_backward, ops.cross_entropy_backward

    def backward(p, g, a, d, batch):
        n = batch.sizes[0]
        cross_entropy_backward(d.logits, a.logits, a.lse, batch.targets, batch.weights, n)
        dhf = d.h if norm_final else d.x
        hf = a.hf if norm_final else a.x[n_layer]
        if tied:
            tied_head_backward(dhf, g.wte, d.logits, hf, p.wte, n)
        else:
            linear_backward(dhf, g.head, g.head[0, :0], d.logits, hf, p.head, n)
        if norm_final:
            zero(d.x, n)
            norm_backward(d.x, g.normf_w, g.normf_b, d.h, a.x[n_layer], a.meanf, a.rstdf, p.normf_w, n)

        for l in range(n_layer - 1, -1, -1):
            # x' = y + w2 · activation(w1 · norm(y)):  the sum passes d.x on to both its terms
            h2 = a.h2[l] if norm_mlp else a.y[l]
            linear_backward(d.v, g.w2[l], g.b2[l], d.x, a.v[l], p.w2[l], n)
            activation_backward(d.u, d.v, a.u[l], n)
            linear_backward(d.h, g.w1[l], g.b1[l], d.u, h2, p.w1[l], n)
            if norm_mlp:
                norm_backward(
                    d.x, g.norm2_w[l], g.norm2_b[l], d.h, a.y[l], a.mean2[l], a.rstd2[l], p.norm2_w[l], n
                )
            else:
                accumulate(d.x, d.h, n)

            # y = x + wo · attention(wqkv · norm(x))
            h1 = a.h1[l] if norm_attn else a.x[l]
            linear_backward(d.att, g.wo[l], g.bo[l], d.x, a.att[l], p.wo[l], n)
            attention_backward(d.qkv, d.row, d.att, a.probs[l], a.qkv[l], batch.starts, batch.sizes)
            linear_backward(d.h, g.wqkv[l], g.bqkv[l], d.qkv, h1, p.wqkv[l], n)
            if norm_attn:
                norm_backward(
                    d.x, g.norm1_w[l], g.norm1_b[l], d.h, a.x[l], a.mean1[l], a.rstd1[l], p.norm1_w[l], n
                )
            else:
                accumulate(d.x, d.h, n)

        if norm_embed:
            zero(d.emb, n)
            norm_backward(d.emb, g.norme_w, g.norme_b, d.x, a.emb, a.meane, a.rstde, p.norme_w, n)
            embed_backward(g.wte, g.wpe, d.emb, batch.tokens, batch.positions, n)
        else:
            embed_backward(g.wte, g.wpe, d.x, batch.tokens, batch.positions, n)

    return backward
