"""Softmax and cross-entropy, and sampling a token."""

import numpy as np

from tapeless.ops.cpu.elementary import exp

_f32 = np.float32


def cross_entropy_forward(loss, lse, logits, targets, weights, n):
    mean = 0.0
    for t in range(n):
        top = _f32(-np.inf)
        for v in range(logits.shape[1]):
            top = max(top, logits[t, v])
        total = _f32(0)
        for v in range(logits.shape[1]):
            total += exp(logits[t, v] - top)
        lse[t] = top + np.log(total)
        loss[t] = lse[t] - logits[t, targets[t]]
        mean += weights[t] * loss[t]
    return mean


def cross_entropy_backward(dlogits, logits, lse, targets, weights, n):
    for t in range(n):
        for v in range(logits.shape[1]):
            dlogits[t, v] = weights[t] * exp(logits[t, v] - lse[t])
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
