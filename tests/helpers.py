"""Small models, batches, and the comparison of gradients with finite differences."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from tapeless.config import GPTConfig
from tapeless.model import GPT
from tapeless.presets import presets


def small(config: GPTConfig) -> GPTConfig:
    """The same structure on 26 letters and BOS, where large in sizes whose every gradient entry can be
    checked in seconds. Heads keep their share of the width, flash its tiles smaller than the block."""
    config = config.replace(vocab_size=27)
    if config.n_embd <= 16:
        return config
    return config.replace(vocab_size=11, n_layer=2, n_head=2, n_embd=8, block_size=16, attention_tile=4)


# Of GPT-2's sizes one: the others have the same structure.
PRESETS = {name: small(preset.model) for name, preset in presets.items() if "gpt2-" not in name}


class Batch(NamedTuple):
    """Packed documents, as `GPT.loss_and_grad` takes them."""

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    weights: np.ndarray | None = None

    def document(self, s: int) -> Batch:
        """Document s alone."""
        first, end = self.starts[s : s + 2]
        return Batch(self.tokens[first:end], self.targets[first:end], np.array([0, end - first]))


def random_batch(config: GPTConfig, lengths: Any, seed: int, weighted: bool = False) -> Batch:
    """Documents of these lengths with random tokens."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, config.vocab, (2, sum(lengths)))
    weights = rng.uniform(0.1, 2, sum(lengths)) if weighted else None
    return Batch(tokens, targets, np.concatenate([[0], np.cumsum(lengths)]), weights)


def random_model(
    config: GPTConfig, engine: str = "reference", dtype: str | None = None, seed: int = 0
) -> GPT:
    """A model whose every number matters: weights wide enough that no gradient is lost in the others'
    rounding, gains away from 1 and biases away from 0."""
    model = GPT(config, None, engine, dtype=dtype)
    rng = np.random.default_rng(seed)
    for name, value in model.params.items():
        gain = name.startswith("norm") and name.endswith("_w")
        value[...] = rng.normal(1.0 if gain else 0.0, 0.3, value.shape)
    return model


def grads(model: GPT, batch: Batch) -> dict[str, np.ndarray]:
    """Copies of the gradients of a batch."""
    model.loss_and_grad(*batch)
    return {name: g.copy() for name, g in model.grads.items()}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a − b| / |b| in the Euclidean norm; 0 where both are zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference = np.linalg.norm(a - b)
    return float(difference / np.linalg.norm(b)) if difference else 0.0


@st.composite
def configs(draw: Any, max_width: int = 6) -> GPTConfig:
    """Any architecture there is, in a size that a finite difference for each entry can afford."""
    n_head = draw(st.integers(1, 3))
    norm = draw(st.sampled_from(["none", "rms", "layer"]))
    places = {
        name: norm != "none" and draw(st.booleans())
        for name in ("norm_embed", "norm_attn", "norm_mlp", "norm_final")
    }
    anywhere = any(places.values())
    return GPTConfig(
        vocab_size=draw(st.integers(2, 7)),
        block_size=draw(st.integers(1, 6)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_embd=n_head * draw(st.integers(1, max_width // n_head)),
        n_hidden=draw(st.integers(1, 8)),
        norm=norm,
        norm_gain=anywhere and draw(st.booleans()),
        norm_bias=norm == "layer" and anywhere and draw(st.booleans()),
        **places,
        activation=draw(st.sampled_from(["relu", "gelu"])),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
    )


def lengths_of(config: GPTConfig, max_documents: int = 4) -> st.SearchStrategy[list[int]]:
    """Lengths of the documents of a batch."""
    return st.lists(st.integers(1, config.block_size), min_size=1, max_size=max_documents)


# ---------------------------------------------------------------- finite differences

RELATIVE = 1e-6
STEP, NARROWEST = 2e-4, 2e-7


def gradient_mistakes(model: GPT, batch: Batch, every: int = 1) -> list[str]:
    """The parameter entries whose analytic gradient disagrees with finite differences of the loss; `every`
    k-th entry is looked at.

    The difference is central with one Richardson step, (4·D(h) − D(2h))/3, which leaves out terms
    of order h⁴. What remains is rounding: a loss comes of sums of numbers up to the size of the
    largest logit, so it is off by about ε = 2⁻⁵² of that size, and D(h) by as much over h. Twice
    that is the absolute floor, some 1e-12; every entry above it is held to the relative 1e-6.

    A relu has no derivative at 0, and a difference across that kink is nobody's derivative. So the
    signs of all relu inputs are compared at all four points. Where one changes, the step is
    narrowed until none does; the floor then grows with 1/h and nothing else is given away. The
    same is done where the curve is so sharp that D(h) and D(2h) are not yet close to each other.
    """
    engine, params = model.engine, model.engine.params
    model.loss_and_grad(*batch)
    analytic = engine.grads.copy()
    n = len(batch.tokens)
    has_kinks = model.config.activation == "relu"
    signs = engine.a.u[:, :n] > 0
    size = max(1.0, float(np.abs(engine.a.logits[:n]).max()))

    def difference(i: int, h: float) -> float | None:
        """Central difference along parameter i, or None if a kink lies in the way."""
        here = params[i]
        try:
            params[i] = high = here + h
            above = engine.evaluate()
            if has_kinks and not np.array_equal(engine.a.u[:, :n] > 0, signs):
                return None
            params[i] = low = here - h
            below = engine.evaluate()
            if has_kinks and not np.array_equal(engine.a.u[:, :n] > 0, signs):
                return None
            return (above - below) / (high - low)
        finally:
            params[i] = here

    def close(a: float, b: float, relative: float, floor: float) -> bool:
        return abs(a - b) <= relative * max(abs(a), abs(b)) + floor

    mistakes = []
    for i in range(0, len(analytic), every):
        a = analytic[i]
        h = STEP
        while True:
            floor = 2 * np.finfo(np.float64).eps * size / h
            wide, narrow = difference(i, 2 * h), difference(i, h)
            # The h² term, of which D(2h) − D(h) is three, says how sharp the curve is: where it is
            # below 1e-4 of D, the h⁴ term left after Richardson's step is of the order of 1e-8.
            if wide is not None and narrow is not None and close(wide, narrow, 1e-4, floor):
                break
            h /= 4
            assert h > NARROWEST, f"{entry_name(model, i)} lies on a kink: choose other weights"
        numeric = (4 * narrow - wide) / 3
        if not close(a, numeric, RELATIVE, floor):
            mistakes.append(f"{entry_name(model, i)}: analytic {a:.12g}, numeric {numeric:.12g}")
    return mistakes


def entry_name(model: GPT, i: int) -> str:
    """Parameter i of the flat buffer, by name: "wqkv[0, 3, 5]"."""
    for name, value in model.params.items():
        if i < value.size:
            index = ", ".join(str(k) for k in np.unravel_index(i, value.shape))
            return f"{name}[{index}]"
        i -= value.size
    raise IndexError(i)


# ---------------------------------------------------------------- bfloat16


def as_bfloat16(x: Any) -> Any:
    """The nearest float32s of 8 significant bits, of two as near the even one; for numbers in range."""
    digits, exponent = np.frexp(np.asarray(x, "f8"))
    return np.ldexp(np.rint(digits * 256), exponent - 8).astype("f4")
