"""The matrix products of the CPU engine, against NumPy in float64."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapeless.ops.cpu import native
from tapeless.ops.cpu.product import DEPTH, LARGE, MANY, make_product, matmul
from tapeless.ops.cpu.simd import LANES

native.link_routines()
product = make_product()


@numba.njit
def multiply(y, ldy, x, row, term, w, w_term, column, m, n, k):
    product(y, ldy, 0, 0, x, row, term, w, w_term, column, m, n, k)


@numba.njit
def multiply_from(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k):
    product(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k)


def stored(matrix, turned):
    """The numbers of a matrix, or of its transpose, and the steps to the next row and column."""
    rows, columns = matrix.shape
    return (np.ascontiguousarray(matrix.T), 1, rows) if turned else (matrix, columns, 1)


def check_product(m, n, k, start, x_turned, w_turned, seed):
    """One product against float64; nothing beyond y is touched."""
    rng = np.random.default_rng(seed)
    x, w = (rng.normal(size=shape).astype("f4") for shape in ((m, k), (k, n)))
    y, b = rng.normal(size=(m + 1, n)).astype("f4"), rng.normal(size=n).astype("f4")
    want = x.astype("f8") @ w + {"zero": 0, "y": y[:m], "bias": b}[start]
    last = y[m].copy()
    rest = (*stored(x, x_turned), *stored(w, w_turned), m, n, k)
    if start == "zero":
        y[:m] = np.nan  # what was there does not matter
        multiply(y, n, *rest)
    else:
        multiply_from(y, n, *((y, n) if start == "y" else (b, 0)), *rest)
    np.testing.assert_allclose(y[:m], want, rtol=1e-5, atol=1e-5 * max(1, k / 20) ** 0.5)
    assert (y[m] == last).all()
    return y[:m], x, w


WAYS = {
    "start": st.sampled_from(["zero", "y", "bias"]),
    "x_turned": st.booleans(),
    "w_turned": st.booleans(),
    "seed": st.integers(0, 999),
}


@settings(max_examples=300)
@given(m=st.integers(1, 35), n=st.integers(LANES, 8 * LANES + 3), k=st.integers(1, 35), **WAYS)
def test_products(m, n, k, start, x_turned, w_turned, seed):
    """Any number of rows and columns, x and w or their transposes, from zero, from a bias, or on top."""
    check_product(m, n, k, start, x_turned, w_turned, seed)


@settings(max_examples=20)
@given(
    m=st.integers(MANY, MANY + 20), more=st.integers(0, 3 * LANES), k=st.integers(1, 2 * DEPTH + 9), **WAYS
)
def test_large_products(m, more, k, start, x_turned, w_turned, seed):
    """Those that go by panels of w, and long sums in parts."""
    check_product(m, LARGE // k + LANES + more, k, start, x_turned, w_turned, seed)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(13, 3 * LANES + 5, 40), (MANY + 3, LANES + 1 + LARGE // 999, 999)]
)
@pytest.mark.parametrize("w_turned", [False, True])
def test_a_row_comes_out_the_same_in_any_company(m, n, k, w_turned):
    y, x, w = check_product(m, n, k, "zero", False, w_turned, 0)
    alone = np.empty((1, n), "f4")
    for row in range(m):
        multiply(alone, n, np.ascontiguousarray(x[row]), k, 1, *stored(w, w_turned), 1, n, k)
        assert (alone[0] == y[row]).all()


@settings(max_examples=50)
@given(
    m=st.integers(1, 90),
    n=st.integers(LANES, 8 * LANES),
    k=st.integers(1, 60),
    threads=st.integers(1, 5),
    x_turned=st.booleans(),
    w_turned=st.booleans(),
)
def test_matmul(m, n, k, threads, x_turned, w_turned):
    """As NumPy, into part of a larger array, and the same to the bit on any number of threads."""
    rng = np.random.default_rng(m)
    x = rng.normal(size=(k, m)).astype("f4").T if x_turned else rng.normal(size=(m, k)).astype("f4")
    w = rng.normal(size=(n, k)).astype("f4").T if w_turned else rng.normal(size=(k, n)).astype("f4")
    whole, alone = np.full((m + 2, n + 2), 7, "f4"), np.empty((m, n), "f4")
    matmul(whole[1:-1, 1:-1], x, w, threads)
    matmul(alone, x, w, 1)
    np.testing.assert_allclose(alone, x.astype("f8") @ w, rtol=1e-5, atol=1e-5)
    assert (whole[1:-1, 1:-1] == alone).all()
    whole[1:-1, 1:-1] = 7
    assert (whole == 7).all()


def matrices(m=3, k=4, n=2 * LANES, **other):
    arrays = {"y": np.empty((m, n), "f4"), "x": np.ones((m, k), "f4"), "w": np.ones((k, n), "f4")}
    return arrays | other


@pytest.mark.parametrize(
    "wrong",
    [
        matrices(n=LANES - 1),
        matrices(k=0),
        matrices(x=np.ones((3, 5), "f4")),
        matrices(x=np.ones((3, 4))),
        matrices(y=np.empty((4, 2 * LANES), "f4")),
        matrices(y=np.empty((2 * LANES, 3), "f4").T),
        matrices(w=np.ones((4, 4 * LANES), "f4")[:, ::2]),
        matrices(w=np.ones(4, "f4")),
    ],
    ids=["narrow", "no terms", "inner sizes", "float64", "rows", "columns of y apart", "w apart", "vector"],
)
def test_matmul_refuses(wrong):
    with pytest.raises(ValueError, match=r"expected float32 y \[m, n\]"):
        matmul(**wrong)
