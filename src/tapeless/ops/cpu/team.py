"""Where the threads of a step meet: a barrier, and sums over what each of them has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import llvmlite.binding as llvm

from tapeless.ops.cpu.native import YIELD

# Looks at another thread's counter before giving the processor to whoever else wants it: some tens
# of µs, so that a thread that is held up, or has no processor, costs the others little.
PATIENCE = 1000


def make_ops() -> dict[str, Callable]:
    """The ops by name, to be compiled."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
    from numba.np import arrayobj

    x86 = llvm.get_default_triple().startswith(("x86_64", "i686"))

    def counter(context, builder, kind, arrivals, row):
        array = arrayobj.make_array(kind)(context, builder, arrivals)
        return cgutils.get_item_pointer(
            context, builder, kind, array, [row, context.get_constant(types.intp, 0)]
        )

    @intrinsic
    def store(typing_context, arrivals, row, value):
        """arrivals[row, 0] = value, after everything this thread wrote before."""

        def codegen(context, builder, signature, args):
            place = counter(context, builder, signature.args[0], args[0], args[1])
            builder.store_atomic(args[2], place, "release", 8)
            return context.get_dummy_value()

        return types.void(arrivals, types.int64, types.int64), codegen

    @intrinsic
    def load(typing_context, arrivals, row):
        """arrivals[row, 0], before everything this thread reads afterwards."""

        def codegen(context, builder, signature, args):
            place = counter(context, builder, signature.args[0], args[0], args[1])
            return builder.load_atomic(place, "acquire", 8)

        return types.int64(arrivals, types.int64), codegen

    @intrinsic
    def rest(typing_context, spins):
        """A short pause, or after PATIENCE of them a turn for other threads."""

        def codegen(context, builder, signature, args):
            limit = context.get_constant(types.int64, PATIENCE)
            with builder.if_else(builder.icmp_signed("<", args[0], limit)) as (soon, late):
                with soon:
                    if x86:
                        kind = ir.FunctionType(ir.VoidType(), [])
                        pause = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause")
                        builder.call(pause, [])
                with late:
                    kind = ir.FunctionType(ir.IntType(32), [])
                    builder.call(cgutils.get_or_insert_function(builder.module, kind, YIELD), [])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    write, read, pause = cast(Any, (store, load, rest))  # their signatures are not a type checker's

    def wait(arrivals, index):
        """Wait until every thread has come here as often as this one, thread `index`.

        arrivals [threads, a cache line]: how often each has come. They only grow, so nothing needs
        resetting. What any thread wrote before its wait, all can read after theirs.
        """
        here = arrivals[index, 0] + 1
        write(arrivals, index, here)
        for other in range(arrivals.shape[0]):
            spins = 0
            while read(arrivals, other) < here:
                pause(spins)
                spins += 1

    return {"wait": wait, "gather": gather, "total": total}


def gather(grads, others, first, end):
    """Add the other threads' gradients between these bounds to `grads`, in their order."""
    mine = grads[first:end]
    for k in range(others.shape[0]):
        other = others[k, first:end]
        for i in range(end - first):
            mine[i] += other[i]


def total(parts):
    """The sum of what each thread has, in their order;  parts [threads, a cache line]."""
    result = 0.0
    for k in range(parts.shape[0]):
        result += parts[k, 0]
    return result
