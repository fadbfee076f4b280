"""Are the hand-written gradients right? Every tensor against finite differences, and every engine
against the reference.

1. In float64 on the reference engine, each analytic gradient entry g is compared with
   D(h) = (8(L(x+h) − L(x−h)) − (L(x+2h) − L(x−2h))) / 12h, whose error is O(h⁴). An entry's error is
   |g − D| / max(|g|, |D|, floor): below the floor a difference of two losses cannot resolve a
   gradient. ReLU has kinks, and a step across one spoils D but not g; so smaller steps are tried
   until one agrees. A wrong gradient agrees with none.
2. Of a large tensor only a sample of entries is checked, spread over its rows and columns. What the
   sample leaves out is checked along random directions u of length 1: ⟨g, u⟩ against the same
   difference of L(x + hu). An error e in the n entries of g shows as ⟨e, u⟩, which is normally
   distributed with deviation |e|/√n, whichever entries are wrong: a single one is found if its
   error is a millionth of |g|. Several directions make missing it by chance unlikely.
3. The CPU engine's gradient, in float32, is compared with the reference's, tensor by tensor, in
   relative norm.

With precision "bf16", 1 and 2 are about the gradient without rounding: a rounded loss is a staircase,
whose differences mean nothing. In 3 the reference rounds the operands of products as the engine does.
The two still differ: where sums differ in the last bit of float32, operands fall on either side of a tie,
and in deep models that spreads. It does no more to a gradient than the rounding itself; so that is the
tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from math import lcm
from typing import Any, Literal

import numpy as np

from tapeless.config import MAX_SIZE, GPTConfig, whole
from tapeless.errors import ConfigError
from tapeless.layout import n_params
from tapeless.model import GPT

WHOLE = 1024  # entries of a tensor that is checked entry by entry unless something else is asked for
SAMPLE = 128  # entries that are checked of a larger one
LARGEST = 250_000  # parameters of a model that `tapeless check` takes as it is
DIRECTIONS = 4  # along which a tensor is checked whose entries are not all checked

TOLERANCE = 1e-6  # of a single entry, against finite differences in float64
DIRECTION_TOLERANCE = 1e-7  # of a directional derivative: nothing cancels in it, so it is more exact
ENGINE_TOLERANCE = 1e-4  # of a tensor's gradient, relative norm, float32 against float64
LOSS_TOLERANCE = 1e-5
HALF_LOSS_TOLERANCE = 1e-3  # relative, in bfloat16, of 8 bits
STEPS = (1e-3, 1e-4, 1e-5)  # of an entry
LONGER_STEPS = (1e-2, *STEPS)  # along a direction of length 1: each entry moves less
# Losses are of order 1 and carry rounding of about 1e-15; over a step of 1e-3 that is 1e-12 in D.
FLOOR = 2e-6
# Where a tensor's terms cancel (a scale before a norm, say), float32 leaves their rounding: a tensor
# may differ by this part of the norm of all gradients together.
WHOLE_FLOOR = 5e-7


@dataclass(frozen=True)
class TensorCheck:
    """One line of the table. `worst` is the largest relative error of the entries checked,
    `directional` that of the directional derivatives (None where every entry was checked); `engine`
    is the relative distance of the engine's gradient from the reference's, `allowed` what that may be
    (None if not compared)."""

    name: str
    shape: tuple[int, ...]
    size: int
    checked: int
    worst: float
    directional: float | None
    engine: float | None
    allowed: float | None
    ok: bool


@dataclass(frozen=True)
class GradCheck:
    """The result of `gradcheck`: a row for each tensor, and the engine's loss beside the reference's."""

    rows: tuple[TensorCheck, ...]
    loss: float
    engine_loss: float | None
    engine: str
    seed: int
    precision: str = "float32"

    @property
    def ok(self) -> bool:
        """Whether everything agreed."""
        return self.loss_ok and all(row.ok for row in self.rows)

    @property
    def loss_ok(self) -> bool:
        """Whether the engine's loss agrees with the reference's."""
        tolerance = LOSS_TOLERANCE if self.precision == "float32" else HALF_LOSS_TOLERANCE * self.loss
        return self.engine_loss is None or abs(self.engine_loss - self.loss) <= tolerance

    @property
    def failed(self) -> list[str]:
        """Names of the tensors whose gradients are wrong."""
        return [row.name for row in self.rows if not row.ok]

    @property
    def directions(self) -> int:
        """Random directions along which each tensor was checked whose entries were not all checked."""
        return DIRECTIONS if any(row.directional is not None for row in self.rows) else 0

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
        return {**asdict(self), "directions": self.directions, "ok": self.ok}

    def __repr__(self) -> str:
        checked, size = (sum(getattr(row, name) for row in self.rows) for name in ("checked", "size"))
        verdict = "ok" if self.ok else f"FAILED: {', '.join(self.failed) or 'the loss'}"
        lines = [
            f"GradCheck({verdict}",
            f"  {len(self.rows)} tensors, {checked:,} of {size:,} entries: worst relative error "
            f"{max(row.worst for row in self.rows):.1e}, allowed {TOLERANCE:.0e}",
        ]
        if self.directions:
            worst = max(row.directional or 0.0 for row in self.rows)
            lines.append(
                f"  {self.directions} directions of each sampled tensor: worst {worst:.1e}, "
                f"allowed {DIRECTION_TOLERANCE:.0e}"
            )
        if self.engine_loss is not None:
            row = max(self.rows, key=lambda row: (row.engine or 0.0) / (row.allowed or 1.0))
            lines.append(f"  {self.engine} engine: worst tensor {row.engine:.1e}, allowed {row.allowed:.0e}")
        return "\n".join(lines) + ")"


def gradcheck(
    model: GPT,
    tokens: Any,
    targets: Any,
    starts: Any = None,
    *,
    entries: int | Literal["all"] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> GradCheck:
    """Check every parameter tensor's gradient at the model's present weights, on this batch.

    `entries` is how many entries of each tensor are checked one by one: a number, "all", or None for
    all entries of tensors of up to 1,024 and 128 of larger ones. A sample is drawn with `seed`; a
    tensor that is sampled is also checked along 4 random directions, each of which depends on every
    entry. A model on the CPU engine is compared with the reference as well.

    `tokens`, `targets` and `starts` are as for `GPT.loss_and_grad`. `progress(done, total)` is called
    after each entry and direction.

    Raises `ConfigError` for another `entries`, and what `GPT.loss_and_grad` raises.
    """
    if entries not in (None, "all"):
        if isinstance(entries, str):
            raise ConfigError(f"entries must be a number, 'all' or None, not {entries!r}.")
        whole("entries", entries, 1, MAX_SIZE)
    reference = GPT(model.config.replace(precision="float32"), None, "reference")
    engine_loss, engine_grads = None, None
    with model.lock:
        for name, values in reference.params.items():
            values[...] = model.params[name]
        if model.engine.name != "reference":
            engine_loss = model.loss_and_grad(tokens, targets, starts)
            engine_grads = {name: values.copy() for name, values in model.grads.items()}
    loss = reference.loss_and_grad(tokens, targets, starts)
    alike = reference
    if model.config.precision == "bf16":
        alike = GPT(model.config, None, "reference")
        alike.engine.params[:] = reference.engine.params
        loss = alike.loss_and_grad(tokens, targets, starts)
    distances = _Distances(reference, alike)

    rng = np.random.default_rng(seed)
    chosen = {name: _sample(values.shape, entries, rng) for name, values in reference.params.items()}
    work = _Work(chosen, reference, progress)
    rows = []
    for name, values in reference.params.items():
        # The flat view writes into the parameters; the gradients are needed as they are now.
        flat, grads = values.reshape(-1), reference.grads[name].ravel().copy()
        worst = max(work.did(_entry_error(reference, flat, int(i), grads[i])) for i in chosen[name])
        directional = None
        if len(chosen[name]) < values.size:
            directions = (rng.standard_normal(values.size) for _ in range(DIRECTIONS))
            directional = max(work.did(_directional_error(reference, flat, u, grads)) for u in directions)
        ok = worst <= TOLERANCE and (directional or 0.0) <= DIRECTION_TOLERANCE
        distance = allowed = None
        if engine_grads is not None:
            distance, allowed = distances(name, engine_grads[name])
            ok = ok and distance <= allowed
        size, checked = values.size, len(chosen[name])
        rows.append(TensorCheck(name, values.shape, size, checked, worst, directional, distance, allowed, ok))
    return GradCheck(tuple(rows), loss, engine_loss, model.engine.name, seed, model.config.precision)


class _Distances:
    """How far an engine's gradients are from those of `alike`, a reference that rounds as the engine does,
    and how far they may be: ENGINE_TOLERANCE, and as far as rounding takes them from those of `exact`."""

    def __init__(self, exact: GPT, alike: GPT):
        self._exact, self._alike = exact.grads, alike.grads
        self._norm = float(np.linalg.norm(alike.engine.grads)) or 1.0
        self._rounding = float(np.linalg.norm(exact.engine.grads - alike.engine.grads)) / self._norm

    def __call__(self, name: str, grads: np.ndarray) -> tuple[float, float]:
        alike = self._alike[name]
        size = max(float(np.linalg.norm(alike)), WHOLE_FLOOR / ENGINE_TOLERANCE * self._norm)
        apart, rounding = (float(np.linalg.norm(each - alike)) / size for each in (grads, self._exact[name]))
        return apart, ENGINE_TOLERANCE + max(rounding, self._rounding)


class _Work:
    """Counts the checks that are done, for `progress`."""

    def __init__(self, chosen: dict[str, np.ndarray], reference: GPT, progress: Any):
        sampled = sum(len(some) < reference.params[name].size for name, some in chosen.items())
        self._done, self._total = 0, sum(map(len, chosen.values())) + DIRECTIONS * sampled
        self._progress = progress

    def did(self, error: float) -> float:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return error


def _sample(shape: tuple[int, ...], entries: int | str | None, rng: np.random.Generator) -> np.ndarray:
    """Indices into a flat tensor: all of them, or a random sample that visits the rows in turn and the
    columns in turn, so that as many as possible of each are hit."""
    R, C = int(np.prod(shape[:-1])), shape[-1]
    if entries is None:
        entries = R * C if R * C <= WHOLE else SAMPLE
    if entries == "all" or int(entries) >= R * C:
        return np.arange(R * C)
    i = np.arange(int(entries))
    # i → (i mod R, i mod C) first repeats itself at i = lcm(R, C): from there on the columns are shifted.
    rows, columns = rng.permutation(R)[i % R], rng.permutation(C)[(i + i // lcm(R, C)) % C]
    return np.sort(rows * C + columns)


def _difference(loss_at: Callable[[float], float], h: float) -> float:
    """D(h), the derivative at 0 of the loss."""
    near, far = loss_at(h) - loss_at(-h), loss_at(2 * h) - loss_at(-2 * h)
    return (8 * near - far) / (12 * h)


def _entry_error(reference: GPT, flat: np.ndarray, i: int, grad: float) -> float:
    """The relative error of one entry."""
    x = flat[i]

    def loss_at(offset: float) -> float:
        flat[i] = x + offset
        return reference.engine.evaluate()

    error = _error(loss_at, float(grad), FLOOR, STEPS, TOLERANCE)
    flat[i] = x
    return error


def _directional_error(reference: GPT, flat: np.ndarray, u: np.ndarray, grads: np.ndarray) -> float:
    """The error of the derivative along u, relative to what |⟨g, u⟩| is on average over all u."""
    x, u = flat.copy(), u / np.linalg.norm(u)

    def loss_at(offset: float) -> float:
        flat[:] = x + offset * u
        return reference.engine.evaluate()

    usual = float(np.linalg.norm(grads)) / np.sqrt(flat.size)
    error = _error(loss_at, float(grads @ u), max(usual, FLOOR), LONGER_STEPS, DIRECTION_TOLERANCE)
    flat[:] = x
    return error


def _error(
    loss_at: Callable[[float], float], grad: float, floor: float, steps: Sequence[float], tolerance: float
) -> float:
    """The relative error of a derivative, at the first step size that agrees, or the best of them."""
    best = np.inf
    for h in steps:
        difference = _difference(loss_at, h)
        error = abs(grad - difference) / max(abs(grad), abs(difference), floor)
        best = min(best, error) if np.isfinite(error) else best
        if best <= tolerance:
            break
    return float(best)


def smaller(config: GPTConfig, kept: Collection[str] = ()) -> GPTConfig:
    """The config itself if finite differences of it take seconds, else one of the same structure with
    smaller sizes. Fields in `kept` stay as they are."""
    if n_params(config) <= LARGEST:
        return config
    sizes = {"n_layer": 2, "block_size": 32, "vocab_size": 64, "n_head": 4}
    changes = {k: min(size, getattr(config, k)) for k, size in sizes.items() if k not in kept}
    if "n_embd" in kept:
        changes.pop("n_head", None)  # it may not divide the width
    else:
        changes["n_embd"] = 16 * changes.get("n_head", config.n_head)
    return config.replace(**changes)


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
