"""Weights in int8 with a scale for each row: a quarter of the flash, and what that costs in quality.

A row is that of the matrix as it is stored: of an embedding one token's or position's, of a product's
`[in, out]` weights what one input is multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tapeless.config import GPTConfig
from tapeless.layout import DECAYED, parameter_plan

MOST = 127


@dataclass(frozen=True)
class Quantised:
    """A model's matrices in int8, and its other parameters as they were."""

    values: np.ndarray  # int8, all matrices in the order of the parameters
    scales: np.ndarray  # float32, one for each of their rows
    kept: np.ndarray  # float32
    places: dict[str, tuple[int, int, str]]  # of "p.wqkv[0]": first value, first scale, shape
    others: dict[str, int]  # of "p.bqkv[0]": where it begins in `kept`

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.kept.nbytes


def quantise(config: GPTConfig, weights: np.ndarray) -> tuple[Quantised, np.ndarray]:
    """w ≈ s·q with s = max|w|/127 of its row and q whole. Returns also the weights [P] that are then
    computed with."""
    layout = parameter_plan(config)
    rounded = weights.astype(np.float32).copy()
    views = layout.views("p", rounded.view(np.uint8))._asdict()
    values, scales, kept = [], [], []
    places: dict[str, tuple[int, int, str]] = {}
    others: dict[str, int] = {}
    for tensor in layout.tensors:
        name, w = f"p.{tensor.name}", views[tensor.name]
        if not w.size:
            continue
        # Refs of a tensor with layers name one of them.
        layered = len(w) == config.n_layer and tensor.name not in ("wte", "wpe", "head", "normf_w", "contract")
        layered = layered and not tensor.name.startswith("norme")
        parts = [(f"{name}[{l}]", w[l]) for l in range(config.n_layer)] if layered else [(name, w)]
        for part, numbers in parts:
            if tensor.name not in DECAYED:
                others[part] = sum(map(len, kept))
                kept.append(numbers.ravel().copy())
                continue
            scale = np.abs(numbers).max(axis=1, keepdims=True).astype(np.float32) / np.float32(MOST)
            q = np.rint(numbers / np.where(scale > 0, scale, 1)).astype(np.int8)
            shape = ", ".join(map(str, numbers.shape))
            places[part] = sum(map(len, values)), sum(map(len, scales)), shape
            values.append(q.ravel())
            scales.append(scale.ravel())
            numbers[...] = q * scale
    empty = np.empty(0, np.float32)
    return (
        Quantised(np.concatenate(values), np.concatenate(scales), np.concatenate([*kept, empty]), places, others),
        rounded,
    )
