"""Learning rates, optimisers and clipping, against plain arithmetic and worked by hand."""

import math

import numpy as np
import pytest

from helpers import PRESETS, random_batch, random_model
from tapeless.config import GPTConfig
from tapeless.layout import decay_segments, n_params, parameters
from tapeless.ops import reference
from tapeless.ops.cpu import optim
from tapeless.optim import learning_rates
from tapeless.settings import Training

# ---------------------------------------------------------------- learning rates


def plain_rate(t: Training, i: int) -> float:
    """The learning rate of step i, as a training loop would write it."""
    if i < t.warmup_steps:
        return t.lr * (i + 1) / t.warmup_steps
    if t.schedule == "constant":
        return t.lr
    progress = (i - t.warmup_steps) / (t.steps - t.warmup_steps)
    if t.schedule == "linear":
        return t.lr + progress * (t.min_lr - t.lr)
    return t.min_lr + (1 + math.cos(math.pi * progress)) / 2 * (t.lr - t.min_lr)


@pytest.mark.parametrize("min_lr", [0.0, 3e-4])
@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates(schedule, warmup, min_lr):
    t = Training(steps=40, lr=3e-3, min_lr=min_lr, schedule=schedule, warmup_steps=warmup)
    rates = learning_rates(t, 0, 40)
    np.testing.assert_allclose(rates, [plain_rate(t, i) for i in range(40)], rtol=1e-12)
    # Any part of them is the same as all of them: training stops and goes on anywhere.
    for first, count in [(0, 1), (7, 9), (10, 1), (39, 1), (5, 0)]:
        assert np.array_equal(learning_rates(t, first, count), rates[first : first + count])


def test_learning_rates_by_hand():
    def of(schedule: str, warmup: int = 0) -> list[float]:
        t = Training(steps=4 + warmup, lr=1.0, min_lr=0.2, schedule=schedule, warmup_steps=warmup)
        return learning_rates(t, 0, t.steps).tolist()

    half = 0.4 * math.sqrt(0.5)
    assert of("constant") == [1, 1, 1, 1]
    assert of("linear") == pytest.approx([1, 0.8, 0.6, 0.4])
    assert of("cosine") == pytest.approx([1, 0.6 + half, 0.6, 0.6 - half])
    for schedule in ("constant", "linear", "cosine"):
        assert of(schedule, warmup=2) == pytest.approx([0.5, 1.0, *of(schedule)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(5, 5), (5, 50), (1, 0), (1, 1)])
def test_learning_rates_of_short_runs_are_finite_and_positive(schedule, steps, warmup):
    t = Training(steps=steps, lr=0.1, schedule=schedule, warmup_steps=warmup)
    rates = learning_rates(t, 0, steps)
    assert (rates > 0).all()
    assert (rates <= t.lr).all()


# ---------------------------------------------------------------- one step by hand

# The CPU functions are plain Python until compiled.
OPS = {"reference": (reference, np.float64, 1e-14), "cpu": (optim, np.float32, 5e-7)}


@pytest.fixture(params=OPS)
def ops(request):
    return OPS[request.param]


def test_global_norm_by_hand(ops):
    functions, dtype, tolerance = ops
    assert functions.global_norm(np.array([3, 0, -4, 12], dtype)) == pytest.approx(13, rel=tolerance)
    assert functions.global_norm(np.zeros(3, dtype)) == 0


def test_sgd_by_hand(ops):
    functions, dtype, tolerance = ops
    p, m = np.array([1, -2], dtype), np.zeros(2, dtype)
    g = np.array([2, 4], dtype)
    functions.sgd(p, g, m, 0.1, 0.0, 1.0)  # p − 0.1·g
    np.testing.assert_allclose(p, [0.8, -2.4], rtol=tolerance)
    m[:] = 0
    functions.sgd(p, g, m, 0.1, 0.5, 0.25)  # m = g/4
    np.testing.assert_allclose(p, [0.75, -2.5], rtol=tolerance)
    functions.sgd(p, -g, m, 0.1, 0.5, 0.25)  # m = g/8 − g/4
    np.testing.assert_allclose(m, [-0.25, -0.5], rtol=tolerance)
    np.testing.assert_allclose(p, [0.775, -2.45], rtol=tolerance)


def test_sgd_without_momentum_keeps_nothing(ops):
    functions, dtype, tolerance = ops
    p, none = np.array([1, -2], dtype), np.zeros(0, dtype)
    functions.sgd(p, np.array([2, 4], dtype), none, 0.1, 0.0, 0.5)  # p − 0.05·g
    np.testing.assert_allclose(p, [0.9, -2.2], rtol=tolerance)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("optimiser", "momentum", "kept"), [("sgd", 0, ""), ("sgd", 0.9, "m"), ("adamw", 0, "mv")]
)
def test_an_engine_keeps_the_moments_of_its_optimiser(engine, optimiser, momentum, kept):
    engine = random_model(BIASED, engine).engine
    engine.optimiser.constants[:5] = 0.9, 0.99, 1e-8, 0, momentum
    engine.train(np.arange(9, dtype=np.int32) % 7, np.array([[[0, 6]]]), np.array([0.1]), optimiser)
    assert engine.state.keys() == {"params", "powers", "means", *kept}
    assert all(engine.state[name].shape == engine.params.shape for name in kept)


def test_adamw_by_hand(ops):
    functions, dtype, tolerance = ops
    p = np.array([1, -1, 10, 10], dtype)
    m, v, powers = np.zeros(4, dtype), np.zeros(4, dtype), np.ones(2)
    segments = np.array([[0, 3, 0], [3, 4, 1]])  # the last decays
    rest = (0.1, 0.5, 0.75, 1e-20, 0.2)  # lr, beta1, beta2, eps, weight_decay

    # Bias correction makes the first step lr·sign(g), whatever the size of g and its scale.
    functions.adamw(p, np.array([3, -5, 0, 0], dtype), m, v, powers, segments, *rest, 2.0)
    np.testing.assert_allclose(p, [0.9, -0.9, 10, 10 * (1 - 0.02)], rtol=tolerance)
    np.testing.assert_allclose(m, [3, -5, 0, 0], rtol=tolerance)
    np.testing.assert_allclose(v, [9, 25, 0, 0], rtol=tolerance)
    np.testing.assert_allclose(powers, [0.5, 0.75])

    # m = 1.5 and 1 − β₁² = 3/4;  v = 6.75 and 1 − β₂² = 7/16.
    functions.adamw(p, np.zeros(4, dtype), m, v, powers, segments, *rest, 1.0)
    step = 0.1 * (1.5 / 0.75) / math.sqrt(6.75 / 0.4375)
    np.testing.assert_allclose(p, [0.9 - step, -0.9 + step, 10, 10 * 0.98**2], rtol=tolerance)
    np.testing.assert_allclose(powers, [0.25, 0.5625])


def test_eps_is_added_after_the_root(ops):
    functions, dtype, tolerance = ops
    p, m, v = np.zeros(1, dtype), np.zeros(1, dtype), np.zeros(1, dtype)
    functions.adamw(p, np.ones(1, dtype), m, v, np.ones(2), np.array([[0, 1, 0]]), 0.3, 0.9, 0.9, 0.5, 0, 1)
    np.testing.assert_allclose(p, [-0.3 / 1.5], rtol=tolerance)


# ---------------------------------------------------------------- the two engines' functions


def test_the_cpu_functions_equal_the_reference():
    rng = np.random.default_rng(0)
    size, segments = 60, np.array([[0, 20, 1], [20, 37, 0], [37, 60, 1]])
    start = rng.normal(size=size).astype(np.float32)
    gradients = rng.normal(size=(20, size)).astype(np.float32)
    states = []
    for functions, dtype, _ in OPS.values():
        p, m, v, powers = start.astype(dtype), np.zeros(size, dtype), np.zeros(size, dtype), np.ones(2)
        q, momentum = start.astype(dtype), np.zeros(size, dtype)
        for k, gradient in enumerate(gradients):
            g = gradient.astype(dtype)
            scale = min(1.0, 7.5 / functions.global_norm(g))
            lr = 0.01 * (k + 1)
            functions.adamw(p, g, m, v, powers, segments, lr, 0.9, 0.99, 1e-8, 0.1, scale)
            functions.sgd(q, g, momentum, lr, 0.9, scale)
        states.append((p, m, v, q, momentum))
    for mine, exact in zip(*reversed(states), strict=True):
        assert np.abs(mine - exact).max() < 2e-6 * np.abs(exact).max()


# ---------------------------------------------------------------- decay and clipping


@pytest.mark.parametrize("preset", PRESETS)
def test_matrices_and_embeddings_decay_and_nothing_else(preset):
    config = PRESETS[preset]
    segments = decay_segments(config)
    assert segments[0, 0] == 0
    assert segments[-1, 1] == n_params(config)
    assert np.array_equal(segments[1:, 0], segments[:-1, 1])  # no gap, no overlap
    decays = np.repeat(segments[:, 2], segments[:, 1] - segments[:, 0])
    end = 0
    for tensor in parameters(config):
        first, end = end, end + math.prod(tensor.resolve({}))
        matrix = tensor.name in ("wte", "wpe", "wqkv", "wo", "w1", "w2", "head")
        assert (decays[first:end] == matrix).all(), tensor.name


BIASED = GPTConfig(
    vocab_size=9,
    block_size=6,
    n_layer=2,
    n_embd=8,
    norm="layer",
    norm_gain=True,
    norm_bias=True,
    activation="gelu",
    bias=True,
    tied=True,
)


def one_step(engine: str, optimiser: str, lr: float = 0.125, **constants: float):
    """Parameters before and after one step on two documents, and the gradient it used."""
    model = random_model(BIASED, engine)
    names = ("beta1", "beta2", "eps", "weight_decay", "momentum", "grad_clip")
    values = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8} | constants
    model.engine.optimiser.constants[:] = [values.get(name, 0.0) for name in names]
    batch = random_batch(BIASED, [12], seed=1)
    before = model.engine.params.copy()
    spans = np.array([[[0, 6], [6, 4]]])
    model.engine.train(batch.tokens.astype(np.int32), spans, np.array([lr]), optimiser)
    return before, model.engine.params.copy(), model.engine.grads.copy()


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_clipping_scales_the_whole_gradient(engine):
    tolerance = 1e-12 if engine == "reference" else 1e-5
    before, free, g = one_step(engine, "sgd")
    norm = float(np.linalg.norm(g.astype(np.float64)))
    np.testing.assert_allclose(free - before, -0.125 * g, atol=tolerance)

    _, clipped, same = one_step(engine, "sgd", grad_clip=norm / 4)
    assert np.array_equal(g, same)  # the gradient that is kept is the unclipped one
    moved = (before - clipped) / 0.125
    assert np.linalg.norm(moved) == pytest.approx(norm / 4, rel=max(tolerance, 1e-5))
    np.testing.assert_allclose(moved, g / 4 / (1 + 1e-6 / norm), atol=8 * tolerance)

    _, untouched, _ = one_step(engine, "sgd", grad_clip=norm * 1.01)
    assert np.array_equal(untouched, free)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_decay_shrinks_matrices_beside_the_gradient(engine):
    """Decoupled: what weight decay takes off is lr·λ·p, whatever the gradient, and only of matrices."""
    before, plain, _ = one_step(engine, "adamw")
    _, decayed, _ = one_step(engine, "adamw", weight_decay=0.5)
    decays = np.zeros(before.size)
    for first, end, flag in decay_segments(BIASED):
        decays[first:end] = flag
    assert 0 < decays.sum() < decays.size
    tolerance = 1e-14 if engine == "reference" else 5e-7
    np.testing.assert_allclose(plain - decayed, 0.125 * 0.5 * decays * before, atol=tolerance)
    assert np.array_equal(plain[decays == 0], decayed[decays == 0])
