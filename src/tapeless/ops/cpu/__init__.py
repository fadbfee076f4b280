"""The ops of `tapeless.ops.reference` as loops that Numba compiles to float32 machine code.

Each file holds one family, forward beside backward; the mathematics stands in the reference. The
functions are plain Python until `make_ops` compiles them, and shapes of parameters and of rows are
constants by then.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from tapeless.ops import reference
from tapeless.ops.cpu import activation, attention, elementary, embed, linear, loss, mhc, norm, optim, team
from tapeless.ops.cpu.native import jit


@cache
def make_ops() -> Any:
    """Every op, compiled on first use."""
    elementary.register()
    functions = {
        name: function
        for module in (activation, attention, embed, loss, mhc, norm, optim)
        for name, function in vars(module).items()
        if callable(function) and function.__module__ == module.__name__
    }
    functions |= linear.make_ops() | team.make_ops()
    functions["pack"] = reference.pack  # plain loops already
    return SimpleNamespace(**{name: jit(function) for name, function in functions.items()})
