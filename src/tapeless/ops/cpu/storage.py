"""Weights stored as bfloat16: half of memory to read, where reading is what takes the time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tapeless.ops.cpu.routines import from_python


def to_bfloat16(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """The bfloat16 nearest to each float32 (of two as near the even one; NaN stays NaN) as uint16: the upper
    half of its bits. Into y, if one is given: uint16 of as many numbers, in the same order.

    Raises `ValueError` for arrays of other types, or whose numbers do not lie side by side.
    """
    if y is None:
        y = np.empty(x.shape, np.uint16)
    if x.dtype != np.float32 or y.dtype != np.uint16 or x.shape != y.shape or not y.flags.writeable:
        got = f"{x.dtype} {x.shape} and {y.dtype} {y.shape}"
        raise ValueError(f"expected float32 and writeable uint16 of one shape, got {got}.")
    if not (x.flags.c_contiguous and y.flags.c_contiguous):
        raise ValueError("expected arrays whose numbers lie side by side; copy them first.")
    from_python("to_bfloat16")(y.ctypes.data, x.ctypes.data, x.size)
    return y


def make_routine() -> Callable:
    """The routine to compile: to_bfloat16(y, x, n) for n numbers."""
    from tapeless.ops.cpu.bfloat import LANES, shorten

    def to_bfloat16(y, x, n):
        for i in range(0, n, LANES):
            shorten(y + 2 * i, x + 4 * i, n - i)

    return to_bfloat16
