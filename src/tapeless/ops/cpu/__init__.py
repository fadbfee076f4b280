"""The ops of `tapeless.ops.reference` for float32, as Numba compiles them to machine code.

Each file holds one family, forward beside backward; the mathematics stands in the reference. The
functions are plain Python until `make_ops` compiles them, and shapes of parameters and of rows are
constants by then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

from tapeless.config import GPTConfig
from tapeless.layout import streamed_width
from tapeless.ops.cpu.native import jit


def make_ops(config: GPTConfig, decoding: bool = False) -> Any:
    """Every op that this model may need, compiled on first use: with `decoding` for one row or a few."""
    ops = _common() | _linear(config.precision, streamed_width(config) > 0)
    if decoding:
        ops |= {f"{name}_forward": ops[f"{name}_decode"] for name in ("linear", "tied_head")}
    return SimpleNamespace(**ops, **_attention(config.head_dim, config.block_size))


@cache
def _common() -> dict[str, Callable]:
    # Imported here since they import Numba, which a process whose programs are in the cache never needs.
    from tapeless.ops.cpu import activation, embed, loss, mhc, norm, optim, share

    functions: dict[str, Callable] = {
        name: function
        for module in (activation, embed, loss, mhc, norm, optim)
        for name, function in vars(module).items()
        if isinstance(function, FunctionType) and function.__module__ == module.__name__
    }
    ops = {name: jit(function) for name, function in functions.items()}
    shared = (share.rows, share.documents, share.take, share.pack, share.meet)
    return ops | {f.__name__: f for f in shared}


@cache
def _linear(precision: str, streams: bool) -> dict[str, Callable]:
    from tapeless.ops.cpu import linear

    return linear.make_ops(precision, streams)


@cache
def _attention(head_dim: int, block_size: int) -> dict[str, Callable]:
    from tapeless.ops.cpu import attention

    return {name: jit(function) for name, function in attention.make_ops(head_dim, block_size).items()}
