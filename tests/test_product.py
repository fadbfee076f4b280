"""The register tiles and elementary functions of the CPU engine, against NumPy in float64."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeless.ops.cpu import elementary
from tapeless.ops.cpu.product import make_products
from tapeless.ops.cpu.simd import LANES

elementary.register()
product, transpose = make_products()
vector_exp, vector_tanh = elementary.exp, elementary.tanh


@numba.njit
def multiply(y, ldy, x, w, ldw, m, n, k, step_row, step_i, add):
    product(y, ldy, x, w, ldw, m, n, k, step_row, step_i, add)


@numba.njit
def turn(y, x, m, n):
    transpose(y, x, m, n)


@numba.njit
def elementwise(x, exps, tanhs):
    for i in range(x.shape[0]):
        exps[i] = vector_exp(x[i])
        tanhs[i] = vector_tanh(x[i])


@settings(max_examples=200)
@given(
    m=st.integers(1, 21),
    n=st.integers(LANES, 6 * LANES + 3),
    k=st.integers(1, 21),
    add=st.booleans(),
    turned=st.booleans(),
    seed=st.integers(0, 999),
)
def test_products(m, n, k, add, turned, seed):
    """Any number of rows and columns, x or its transpose, from zero or on top; nothing beyond is touched."""
    rng = np.random.default_rng(seed)
    x, w = (rng.normal(size=shape).astype("f4") for shape in ((m, k), (k, n)))
    y = rng.normal(size=(m + 1, n)).astype("f4")
    want = x.astype("f8") @ w + (y[:m] if add else 0)
    last = y[m].copy()
    stored = np.ascontiguousarray(x.T) if turned else x
    steps = (1, m) if turned else (k, 1)
    multiply(y, n, stored, w, n, m, n, k, *steps, int(add))
    np.testing.assert_allclose(y[:m], want, rtol=1e-5, atol=1e-5)
    assert (y[m] == last).all()


@settings(max_examples=50)
@given(m=st.integers(1, 3 * LANES + 1), n=st.integers(1, 3 * LANES + 1))
def test_transposes(m, n):
    x = np.arange(m * n, dtype="f4").reshape(m, n)
    y = np.full(m * n + 1, -1, "f4")
    turn(y, x, m, n)
    assert (y[:-1].reshape(n, m) == x.T).all()
    assert y[-1] == -1


def test_exp_and_tanh_over_all_float32():
    """A stride through every bit pattern: signs, exponents, and mantissas."""
    bits = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    x = bits.view("f4")
    x = x[np.isfinite(x)]
    exps, tanhs = np.empty_like(x), np.empty_like(x)
    elementwise(x, exps, tanhs)
    normal = (x > -87.3) & (x < 88.3)
    want = np.exp(x[normal].astype("f8"))
    assert np.abs(exps[normal] / want - 1).max() <= 3e-7
    assert (exps[x <= -87.3] == 0).all()
    assert (exps[x >= 88.3] > 2e38).all()
    assert np.abs(tanhs - np.tanh(x.astype("f8"))).max() <= 2.4e-7


@pytest.mark.parametrize(("x", "exp"), [(0.0, 1.0), (-np.inf, 0.0), (np.nan, np.nan)])
def test_special_values(x, exp):
    exps, tanhs = np.empty(1, "f4"), np.empty(1, "f4")
    elementwise(np.array([x], "f4"), exps, tanhs)
    assert exps[0] == exp or (np.isnan(exps[0]) and np.isnan(exp))
    assert np.isnan(tanhs[0]) == np.isnan(x)
