"""The routines that programs share, and how to call them from compiled code and from Python.

A routine is compiled once for the processor, into object code of its own that every program which calls
it is linked with. All its arguments are int64, arrays being given by address. It allocates nothing and
keeps no state, so any number of threads may call it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from inspect import Parameter, Signature
from typing import Any

# The routines by name, and their parameters.
_PRODUCT = ["y", "ldy", "start", "ld_start", "x", "row", "term", "w", "w_term", "column", "m", "n", "k"]
ROUTINES = {"product": _PRODUCT, "product_bf16": _PRODUCT}


def make_routine(name: str) -> Callable:
    """What is to be compiled."""
    from tapeless.ops.cpu import pairs, product

    return {"product": product.make_routine, "product_bf16": pairs.make_routine}[name]()


def symbol(name: str) -> str:
    return f"tapeless_{name}"


@cache
def make_call(name: str) -> Any:
    """An intrinsic that calls the routine, with arrays (or 0) in place of addresses."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
    from numba.np import arrayobj

    from tapeless.ops.cpu.native import link_routine

    link_routine(name)  # Numba looks up what the functions call that it compiles
    word = ir.IntType(64)

    def typed(typing_context, *kinds):
        def codegen(context, builder, signature, args):
            numbers = []
            for kind, value in zip(signature.args, args, strict=True):
                if isinstance(kind, types.Array):
                    data = arrayobj.make_array(kind)(context, builder, value).data
                    numbers.append(builder.ptrtoint(data, word))
                else:
                    numbers.append(value)
            kind = ir.FunctionType(ir.VoidType(), [word] * len(numbers))
            builder.call(cgutils.get_or_insert_function(builder.module, kind, symbol(name)), numbers)
            return context.get_dummy_value()

        return types.void(*(k if isinstance(k, types.Array) else types.int64 for k in kinds)), codegen

    parameters = ["typing_context", *ROUTINES[name]]
    typed.__signature__ = Signature([Parameter(p, Parameter.POSITIONAL_ONLY) for p in parameters])  # type: ignore[attr-defined]
    return intrinsic(typed)


@cache
def from_python(name: str) -> Callable[..., None]:
    """The routine as a function of Python's integers, which waits without the GIL."""
    from tapeless.ops.cpu.native import link_routine

    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(ROUTINES[name]))(link_routine(name))
