"""Flash attention, the reference's and the compiled one, against full attention in float64."""

from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeless.config import GPTConfig
from tapeless.layout import attention_scratch
from tapeless.ops import reference
from tapeless.ops.cpu import attention, native
from tapeless.ops.cpu.share import Documents, Rows
from tapeless.ops.cpu.simd import LANES


def attention_case(lengths, heads, head_dim, seed):
    rng = np.random.default_rng(seed)
    n, C = sum(lengths), heads * head_dim
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return rng.normal(0, 1, (n, 3 * C)), rng.normal(0, 1, (n, C)), starts


def check_flash_attention(ops, dtype, case, heads, tile, scratch, tolerance):
    """`ops`' flash attention in `dtype` against the reference's full attention in float64."""
    qkv, dout, starts = case
    docs = list(pairwise(starts))
    n, C = dout.shape
    full, dfull = np.zeros((n, C)), np.zeros((n, 3 * C))
    probs = np.zeros((n, heads, int(np.diff(starts).max())))
    reference.attention_forward(full, probs, qkv, docs)
    reference.attention_backward(dfull, dout, probs, qkv, docs)

    qkv, dout = qkv.astype(dtype), dout.astype(dtype)
    # What lies behind a result must be left alone.
    widths = C, heads, 3 * C
    guarded = [np.full(n * width + 64, np.nan, dtype) for width in widths]
    flash, lse, dflash = (g[:-64].reshape(n, width) for g, width in zip(guarded, widths, strict=True))
    if ops is not REFERENCE:
        count, arrivals = len(docs), np.zeros((1, 8), np.int64)
        docs = Documents(
            starts, 0, count, count, False, Rows(0, n, n, 0, 1, arrivals, np.zeros((1, 0), "f4"))
        )
    ops["forward"](flash, lse, scratch[0], qkv, docs, tile)
    ops["backward"](dflash, scratch[1], dout, flash, lse, qkv, docs, tile)
    np.testing.assert_allclose(flash, full, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dflash, dfull, rtol=tolerance, atol=tolerance)
    assert all(np.isnan(g[-64:]).all() for g in guarded)
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
    ("head_dim", "block_size"), [(2, 9), (4, 16), (16, 5), (32, 16), (5, 11), (8, 40), (12, 27), (24, 150)]
)
def test_compiled_attention_equals_full_attention(head_dim, block_size):
    made = attention.make_ops(head_dim, block_size)
    ops = {
        pass_: numba.njit(made[f"flash_attention_{pass_}"], fastmath=native.FASTMATH)
        for pass_ in ("forward", "backward")
    }

    @settings(max_examples=30)
    @given(
        lengths=st.lists(st.integers(1, block_size), min_size=1, max_size=4),
        heads=st.integers(1, 5) | st.sampled_from([LANES, 2 * LANES]),
        seed=st.integers(0, 999),
    )
    def check(lengths, heads, seed):
        config = GPTConfig(block_size=block_size, n_head=heads, n_embd=heads * head_dim)
        # What earlier batches left in the scratch must not matter.
        scratch = [np.full((1, size), np.nan, "f4") for size in attention_scratch(config)]
        case = attention_case(lengths, heads, head_dim, seed)
        check_flash_attention(ops, "float32", case, heads, 32, scratch, 3e-5)

    check()
