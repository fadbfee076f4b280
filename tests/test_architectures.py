"""Equalities between architectures, and between decoding and the forward pass, for every preset."""

from __future__ import annotations

import numpy as np
import pytest

import tapeless as tl
from helpers import PRESETS, random_batch, random_model
from tapeless.layout import n_params
from tapeless.ops import reference

COMPILED = ("microgpt", "flashmicrogpt", "gpt2")  # by `make test`; the oracles compile all
ENGINES = [("reference", "float64"), ("reference", "float32"), ("cpu", "float32")]


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("preset", "engine"),
    [
        *((preset, "reference") for preset in PRESETS),
        *((preset, "cpu") for preset in COMPILED),
        *(pytest.param(p, "cpu", marks=pytest.mark.oracle) for p in PRESETS if p not in COMPILED),
    ],
)
def test_cached_decoding_gives_the_logits_of_the_full_pass(preset, engine):
    """One position at a time from cached keys and values, and beyond the block from the last T tokens."""
    config = PRESETS[preset]
    model, T = random_model(config, engine), config.block_size
    rng = np.random.default_rng(0)
    for length, new in ((1, 1), (3, T - 3), (T, 1), (T - 2, 6), (T + 5, 4), (1, 2 * T)):
        prompt = rng.integers(0, config.vocab, length).tolist()
        (row,), _ = model.engine.generate(prompt, 1, new, rng.random(new), temperature=1.0)
        decoded = model.engine._decoding[0][0].logits[0].copy()
        context = [*prompt, *row[:-1].tolist()][-T:]
        np.testing.assert_allclose(decoded, model.logits(context)[-1], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- hyper-connections


@pytest.mark.parametrize(
    ("streams", "engine", "dtype"),
    [
        *((streams, *engine) for streams in (2, 4) for engine in ENGINES[:2]),
        *(pytest.param(streams, *ENGINES[2], marks=pytest.mark.oracle) for streams in (2, 4)),
    ],
)
def test_hyper_connections_begin_as_the_plain_residual(streams, engine, dtype):
    """With two or four streams, halves and quarters: equal to the last bit."""
    plain = tl.GPTConfig(vocab_size=9, block_size=6, n_layer=2, n_head=2, n_embd=8, norm_embed=True)
    mhc = plain.replace(residual="mhc", n_streams=streams)
    a, b = tl.GPT(plain, 3, engine, dtype=dtype), tl.GPT(mhc, 3, engine, dtype=dtype)
    for name, values in a.params.items():
        assert (b.params[name] == values).all()
    batch = random_batch(plain, [1, 6, 3], seed=0)
    assert a.loss_and_grad(*batch) == pytest.approx(b.loss_and_grad(*batch), rel=1e-6)
    np.testing.assert_allclose(
        a.logits(batch.tokens, batch.starts), b.logits(batch.tokens, batch.starts), rtol=1e-5
    )
    # Streams that are equal have no gradient to mix them: exactly none, or Adam would make full steps.
    assert not b.grads["mix1"].any()
    assert not b.grads["mix2"].any()


def test_the_mixing_matrix_is_doubly_stochastic():
    rng = np.random.default_rng(0)
    for S in (3, 4, 7):
        A, trace = np.empty((S, S)), np.empty((41, S, S))
        reference.sinkhorn_forward(A, trace, rng.normal(0, 1, (S, S)))
        assert (A > 0).all()
        np.testing.assert_allclose(A.sum(1), 1, rtol=1e-14)
        np.testing.assert_allclose(A.sum(0), 1, rtol=1e-6)


def test_flashmicrogpt_has_4204_parameters():
    assert n_params(tl.presets["flashmicrogpt"].model.replace(vocab_size=27)) == 4204


def test_flashmicrogpt_learns_names_as_microgpt_does():
    last = {}
    for preset in ("microgpt", "flashmicrogpt"):
        losses = tl.train("names", preset, samples=0, progress=False).losses
        assert losses[:5].mean() > 3
        last[preset] = losses[-200:].mean()
    assert last["microgpt"] < 2.4
    assert abs(last["flashmicrogpt"] - last["microgpt"]) < 0.1
