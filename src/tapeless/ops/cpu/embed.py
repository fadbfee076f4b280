"""Embedding, and the small movers of rows."""


def embed_forward(x, wte, wpe, tokens, positions, n):
    for t in range(n):
        for c in range(x.shape[1]):
            x[t, c] = wte[tokens[t], c] + wpe[positions[t], c]


def embed_backward(dwte, dwpe, dx, tokens, positions, n):
    for t in range(n):
        for c in range(dx.shape[1]):
            dwte[tokens[t], c] += dx[t, c]
            dwpe[positions[t], c] += dx[t, c]


def zero(x, n):
    for t in range(n):
        for c in range(x.shape[1]):
            x[t, c] = 0


def accumulate(y, x, n):
    for t in range(n):
        for c in range(x.shape[1]):
            y[t, c] += x[t, c]


def add_forward(y, x, f, n):
    for t in range(n):
        for c in range(x.shape[1]):
            y[t, c] = x[t, c] + f[t, c]
