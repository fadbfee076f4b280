"""exp and tanh for float32 that LLVM can turn into vectors, where the C library's stop it.

As Python these are NumPy's. `register` tells Numba what to compile in their place.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

_f32 = np.float32


def exp(x):
    """eˣ for float32, to 3e-7 of its value: x = n·ln 2 + r with |r| ≤ ½ ln 2, then 2ⁿ·p(r),
    p the Taylor polynomial of degree 7. 0 below −87.3, the largest power above 88.3."""
    return np.exp(x)


def tanh(x):
    """1 − 2/(e²ˣ + 1) for float32, to 2.4e-7."""
    return np.tanh(x)


@cache
def register() -> None:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic, overload

    from tapeless.ops.cpu.native import FASTMATH

    @intrinsic
    def power(typing_context, n):
        """2ⁿ for an int32 n: its float32 has n + 127 in the exponent's bits."""

        def codegen(context, builder, signature, args):
            word = ir.IntType(32)
            biased = builder.add(args[0], ir.Constant(word, 127))
            return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

        return types.float32(types.int32), codegen

    power_of_two: Any = power  # an intrinsic's signature is not a type checker's
    log2e, ln2_high, ln2_low = _f32(1.4426950408889634), _f32(0.693359375), _f32(-2.12194440e-4)
    c2, c3, c4, c5, c6, c7 = (_f32(1 / f) for f in (2, 6, 24, 120, 720, 5040))
    lowest, highest, zero, one, two = map(_f32, (-87.3, 88.3, 0, 1, 2))
    options: Any = {"fastmath": FASTMATH, "error_model": "numpy", "forceinline": True}

    def compiled_exp(x):
        z = min(max(x, lowest), highest)
        n = np.floor(z * log2e + _f32(0.5))
        r = z - n * ln2_high - n * ln2_low
        p = one + r * (one + r * (c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))))
        # x − x is zero, but NaN where x is no number: the clamp must not hide that.
        return zero if x <= lowest else p * power_of_two(np.int32(n)) + (x - x)

    @overload(exp, jit_options=options)
    def choose_exp(x):
        return compiled_exp if x == types.float32 else None

    @overload(tanh, jit_options=options)
    def choose_tanh(x):
        if x == types.float32:
            return lambda x: one - two / (exp(two * x) + one)
