"""Equalities between architectures, and between decoding and the forward pass, for every preset."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapeless as tl
from helpers import PRESETS, random_batch, random_model
from tapeless.config import GPTConfig
from tapeless.layout import attention_scratch, n_params
from tapeless.ops import reference
from tapeless.ops.cpu import attention, native

ENGINES = [("reference", "float64"), ("reference", "float32"), ("cpu", "float32")]


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("preset", PRESETS)
def test_cached_decoding_gives_the_logits_of_the_full_pass(preset, engine):
    """One position at a time from cached keys and values, and beyond the block from the last T tokens."""
    config = PRESETS[preset]
    model, T = random_model(config, engine), config.block_size
    rng = np.random.default_rng(0)
    for length, new in ((1, 1), (3, T - 3), (T, 1), (T - 2, 6), (T + 5, 4), (1, 2 * T)):
        prompt = rng.integers(0, config.vocab, length).tolist()
        (row,), _ = model.engine.generate(prompt, 1, new, rng.random(new), temperature=1.0)
        decoded = model.engine._decoding[0].logits[0].copy()
        context = [*prompt, *row[:-1].tolist()][-T:]
        np.testing.assert_allclose(decoded, model.logits(context)[-1], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- hyper-connections


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
@pytest.mark.parametrize("streams", [2, 4])
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


# ---------------------------------------------------------------- flash attention


def attention_case(lengths, heads, head_dim, seed):
    rng = np.random.default_rng(seed)
    n, C = sum(lengths), heads * head_dim
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    sizes = np.array([n, len(lengths)], np.int32)
    return rng.normal(0, 1, (n, 3 * C)), rng.normal(0, 1, (n, C)), starts, sizes


def check_flash_attention(ops, dtype, case, heads, tile, scratch, tolerance):
    """`ops`' flash attention in `dtype` against the reference's full attention in float64."""
    qkv, dout, starts, sizes = case
    n, C = dout.shape
    full, dfull = np.zeros((n, C)), np.zeros((n, 3 * C))
    probs = np.zeros((n, heads, int(np.diff(starts).max())))
    reference.attention_forward(full, probs, qkv, starts, sizes)
    reference.attention_backward(dfull, dout, probs, qkv, starts, sizes)

    qkv, dout = qkv.astype(dtype), dout.astype(dtype)
    flash, lse, dflash = (np.full((n, width), np.nan, dtype) for width in (C, heads, 3 * C))
    ops["forward"](flash, lse, scratch[0], qkv, starts, sizes, tile)
    ops["backward"](dflash, scratch[1], dout, flash, lse, qkv, starts, sizes, tile)
    np.testing.assert_allclose(flash, full, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dflash, dfull, rtol=tolerance, atol=tolerance)
    # One key: the first query of each document. No gradient reaches it, or its key, through scores.
    assert not dflash[starts[:-1], :C].any()
    alone = starts[:-1][np.diff(starts) == 1]
    assert not dflash[alone, : 2 * C].any()


REFERENCE = {
    "forward": reference.flash_attention_forward,
    "backward": reference.flash_attention_backward,
}


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    tile=st.integers(1, 13),
    seed=st.integers(0, 999),
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-12)])
def test_flash_attention_equals_full_attention(dtype, tolerance, lengths, heads, head_dim, tile, seed):
    """For tiles that divide the length and tiles that do not, forward and backward, to rounding."""
    case = attention_case(lengths, heads, head_dim, seed)
    check_flash_attention(REFERENCE, dtype, case, heads, tile, (None, None), tolerance)


# By rows: heads that share a vector, fill one, need two. By tiles: long, or heads of odd sizes.
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(2, 9), (4, 16), (16, 5), (32, 16), (5, 11), (4, 40), (32, 70), (20, 150)]
)
def test_compiled_attention_equals_full_attention(head_dim, block_size):
    native.link_routines()
    made = attention.make_ops(head_dim, block_size)
    ops = {
        pass_: numba.njit(made[f"flash_attention_{pass_}"], fastmath=native.FASTMATH)
        for pass_ in ("forward", "backward")
    }

    @settings(max_examples=40)
    @given(
        lengths=st.lists(st.integers(1, block_size), min_size=1, max_size=4),
        heads=st.integers(1, 5),
        seed=st.integers(0, 999),
    )
    def check(lengths, heads, seed):
        config = GPTConfig(block_size=block_size, n_head=heads, n_embd=heads * head_dim)
        # What earlier batches left in the scratch must not matter.
        scratch = [np.full(size, np.nan, "f4") for size in attention_scratch(config)]
        case = attention_case(lengths, heads, head_dim, seed)
        check_flash_attention(ops, "float32", case, heads, 32, scratch, 3e-5)

    check()
