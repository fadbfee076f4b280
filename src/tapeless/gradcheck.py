"""Are the hand-written gradients right? Every tensor against finite differences, and every engine
against the reference.

1. In float64 on the reference engine, each analytic gradient entry g is compared with
   D(h) = (8(L(x+h) − L(x−h)) − (L(x+2h) − L(x−2h))) / 12h, whose error is O(h⁴). An entry's error is
   |g − D| / max(|g|, |D|, floor): below the floor a difference of two losses cannot resolve a
   gradient. ReLU has kinks, and a step across one spoils D but not g; so smaller steps are tried
   until one agrees. A wrong gradient agrees with none.
2. The CPU engine's gradient, in float32, is compared with the reference's, tensor by tensor, in
   relative norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tapeless.config import GPTConfig
from tapeless.model import GPT

TOLERANCE = 1e-6  # of a single entry, against finite differences in float64
ENGINE_TOLERANCE = 1e-4  # of a tensor's gradient, relative norm, float32 against float64
LOSS_TOLERANCE = 1e-5
STEPS = (1e-3, 1e-4, 1e-5)
# Losses are of order 1 and carry rounding of about 1e-15; over a step of 1e-3 that is 1e-12 in D.
FLOOR = 2e-6
# Where a tensor's terms cancel (a scale before a norm, say), float32 leaves their rounding: a tensor
# may differ by this part of the norm of all gradients together.
WHOLE_FLOOR = 5e-7


@dataclass(frozen=True)
class TensorCheck:
    """One line of the table. `worst` is the largest relative error of the entries checked; `engine`
    the relative distance of the engine's gradient from the reference's (None if not compared)."""

    name: str
    shape: tuple[int, ...]
    size: int
    checked: int
    worst: float
    engine: float | None
    ok: bool


@dataclass(frozen=True)
class GradCheck:
    """The result of `gradcheck`: a row for each tensor, and the engine's loss beside the reference's."""

    rows: tuple[TensorCheck, ...]
    loss: float
    engine_loss: float | None
    engine: str
    seed: int

    @property
    def ok(self) -> bool:
        """Whether everything agreed."""
        return self.loss_ok and all(row.ok for row in self.rows)

    @property
    def loss_ok(self) -> bool:
        return self.engine_loss is None or abs(self.engine_loss - self.loss) <= LOSS_TOLERANCE

    @property
    def failed(self) -> list[str]:
        """Names of the tensors whose gradients are wrong."""
        return [row.name for row in self.rows if not row.ok]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def gradcheck(
    model: GPT, tokens: Any, targets: Any, starts: Any = None, *, entries: int = 5000, seed: int = 0
) -> GradCheck:
    """Check every parameter tensor's gradient at the model's present weights, on this batch.

    Tensors of up to `entries` numbers are checked entry by entry, larger ones at `entries` entries
    drawn with `seed`. A model on the CPU engine is compared with the reference as well.
    The batch is as for `GPT.loss_and_grad`, and so are the errors raised.
    """
    reference = GPT(model.config, None, "reference")
    engine_loss, engine_grads = None, None
    with model.lock:
        for name, values in reference.params.items():
            values[...] = model.params[name]
        if model.engine.name != "reference":
            engine_loss = model.loss_and_grad(tokens, targets, starts)
            engine_grads = {name: values.copy() for name, values in model.grads.items()}
    loss = reference.loss_and_grad(tokens, targets, starts)

    rng = np.random.default_rng(seed)
    whole = float(np.linalg.norm(reference.engine.grads))
    rows = []
    for name, values in reference.params.items():
        grads = reference.grads[name].ravel().copy()
        if values.size <= entries:
            chosen = np.arange(values.size)
        else:
            chosen = np.sort(rng.choice(values.size, entries, replace=False))
        flat = values.reshape(-1)
        worst = max(_entry_error(reference, flat, int(i), grads[i]) for i in chosen)
        distance = None
        if engine_grads is not None:
            apart = float(np.linalg.norm(engine_grads[name].ravel() - grads))
            distance = apart / max(float(np.linalg.norm(grads)), WHOLE_FLOOR / ENGINE_TOLERANCE * whole)
        ok = worst <= TOLERANCE and (distance is None or distance <= ENGINE_TOLERANCE)
        rows.append(TensorCheck(name, values.shape, values.size, len(chosen), worst, distance, ok))
    return GradCheck(tuple(rows), loss, engine_loss, model.engine.name, seed)


def _entry_error(reference: GPT, flat: np.ndarray, i: int, grad: float) -> float:
    """The relative error of one entry, at the first step size that agrees, or the best of them."""
    best, x = np.inf, flat[i]

    def loss_at(offset: float) -> float:
        flat[i] = x + offset
        return reference.engine.evaluate()

    for h in STEPS:
        near, far = loss_at(h) - loss_at(-h), loss_at(2 * h) - loss_at(-2 * h)
        difference = (8 * near - far) / (12 * h)
        error = abs(grad - difference) / max(abs(grad), abs(difference), FLOOR)
        best = min(best, error) if np.isfinite(error) else best
        if best <= TOLERANCE:
            break
    flat[i] = x
    return float(best)


def example(
    config: GPTConfig, engine: str = "cpu", seed: int = 0
) -> tuple[GPT, np.ndarray, np.ndarray, Sequence[int]]:
    """A model away from every special point (its initial weights with N(0, 0.1²) added, so that no
    gain is one and no streams are equal) and a packed batch of documents of different lengths, the
    shortest of one token, the longest filling the block (or 24 tokens, if the block is longer)."""
    rng = np.random.default_rng(seed)
    model = GPT(config, seed, engine)
    for values in model.params.values():
        values[...] += rng.normal(0, 0.1, values.shape)
    longest = min(config.block_size, 24)
    lengths = [1, longest, max(1, longest // 2), min(2, longest)]
    starts = [0, *np.cumsum(lengths).tolist()]
    tokens, targets = rng.integers(0, config.vocab, (2, starts[-1]))
    return model, tokens, targets, starts
