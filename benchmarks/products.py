"""How fast matrix products are, as fractions of what the processor can do, NumPy's BLAS beside them.

    python benchmarks/products.py

First, one core's peak: multiply-adds that touch no memory. Then a linear layer's three products,
y = x·w, dx = dy·wᵀ and dw += xᵀ·dy, in the sizes of small models, on one thread. Then large ones, on
one thread and on all cores, and NumPy's on as many. Of several repetitions, turn and turn about, the
fastest counts; arrays are warm, as far as they fit the caches.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numba
import numpy as np

from tapeless.bench import about
from tapeless.ops.cpu.peak import peak_gflops
from tapeless.ops.cpu.product import make_product, matmul

# tokens, I and O of layers [I, O]
NARROW = [(n, *io) for n in (114, 7, 1) for io in ((16, 48), (16, 16), (16, 64), (64, 16), (16, 27))]
WIDE = [(114, *io) for C in (32, 64, 128) for io in ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, 27))]
SHAKESPEARE = [(768, 128, 384), (768, 128, 512), (768, 512, 128), (768, 128, 65)]
LARGE = [(256, 768, 2304), (256, 768, 3072), (256, 3072, 768), (256, 768, 50304)]
LARGE += [(size,) * 3 for size in (256, 512, 1024, 2048)]

product = make_product("float32")


@numba.njit
def forward(y, x, w, repeats):
    n, I, O = *x.shape, w.shape[1]
    for _ in range(repeats):
        product(y, O, 0, 0, x, I, 1, w, O, 1, n, O, I)


@numba.njit
def backward_x(dx, dy, w, repeats):
    n, I, O = *dx.shape, w.shape[1]
    for _ in range(repeats):
        product(dx, I, 0, 0, dy, O, 1, w, 1, O, n, I, O)


@numba.njit
def backward_w(dw, x, dy, repeats):
    n, I, O = *x.shape, dw.shape[1]
    for _ in range(repeats):
        product(dw, O, dw, O, x, 1, I, dy, O, 1, I, O, n)


def fastest(calls: Sequence[Callable[[], object]], rounds: int, pause: float = 0) -> list[float]:
    """The fewest seconds each call took, in rounds of two calls of each, after so many seconds' pause."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            time.sleep(pause)
            for _ in range(2):
                began = time.perf_counter()
                call()
                best[i] = min(best[i], time.perf_counter() - began)
    return best


@cache
def blas_setter() -> Callable[[int], object]:
    """Sets the number of threads of the OpenBLAS in NumPy's wheels; any other BLAS keeps its own."""
    for path in (Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_"):
            if hasattr(library, name):
                return getattr(library, name)
    return lambda threads: None


def blas(threads: int, y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    blas_setter()(threads)
    np.matmul(x, w, out=y)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def small(core: float) -> None:
    print("\none thread, from compiled code: fraction of one core's peak (µs)")
    print(f"{'tokens     I     O':>18}{'y = x·w':>20}{'dx = dy·wᵀ':>20}{'dw += xᵀ·dy':>20}")
    for n, I, O in NARROW + WIDE + SHAKESPEARE:
        x, w, dy = normal(n, I), normal(I, O), normal(n, O)
        y, dx, dw = np.empty_like(dy), np.empty_like(x), np.zeros_like(w)
        flops = 2 * n * I * O
        repeats = max(1, int(1e-3 * core / flops))
        calls = [
            partial(forward, y, x, w, repeats),
            partial(backward_x, dx, dy, w, repeats),
            partial(backward_w, dw, x, dy, repeats),
        ]
        best = fastest(calls, 8)  # compiles first
        cells = [f"{flops * repeats / s / core:8.0%} ({s / repeats * 1e6:9.2f})" for s in best]
        print(f"{n:6}{I:6}{O:6}" + "".join(cells))


def large(core: float) -> None:
    cores = os.cpu_count() or 1
    print(f"\nGFLOP/s and fraction of the peak, on one thread and on {cores}")
    titles = [f"{name} {threads}" for threads in (1, cores) for name in ("tapeless", "NumPy")]
    print(f"{'m     k     n  form':>23}" + "".join(f"{title:>15}" for title in titles))
    for m, k, n in LARGE:
        x, w = normal(m, k), normal(k, n)
        forms = {"x·w": (x, w), "x·wᵀ": (x, np.ascontiguousarray(w.T).T)}
        forms["xᵀ·w"] = (np.ascontiguousarray(x.T).T, w)
        for form, (a, b) in forms.items():
            ours, theirs = np.empty((m, n), np.float32), np.empty((m, n), np.float32)
            flops = 2 * m * k * n
            calls: list[Callable[[], object]] = []
            for threads in (1, cores):
                calls += [partial(matmul, ours, a, b, threads), partial(blas, threads, theirs, a, b)]
            # For some 30 ms after a product, NumPy's own threads keep a core each busy waiting.
            best = fastest(calls, max(2, min(10, int(1e11 / flops))), pause=0.05)
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * k)
            cells = [
                f"{flops / s / 1e9:8.1f} {flops / s / core / threads:5.0%} "
                for s, threads in zip(best, (1, 1, cores, cores), strict=True)
            ]
            print(f"{m:6}{k:6}{n:6} {form:<5}" + "".join(cells))


def main() -> None:
    known = about()
    print(f"{known['machine']['processor']}, {known['simd']}, {os.cpu_count()} cores; {known['date']}")
    print(", ".join(f"{name} {version}" for name, version in known["versions"].items()))
    core = peak_gflops() * 1e9
    print(f"one core's peak: {core / 1e9:.1f} GFLOP/s")
    small(core)
    large(core)


if __name__ == "__main__":
    main()
