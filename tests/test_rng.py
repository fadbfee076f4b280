"""Random numbers: Python's own, and xorshift32 against its three shifts."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeless.ops import reference
from tapeless.ops.cpu import loss as cpu_loss
from tapeless.rng import GENERATORS, PythonRandom, XorShift32

seeds = st.integers(0, 2**63 - 1)


@given(seeds, st.integers(1, 50))
def test_python_random_is_pythons(seed, n):
    ours, pythons = PythonRandom(seed), random.Random(seed)
    order = list(range(n))
    pythons.shuffle(order)
    assert ours.permutation(n).tolist() == order
    assert ours.gauss(n, 0.08).tolist() == [pythons.gauss(0, 0.08) for _ in range(n)]
    assert ours.uniforms(n).tolist() == [pythons.random() for _ in range(n)]
    assert [ours.index(n) for _ in range(n)] == [pythons.randrange(n) for _ in range(n)]


@pytest.mark.parametrize("sample", [reference.sample_token, cpu_loss.sample_token], ids=["reference", "cpu"])
@given(
    seed=seeds,
    logits=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30),
    temperature=st.floats(0.1, 2),
)
@settings(max_examples=60)
def test_sampling_is_python_choices(sample, seed, logits, temperature):
    """microgpt draws with random.choices(range(V), weights): one uniform number for each token, and the
    first token whose cumulative weight exceeds it."""
    logits = np.array(logits, np.float32)
    z = logits.astype(np.float64) / temperature
    weights = np.exp(z - z.max()).tolist()
    uniforms, pythons = PythonRandom(seed).uniforms(5), random.Random(seed)
    for uniform in uniforms:
        (expected,) = pythons.choices(range(len(weights)), weights)
        assert sample(np.empty(len(weights)), logits, temperature, 0, 1, uniform) == expected
    assert pythons.random() == PythonRandom(seed).uniforms(6)[5]


# ---------------------------------------------------------------- xorshift32


def xorshift32(x):
    """The next state by the definition: three shifts in 32 bits."""
    x = x ^ x << 13 & 0xFFFFFFFF
    x = x ^ x >> 17
    return x ^ x << 5 & 0xFFFFFFFF


def test_xorshift32_gives_marsaglias_numbers():
    rng = XorShift32(2463534242)
    assert [rng.next_u32() for _ in range(4)] == [723471715, 2497366906, 2064144800, 2008045182]
    assert XorShift32(0).next_u32() == 723471715  # zero itself would stay zero for ever


@given(st.integers(1, 2**32 - 1), st.integers(1, 50))
def test_xorshift32_is_three_shifts(seed, n):
    x, stream = seed, []
    for _ in range(4 * n):
        x = xorshift32(x)
        stream.append(x)
    rng = XorShift32(seed)
    assert [rng.next_u32() for _ in range(n)] == stream[:n]
    uniforms = rng.uniforms(n)
    assert uniforms.tolist() == [float(np.float32(u)) / 2**32 for u in stream[n : 2 * n]]
    assert np.array_equal(uniforms, uniforms.astype(np.float32))  # a chip has no more digits
    assert [rng.index(n) for _ in range(n)] == [u % n for u in stream[2 * n : 3 * n]]
    order = list(range(n))
    for i, u in zip(range(n - 1, 0, -1), stream[3 * n :], strict=False):
        j = u % (i + 1)
        order[i], order[j] = order[j], order[i]
    assert rng.permutation(n).tolist() == order


@given(st.integers(1, 2**32 - 1))
def test_xorshift32_normals_are_box_muller(seed):
    x, expected = seed, []
    while len(expected) < 20:
        x = xorshift32(x)
        u1 = x / 2**32
        if u1 <= 1e-10:
            continue
        x = xorshift32(x)
        r, angle = math.sqrt(-2 * math.log(u1)), 2 * math.pi * x / 2**32
        expected += [r * math.cos(angle), r * math.sin(angle)]
    rng = XorShift32(seed)
    # An odd number first: the spare of a pair goes to the next call. Float32's angle of up to 2π is off by
    # 2e-7, and r is 6 at most; near u1 = 1 the logarithm loses the digits that rounding u1 took.
    normals = np.concatenate([rng.gauss(7, 1.0), rng.gauss(13, 1.0)])
    np.testing.assert_allclose(normals, expected, rtol=0, atol=3e-4)
    assert np.median(np.abs(normals - expected)) < 2e-6
    assert np.array_equal(normals, normals.astype(np.float32))


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("name", GENERATORS)
@given(seed=seeds, used=st.integers(0, 9), n=st.integers(1, 9))
def test_state_round_trip(name, seed, used, n):
    """A generator goes on in another process as if nothing had happened, a kept spare normal included."""
    rng = GENERATORS[name](seed)
    rng.gauss(used, 1.0)
    # As a file would hold it.
    state = {key: np.frombuffer(a.tobytes(), a.dtype) for key, a in rng.state().items()}
    other = GENERATORS[name](1)
    other.gauss(1, 1.0)
    other.restore(state)
    for generator in (rng, other):
        generator.drawn = (
            generator.gauss(n, 0.5).tolist(),
            generator.uniforms(n).tolist(),
            generator.permutation(n).tolist(),
            generator.index(1000),
        )
    assert rng.drawn == other.drawn
    rng.restore(state)
    assert rng.gauss(n, 0.5).tolist() == other.drawn[0]


@pytest.mark.parametrize("name", GENERATORS)
def test_gauss_has_the_right_spread(name):
    values = GENERATORS[name](42).gauss(20_000, 0.1)
    assert abs(values.mean()) < 0.003
    assert abs(values.std() - 0.1) < 0.002
