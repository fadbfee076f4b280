"""How many operations a model takes: what a training step or a generated token must do at least."""

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
