"""Causal attention inside documents, in the flash form: only the log-sum-exp of each query is kept.

Two ways of doing the same. Short documents go query by query with all heads of a row in a vector:
a query row times a key row, summed within groups of head_dim lanes, puts each head's score into all
lanes of that head, so that one exp and one multiply-add serve every head. Long ones, and head sizes
that do not fill a vector evenly, go head by head in matrix products of a tile of queries with the
keys before them. Only one of the two is compiled for a model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapeless.layout import ATTENTION_QUERIES, attention_keys
from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.product import make_product
from tapeless.ops.cpu.share import meet
from tapeless.ops.cpu.simd import (
    LANES,
    collect,
    exp,
    first,
    fma,
    group_sum,
    hmax,
    hsum,
    load,
    log,
    matrix,
    maximum,
    splat,
    spread,
    store,
    transpose_rows,
)

_f32 = np.float32
_LOWEST = -np.inf
# Up to this block size, products are too small to pay for the packing they need.
SHORT = 24


def make_ops(head_dim: int, block_size: int) -> dict[str, Callable]:
    """The ops by name, to be compiled."""
    whole_groups = LANES % head_dim == 0 or head_dim % LANES == 0
    make = _by_rows if whole_groups and block_size <= SHORT else _by_tiles
    forward, backward = make(head_dim, block_size)
    return {
        "flash_attention_forward": forward,
        "flash_attention_backward": backward,
        "attention_decode": _decode(head_dim) if whole_groups else attention_decode,
    }


@jit
def meet_if_split(docs):
    """Attention reads, and leaves, rows of other threads where those threads have parts of its documents.
    (Before its backward pass stands a product that ends with a barrier.)"""
    if docs.split:
        meet(docs.rows)


@jit
def meet_if_many(rows):
    """The same while decoding, where each thread has some heads of all rows. (Of a single one, the products
    before and after see to it.)"""
    if rows.n > 1:
        meet(rows)


# ---------------------------------------------------------------- a query at a time, all heads at once


def _by_rows(K: int, T: int) -> tuple[Callable, Callable]:
    # Lanes that belong together: the vectors of a head, or the heads in a vector; and a head's in one vector.
    width, group = max(K, LANES), min(K, LANES)
    heads, scale = width // K, _f32(K**-0.5)
    attend = _make_attend(K)

    def flash_attention_forward(out, lse, scratch, qkv, docs, tile):
        meet_if_split(docs)
        (N, C), H, own = out.shape, lse.shape[1], scratch[docs.rows.me]
        keys, values = matrix(qkv, C, N, C, 3 * C), matrix(qkv, 2 * C, N, C, 3 * C)
        for s in range(docs.begin, docs.end):
            start = docs.starts[s]
            for t in range(start, docs.starts[s + 1]):
                for b in range(0, C, width):
                    whole = attend(out, own, qkv, keys, values, t, b, start, t - start + 1)
                    here = min(heads, H - b // K)
                    store(collect(whole, group), matrix(lse, t * H + b // K, 1, here, H), 0, 0)
        meet_if_split(docs)

    def flash_attention_backward(dqkv, scratch, dout, out, lse, qkv, docs, tile):
        (N, C), H = out.shape, lse.shape[1]
        queries, dqueries = matrix(qkv, 0, N, C, 3 * C), matrix(dqkv, 0, N, C, 3 * C)
        keys, values = matrix(qkv, C, N, C, 3 * C), matrix(qkv, 2 * C, N, C, 3 * C)
        dkeys, dvalues = matrix(dqkv, C, N, C, 3 * C), matrix(dqkv, 2 * C, N, C, 3 * C)
        for t in range(docs.starts[docs.begin], docs.starts[docs.end]):
            for c in range(0, 3 * C, LANES):
                store(0.0, dqkv, t, c)
        for s in range(docs.begin, docs.end):
            start = docs.starts[s]
            for t in range(start, docs.starts[s + 1]):
                for b in range(0, C, width):
                    along = splat(0.0)
                    for c in range(b, b + width, LANES):
                        along = fma(load(dout, t, c), load(out, t, c), along)
                    along = group_sum(along, group)
                    here = min(heads, H - b // K)
                    whole = spread(load(matrix(lse, t * H + b // K, 1, here, H), 0, 0), group)
                    # With one key the softmax is constant; dp and along may round differently.
                    slope = scale if t > start else _f32(0)
                    for j in range(start, t + 1):
                        score, dp = splat(0.0), splat(0.0)
                        for c in range(b, b + width, LANES):
                            score = fma(load(queries, t, c), load(keys, j, c), score)
                            dp = fma(load(dout, t, c), load(values, j, c), dp)
                        p = exp(fma(group_sum(score, group), scale, 0.0 - whole))
                        ds = p * (group_sum(dp, group) - along) * slope
                        for c in range(b, b + width, LANES):
                            store(fma(ds, load(keys, j, c), load(dqueries, t, c)), dqueries, t, c)
                            store(fma(ds, load(queries, t, c), load(dkeys, j, c)), dkeys, j, c)
                            store(fma(p, load(dout, t, c), load(dvalues, j, c)), dvalues, j, c)
        meet_if_split(docs)

    return flash_attention_forward, flash_attention_backward


def _make_attend(K: int) -> Callable:
    width, group = max(K, LANES), min(K, LANES)
    scale = _f32(K**-0.5)

    @jit
    def attend(out, scratch, qkv, keys, values, t, b, start, count):
        """Columns b … b + width of row t of `out`: its query over `count` keys and values from `start`.
        Returns the log-sum-exp, in all lanes of each head."""
        top = splat(_LOWEST)
        for j in range(count):
            score = splat(0.0)
            for c in range(b, b + width, LANES):
                score = fma(load(qkv, t, c), load(keys, start + j, c), score)
            score = group_sum(score, group) * scale
            store(score, scratch, j * LANES)
            top = maximum(score, top)
        total = splat(0.0)
        for j in range(count):
            e = exp(load(scratch, j * LANES) - top)
            store(e, scratch, j * LANES)
            total = total + e
        for c in range(b, b + width, LANES):
            mixed = splat(0.0)
            for j in range(count):
                mixed = fma(load(scratch, j * LANES), load(values, start + j, c), mixed)
            store(mixed / total, out, t, c)
        return top + log(total)

    return attend


def _decode(K: int) -> Callable:
    width = max(K, LANES)
    attend = _make_attend(K)

    def attention_decode(out, cache, scratch, qkv, positions, rows):
        T, C = cache.shape[0], out.shape[1]
        blocks = (C + width - 1) // width
        begin = rows.me * blocks // rows.threads * width
        end = min(C, (rows.me + 1) * blocks // rows.threads * width)
        keys, values = matrix(cache, 0, T, C, 2 * C), matrix(cache, C, T, C, 2 * C)
        meet_if_many(rows)
        for t in range(rows.n):
            last = positions[t]
            for c in range(begin, end, LANES):
                store(load(qkv, t, C + c), keys, last, c)
                store(load(qkv, t, 2 * C + c), values, last, c)
            for b in range(begin, end, width):
                attend(out, scratch[rows.me], qkv, keys, values, t, b, 0, last + 1)
        meet_if_many(rows)

    return attention_decode


# ---------------------------------------------------------------- a head at a time, in tiles


@jit
def heads_of(docs, H):
    """The documents and heads of this thread: all heads of its documents, or its heads of all documents."""
    if docs.split:
        me, threads = docs.rows.me, docs.rows.threads
        return 0, docs.count, me * H // threads, (me + 1) * H // threads
    return docs.begin, docs.end, 0, H


def _by_tiles(K: int, T: int) -> tuple[Callable, Callable]:
    B, TILE = ATTENTION_QUERIES, attention_keys(T)
    P, room = -(-K // LANES) * LANES, -(-T // B) * B  # a head's numbers, and keys, in whole vectors
    scale = _f32(K**-0.5)
    product = make_product()

    @jit
    def copy_rows(y, x, row, rows):
        """The first `rows` rows of y become those of x from `row` on; the rest of y becomes zero."""
        for r in range(y.shape[0]):
            for c in range(0, P, LANES):
                store(load(x, row + r, c) if r < rows else splat(0.0), y, r, c)

    @jit
    def turn_rows(y, x, row, rows, columns):
        """y = xᵀ of `rows` rows from `row` on; columns of y after those repeat the last."""
        for r in range(0, columns, LANES):
            for c in range(0, P, LANES):
                transpose_rows(y, c, r, x, row + r, row + rows - 1, c)

    def flash_attention_forward(out, lse, scratch, qkv, docs, tile):
        meet_if_split(docs)
        (N, C), H, own = out.shape, lse.shape[1], scratch[docs.rows.me]
        turned = matrix(own, 0, P, room, room)
        scores = matrix(own, 2 * P * room, B, room, room)
        mixed = matrix(own, (2 * P + B) * room, B, P, P)
        first_s, last_s, first_h, last_h = heads_of(docs, H)
        for s in range(first_s, last_s):
            start, n = docs.starts[s], docs.starts[s + 1] - docs.starts[s]
            whole = (n + B - 1) // B * B
            v = matrix(own, P * room, whole, P, P)
            for h in range(first_h, last_h):
                keys, values = matrix(qkv, C + h * K, N, K, 3 * C), matrix(qkv, 2 * C + h * K, N, K, 3 * C)
                turn_rows(turned, keys, start, n, whole)
                copy_rows(v, values, start, n)
                for i in range(0, n, B):
                    rows, end = min(B, n - i), i + B
                    queries = matrix(qkv, (start + i) * 3 * C + h * K, rows, K, 3 * C)
                    product(scores, room, 0, 0, queries, 3 * C, 1, turned, room, 1, rows, end, K)
                    for r in range(rows):
                        lse[start + i + r, h] = softmax(scores, r, i + r + 1, end)
                    product(mixed, P, 0, 0, scores, room, 1, v, P, 1, rows, P, end)
                    outputs = matrix(out, (start + i) * C + h * K, rows, K, C)
                    for r in range(rows):
                        for c in range(0, P, LANES):
                            store(load(mixed, r, c), outputs, r, c)
        meet_if_split(docs)

    @jit
    def softmax(scores, r, count, end):
        """Row r becomes the softmax of `scale` times its first `count` numbers, and zero up to `end`.
        Returns their log-sum-exp."""
        tops = splat(_LOWEST)
        for j in range(0, end, LANES):
            tops = maximum(first(count - j, load(scores, r, j), _LOWEST), tops)
        top = hmax(tops) * scale
        totals = splat(0.0)
        for j in range(0, end, LANES):
            e = first(count - j, exp(fma(load(scores, r, j), scale, 0.0 - splat(top))), 0.0)
            store(e, scores, r, j)
            totals = totals + e
        total = hsum(totals)
        inverse = _f32(1) / total
        for j in range(0, end, LANES):
            store(load(scores, r, j) * inverse, scores, r, j)
        return top + np.log(total)

    def flash_attention_backward(dqkv, scratch, dout, out, lse, qkv, docs, tile):
        (N, C), H, own = out.shape, lse.shape[1], scratch[docs.rows.me]
        at = 0
        turned_k, at = matrix(own, at, P, TILE, TILE), at + P * TILE
        turned_v, at = matrix(own, at, P, TILE, TILE), at + P * TILE
        k, at = matrix(own, at, TILE, P, P), at + P * TILE
        dk, at = matrix(own, at, TILE, P, P), at + P * TILE
        dv, at = matrix(own, at, TILE, P, P), at + P * TILE
        q, at = matrix(own, at, B, P, P), at + B * P
        do, at = matrix(own, at, B, P, P), at + B * P
        dq, at = matrix(own, at, B, P, P), at + B * P
        p, at = matrix(own, at, B, TILE, TILE), at + B * TILE
        ds = matrix(own, at, B, TILE, TILE)
        first_s, last_s, first_h, last_h = heads_of(docs, H)
        for s in range(first_s, last_s):
            start, n = docs.starts[s], docs.starts[s + 1] - docs.starts[s]
            for h in range(first_h, last_h):
                at = h * K
                queries, dqueries = matrix(qkv, at, N, K, 3 * C), matrix(dqkv, at, N, K, 3 * C)
                keys, dkeys = matrix(qkv, C + at, N, K, 3 * C), matrix(dqkv, C + at, N, K, 3 * C)
                values, dvalues = matrix(qkv, 2 * C + at, N, K, 3 * C), matrix(dqkv, 2 * C + at, N, K, 3 * C)
                outputs, douts = matrix(out, at, N, K, C), matrix(dout, at, N, K, C)
                for j in range(0, n, TILE):
                    here = min(TILE, n - j)
                    turn_rows(turned_k, keys, start + j, here, TILE)
                    turn_rows(turned_v, values, start + j, here, TILE)
                    copy_rows(k, keys, start + j, here)
                    copy_rows(dk, keys, 0, 0)
                    copy_rows(dv, values, 0, 0)
                    for i in range(j, n, B):
                        rows, wide = min(B, n - i), min(TILE, i + B - j)
                        copy_rows(q, queries, start + i, rows)
                        copy_rows(do, douts, start + i, rows)
                        product(p, TILE, 0, 0, q, P, 1, turned_k, TILE, 1, rows, wide, K)
                        product(ds, TILE, 0, 0, do, P, 1, turned_v, TILE, 1, rows, wide, K)
                        for r in range(rows):
                            t = start + i + r
                            softmax_backward(p, ds, r, i + r + 1 - j, wide, outputs, do, t, lse[t, h], i + r)
                        product(dq, P, 0, 0, ds, TILE, 1, k, P, 1, rows, P, wide)
                        for r in range(rows):
                            for c in range(0, P, LANES):
                                before = load(dqueries, start + i + r, c) if j else splat(0.0)
                                store(before + load(dq, r, c), dqueries, start + i + r, c)
                        product(dk, P, dk, P, ds, 1, TILE, q, P, 1, wide, P, rows)
                        product(dv, P, dv, P, p, 1, TILE, do, P, 1, wide, P, rows)
                    for r in range(here):
                        for c in range(0, P, LANES):
                            store(load(dk, r, c), dkeys, start + j + r, c)
                            store(load(dv, r, c), dvalues, start + j + r, c)
        meet_if_split(docs)

    @jit
    def softmax_backward(p, ds, r, count, end, outputs, do, t, whole, earlier):
        """Row r of p becomes the probabilities from the products q·k there, and that of ds the gradient of
        those products from the gradient of the probabilities."""
        products = splat(0.0)
        for c in range(0, P, LANES):
            products = fma(load(outputs, t, c), load(do, r, c), products)
        along = hsum(products)
        # With one key the softmax is constant; dp and along may round differently.
        slope = scale if earlier else _f32(0)
        for j in range(0, end, LANES):
            e = first(count - j, exp(fma(load(p, r, j), scale, 0.0 - splat(whole))), 0.0)
            store(e, p, r, j)
            store(first(count - j, e * (load(ds, r, j) - along) * slope, 0.0), ds, r, j)

    return flash_attention_forward, flash_attention_backward


def attention_decode(out, cache, scratch, qkv, positions, rows):
    """For heads that do not fill vectors evenly."""
    T, _, H, K = cache.shape
    C, own = H * K, scratch[rows.me]
    scale = _f32(1) / np.sqrt(_f32(K))
    meet_if_many(rows)
    for h in range(rows.me * H // rows.threads, (rows.me + 1) * H // rows.threads):
        queries, outputs = matrix(qkv, h * K, rows.n, K, 3 * C), matrix(out, h * K, rows.n, K, C)
        keys, values = matrix(cache, h * K, T, K, 2 * C), matrix(cache, C + h * K, T, K, 2 * C)
        for t in range(rows.n):
            last = positions[t]
            for c in range(K):
                cache[last, 0, h, c] = qkv[t, C + h * K + c]
                cache[last, 1, h, c] = qkv[t, 2 * C + h * K + c]
            top = _f32(_LOWEST)
            for j in range(last + 1):
                score = splat(0.0)
                for c in range(0, K, LANES):
                    score = fma(load(queries, t, c), load(keys, j, c), score)
                own[j] = hsum(score) * scale
                top = max(top, own[j])
            for c in range(0, K, LANES):
                mixed, totals = splat(0.0), splat(0.0)
                for j in range(last + 1):
                    e = exp(splat(own[j] - top))
                    totals = totals + e
                    mixed = fma(e, load(values, j, c), mixed)
                store(mixed / totals, outputs, t, c)
    meet_if_many(rows)
