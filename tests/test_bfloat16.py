"""Rounding to bfloat16, of exact ties, NaN and the ends of the range, wherever it is done.

The judges are ml_dtypes, and the rule itself in whole numbers.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest

import tapeless as tl
from helpers import random_batch, random_model, relative
from tapeless.engine import Engine
from tapeless.io import llmc
from tapeless.io.checkpoints import Checkpoint
from tapeless.io.tensors import Held
from tapeless.layout import streamed_width, view_class
from tapeless.ops import reference
from tapeless.ops.cpu import native
from tapeless.programs import WEIGHTS

HERE = str(Path(__file__).parent)

# Of every bfloat16: itself, the number after it, those before, at and after the tie with the next bfloat16,
# and the last one before that.
LOWER = (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
BITS = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array(LOWER, np.uint32)).ravel()
NUMBERS = BITS.view(np.float32)
TINY = np.finfo(np.float32).tiny


def nearest(x):
    """The bfloat16s nearest to float32s."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return x.astype(ml_dtypes.bfloat16)


def without_subnormals(x):
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def test_the_judges_agree():
    words = nearest(NUMBERS).view(np.uint16).astype(np.int64)
    upper, lower = BITS.astype(np.int64) >> 16, BITS & 0xFFFF
    odd = upper & 1
    up = (lower > 0x8000) | ((lower == 0x8000) & (odd == 1))
    numbers = ~np.isnan(NUMBERS)
    np.testing.assert_array_equal(words[numbers], (upper + up)[numbers])
    assert np.isnan(nearest(NUMBERS)[~numbers].astype("f4")).all()


def test_the_reference():
    for dtype in ("f4", "f8"):
        with np.errstate(invalid="ignore"):
            numbers = NUMBERS.astype(dtype)
        rounded = reference.as_bfloat16(numbers)
        assert rounded.dtype == dtype
        want = nearest(without_subnormals(NUMBERS)).astype("f4")
        np.testing.assert_array_equal(rounded, want)
        np.testing.assert_array_equal(np.signbit(rounded)[want == 0], np.signbit(want)[want == 0])


# Products with 1 in which one operand has the numbers: row by row or transposed, and as the first or the
# second term of a pair.
PRODUCTS = f"""
import sys
sys.path.insert(0, {HERE!r})
import numpy as np
from tapeless.ops.cpu.native import bf16_path
from tapeless.ops.cpu.routines import from_python
from test_bfloat16 import NUMBERS, nearest, without_subnormals

product = from_python("product_bf16")
want = nearest(without_subnormals(NUMBERS)).astype("f4")
n = len(NUMBERS)
for turned in False, True:
    for place in 0, 1:
        values, ones = np.zeros((2, n), "f4"), np.zeros((16, 2), "f4")
        values[place], ones[:, place] = NUMBERS, 1
        stored = np.ascontiguousarray(values.T) if turned else values
        down, across = (1, 2) if turned else (n, 1)  # from term to term, from number to number
        address, one = stored.ctypes.data, ones.ctypes.data
        y = np.full((1, n), 7, "f4")
        product(y.ctypes.data, n, 0, 0, one, 2, 1, address, down, across, 1, n, 2)
        np.testing.assert_array_equal(y[0], want, f"w, turned {{turned}}, place {{place}}")
        y = np.full((n, 16), 7, "f4")
        other = np.ascontiguousarray(ones.T).ctypes.data
        product(y.ctypes.data, 16, 0, 0, address, across, down, other, 16, 1, n, 16, 2)
        every = want[:, None].repeat(16, 1)
        np.testing.assert_array_equal(y, every, f"x, turned {{turned}}, place {{place}}")
print(bf16_path())
"""


@pytest.mark.parametrize("path", ["here", "emulated", "AVX2"])
def test_products(path, child):
    features = native.processor()[1]
    lesser = {
        "emulated": {"NUMBA_CPU_FEATURES": features.replace("+avx512bf16", "-avx512bf16")},
        "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx,+bmi,+sse4.2"},
    }
    if path != "here" and native.bf16_path() == "emulated":
        pytest.skip("this processor has no instructions for bfloat16: what it does is emulated")
    assert child(PRODUCTS, **lesser.get(path, {})) == (native.bf16_path() if path == "here" else "emulated")


def test_narrow_products():
    from tapeless.ops.cpu.bfloat import nearest as one

    @numba.njit
    def each(y, x):
        for i in range(x.size):
            y[i] = one(x[i])

    y = np.empty_like(NUMBERS)
    each(y, NUMBERS)
    np.testing.assert_array_equal(y, nearest(without_subnormals(NUMBERS)).astype("f4"))


def test_weights_that_are_stored_to_generate():
    """These are widened and multiplied as float32, so subnormal numbers stay what they are."""
    config = tl.GPTConfig(vocab_size=5, n_embd=256, n_head=4, precision="bf16")
    assert streamed_width(config) > 0
    rounded = np.zeros(len(NUMBERS), np.uint16)
    Engine(config)._run("round", [(view_class("weights", WEIGHTS)(NUMBERS, rounded),)])
    want = nearest(NUMBERS)
    np.testing.assert_array_equal(rounded.view(ml_dtypes.bfloat16).astype("f4"), want.astype("f4"))


def test_files(tmp_path):
    """llm.c's version 5 has the words of all numbers, in whatever order. (It refuses NaN and infinity.)"""
    config = tl.presets["gpt2"].model.replace(vocab_size=128, block_size=8, n_layer=1, n_head=2, n_embd=128)
    model = tl.GPT(config, None, "reference", dtype="float32")
    kept = NUMBERS[np.isfinite(nearest(NUMBERS).astype("f4"))]
    model.engine.params[:] = np.random.default_rng(0).choice(kept, model.engine.params.size, replace=False)
    held = {name: [Held(value)] for name, value in model.params.items()}
    path = tmp_path / "model.bin"
    llmc.write_model(path, Checkpoint(path, "weights", config, held, tmp_path), "bf16")
    words = np.fromfile(path, np.uint16, offset=4 * 256)
    np.testing.assert_array_equal(np.sort(words), np.sort(nearest(model.engine.params).view(np.uint16)))
    loaded = tl.load(path)
    for name, value in model.params.items():
        np.testing.assert_array_equal(loaded.params[name], nearest(value).astype("f4"))


# ---------------------------------------------------------------- whole models

WIDE = tl.GPTConfig(vocab_size=40, block_size=8, n_head=2, n_embd=32, n_hidden=48, norm="rms", bias=True)
NARROW = tl.GPTConfig(vocab_size=3, block_size=8, n_head=1, n_embd=2, n_hidden=3, norm="rms", bias=True)


@pytest.mark.parametrize(
    "config", [WIDE, WIDE.replace(tied=True), NARROW], ids=["wide", "tied", "narrower than a vector"]
)
@pytest.mark.parametrize("lengths", [[8, 5, 1], [2]], ids=["many rows", "few rows"])
def test_the_cpu_engine_multiplies_what_the_reference_multiplies(config, lengths):
    """In a model of one layer and few tokens hardly any operand lies so near to a tie that float32's other
    rounding of sums decides: the gradients are the same to float32's rounding."""
    half = random_model(config.replace(precision="bf16"), "cpu")
    alike, exact = (random_model(c, "reference") for c in (half.config, config))
    for model in (alike, exact):
        model.engine.params[:] = half.engine.params
    batch = random_batch(config, lengths, 1)
    losses = [model.loss_and_grad(*batch) for model in (half, alike, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert relative(half.engine.grads, alike.engine.grads) <= 1e-6
    assert relative(half.engine.grads, exact.engine.grads) >= 1e-4
