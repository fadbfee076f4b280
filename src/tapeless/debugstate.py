"""Debug states of llm.c: holding a model to one, and writing one for others to be held to.

Tensors are compared as llm.c's own test does, by their largest difference. Where gradients are small
that lets anything pass, so a tensor must also lie within 1 % of the expected one, in norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tapeless.errors import DataError
from tapeless.gradcheck import WHOLE_FLOOR
from tapeless.io import gpt2, llmc
from tapeless.io.checkpoints import open_model
from tapeless.model import GPT

LOGITS, LOSS, GRADS = 1e-2, 1e-2, 2e-2  # the largest differences that llm.c's test allows
RELATIVE = 1e-2  # |difference| / |expected|


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the expected one: its largest difference, and that of the whole tensor,
    relative to the expected one."""

    name: str
    theirs: str  # what llm.c calls it
    shape: tuple[int, ...]
    largest: float
    allowed: float
    relative: float

    @property
    def ok(self) -> bool:
        return self.largest <= self.allowed and self.relative <= RELATIVE


def load(source: str | Path, engine: str) -> GPT:
    """The model at `source` as llm.c holds it. Raises `ConfigError` for another architecture."""
    checkpoint = llmc.fitted(open_model(source))
    model = GPT(checkpoint.config, None, engine)
    checkpoint.read_into(model.params)
    return model


def compare(model: GPT, path: Path) -> tuple[llmc.State, list[Difference]]:
    """Compare logits, loss and every gradient with those of a debug state.

    Raises `RunError` for a file that is none, or of another model.
    """
    state = llmc.open_state(path, model.config)
    loss, logits = _run(model, state.tokens, state.targets)
    rows = [
        _difference("logits", "logits", [state.logits], logits, LOGITS, 0.0),
        _difference("loss", "loss", [np.array([state.loss])], np.array([loss]), LOSS, 0.0),
    ]
    norm = float(np.linalg.norm(model.engine.grads))
    for names in gpt2.TENSORS:
        blocks = (block for part in state.grads.tensors[names.ours] for block in part.blocks())
        rows.append(_difference(names.ours, "d" + names.llmc, blocks, model.grads[names.ours], GRADS, norm))
    return state, rows


def _difference(
    name: str, theirs: str, blocks: Iterable[np.ndarray], ours: np.ndarray, allowed: float, whole_norm: float
) -> Difference:
    first, largest, apart, size = 0, 0.0, 0.0, 0.0
    for block in blocks:
        difference = ours[first : first + len(block)] - block
        largest = max(largest, float(np.nan_to_num(np.abs(difference), nan=np.inf).max()))
        apart += float(np.square(difference, dtype=np.float64).sum())
        size += float(np.square(block, dtype=np.float64).sum())
        first += len(block)
    # A gradient whose terms cancel is mere rounding, which grows with all the others.
    floor = WHOLE_FLOOR / RELATIVE * whole_norm
    relative = np.sqrt(apart) / max(np.sqrt(size), floor) if apart else 0.0
    return Difference(name, theirs, ours.shape, largest, allowed, float(relative))


def _run(model: GPT, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss of a batch [B, T], its logits, and its gradients in the model."""
    starts = np.arange(0, tokens.size + 1, tokens.shape[1])
    logits = model.logits(tokens.ravel(), starts)
    return model.loss_and_grad(tokens.ravel(), targets.ravel(), starts), logits


def write(model: GPT, path: Path, stream: np.ndarray, batch_size: int, block_size: int) -> float:
    """Write the debug state of the batch that `stream` begins with, and return its loss.

    Raises `DataError` for too few tokens, `RunError` if the file cannot be written.
    """
    B, T = batch_size, block_size
    if len(stream) < B * T + 1:
        raise DataError(f"{len(stream):,} tokens are too few for {B} × {T} and one more.")
    tokens, targets = (stream[i : i + B * T].reshape(B, T) for i in (0, 1))
    loss, logits = _run(model, tokens, targets)
    llmc.write_state(path, tokens, targets, logits, loss, model.config, model.grads)
    return loss
