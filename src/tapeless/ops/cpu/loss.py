"""Softmax and cross-entropy, and sampling a token."""

import numpy as np

from tapeless.ops.cpu.simd import LANES, exp, first, hmax, hsum, load, log, matrix, maximum, splat, store

_LOWEST = -np.inf


def cross_entropy_forward(loss, stats, logits, targets, weights, rows):
    V = logits.shape[1]
    for t in range(rows.begin, rows.end):
        tops = splat(_LOWEST)
        for v in range(0, V, LANES):
            tops = maximum(first(V - v, load(logits, t, v), _LOWEST), tops)
        top = hmax(tops)
        totals = splat(0.0)
        for v in range(0, V, LANES):
            totals = totals + first(V - v, exp(load(logits, t, v) - top), 0.0)
        total = hsum(totals)
        stats[t, 0] = top
        stats[t, 1] = total
        loss[t] = total
    # The logarithms of many rows at once.
    own = matrix(loss, rows.begin, 1, rows.end - rows.begin, 0)
    for t in range(0, rows.end - rows.begin, LANES):
        store(log(load(own, 0, t)), own, 0, t)
    mean = 0.0
    for t in range(rows.begin, rows.end):
        loss[t] += stats[t, 0] - logits[t, targets[t]]
        mean += weights[t] * loss[t]
    return mean


def cross_entropy_backward(dlogits, logits, stats, targets, weights, rows):
    for t in range(rows.begin, rows.end):
        top, factor = stats[t, 0], weights[t] / stats[t, 1]
        for v in range(0, logits.shape[1], LANES):
            store(exp(load(logits, t, v) - top) * factor, dlogits, t, v)
        dlogits[t, targets[t]] -= weights[t]


def sample_token(probs, logits, temperature, top_k, top_p, uniform):
    V = logits.shape[0]
    best, lowest = 0, 0
    for v in range(V):
        if logits[v] > logits[best]:
            best = v
        if logits[v] < logits[lowest]:
            lowest = v
    if temperature == 0:
        return best
    total = 0.0
    for v in range(V):
        probs[v] = np.exp((np.float64(logits[v]) - logits[best]) / temperature)
        total += probs[v]

    # The border of the top k, then of the top p: the highest logit that still leaves enough above
    # or on it, found by halving the interval, which needs neither a sort nor memory.
    for what in range(2):
        if what == 0:
            needed = np.float64(top_k)
            search = 0 < top_k < V
        else:
            needed = top_p * total
            search = top_p < 1
        if search:
            low, high = np.float64(logits[lowest]), np.float64(logits[best])
            for _ in range(64):
                middle = 0.5 * (low + high)
                above = 0.0
                for v in range(V):
                    if logits[v] >= middle:
                        above += 1.0 if what == 0 else probs[v]
                if above >= needed:
                    low = middle
                else:
                    high = middle
            total = 0.0
            for v in range(V):
                if logits[v] < low:
                    probs[v] = 0
                total += probs[v]

    aim, running, last = uniform * total, 0.0, best
    for v in range(V):
        if probs[v] > 0:
            last = v
            running += probs[v]
            if running > aim:
                return v
    return last
