"""Products in bfloat16, and generating at the memory's speed, against the reference engine."""

from __future__ import annotations

import numpy as np
import pytest

import tapeless as tl
from commands import refused, succeeds
from helpers import as_bfloat16, random_batch
from tapeless.errors import ConfigError
from tapeless.layout import streamed_width

# Large enough to stream its weights when it generates; 4 streams on 3 threads leave rows over.
LARGE = tl.presets["gpt2"].model.replace(vocab_size=57, block_size=12, n_layer=2, n_head=4, n_embd=256)
UNTIED = LARGE.replace(tied=False, bias=False, norm_bias=False, n_hidden=320)


def models(config, threads=2):
    """The same weights in three engines; of GPT-2's size, since rounding tears apart a chaotic model."""
    exact = tl.GPT(config, 0, "reference")
    exact.engine.params[:] = exact.engine.params.astype("f4")
    made = [tl.GPT(config.replace(precision=p), None, threads=threads) for p in ("float32", "bf16")]
    for model in made:
        model.engine.params[:] = exact.engine.params
    return exact, *made


KINDS = [LARGE, pytest.param(UNTIED, marks=pytest.mark.oracle)]


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("config", KINDS, ids=["tied", "untied"])
def test_gradients_in_bfloat16_are_near(config):
    """bfloat16 has 8 bits: each product is off by up to 2⁻⁸, and the gradients by about that."""
    exact, full, half = models(config)
    batch = random_batch(config, [12, 5, 12, 1], 0)
    loss = exact.loss_and_grad(*batch)
    assert abs(full.loss_and_grad(*batch) / loss - 1) <= 1e-6
    assert 1e-7 < abs(half.loss_and_grad(*batch) / loss - 1) <= 2e-3
    assert relative(full.engine.grads, exact.engine.grads) <= 1e-4
    assert 1e-4 < relative(half.engine.grads, exact.engine.grads) <= 5e-2


def test_training_in_bfloat16_keeps_weights_in_float32():
    options = {"steps": 60, "batch_size": 8, "samples": 0, "progress": False}
    half = tl.train(set={"precision": "bf16"}, **options)
    full = tl.train(**options)
    difference = np.abs(half.losses - full.losses)
    assert 0 < difference.max() <= 0.05
    params = half.model.params["wqkv"]
    assert params.dtype == np.float32
    assert not np.array_equal(params, as_bfloat16(params))


@pytest.mark.parametrize("prompt", [[3], [3, 1, 4, 1, 5]], ids=len)
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.oracle), 3])
@pytest.mark.parametrize("config", KINDS, ids=["tied", "untied"])
def test_generating_reads_the_weights_it_should(config, threads, prompt):
    """Logits of each new token: the reference's, with weights in float32 or rounded to bfloat16."""
    assert streamed_width(config) > 0
    exact, full, half = models(config, threads)
    uniforms = np.linspace(0, 0.99, 50)
    for model, rounded in ((full, False), (half, True)):
        if rounded:
            for name, value in exact.params.items():
                if name in ("wqkv", "wo", "w1", "w2") or (name == "wte" and config.tied):
                    value[:] = as_bfloat16(value)
        (row,), _ = model.engine.generate(prompt, 1, 6, uniforms, temperature=1.0)
        tokens = [*prompt, *row.tolist()]
        logits = exact.logits(tokens[:-1])[-1]
        # A prompt and a head of its own are multiplied as in training, with both operands rounded.
        both = rounded and (len(prompt) > 1 or not config.tied)
        tolerance = 1e-2 if both else 1e-4
        np.testing.assert_allclose(model.engine._decoding[0][0].logits[0], logits, rtol=0, atol=tolerance)


def test_weights_that_change_are_read_anew():
    _, _, half = models(LARGE)
    uniforms = np.linspace(0, 0.99, 50)
    first, _ = half.engine.generate([1], 2, 9, uniforms)
    half.params["wte"][:] *= -1
    second, _ = half.engine.generate([1], 2, 9, uniforms)
    assert [r.tolist() for r in first] != [r.tolist() for r in second]


# ---------------------------------------------------------------- users


def test_the_commands(tmp_path):
    options = ("--steps", 4, "--samples", 1, "--out", "run")
    result = succeeds("train", *options, "--precision", "bf16", cwd=tmp_path)
    assert "products in bfloat16" in result.stderr
    assert "bfloat16" not in succeeds("train", *options, "--overwrite", cwd=tmp_path).stderr
    succeeds("train", "--resume", "--out", "run", "--steps", 6, "--precision", "bf16", cwd=tmp_path)
    succeeds("sample", "run", "-n", 1, "--precision", "bf16", cwd=tmp_path)
    succeeds("eval", "run", "names", "--precision", "float32", cwd=tmp_path)
    assert "precision" in refused("train", "--precision", "fp8", cwd=tmp_path)


def test_unknown_precisions_are_refused():
    with pytest.raises(ConfigError, match="precision cannot be 'half'"):
        LARGE.replace(precision="half")
