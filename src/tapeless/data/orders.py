"""Orders: which documents or windows of the data each training step reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from tapeless.errors import DataError, Notice
from tapeless.rng import Random

DRAWS = 2**16  # random numbers of a permutation made at once


class Tokens(Protocol):
    """Data to train on: one stream of tokens in one or several pieces, in memory or in files.

    `pieces` [P+1] int64: where each piece begins in the stream, then where the last one ends;
    `names`: what messages call them. `spans` [documents, 2]: start and length of each document, or
    None where documents are not known. `digest`: the same data, the same digest.
    """

    @property
    def pieces(self) -> np.ndarray: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def spans(self) -> np.ndarray | None: ...
    @property
    def digest(self) -> str: ...

    def take(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For `spans` [..., 2] into the whole stream: a stream int32 [M] that holds them, targets
        included, and the same spans into that one."""
        ...


class Order(Protocol):
    """Which spans each step trains on; `longest` is the length of the longest."""

    longest: int

    def take(self, step: int, steps: int) -> np.ndarray:
        """Spans [steps, B, 2] of steps `step` to `step + steps` (from 0). "draw" and "windows" draw
        now, at random: they must be asked for steps in turn."""
        ...


def make_order(kind: str, data: Tokens, rng: Random, batch_size: int, block_size: int) -> Order:
    """The order "shuffle", "draw", "windows", "sequence" or "llmc".

    Raises `DataError` where the data cannot be read that way.
    """
    if kind == "windows":
        return Windows(data, rng, batch_size, block_size)
    if kind == "sequence":
        return Sequential(data, batch_size, block_size)
    if kind == "llmc":
        return Llmc(data, batch_size, block_size)
    if data.spans is None or data.spans[:, 1].max() > block_size:
        raise DataError("data without documents can only be read as order=windows, sequence or llmc.")
    if kind == "draw":
        return Drawn(data, data.spans, rng, batch_size, block_size)
    return Shuffled(data.spans, rng, batch_size)


# ---------------------------------------------------------------- documents


class Shuffled:
    """Documents in an order shuffled once, round and round."""

    def __init__(self, spans: np.ndarray, rng: Random, batch_size: int):
        self.longest = int(spans[:, 1].max())
        self._spans = spans[rng.permutation(len(spans))]
        self._batch_size = batch_size

    def take(self, step: int, steps: int) -> np.ndarray:
        B = self._batch_size
        index = np.arange(step * B, (step + steps) * B) % len(self._spans)
        return self._spans[index].reshape(steps, B, 2)


class Drawn:
    """A random document each time, drawn again if it is longer than the block."""

    def __init__(self, data: Tokens, spans: np.ndarray, rng: Random, batch_size: int, block_size: int):
        self._spans = spans
        self._fits = np.diff(np.append(spans[:, 0], data.pieces[-1] - 1)) <= block_size
        if not self._fits.any():
            raise DataError(
                f"every document is longer than the block ({block_size} tokens): "
                "set a larger block_size, or order=shuffle, which cuts them."
            )
        self.longest = int(spans[self._fits, 1].max())
        self._rng = rng
        self._batch_size = batch_size

    def take(self, step: int, steps: int) -> np.ndarray:
        chosen = []
        for _ in range(steps * self._batch_size):
            i = self._rng.index(len(self._spans))
            while not self._fits[i]:
                i = self._rng.index(len(self._spans))
            chosen.append(i)
        return self._spans[chosen].reshape(steps, self._batch_size, 2)


# ---------------------------------------------------------------- windows


def _places(data: Tokens, block_size: int) -> np.ndarray:
    """At how many places of each piece a window can begin."""
    places = np.diff(data.pieces) - block_size
    if (places < 1).any():
        short = int(np.argmax(places < 1))
        raise DataError(
            f"{data.names[short]} has {places[short] + block_size:,} tokens; windows of {block_size:,} "
            "need one more than that at least: set a smaller block_size."
        )
    return places


class Windows:
    """Windows of the block's length at random places, as nanoGPT reads a text."""

    def __init__(self, data: Tokens, rng: Random, batch_size: int, block_size: int):
        self.longest = block_size
        places = _places(data, block_size)
        self._ends = np.cumsum(places)
        self._shift = data.pieces[:-1] - (self._ends - places)
        self._rng = rng
        self._batch_size = batch_size

    def take(self, step: int, steps: int) -> np.ndarray:
        count, places = steps * self._batch_size, int(self._ends[-1])
        chosen = np.array([self._rng.index(places) for _ in range(count)], np.int64)
        starts = chosen + self._shift[np.searchsorted(self._ends, chosen, side="right")]
        return np.stack([starts, np.full(count, self.longest)], axis=1).reshape(steps, self._batch_size, 2)


class _Batches:
    """Each piece cut into batches of B windows end to end; the tail that fills no batch is dropped."""

    def __init__(self, data: Tokens, batch_size: int, block_size: int):
        _places(data, block_size)
        self._starts = data.pieces[:-1]
        self._step = batch_size * block_size
        self.counts = (np.diff(data.pieces) - 1) // self._step  # the last target needs one token more
        if not self.counts.any():
            longest = int(np.argmax(np.diff(data.pieces)))
            raise DataError(
                f"{data.names[longest]} has {np.diff(data.pieces)[longest]:,} tokens; a batch of "
                f"{batch_size:,} windows of {block_size:,} needs {self._step + 1:,}: "
                "set a smaller batch_size or block_size."
            )
        if short := [name for name, count in zip(data.names, self.counts, strict=True) if not count]:
            more = f" and {len(short) - 1} more" if len(short) > 1 else ""
            warnings.warn(
                Notice(
                    f"{short[0]}{more} is not read: it has fewer than the {self._step + 1:,} tokens of a "
                    "batch. Set a smaller batch_size or block_size, or order=windows."
                ),
                stacklevel=4,
            )
        offsets = np.arange(batch_size, dtype=np.int64) * block_size
        self._windows = np.stack([offsets, np.full(batch_size, block_size)], axis=1)

    def spans(self, piece: Any, index: np.ndarray) -> np.ndarray:
        """Spans [K, B, 2] of the batches `index` [K] of `piece`: one, or [K]."""
        starts = self._starts[piece] + index.astype(np.int64) * self._step
        return np.stack([starts, np.zeros_like(starts)], axis=1)[:, None] + self._windows


class Sequential:
    """Batches from the beginning to the end, piece by piece, and over again: llm.c without shuffling."""

    def __init__(self, data: Tokens, batch_size: int, block_size: int):
        self.longest = block_size
        self._batches = _Batches(data, batch_size, block_size)
        self._ends = np.cumsum(self._batches.counts)

    def take(self, step: int, steps: int) -> np.ndarray:
        index = np.arange(step, step + steps) % self._ends[-1]
        piece = np.searchsorted(self._ends, index, side="right")
        return self._batches.spans(piece, index - (self._ends - self._batches.counts)[piece])


class Llmc:
    """llm.c's shuffled order of one process: the pieces permuted each time round, starting from the
    last permutation, and the batches of each piece permuted when its turn comes, starting from their
    order in it. MT19937, seeded once with 42 as torch seeds it; Fisher-Yates from the last index down,
    `randint32 % (i+1)`.

    Source: llm.c, `llmc/dataloader.h` and `llmc/rand.h`.
    """

    _order: np.ndarray | None  # of the batches of the present piece, once it is drawn

    def __init__(self, data: Tokens, batch_size: int, block_size: int):
        self.longest = block_size
        self._batches = _Batches(data, batch_size, block_size)
        self._begin()

    def take(self, step: int, steps: int) -> np.ndarray:
        if step < self._first:
            self._begin()
        rows = []
        while steps:
            piece = self._pieces[self._turn]
            n = int(self._batches.counts[piece])
            if step >= self._first + n:
                self._next(n)
                continue
            if self._order is None:
                self._order = self._permuted(np.arange(n))
            index = self._order[step - self._first :][:steps]
            rows.append(self._batches.spans(piece, index))
            step, steps = step + len(index), steps - len(index)
        return np.concatenate(rows)

    def _begin(self) -> None:
        self._random = np.random.RandomState(42)
        self._pieces = self._permuted(np.arange(len(self._batches.counts)))
        self._turn = 0  # of self._pieces
        self._first = 0  # the step that begins it
        self._order = None

    def _next(self, n: int) -> None:
        """Go on to the next piece from one of `n` batches."""
        if self._order is None:
            for _ in self._draws(n):
                pass
        self._order = None
        self._first += n
        self._turn += 1
        if self._turn == len(self._pieces):
            self._pieces = self._permuted(self._pieces)
            self._turn = 0

    def _permuted(self, order: np.ndarray) -> np.ndarray:
        items = order.data  # a memoryview: its items come and go faster than the array's
        for i, r in self._draws(len(order)):
            for a, b in zip(i.tolist(), (r % (i + 1)).tolist(), strict=True):
                items[a], items[b] = items[b], items[a]
        return order

    def _draws(self, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The indices n−1 … 1, and a random number of 32 bits for each; many at once."""
        for high in range(n - 1, 0, -DRAWS):
            i = np.arange(high, max(high - DRAWS, 0), -1)
            yield i, self._random.randint(0, 2**32, len(i), np.uint32)
