"""Where numbers live: counts, and buffers in which nothing overlaps."""

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import PRESETS, configs
from tapeless.config import GPTConfig
from tapeless.engine import Engine
from tapeless.layout import (
    ALIGN,
    BATCH,
    Plan,
    activation_grads,
    activations,
    aligned_zeros,
    decoding,
    n_params,
    parameter_plan,
    parameters,
)
from tapeless.model import GPT


def test_microgpt_has_4192_parameters():
    assert n_params(PRESETS["microgpt"]) == 4192
    assert n_params(PRESETS["esp32gpt"]) == 4192
    assert n_params(PRESETS["esp32gpt-rms"]) == 4192


@pytest.mark.parametrize(
    ("layers", "heads", "width", "count"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_gpt2_has_its_published_sizes(layers, heads, width, count):
    config = GPTConfig(
        vocab_size=50257,
        block_size=1024,
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        norm="layer",
        norm_gain=True,
        norm_bias=True,
        norm_final=True,
        activation="gelu",
        bias=True,
        tied=True,
    )
    assert n_params(config) == count


@pytest.mark.parametrize(
    ("init", "spread"), [("gpt2", 0.02), ("microgpt", 0.08), ("esp32gpt", 0.1), ("width", 1 / 8)]
)
def test_first_weights_have_the_spread_of_their_scheme(init, spread):
    """GPT-2's scale the matrices that write into the residual stream by 1/√N, N of them: two a layer."""
    model = GPT(GPTConfig(vocab_size=50, n_layer=3, n_embd=64, n_head=4, init=init), 1, "reference")
    for name in ("wte", "wqkv", "wo", "w1", "w2", "head"):
        expected = spread / 6**0.5 if init == "gpt2" and name in ("wo", "w2") else spread
        assert model.params[name].std() == pytest.approx(expected, rel=0.05), name
        assert abs(model.params[name].mean()) < 0.1 * expected


@given(configs())
def test_parameters_have_the_sizes_of_the_formulas(config):
    V, C, T, L, F = config.vocab, config.n_embd, config.block_size, config.n_layer, config.n_hidden
    weights = V * C + T * C + L * (4 * C * C + 2 * C * F) + (0 if config.tied else V * C)
    biases = L * (5 * C + F) if config.bias else 0
    norms = config.norm_embed + L * (config.norm_attn + config.norm_mlp) + config.norm_final
    affine = norms * C * (config.norm_gain + config.norm_bias)
    assert n_params(config) == weights + biases + affine
    assert parameter_plan(config).size == n_params(config)


sizes = st.fixed_dictionaries(
    {"N": st.integers(1, 20), "D": st.integers(1, 5), "W": st.integers(1, 3), "X": st.integers(0, 9)}
)
dtypes = st.sampled_from([np.float32, np.float64])


@given(configs(), sizes, dtypes)
def test_plans_do_not_overlap(config, sizes, dtype):
    for tensors in (activations(config), activation_grads(config), decoding(config), BATCH):
        plan = Plan(tensors, dtype, sizes)
        buffer = plan.allocate()
        views = plan.views("views", buffer)
        base, end = buffer.ctypes.data, 0
        covered = np.zeros(plan.nbytes, int)
        for tensor, view in zip(tensors, views, strict=True):
            assert view.shape == tensor.resolve(sizes | {"D+1": sizes["D"] + 1})
            assert view.dtype == (dtype if tensor.dtype == "float" else tensor.dtype)
            assert view.flags.c_contiguous
            if view.size:
                start = view.ctypes.data - base
                assert start == plan.offsets[tensor.name]
                assert view.ctypes.data % ALIGN == 0
                assert end <= start < end + ALIGN
                end = start + view.nbytes
                covered[start:end] += 1
                view[...] = 1
        assert end == plan.nbytes == len(buffer)
        assert covered.max() == 1
        assert sum(view.sum() for view in views) == sum(view.size for view in views)


@given(configs(), dtypes)
def test_parameters_fill_their_buffer_without_gaps(config, dtype):
    plan = parameter_plan(config, dtype)
    buffer = plan.allocate()
    flat = buffer.view(dtype)
    views = plan.views("p", buffer)
    for tensor, view in zip(parameters(config), views, strict=True):
        assert view.shape == tensor.resolve({})
        view[...] += 1
    assert flat.size == n_params(config) == sum(prod(t.resolve({})) for t in parameters(config))
    assert np.array_equal(flat, np.ones(flat.size, dtype))
    # In order: the flat buffer is the tensors one after the other.
    flat[:] = np.arange(flat.size)
    assert np.array_equal(np.concatenate([view.ravel() for view in views]), flat)


@given(st.integers(0, 1000))
def test_buffers_start_on_a_cache_line(nbytes):
    buffer = aligned_zeros(nbytes)
    assert len(buffer) == nbytes
    assert buffer.ctypes.data % ALIGN == 0 or nbytes == 0
    assert not buffer.any()


def test_growing_keeps_the_largest_of_each_size():
    engine = Engine(PRESETS["microgpt"], "reference")
    engine.reserve(4, 3)
    engine.reserve(9, 1)
    assert engine.batch.tokens.shape == (9,)
    assert engine.batch.starts.shape == (4,)
    batch = engine.batch
    engine.reserve(9, 3)
    assert engine.batch is batch


def test_decoding_keeps_keys_and_values_instead_of_probabilities():
    config = PRESETS["microgpt"]
    names = [t.name for t in decoding(config)]
    assert "probs" not in names
    (cache,) = (t for t in decoding(config) if t.name == "cache")
    assert cache.shape == (1, 16, 2, 4, 4)
    assert all(t.resolve({"W": 1, "X": 0}) for t in decoding(config))  # nothing depends on the batch
