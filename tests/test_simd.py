"""The vector type of the CPU engine, against NumPy: in this processor's vectors and in lesser ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import environment
from tapeless.ops.cpu import native
from tapeless.ops.cpu.simd import (
    LANES,
    collect,
    exp,
    first,
    fma,
    group_sum,
    hmax,
    hsum,
    load,
    log,
    matrix,
    maximum,
    minimum,
    rsqrt,
    splat,
    spread,
    store,
    tanh,
    transpose_rows,
    where,
)

# Functions of one vector: maximum error relative to the value, and the range where that holds.
FUNCTIONS = {
    "exp": (np.exp, 1.3e-7, (-87.33, 88.37)),
    "tanh": (np.tanh, 4e-7, (-np.inf, np.inf)),
    "log": (np.log, 1e-7, (1.2e-38, np.inf)),
    "rsqrt": (lambda x: x**-0.5, 1.8e-7, (1.2e-38, np.inf)),
}


@numba.njit(fastmath=native.FASTMATH)
def functions(x, exps, tanhs, logs, rsqrts):
    for i in range(0, x.shape[0], LANES):
        v = load(x, i)
        store(exp(v), exps, i)
        store(tanh(v), tanhs, i)
        store(log(v), logs, i)
        store(rsqrt(v), rsqrts, i)


def evaluated(x):
    results = [np.empty_like(x) for _ in FUNCTIONS]
    functions(x, *results)
    return dict(zip(FUNCTIONS, results, strict=True))


def worst_errors(stride):
    """The largest relative error of each function over float32s, `stride` bit patterns apart."""
    worst = dict.fromkeys(FUNCTIONS, 0.0)
    chunk = 2**22 * stride
    for begin in range(0, 2**32, chunk):
        bits = np.arange(begin, min(begin + chunk, 2**32), stride, dtype=np.uint64).astype(np.uint32)
        x = bits.view("f4")
        results = evaluated(x)
        for name, (exact, _, (low, high)) in FUNCTIONS.items():
            inside = (x > low) & (x < high) & (np.abs(x) > 1.2e-38)
            if inside.any():
                want = exact(x[inside].astype("f8"))
                error = np.abs(results[name][inside] - want) / np.maximum(np.abs(want), 1e-300)
                worst[name] = np.maximum(worst[name], error.max())
    return worst


def check_errors(stride):
    for name, error in worst_errors(stride).items():
        assert error <= FUNCTIONS[name][1], name


def test_errors_over_the_whole_float32_range():
    """A stride through every bit pattern: signs, exponents and mantissas."""
    check_errors(4099)


@pytest.mark.oracle
def test_errors_at_many_more_float32s():
    check_errors(61)


def test_beyond_the_range():
    x = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0, 88.6, -88.0, 1e-40, -1e-40, 20.0, -20.0], "f4")
    got = evaluated(x)
    with np.errstate(over="ignore"):
        want = np.exp(x).astype("f4")
    want[5], want[6] = np.inf, 0  # beyond the stated range
    np.testing.assert_allclose(got["exp"], want, rtol=2e-7)
    np.testing.assert_allclose(got["tanh"], np.tanh(x), rtol=4e-7)
    assert np.isnan(got["log"][0])
    assert got["log"][1] == np.inf
    assert np.isnan(got["rsqrt"][0])
    assert got["log"][4] == 0


# ---------------------------------------------------------------- everything else


@numba.njit
def elementwise(x, y, results):
    for t in range(x.shape[0]):
        for c in range(0, x.shape[1], LANES):
            a, b = load(x, t, c), load(y, t, c)
            store(a + b, results, 0, t, c)
            store(a - 2 * b, results, 1, t, c)
            store(1.5 * a * b, results, 2, t, c)
            store(a / b, results, 3, t, c)
            store(fma(a, b, 3.0), results, 4, t, c)
            store(maximum(a, b), results, 5, t, c)
            store(minimum(a, 0.0), results, 6, t, c)
            store(where(a > b, a, -1.0), results, 7, t, c)
            store(where(a < 0.5, 1.0, b), results, 8, t, c)
            store(first(c + 3 - x.shape[1] // 2, a, b), results, 9, t, c)


@given(rows=st.integers(1, 4), columns=st.integers(1, 3 * LANES + 2), seed=st.integers(0, 999))
def test_elementwise(rows, columns, seed):
    """Any length of rows; nothing beyond their ends is read into results or written."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, rows, columns)).astype("f4")
    results = np.full((11, rows, columns), 7, "f4")
    elementwise(x, y, results)
    c = np.arange(columns)
    from_x = c % LANES < c // LANES * LANES + 3 - columns // 2
    want = [
        x + y, x - 2 * y, np.float32(1.5) * x * y, x / y, x * y + 3, np.maximum(x, y), np.minimum(x, 0),
        np.where(x > y, x, -1), np.where(x < 0.5, 1, y), np.where(from_x, x, y), np.full_like(x, 7),
    ]  # fmt: skip
    np.testing.assert_allclose(results, np.stack(want), rtol=1e-6, atol=1e-6)


@numba.njit
def horizontal(x, sums, tops, groups, spreads, collects):
    for c in range(0, x.shape[0], LANES):
        v = load(x, c)
        sums[c // LANES] = hsum(v)
        tops[c // LANES] = hmax(v)
    size, row = 1, 0
    while size <= LANES:
        v = load(x, 0)
        store(group_sum(v, size), groups, row, 0)
        store(spread(v, size), spreads, row, 0)
        store(collect(v, size), collects, row, 0)
        size, row = 2 * size, row + 1


@given(seed=st.integers(0, 999))
def test_across_lanes(seed):
    x = np.random.default_rng(seed).normal(size=4 * LANES).astype("f4")
    sizes = [2**i for i in range(LANES.bit_length())]
    sums, tops = np.empty(4, "f4"), np.empty(4, "f4")
    groups, spreads, collects = np.empty((3, len(sizes), LANES), "f4")
    horizontal(x, sums, tops, groups, spreads, collects)
    np.testing.assert_allclose(sums, x.reshape(4, LANES).sum(1), rtol=1e-5, atol=1e-5)
    assert (tops == x.reshape(4, LANES).max(1)).all()
    v = x[:LANES]
    for row, size in enumerate(sizes):
        want = np.repeat(v.reshape(-1, size).sum(1), size)
        np.testing.assert_allclose(groups[row], want, rtol=1e-5, atol=1e-5)
        assert (spreads[row] == np.repeat(v, size)[:LANES]).all()
        assert (collects[row][: LANES // size] == v[::size]).all()


@numba.njit
def turn(y, x, first_row, last_row, first_column, columns):
    transpose_rows(y, 0, 0, matrix(x, first_column, x.shape[0], columns, x.shape[1]), first_row, last_row, 0)


@given(first_row=st.integers(0, 5), rows=st.integers(1, LANES), columns=st.integers(1, LANES))
def test_transposed_rows(first_row, rows, columns):
    """A block of a wider matrix: rows after the last repeat it, columns beyond the block are zero."""
    x = np.arange(1.0, 30 * (LANES + 9) + 1, dtype="f4").reshape(30, LANES + 9)
    y = np.full((LANES, LANES), -1, "f4")
    turn(y, x, first_row, first_row + rows - 1, 4, columns)
    taken = np.minimum(np.arange(LANES), rows - 1) + first_row
    want = np.zeros((LANES, LANES), "f4")
    want[:columns] = x[taken, 4 : 4 + columns].T
    assert (y == want).all()


@numba.njit
def scalar(x):
    return hsum(splat(x))


def test_splat():
    assert scalar(0.5) == 0.5 * LANES


# ---------------------------------------------------------------- lesser processors

FILES = [str(Path(__file__).parent / f"test_{what}.py") for what in ("simd", "attention", "product")]


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("lanes", "name", "features"),
    [
        (4, "x86-64", "+sse2"),
        (8, "haswell", "+avx2,+fma,+avx,+bmi,+bmi2,+sse4.2,+sse2"),
    ],
)
def test_as_if_the_processor_had_less(lanes, name, features):
    """The tests of vectors, attention and products, in a process that compiles for such a processor."""
    host = native.llvm.get_host_cpu_features()
    if not all(host.get(f.lstrip("+")) for f in features.split(",")):
        pytest.skip(f"this processor is none of the family of {name}")
    env = environment(NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
    code = f"from tapeless.ops.cpu.simd import LANES; assert LANES == {lanes}, LANES"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", "not processor"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
