"""How training is steered: the learning rate of each step."""

from __future__ import annotations

import numpy as np

from tapeless.settings import Training


def learning_rates(training: Training, first: int, count: int) -> np.ndarray:
    """Learning rates of steps `first` to `first + count` (from 0).

    Rises by lr/warmup_steps a step, reaching lr at step warmup_steps − 1; then with
    r = (i − warmup_steps) / (steps − warmup_steps) from 0 towards 1:

        constant   lr
        linear     min_lr + (lr − min_lr)·(1 − r)
        cosine     min_lr + (lr − min_lr)·½(1 + cos πr)     Loshchilov and Hutter 2017, arXiv:1608.03983
    """
    t, i = training, np.arange(first, first + count)
    r = (i - t.warmup_steps) / max(t.steps - t.warmup_steps, 1)
    shapes = {"constant": np.ones(count), "linear": 1 - r, "cosine": 0.5 * (1 + np.cos(np.pi * r))}
    falling = t.min_lr + (t.lr - t.min_lr) * shapes[t.schedule]
    rising = t.lr * (i + 1) / max(t.warmup_steps, 1)
    rates: np.ndarray = np.where(i < t.warmup_steps, rising, falling)
    return rates
