"""Embedding, and the small movers of rows."""

from tapeless.ops.cpu.share import meet, part
from tapeless.ops.cpu.simd import LANES, load, store
from tapeless.ops.cpu.streams import load_stored


def embed_forward(x, wte, wpe, tokens, positions, rows):
    for t in range(rows.begin, rows.end):
        for c in range(0, x.shape[1], LANES):
            store(load(wte, tokens[t], c) + load(wpe, positions[t], c), x, t, c)


def embed_stored_forward(x, wte, wpe, tokens, positions, rows):
    """With wte in bfloat16, if the head reads it so as well."""
    for t in range(rows.begin, rows.end):
        for c in range(0, x.shape[1], LANES):
            store(load_stored(wte, tokens[t], c) + load(wpe, positions[t], c), x, t, c)


def embed_backward(dwte, dwpe, dx, tokens, positions, rows):
    meet(rows)
    begin, end = part(rows, dx.shape[1])
    for t in range(rows.n):
        for c in range(begin, end, LANES):
            g = load(dx, t, c)
            store(load(dwte, tokens[t], c) + g, dwte, tokens[t], c)
            store(load(dwpe, positions[t], c) + g, dwpe, positions[t], c)
    meet(rows)


def zero(x, rows):
    for t in range(rows.begin, rows.end):
        for c in range(0, x.shape[1], LANES):
            store(0.0, x, t, c)


def accumulate(y, x, rows):
    for t in range(rows.begin, rows.end):
        for c in range(0, x.shape[1], LANES):
            store(load(y, t, c) + load(x, t, c), y, t, c)


def add_forward(y, x, f, rows):
    for t in range(rows.begin, rows.end):
        for c in range(0, x.shape[1], LANES):
            store(load(x, t, c) + load(f, t, c), y, t, c)
