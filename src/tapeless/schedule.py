"""The forward pass and the backward pass of every model, written once.

`make_schedule` closes plain functions over a config's constants and an engine's ops. They call ops
on views of preallocated buffers and allocate nothing, so the same source runs as it stands under
NumPy (`ops.reference`), and compiled to native code (`ops.cpu`). Branches on the config's constants
are decided before anything runs.

    p  parameters              g  their gradients (backward adds to them)
    a  activations             d  gradients of activations
    batch  tokens, targets, positions, weights, starts and sizes = (n tokens, n documents)
    rows, docs   of the batch, that the op works on: all, or for threads that share a step, each its own

Read `forward` from top to bottom, then `backward` from its head line down: it is `forward` in
reverse, line by line. `d.x` is the running gradient of the residual stream: at the top of each
layer's block it is the gradient of that layer's output, at the bottom that of its input. With
hyper-connections ("mhc") the residual is S streams instead of one; a sublayer reads a mixture of
them (`in1`, `in2`) and what it returns (`f1`, `f2`) goes out to all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tapeless.config import GPTConfig


class Schedule(NamedTuple):
    """The passes of one model over one engine's ops."""

    forward: Callable[..., Any]  # (p, a, batch) -> loss, and everything in a
    # (p, c, batch): a document's next tokens, their keys and values cached in c; of a single one, its logits
    decode: Callable[..., Any]
    backward: Callable[..., Any]  # (p, g, a, d, batch): adds to g


def make_schedule(config: GPTConfig, ops: Any, wrap: Callable[..., Any] = lambda f: f) -> Schedule:
    """The passes over an engine's ops; `wrap` makes a function one that compiled ones may call."""
    layer = wrap(make_layer(config, ops))
    brief = config.replace(recompute=True)
    decode_layer = wrap(make_layer(brief, ops, decoding=True))
    return Schedule(
        forward=wrap(make_forward(config, ops, layer)),
        decode=wrap(make_forward(brief, ops, decode_layer, decoding=True)),
        backward=wrap(make_backward(config, ops, layer)),
    )


def make_layer(config: GPTConfig, ops: Any, decoding: bool = False) -> Callable[..., Any]:
    """A layer's forward pass up to what its last product reads, `a.v`, from its input `a.x[l]`: all that
    its backward pass needs. With `recompute` only the present layer's is kept, always in the same place."""
    keep, eps, tile = not config.recompute, config.norm_eps, config.attention_tile
    norm_attn, norm_mlp = config.norm_attn, config.norm_mlp
    mhc, flash = config.residual == "mhc", config.attention == "flash"

    linear_forward, add_forward = ops.linear_forward, ops.add_forward
    norm_forward = ops.layernorm_forward if config.norm == "layer" else ops.rmsnorm_forward
    activation_forward = ops.gelu_forward if config.activation == "gelu" else ops.relu_forward
    attention_forward = ops.flash_attention_forward if flash else ops.attention_forward
    attention_decode = ops.attention_decode
    matrix_forward = ops.sigmoid_matrix_forward if config.n_streams == 2 else ops.sinkhorn_forward
    mhc_mix_forward, mhc_distribute_forward = ops.mhc_mix_forward, ops.mhc_distribute_forward

    def layer(p, a, batch, rows, docs, l):
        k = l if keep else 0
        # y = x + wo · attention(wqkv · norm(x))
        if mhc:
            matrix_forward(a.A1[k], a.sinkhorn1[k], p.mix1[l])
            mhc_mix_forward(a.y[k], a.in1[k], a.x[l], a.A1[k], p.alpha1[l], rows)
        x = a.in1[k] if mhc else a.x[l]
        if norm_attn:
            norm_forward(a.h1[k], a.mean1[k], a.rstd1[k], x, p.norm1_w[l], p.norm1_b[l], rows, eps)
        h1 = a.h1[k] if norm_attn else x
        linear_forward(a.qkv[k], h1, p.wqkv[l], p.bqkv[l], rows)
        if decoding:
            attention_decode(a.att[k], a.cache[l], a.scratch, a.qkv[k], batch.positions, rows)
        elif flash:
            attention_forward(a.att[k], a.lse[k], a.scratch, a.qkv[k], docs, tile)
        else:
            attention_forward(a.att[k], a.probs[k], a.qkv[k], docs)
        f1 = a.f1[k] if mhc else a.f
        linear_forward(f1, a.att[k], p.wo[l], p.bo[l], rows)
        if mhc:
            mhc_distribute_forward(a.y[k], f1, p.beta1[l], rows)
        else:
            add_forward(a.y[k], x, f1, rows)

        # x' = y + w2 · activation(w1 · norm(y))
        if mhc:
            matrix_forward(a.A2[k], a.sinkhorn2[k], p.mix2[l])
            mhc_mix_forward(a.x[l + 1], a.in2[k], a.y[k], a.A2[k], p.alpha2[l], rows)
        y = a.in2[k] if mhc else a.y[k]
        if norm_mlp:
            norm_forward(a.h2[k], a.mean2[k], a.rstd2[k], y, p.norm2_w[l], p.norm2_b[l], rows, eps)
        h2 = a.h2[k] if norm_mlp else y
        linear_forward(a.u[k], h2, p.w1[l], p.b1[l], rows)
        activation_forward(a.v[k], a.u[k], rows)

    return layer


def make_forward(config: GPTConfig, ops: Any, layer: Callable, decoding: bool = False) -> Callable[..., Any]:
    """The forward pass. With `decoding` the batch is the next tokens of one document, the ones before
    them being keys and values in `a.cache`; there is no loss, and logits only of a single token."""
    n_layer, tied, eps, keep = config.n_layer, config.tied, config.norm_eps, not config.recompute
    norm_embed, norm_final, mhc = config.norm_embed, config.norm_final, config.residual == "mhc"

    rows_of, documents_of = ops.rows, ops.documents
    embed_forward, linear_forward, add_forward = ops.embed_forward, ops.linear_forward, ops.add_forward
    norm_forward = ops.layernorm_forward if config.norm == "layer" else ops.rmsnorm_forward
    tied_head_forward, cross_entropy_forward = ops.tied_head_forward, ops.cross_entropy_forward
    mhc_expand_forward, mhc_contract_forward = ops.mhc_expand_forward, ops.mhc_contract_forward
    mhc_distribute_forward = ops.mhc_distribute_forward

    def forward(p, a, batch):
        rows, docs = rows_of(batch), documents_of(batch)
        emb = a.emb if norm_embed or mhc else a.x[0]
        embed_forward(emb, p.wte, p.wpe, batch.tokens, batch.positions, rows)
        if norm_embed:
            he = a.he if mhc else a.x[0]
            norm_forward(he, a.meane, a.rstde, emb, p.norme_w, p.norme_b, rows, eps)
        if mhc:
            mhc_expand_forward(a.x[0], a.he if norm_embed else a.emb, rows)

        for l in range(n_layer):
            layer(p, a, batch, rows, docs, l)
            k = l if keep else 0
            f2 = a.f2[l] if mhc else a.f
            linear_forward(f2, a.v[k], p.w2[l], p.b2[l], rows)
            if mhc:
                mhc_distribute_forward(a.x[l + 1], f2, p.beta2[l], rows)
            else:
                add_forward(a.x[l + 1], a.y[k], f2, rows)

        if decoding and batch.sizes[0] > 1:
            return 0.0
        if mhc:
            mhc_contract_forward(a.out, a.x[n_layer], p.contract, rows)
        out = a.out if mhc else a.x[n_layer]
        if norm_final:
            norm_forward(a.hf, a.meanf, a.rstdf, out, p.normf_w, p.normf_b, rows, eps)
        hf = a.hf if norm_final else out
        if tied:
            tied_head_forward(a.logits, hf, p.wte, rows)
        else:
            linear_forward(a.logits, hf, p.head, p.head[0, :0], rows)
        if decoding:
            return 0.0
        return cross_entropy_forward(a.loss, a.logits_stats, a.logits, batch.targets, batch.weights, rows)

    return forward


def make_backward(config: GPTConfig, ops: Any, layer: Callable) -> Callable[..., Any]:
    """The backward pass: `forward` in reverse. Adds to `g`; overwrites `d`."""
    n_layer, tied, tile = config.n_layer, config.tied, config.attention_tile
    norm_embed, norm_attn = config.norm_embed, config.norm_attn
    norm_mlp, norm_final = config.norm_mlp, config.norm_final
    mhc, flash, keep = config.residual == "mhc", config.attention == "flash", not config.recompute

    rows_of, documents_of = ops.rows, ops.documents
    embed_backward, linear_backward = ops.embed_backward, ops.linear_backward
    zero, accumulate = ops.zero, ops.accumulate
    norm_backward = ops.layernorm_backward if config.norm == "layer" else ops.rmsnorm_backward
    activation_backward = ops.gelu_backward if config.activation == "gelu" else ops.relu_backward
    attention_backward = ops.flash_attention_backward if flash else ops.attention_backward
    tied_head_backward, cross_entropy_backward = ops.tied_head_backward, ops.cross_entropy_backward
    matrix_backward = ops.sigmoid_matrix_backward if config.n_streams == 2 else ops.sinkhorn_backward
    mhc_expand_backward, mhc_mix_backward = ops.mhc_expand_backward, ops.mhc_mix_backward
    mhc_distribute_backward, mhc_contract_backward = ops.mhc_distribute_backward, ops.mhc_contract_backward

    def backward(p, g, a, d, batch):
        rows, docs = rows_of(batch), documents_of(batch)
        cross_entropy_backward(d.logits, a.logits, a.logits_stats, batch.targets, batch.weights, rows)
        out, dout = a.out if mhc else a.x[n_layer], d.out if mhc else d.x
        hf, dhf = a.hf if norm_final else out, d.h if norm_final else dout
        if tied:
            tied_head_backward(dhf, g.wte, d.logits, hf, p.wte, rows)
        else:
            linear_backward(dhf, g.head, g.head[0, :0], d.logits, hf, p.head, rows)
        if norm_final:
            zero(dout, rows)
            norm_backward(dout, g.normf_w, g.normf_b, d.h, out, a.meanf, a.rstdf, p.normf_w, rows)
        if mhc:
            mhc_contract_backward(d.x, g.contract, d.sums, d.out, a.x[n_layer], p.contract, rows)

        for l in range(n_layer - 1, -1, -1):
            if not keep:
                layer(p, a, batch, rows, docs, l)
            k = l if keep else 0
            # x' = y + w2 · activation(w1 · norm(y)):  the sum passes d.x on to both its terms
            y, dy = a.in2[k] if mhc else a.y[k], d.inp if mhc else d.x
            if mhc:
                mhc_distribute_backward(d.f, g.beta2[l], d.sums, d.x, a.f2[l], p.beta2[l], rows)
                zero(d.inp, rows)
            df = d.f if mhc else d.x
            h2 = a.h2[k] if norm_mlp else y
            linear_backward(d.v, g.w2[l], g.b2[l], df, a.v[k], p.w2[l], rows)
            activation_backward(d.u, d.v, a.u[k], rows)
            linear_backward(d.h, g.w1[l], g.b1[l], d.u, h2, p.w1[l], rows)
            if norm_mlp:
                mean, rstd = a.mean2[k], a.rstd2[k]
                norm_backward(dy, g.norm2_w[l], g.norm2_b[l], d.h, y, mean, rstd, p.norm2_w[l], rows)
            else:
                accumulate(dy, d.h, rows)
            if mhc:
                mhc_mix_backward(d.x, d.A, g.alpha2[l], d.sums, d.inp, a.y[k], a.A2[k], p.alpha2[l], rows)
                matrix_backward(g.mix2[l], d.A, a.A2[k], a.sinkhorn2[k], rows)

            # y = x + wo · attention(wqkv · norm(x))
            x, dx = a.in1[k] if mhc else a.x[l], d.inp if mhc else d.x
            if mhc:
                mhc_distribute_backward(d.f, g.beta1[l], d.sums, d.x, a.f1[k], p.beta1[l], rows)
                zero(d.inp, rows)
            df = d.f if mhc else d.x
            h1 = a.h1[k] if norm_attn else x
            linear_backward(d.att, g.wo[l], g.bo[l], df, a.att[k], p.wo[l], rows)
            if flash:
                attention_backward(d.qkv, d.scratch, d.att, a.att[k], a.lse[k], a.qkv[k], docs, tile)
            else:
                attention_backward(d.qkv, d.att, a.probs[k], a.qkv[k], docs)
            linear_backward(d.h, g.wqkv[l], g.bqkv[l], d.qkv, h1, p.wqkv[l], rows)
            if norm_attn:
                mean, rstd = a.mean1[k], a.rstd1[k]
                norm_backward(dx, g.norm1_w[l], g.norm1_b[l], d.h, x, mean, rstd, p.norm1_w[l], rows)
            else:
                accumulate(dx, d.h, rows)
            if mhc:
                mhc_mix_backward(d.x, d.A, g.alpha1[l], d.sums, d.inp, a.x[l], a.A1[k], p.alpha1[l], rows)
                matrix_backward(g.mix1[l], d.A, a.A1[k], a.sinkhorn1[k], rows)

        if mhc:
            mhc_expand_backward(d.he if norm_embed else d.emb, d.x, rows)
        if norm_embed:
            dhe = d.he if mhc else d.x
            zero(d.emb, rows)
            norm_backward(d.emb, g.norme_w, g.norme_b, dhe, a.emb, a.meane, a.rstde, p.norme_w, rows)
        demb = d.emb if norm_embed or mhc else d.x
        embed_backward(g.wte, g.wpe, demb, batch.tokens, batch.positions, rows)

    return backward
