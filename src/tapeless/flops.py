"""How many operations a model takes: what a training step or a generated token must do at least; and an
estimate of how long a step takes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tapeless.config import GPTConfig


def forward_flops(config: GPTConfig, lengths: Iterable[int]) -> int:
    """Operations of the forward pass over documents of these lengths: 2 for each multiply-add of the
    matrix products and of attention, and none for anything else.

    A token meets the weights wqkv, wo, w1 and w2 of each layer and the head:
    L·(3C² + C² + 2CF) + C·V multiply-adds. A document of n tokens has n(n+1)/2 causal pairs of query
    and key; each takes C multiply-adds for the scores and C for the sum of values, in each layer.
    """
    C, F, L, V = config.n_embd, config.n_hidden, config.n_layer, config.vocab
    n = np.asarray(lengths, np.int64)
    tokens, pairs = int(n.sum()), int((n * (n + 1) // 2).sum())
    return 2 * (tokens * (L * (4 * C * C + 2 * C * F) + C * V) + pairs * L * 2 * C)


def training_flops(config: GPTConfig, lengths: Iterable[int]) -> int:
    """Operations of the forward and the backward pass. Each product y = x·w has two in the backward
    pass, dx = dy·wᵀ and dw = xᵀ·dy, of the same size; what a backward pass computes again (as
    FlashAttention does) is not counted."""
    return 3 * forward_flops(config, lengths)


# Of the multiply-add peak, what training steps reach: measured on two x86-64 machines with AVX-512, from
# microgpt (a fifth to a quarter) over width 128 (three quarters) to GPT-2 124M. Narrow matmuls and few
# tokens use vectors and registers badly; several threads wait for each other.
BEST_SHARE = 0.92
HALF_WIDTH, HALF_TOKENS = 15, 7  # at which the share is half of what it is for large ones
TOGETHER = 0.85
ACCURACY = 1.5  # measured times lie within this factor of the estimate, on those machines


def expected_share(config: GPTConfig, tokens: int, threads: int) -> float:
    """An estimate of what share of the peak a training step of so many tokens reaches (MFU)."""
    share = BEST_SHARE * config.n_embd / (config.n_embd + HALF_WIDTH) * tokens / (tokens + HALF_TOKENS)
    return share * (TOGETHER if threads > 1 else 1)


def expected_seconds(config: GPTConfig, lengths: Iterable[int], threads: int, peak: float) -> float:
    """An estimate of what one batch of training takes, where `threads` reach `peak` GFLOP/s together. With
    `config.recompute` the layers' forward pass is done twice."""
    lengths = list(lengths)
    flops = training_flops(config, lengths) * (4 / 3 if config.recompute else 1)
    return flops / (expected_share(config, sum(lengths), threads) * peak * 1e9)
