"""Embedding, and the small movers of rows."""

from tapeless.ops.cpu.simd import LANES, load, store


def embed_forward(x, wte, wpe, tokens, positions, n):
    for t in range(n):
        for c in range(0, x.shape[1], LANES):
            store(load(wte, tokens[t], c) + load(wpe, positions[t], c), x, t, c)


def embed_backward(dwte, dwpe, dx, tokens, positions, n):
    for t in range(n):
        for c in range(0, dx.shape[1], LANES):
            g = load(dx, t, c)
            store(load(dwte, tokens[t], c) + g, dwte, tokens[t], c)
            store(load(dwpe, positions[t], c) + g, dwpe, positions[t], c)


def zero(x, n):
    for t in range(n):
        for c in range(0, x.shape[1], LANES):
            store(0.0, x, t, c)


def accumulate(y, x, n):
    for t in range(n):
        for c in range(0, x.shape[1], LANES):
            store(load(y, t, c) + load(x, t, c), y, t, c)


def add_forward(y, x, f, n):
    for t in range(n):
        for c in range(0, x.shape[1], LANES):
            store(load(x, t, c) + load(f, t, c), y, t, c)
