"""Weights in int8 with a scale for each row: a quarter of the flash, and what that costs in quality.

A row is that of the matrix as it is stored: of an embedding one token's or position's, of a product's
`[in, out]` weights what one input is multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, argument, did_you_mean
from tapeless.export.firmware import Firmware
from tapeless.layout import DECAYED, parameter_plan

WEIGHTS = ("float32", "int8")
MOST = 127
WHOLE = ("wte", "wpe", "norme_w", "norme_b", "normf_w", "normf_b", "head", "contract")  # have no layers


@dataclass(frozen=True)
class Quantised:
    """A model's matrices in int8, and its other parameters as they were."""

    values: np.ndarray  # int8, all matrices in the order of the parameters
    scales: np.ndarray  # float32, one for each of their rows
    kept: np.ndarray  # float32
    places: dict[str, tuple[int, int, str]]  # of "p.wqkv[0]": first value, first scale, shape
    others: dict[str, int]  # of "p.bqkv[0]": where it begins in `kept`
    rounded: np.ndarray  # float32 [P]: the weights that are then computed with

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.kept.nbytes


def quantised(firmware: Firmware, weights: str) -> Quantised | None:
    """The weights of a program that generates in int8, or None for "float32".

    Raises `ConfigError` for other words, or a program that trains.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights cannot be {weights!r}.{did_you_mean(weights, WEIGHTS)}")
    if weights == "float32":
        return None
    if firmware.trains or firmware.weights is None:
        raise ConfigError(f"int8 weights are inference-only: use {argument('mode', 'generate')}.")
    return quantise(firmware.config, firmware.weights)


def quantise(config: GPTConfig, weights: np.ndarray) -> Quantised:
    """w ≈ s·q with s = max|w|/127 of its row and q whole."""
    layout = parameter_plan(config)
    rounded = weights.astype(np.float32).copy()
    views = layout.views("p", rounded.view(np.uint8))._asdict()
    values: list[np.ndarray] = []
    scales: list[np.ndarray] = []
    kept: list[np.ndarray] = [np.empty(0, np.float32)]
    places: dict[str, tuple[int, int, str]] = {}
    others: dict[str, int] = {}
    for tensor in layout.tensors:
        name, w = f"p.{tensor.name}", views[tensor.name]
        if not w.size:
            continue
        parts = [(name, w)]
        if tensor.name not in WHOLE:  # the calls name one layer's part
            parts = [(f"{name}[{l}]", w[l]) for l in range(config.n_layer)]
        for part, numbers in parts:
            if tensor.name not in DECAYED:
                others[part] = _length(kept)
                kept.append(numbers.ravel().copy())
                continue
            scale = np.abs(numbers).max(axis=1, keepdims=True).astype(np.float32) / np.float32(MOST)
            # The scale of a row of subnormal numbers has few digits: 127 of it may be less than the largest.
            q = np.clip(np.rint(numbers / np.where(scale > 0, scale, 1)), -MOST, MOST).astype(np.int8)
            shape = ", ".join(map(str, numbers.shape))
            places[part] = _length(values), _length(scales), shape
            values.append(q.ravel())
            scales.append(scale.ravel())
            numbers[...] = q * scale
    arrays = [np.concatenate(part) for part in (values, scales, kept)]
    return Quantised(arrays[0], arrays[1], arrays[2], places, others, rounded)


def _length(arrays: list[np.ndarray]) -> int:
    return sum(map(len, arrays))
