"""A thread's share of a step.

All threads run the same schedule over the same buffers. An op does its own thread's rows; of the
gradients of parameters, which are sums over all rows, it does its own thread's part. Where an op reads
what other threads wrote, they meet first; where others read what it leaves, or it reads what comes to be
overwritten, they meet before anything else is done.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tapeless.ops.cpu.barrier import make_wait
from tapeless.ops.cpu.native import jit
from tapeless.ops.cpu.simd import LANES
from tapeless.team import by_documents

_wait = make_wait()
_by_documents = jit(by_documents)


class Rows(NamedTuple):
    """The rows of a batch of `n` that a thread works on."""

    begin: Any
    end: Any
    n: Any
    me: Any  # which thread this is,
    threads: Any  # of how many
    arrivals: Any  # [W, 16]: how often each has come to a place where all meet
    partial: Any  # [W, X]: each thread's part of sums of one row


class Documents(NamedTuple):
    """The documents of a batch of `count` that a thread's attention works on, `begin` to `end`. If they
    are `split`, they are not those of its rows."""

    starts: Any
    begin: Any
    end: Any
    count: Any
    split: Any
    rows: Rows


@jit
def rows(batch):
    s = batch.share
    return Rows(s[0], s[1], s[2], s[3], s[4], batch.arrivals, batch.partial)


@jit
def documents(batch):
    me, threads, count = batch.share[3], batch.share[4], np.int64(batch.sizes[1])
    begin, end = me * count // threads, (me + 1) * count // threads
    return Documents(batch.starts, begin, end, count, not _by_documents(count, threads), rows(batch))


@jit
def meet(rows):
    """Wait until all threads are here: what each wrote before, all can read then."""
    if rows.threads > 1:
        _wait(rows.arrivals, rows.me, rows.threads)


@jit
def part(rows, size):
    """Where this thread's part of so many columns begins and ends: whole vectors."""
    vectors = (size + LANES - 1) // LANES
    begin, end = rows.me * vectors // rows.threads, (rows.me + 1) * vectors // rows.threads
    return min(begin * LANES, size), min(end * LANES, size)


@jit
def take(batch, n):
    """Let the batch have its first n rows, and each thread its share of them."""
    me, threads = batch.share[3], batch.share[4]
    meet(rows(batch))
    batch.sizes[0] = n
    batch.share[0], batch.share[1], batch.share[2] = me * n // threads, (me + 1) * n // threads, n


@jit
def pack(batch, stream, spans, weight):
    me, threads, count = batch.share[3], batch.share[4], spans.shape[0]
    begin, end = me * count // threads, (me + 1) * count // threads
    n, first, last = 0, 0, 0
    for s in range(count):
        start, length = spans[s, 0], spans[s, 1]
        if s == begin:
            first = n
        if begin <= s < end:
            batch.starts[s] = n
            for i in range(length):
                batch.tokens[n + i] = stream[start + i]
                batch.targets[n + i] = stream[start + i + 1]
                batch.positions[n + i] = i
                batch.weights[n + i] = np.float32(weight)
            last = n + length
        n += length
    if me == 0:
        batch.starts[count] = n
        batch.sizes[0] = n
        batch.sizes[1] = count
    if not _by_documents(count, threads):
        first, last = me * n // threads, (me + 1) * n // threads
    batch.share[0], batch.share[1], batch.share[2] = first, max(first, last), n
    meet(rows(batch))
