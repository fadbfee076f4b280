"""Every combination of architecture choices: three proofs of every gradient.

(a) central differences in float64 agree with the reference engine's gradient, entry by entry;
(b) automatic differentiation of an independent forward pass agrees;
(c) the CPU engine agrees with the reference.

`make test` does (b) for combinations in which any three choices occur together, (a) for some with every pair
of choices, and (c), which compiles each of them, for some with every choice; `make test-oracles` does
everything for all.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import tapeless as tl
from tapeless.gradcheck import gradcheck

RESIDUALS = {
    "add": {"residual": "add"},
    "mhc2": {"residual": "mhc", "n_streams": 2},
    "mhc4": {"residual": "mhc", "n_streams": 4},
}
CHOICES: dict[str, list[Any]] = {
    "norm": ["none", "rms", "layer"],
    "activation": ["relu", "gelu"],
    "bias": [False, True],
    "tied": [False, True],
    "attention": ["full", "flash"],
    "residual": list(RESIDUALS),
    "layers": [1, 3],
}
COMBINATIONS = list(itertools.product(*CHOICES.values()))


def covering(count: int) -> list[Any]:
    """All combinations, as parameters, of which `make test` takes a few: every choice occurs in them
    (count 1), every pair (2), or any three (3). They are found greedily."""

    def groups(combination):
        return set(itertools.combinations(enumerate(combination), count))

    missing = set().union(*map(groups, COMBINATIONS))
    chosen = []
    while missing:
        best = max(COMBINATIONS, key=lambda c: len(groups(c) & missing))
        chosen.append(best)
        missing -= groups(best)
    return [pytest.param(c, marks=() if c in chosen else pytest.mark.oracle) for c in COMBINATIONS]


def make_config(combination: tuple[Any, ...], **sizes: int) -> tl.GPTConfig:
    norm, activation, bias, tied, attention, residual, layers = combination
    normed = norm != "none"
    # Gains (and LayerNorm's biases) in every second combination, so that each choice meets both.
    indices = (values.index(v) for v, values in zip(combination, CHOICES.values(), strict=True))
    gain = normed and sum(indices) % 2 == 0
    sizes = {"vocab_size": 5, "block_size": 4, "n_head": 2, "n_embd": 4, "n_hidden": 3} | sizes
    return tl.GPTConfig(
        **{**RESIDUALS[residual], **sizes},
        **{f"norm_{place}": normed for place in ("embed", "attn", "mlp", "final")},
        norm=norm,
        norm_gain=gain,
        norm_bias=gain and norm == "layer",
        activation=activation,
        bias=bias,
        tied=tied,
        attention=attention,
        attention_tile=2,
        n_layer=layers,
    )


def label(combination: tuple[Any, ...]) -> str:
    names = (n if isinstance(v, bool) else str(v) for n, v in zip(CHOICES, combination, strict=True) if v)
    return "-".join(names)


def example(config: tl.GPTConfig, seed: int, engine: str = "reference") -> tuple[tl.GPT, Any]:
    """A model at a point where nothing is special, and documents of lengths 1, T, and between."""
    rng = np.random.default_rng(seed)
    model = tl.GPT(config, seed, engine)
    for values in model.params.values():
        values[...] += rng.normal(0, 0.3, values.shape)
    T = config.block_size
    starts = np.cumsum([0, 1, T, max(1, T // 2), min(2, T)])
    tokens, targets = rng.integers(0, config.vocab, (2, starts[-1]))
    return model, (tokens, targets, starts)


def assert_same_gradients(config: tl.GPTConfig, seed: int) -> None:
    """(b): 1e-9 of the largest entry of each tensor, and of each entry that is not tiny."""
    model, batch = example(config, seed)
    loss = model.loss_and_grad(*batch)
    want_loss, want = oracle.loss_and_grad(model.params, config, *batch)
    assert loss == pytest.approx(want_loss, rel=1e-12)
    for name, grads in model.grads.items():
        np.testing.assert_allclose(grads, want[name], rtol=1e-9, atol=1e-12, err_msg=name)


@settings(max_examples=40)
@given(
    combination=st.tuples(*(st.sampled_from(values) for values in CHOICES.values())),
    vocab=st.integers(2, 9),
    block=st.integers(1, 9),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 4),
    hidden=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_reference_gradients_of_any_shape(combination, vocab, block, heads, head_dim, hidden, seed):
    if combination[0] == "layer" and heads * head_dim == 1:
        return  # a LayerNorm over one channel is constant
    config = make_config(
        combination,
        vocab_size=vocab,
        block_size=block,
        n_head=heads,
        n_embd=heads * head_dim,
        n_hidden=hidden,
    )
    assert_same_gradients(config, seed)


def assert_engine_agrees(combination: tuple[Any, ...]) -> None:
    """(c): loss to 1e-5, each gradient tensor to 1e-4 in relative norm; repeats bit for bit.

    A scale before a norm has a gradient whose terms cancel; float32 leaves their rounding there,
    which is measured against all gradients together.
    """
    config = make_config(combination)
    model, batch = example(config, 3, "cpu")
    reference = tl.GPT(config, None, "reference")
    for name, values in reference.params.items():
        values[...] = model.params[name]
    want, got = reference.loss_and_grad(*batch), model.loss_and_grad(*batch)
    assert got == pytest.approx(want, abs=1e-5)
    for name, grads in reference.grads.items():
        apart = np.linalg.norm(model.grads[name] - grads)
        assert apart <= 1e-4 * np.linalg.norm(grads) + 5e-7 * np.linalg.norm(reference.engine.grads), name
    first = model.engine.grads.copy()
    model.loss_and_grad(*batch)
    assert (model.engine.grads == first).all()


@pytest.mark.parametrize("combination", covering(3), ids=label)
def test_automatic_differentiation(combination):
    assert_same_gradients(make_config(combination), 1)


@pytest.mark.parametrize("combination", covering(2), ids=label)
def test_finite_differences(combination):
    model, batch = example(make_config(combination), 2)
    result = gradcheck(model, *batch)
    assert result.ok, result.failed


@pytest.mark.parametrize("combination", covering(1), ids=label)
def test_cpu_engine(combination):
    assert_engine_agrees(combination)
