"""The matrix products of the CPU engine, against NumPy in float64."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import as_bfloat16
from tapeless.ops.cpu import native, pairs
from tapeless.ops.cpu.product import BLOCK, DEPTH, LARGE, MANY, ROWS, make_product, matmul
from tapeless.ops.cpu.simd import LANES

KINDS = ["float32", "bf16"]


def compiled(kind):
    product = make_product(kind)

    @numba.njit
    def multiply(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k):
        product(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k)

    return multiply


PRODUCTS = {kind: compiled(kind) for kind in KINDS}


def operands(kind, x, w):
    """The numbers that are multiplied with each other."""
    return (x, w) if kind == "float32" else (as_bfloat16(x), as_bfloat16(w))


def laid_out(matrix, turned):
    """The numbers of a matrix, or of its transpose, and the steps to the next row and column."""
    rows, columns = matrix.shape
    return (np.ascontiguousarray(matrix.T), 1, rows) if turned else (matrix, columns, 1)


def check_product(m, n, k, kind, start, x_turned, w_turned, seed, whole=False):
    """One product against float64, exactly for whole numbers; nothing beyond y is touched."""
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return (rng.integers(-8, 9, shape) if whole else rng.normal(size=shape)).astype("f4")

    x, w, y, b = numbers(m, k), numbers(k, n), numbers(m + 1, n), numbers(n)
    exact_x, exact_w = operands(kind, x, w)
    want = exact_x.astype("f8") @ exact_w.astype("f8") + {"zero": 0, "y": y[:m], "bias": b}[start]
    last = y[m].copy()
    source, ld_source = {"zero": (0, 0), "y": (y, n), "bias": (b, 0)}[start]
    if start == "zero":
        y[:m] = np.nan  # what was there does not matter
    PRODUCTS[kind](y, n, source, ld_source, *laid_out(x, x_turned), *laid_out(w, w_turned), m, n, k)
    if whole:
        assert (y[:m] == want).all()
    # k roundings, each of a sum that has grown like √k: their spread grows like k, at 60 it is 1.3e-6.
    np.testing.assert_allclose(y[:m], want, rtol=1e-5, atol=1e-5 * max(1, k / 60))
    assert (y[m] == last).all()
    return y[:m], x, w


WAYS = {
    "kind": st.sampled_from(KINDS),
    "start": st.sampled_from(["zero", "y", "bias"]),
    "x_turned": st.booleans(),
    "w_turned": st.booleans(),
    "seed": st.integers(0, 999),
}


@settings(max_examples=500)
@given(
    m=st.integers(1, 35),
    n=st.integers(LANES, 8 * LANES + 3),
    k=st.integers(1, 70),
    whole=st.booleans(),
    **WAYS,
)
def test_products(m, n, k, kind, start, x_turned, w_turned, seed, whole):
    """Any number of rows and columns, x and w or their transposes, from zero, from a bias, or on top."""
    check_product(m, n, k, kind, start, x_turned, w_turned, seed, whole)


@settings(max_examples=40)
@given(m=st.integers(MANY, 4 * MANY), more=st.integers(0, 3 * LANES), k=st.integers(1, 2 * DEPTH + 9), **WAYS)
def test_large_products(m, more, k, kind, start, x_turned, w_turned, seed):
    """Those that go by panels of w, and long sums in parts."""
    check_product(m, LARGE // k + LANES + more, k, kind, start, x_turned, w_turned, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x_turned", [False, True])
@pytest.mark.parametrize(
    ("m", "k"), [(ROWS + 9, BLOCK // ROWS + 1), (pairs.BLOCK // (2 * LANES) + 1, 4 * LANES - 3)]
)
def test_many_rows(m, k, x_turned, kind):
    """Those whose rows come in several blocks."""
    check_product(m, LANES + 3, k, kind, "y", x_turned, False, 0)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(13, 3 * LANES + 5, 40), (MANY + 3, LANES + 1 + LARGE // 999, 999)]
)
@pytest.mark.parametrize("w_turned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_comes_out_the_same_in_any_company(m, n, k, w_turned, kind):
    y, x, w = check_product(m, n, k, kind, "zero", False, w_turned, 0)
    alone = np.empty((1, n), "f4")
    for row in range(m):
        x_row = np.ascontiguousarray(x[row])
        PRODUCTS[kind](alone, n, 0, 0, x_row, k, 1, *laid_out(w, w_turned), 1, n, k)
        assert (alone[0] == y[row]).all()


def test_bfloat16_at_the_ends_of_its_range():
    """Infinity and NaN stay what they are; the largest float32s are nearer to infinity."""
    x = np.ones((1, 2), "f4")
    w = np.zeros((2, 2 * LANES), "f4")
    w[0, :6] = np.inf, np.nan, 3.4e38, -np.inf, 1 + 2**-8, 1 + 3 * 2**-8
    w[1, 0] = 1
    y = np.empty((1, 2 * LANES), "f4")
    PRODUCTS["bf16"](y, 2 * LANES, 0, 0, x, 2, 1, w, 2 * LANES, 1, 1, 2 * LANES, 2)
    np.testing.assert_array_equal(y[0, :6], [np.inf, np.nan, np.inf, -np.inf, 1, 1 + 2**-6])


BITS = """
import hashlib
import numpy as np
from tapeless.ops.cpu.native import bf16_path
from tapeless.ops.cpu.routines import from_python

rng, bits = np.random.default_rng(0), hashlib.sha256()

def product(x, w, y):
    (m, k), n = x.shape, w.shape[1]
    to, source, factor = (a.ctypes.data for a in (y, x, w))
    from_python("product_bf16")(to, n, to, n, source, k, 1, factor, n, 1, m, n, k)
    bits.update(y.tobytes())
    return y

def numbers(shape, low, high):
    signed = rng.choice([-1, 1], shape) * rng.uniform(1, 2, shape)
    return np.ldexp(signed, rng.integers(low, high, shape)).astype("f4")

for m, n, k in ((5, 70, 9), (40, 65, 801)):
    product(*(rng.normal(size=shape).astype("f4") for shape in ((m, k), (k, n), (m, n))))
# Subnormal numbers as operands, as results, and as what sums begin with; sums that cancel to such numbers.
for k in (1, 2, 3, 4):
    for x, w, y in (
        ((-149, -100), (-40, 60), (-149, -60)),
        ((-70, -50), (-80, -50), (-149, -120)),
        ((-130, -120), (-2, 5), (-130, -120)),
    ):
        y = product(numbers((7, k), *x), numbers((k, 48), *w), numbers((7, 48), *y))
        assert not ((y != 0) & (abs(y) < 2**-126)).any()
one = np.ones((1, 48), "f4")
assert not product(np.full((1, 1), 1e-39, "f4"), 1e30 * one, 0 * one).any()
assert np.float32(1e-39) * np.float32(1) != 0  # elsewhere, subnormal numbers are what they were
common = bits.hexdigest()
# What rounding brings up to the least normal number.
edge = product(np.full((1, 1), 1.25 * 2**-75, "f4"), -(2**-74) * one, 2**-126 * (1 + 2**-23) * one)[0, 0]
print(bf16_path(), common, float(edge).hex())
"""


def test_every_processor_gets_the_same_bits(child):
    """Products of bfloat16 do not depend on vectors, nor on instructions for them. Subnormal numbers count
    as zero."""
    name, features = native.processor()
    if native.bf16_path() == "emulated":
        pytest.skip("this processor has no instructions for bfloat16 to compare with")
    lesser = {name: features.replace("+avx512bf16", "-avx512bf16"), "haswell": "+avx2,+fma,+avx,+bmi,+sse4.2"}
    path, *bits = child(BITS).split()
    assert path != "emulated"
    for name, features in lesser.items():
        assert child(BITS, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features).split() == ["emulated", *bits]


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
