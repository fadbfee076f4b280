"""Where the time of a training step goes: ops that read the processor's clock when they are done.

`timed` wraps every op so that the ticks since the op before are added to its family's count. The
counts are one array of this process, which compiled code knows by the symbol `tapeless_profile`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from tapeless.engine import Engine
from tapeless.errors import ConfigError
from tapeless.ops.cpu import native
from tapeless.ops.cpu.native import jit

# A family, and what the names of its ops have in common; the first that fits counts.
_MARKS = {
    "optimiser": ("adamw", "sgd", "global_norm"),
    "attention": ("attention",),
    "products": ("linear", "head"),
    "softmax and loss": ("cross_entropy",),
    "activation": ("relu", "gelu"),
    "norms": ("norm",),
}
OTHER = "everything else"
FAMILIES = ("products", "attention", "norms", "activation", "softmax and loss", "optimiser", OTHER)

# Ticks of each family, then readings of the clock for each, then the clock at the last reading.
_counts = np.zeros(2 * len(FAMILIES) + 1, np.int64)
_SYMBOL = "tapeless_profile"


def family(op: str) -> str:
    """The family that an op of this name belongs to."""
    return next((name for name, marks in _MARKS.items() if any(mark in op for mark in marks)), OTHER)


class ProfiledEngine(Engine):
    """A CPU engine whose training programs keep count: see `counts`.

    Raises `ConfigError` where the processor has no clock that programs may read.
    """

    variant = "profiled"

    def program(self, name: str) -> Callable:
        check_clock()
        llvm.add_symbol(_SYMBOL, _counts.ctypes.data)
        return super().program(name)

    def make_ops(self, decoding: bool) -> Any:
        return timed(super().make_ops(decoding))


def has_clock() -> bool:
    """Whether programs may read the processor's clock: cycles on x86-64; on 64-bit ARM, where the counter of
    cycles is the system's, another one, which ticks less often but as evenly."""
    return llvm.get_default_triple().startswith("x86_64") or native.is_arm()


def check_clock() -> None:
    """Raise `ConfigError` unless programs may read the clock."""
    if not has_clock():
        raise ConfigError("profiling reads the clock of an x86-64 or 64-bit ARM processor; this is another.")


def reset() -> None:
    """Begin to count from zero."""
    _counts[:] = 0


def counts() -> tuple[dict[str, int], dict[str, int]]:
    """Ticks spent in each family since `reset`, and how many times its ops read the clock."""
    n = len(FAMILIES)
    cycles, readings = _counts[:n].tolist(), _counts[n : 2 * n].tolist()
    return dict(zip(FAMILIES, cycles, strict=True)), dict(zip(FAMILIES, readings, strict=True))


def timed(ops: Any) -> Any:
    """The same ops, counting. `pack`, the first of each step, begins to count where it starts, so
    that what happens between two calls of a program is nobody's."""
    start, lap = _make_clock()

    def wrap(name: str, op: Callable) -> Any:
        slot = FAMILIES.index(family(name))

        def timed_op(*arguments):
            result = op(*arguments)
            lap(slot)
            return result

        def timed_first_op(*arguments):
            start()
            result = op(*arguments)
            lap(slot)
            return result

        return jit(timed_first_op if name == "pack" else timed_op)

    return SimpleNamespace(**{name: wrap(name, op) for name, op in vars(ops).items()})


def _make_clock() -> tuple[Any, Any]:
    """Intrinsics: start() begins to count; lap(slot) adds the ticks since then, or since the last lap."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    word, n = ir.IntType(64), len(FAMILIES)

    def now(builder: Any) -> Any:
        # (LLVM's "llvm.readsteadycounter" is always 0 on ARM.)
        name, given = "llvm.readcyclecounter", []
        if native.is_arm():
            register = builder.module.add_metadata(["CNTVCT_EL0"])
            name, given = "llvm.read_volatile_register.i64", [register]
        kind = ir.FunctionType(word, [each.type for each in given])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)

    def place(builder: Any, index: Any) -> Any:
        table = builder.module.globals.get(_SYMBOL)
        if table is None:
            table = ir.GlobalVariable(builder.module, ir.ArrayType(word, len(_counts)), _SYMBOL)
        return builder.gep(table, [ir.Constant(word, 0), index])

    def add(builder: Any, index: Any, value: Any) -> None:
        at = place(builder, index)
        builder.store(builder.add(builder.load(at), value), at)

    @intrinsic
    def start(typing_context):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(now(builder), place(builder, ir.Constant(word, 2 * n)))
            return context.get_dummy_value()

        return types.void(), codegen

    @intrinsic
    def lap(typing_context, slot):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            at, (slot,) = now(builder), args
            last = place(builder, ir.Constant(word, 2 * n))
            add(builder, slot, builder.sub(at, builder.load(last)))
            add(builder, builder.add(slot, ir.Constant(word, n)), ir.Constant(word, 1))
            builder.store(at, last)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return start, lap
