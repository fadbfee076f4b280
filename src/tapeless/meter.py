"""How fast training is, and what share of the processor's peak that is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tapeless.engine import Engine
from tapeless.flops import training_flops

EVERY = 1.0  # seconds of training between two reports; shorter intervals are too noisy
WORTHWHILE = 3.0  # seconds of training from which the peak, which takes some 0.1 s, is measured


class Speed(NamedTuple):
    """Training's speed of late. `share` of the peak is None where that is not known."""

    tokens: float  # a second
    gflops: float  # operations of the model's products and attention, as `training_flops` counts them
    share: float | None

    def texts(self) -> list[str]:
        """For people: "36,400 tokens/s", "78 % of peak"."""
        share = [] if self.share is None else [f"{100 * self.share:.0f} % of peak"]
        return [f"{self.tokens:,.0f} tokens/s", *share]


class Meter:
    """Adds up what is done on an engine, by a number of threads, and tells the speed now and then."""

    def __init__(self, engine: Engine, threads: int):
        self._engine, self._threads = engine, threads
        self._total = self._seconds = 0.0
        self._tokens = self._flops = 0
        self._peak, self._tries = 0.0, 3

    def add(self, seconds: float, lengths: np.ndarray) -> None:
        """Documents or windows of these lengths were done in so many seconds."""
        self._total += seconds
        self._seconds += seconds
        self._tokens += int(lengths.sum())
        self._flops += training_flops(self._engine.config, lengths.ravel())

    def speed(self) -> Speed | None:
        """The speed since the last time it was told; None if that is not long ago."""
        if self._seconds < EVERY:
            return None
        gflops = self._flops / self._seconds / 1e9
        # What other programs took when the peak was measured shows when training is faster than it.
        if gflops > self._peak and self._total >= WORTHWHILE and self._tries and self._engine.name == "cpu":
            from tapeless.ops.cpu.peak import peak_gflops

            self._tries -= 1
            self._peak = max(self._peak, peak_gflops(self._threads, seconds=0.005, repeats=8))
        share = gflops / self._peak if gflops <= self._peak else None
        speed = Speed(self._tokens / self._seconds, gflops, share)
        self._seconds, self._tokens, self._flops = 0.0, 0, 0
        return speed
