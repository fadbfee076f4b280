"""The gradients: every entry against finite differences, and what must hold of them exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    PRESETS,
    Batch,
    configs,
    gradient_mistakes,
    grads,
    lengths_of,
    random_batch,
    random_model,
    relative,
)
from tapeless.config import GPTConfig
from tapeless.ops import reference

# ---------------------------------------------------------------- finite differences


@pytest.mark.oracle
@pytest.mark.parametrize("lengths", [[16], [1, 16, 3, 7]], ids=["document", "packed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_entry_of_a_preset(preset, lengths):
    config = PRESETS[preset]
    model = random_model(config)
    assert gradient_mistakes(model, random_batch(config, lengths, seed=1)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_every_seventh_entry_of_a_preset(preset):
    """Of every tensor some, since none has fewer than seven in a row but the hyper-connections' numbers."""
    config = PRESETS[preset]
    model = random_model(config)
    assert gradient_mistakes(model, random_batch(config, [1, 16, 3, 7], seed=1), every=7) == []


@given(st.data())
@settings(max_examples=40)
def test_every_entry_of_small_models(data):
    config = data.draw(configs())
    batch = random_batch(
        config, data.draw(lengths_of(config)), data.draw(st.integers(0, 99)), data.draw(st.booleans())
    )
    model = random_model(config, seed=data.draw(st.integers(0, 99)))
    assert gradient_mistakes(model, batch) == []


# ---------------------------------------------------------------- the check itself

SMALL = GPTConfig(
    vocab_size=5,
    block_size=4,
    n_head=2,
    n_embd=4,
    n_hidden=6,
    norm="rms",
    norm_gain=True,
    norm_final=True,
    tied=True,
    bias=True,
)
RELU, GELU = SMALL, SMALL.replace(activation="gelu", norm="layer", norm_bias=True)


def negated(op):
    """An op that overwrites its first buffer, with the sign of that wrong."""

    def wrong(out, *rest):
        op(out, *rest)
        out *= -1

    return wrong


def rmsnorm_with_constant_rstd(dx, dw, db, dy, x, mean, rstd, w, n):
    dw += np.sum(dy[:n] * x[:n] * rstd[:n, None], axis=0)
    dx[:n] += rstd[:n, None] * dy[:n] * w


def layernorm_with_constant_mean(dx, dw, db, dy, x, mean, rstd, w, n):
    xhat = (x[:n] - mean[:n, None]) * rstd[:n, None]
    g = dy[:n] * w
    dw += np.sum(dy[:n] * xhat, axis=0)
    db += np.sum(dy[:n], axis=0)
    dx[:n] += rstd[:n, None] * (g - xhat * np.mean(g * xhat, axis=-1, keepdims=True))


def embed_losing_repeated_tokens(dwte, dwpe, dx, tokens, positions, n):
    dwte[tokens[:n]] += dx[:n]  # NumPy keeps one of several additions to the same row
    np.add.at(dwpe, positions[:n], dx[:n])


def linear_with_one_entry_slightly_off(dx, dw, db, dy, x, w, n):
    reference_linear_backward(dx, dw, db, dy, x, w, n)
    dw[0, 0] *= 1 + 1e-5


def tied_head_forgetting_the_embedding(dx, dwte, dlogits, x, wte, n):
    np.matmul(dlogits[:n], wte, out=dx[:n])


reference_linear_backward = reference.linear_backward
MISTAKES = [
    ("linear_backward", negated(reference.linear_backward), RELU),
    ("linear_backward", linear_with_one_entry_slightly_off, RELU),
    ("attention_backward", negated(reference.attention_backward), RELU),
    ("relu_backward", lambda du, dv, u, n: np.copyto(du[:n], dv[:n]), RELU),
    ("gelu_backward", negated(reference.gelu_backward), GELU),
    ("rmsnorm_backward", rmsnorm_with_constant_rstd, RELU),
    ("layernorm_backward", layernorm_with_constant_mean, GELU),
    ("embed_backward", embed_losing_repeated_tokens, RELU),
    ("tied_head_backward", tied_head_forgetting_the_embedding, RELU),
    ("cross_entropy_backward", negated(reference.cross_entropy_backward), RELU),
    ("accumulate", lambda y, x, n: None, RELU.replace(norm_mlp=False)),
]


@pytest.mark.parametrize(
    ("op", "wrong", "config"), MISTAKES, ids=[f"{m[0]}-{i}" for i, m in enumerate(MISTAKES)]
)
def test_a_planted_mistake_is_found(monkeypatch, op, wrong, config):
    batch = Batch(np.array([1, 2, 1, 0, 1]), np.array([2, 1, 4, 1, 3]), np.array([0, 4, 5]))
    assert gradient_mistakes(random_model(config), batch) == []
    monkeypatch.setattr(reference, op, wrong)
    assert gradient_mistakes(random_model(config), batch) != []


# ---------------------------------------------------------------- batches and weights


@given(st.data())
@settings(max_examples=60)
def test_a_batch_is_the_token_weighted_mean_of_its_documents(data):
    config = data.draw(configs(max_width=12))
    batch = random_batch(config, data.draw(lengths_of(config, 6)), data.draw(st.integers(0, 99)))
    model = random_model(config)
    together = grads(model, batch)
    loss = model.loss(*batch)
    losses, apart = 0.0, {name: np.zeros_like(g) for name, g in together.items()}
    for s in range(len(batch.starts) - 1):
        one = batch.document(s)
        share = len(one.tokens) / len(batch.tokens)
        losses += share * model.loss(*one)
        for name, g in grads(model, one).items():
            apart[name] += share * g
    assert abs(loss - losses) <= 1e-12 * loss
    size = np.linalg.norm(model.engine.grads)
    for name, g in together.items():
        # Tensors whose gradient cancels to rounding noise (a key's bias) are measured by the whole.
        assert np.linalg.norm(g - apart[name]) <= 1e-12 * max(np.linalg.norm(g), 1e-3 * size), name


@given(st.data())
@settings(max_examples=40)
def test_weights_combine_the_losses_of_single_tokens(data):
    config = data.draw(configs())
    batch = random_batch(config, data.draw(lengths_of(config)), data.draw(st.integers(0, 99)), weighted=True)
    model = random_model(config)
    together = grads(model, batch)
    loss = model.loss(*batch)
    losses, combined = 0.0, {name: np.zeros_like(g) for name, g in together.items()}
    for t, share in enumerate(batch.weights / batch.weights.sum()):
        only = batch._replace(weights=np.eye(len(batch.tokens))[t])
        losses += share * model.loss(*only)
        for name, g in grads(model, only).items():
            combined[name] += share * g
    assert abs(loss - losses) <= 1e-12 * loss
    size = np.linalg.norm(model.engine.grads)
    for name, g in together.items():
        assert np.linalg.norm(g - combined[name]) <= 1e-12 * max(np.linalg.norm(g), size), name


@pytest.mark.parametrize("preset", PRESETS)
def test_tokens_of_weight_zero_contribute_nothing(preset):
    config = PRESETS[preset]
    model = random_model(config)
    batch = random_batch(config, [5, 1, 16], seed=3)
    weights = np.ones(22)
    weights[[0, 5, 9, 21]] = 0
    batch = batch._replace(weights=weights)
    targets = np.where(weights == 0, (batch.targets + 1) % config.vocab, batch.targets)
    other = batch._replace(targets=targets)
    assert model.loss(*batch) == model.loss(*other)
    for a, b in zip(grads(model, batch).values(), grads(model, other).values(), strict=True):
        assert np.array_equal(a, b)
    # A document of weight 0 is as good as absent; the mean is over the weights that are left.
    masked = batch._replace(weights=np.repeat([1.0, 1.0, 0.0], [5, 1, 16]))
    without = Batch(batch.tokens[:6], batch.targets[:6], batch.starts[:3])
    assert model.loss(*masked) == pytest.approx(model.loss(*without), rel=1e-14)
    without_grads = grads(model, without)
    for name, g in grads(model, masked).items():
        assert relative(g, without_grads[name]) <= 1e-12, name


def test_scaling_all_weights_changes_nothing():
    model = random_model(RELU)
    batch = random_batch(RELU, [4, 2], seed=0, weighted=True)
    scaled = batch._replace(weights=8 * batch.weights)  # by a power of two, which rounds nothing
    assert model.loss(*batch) == model.loss(*scaled)
