"""Where the threads of a step wait for each other."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm

from tapeless.ops.cpu.native import YIELD, is_arm

# Looks at another thread's counter before giving the processor to whoever else wants it: some tens
# of µs, so that a thread that is held up, or has no processor, costs the others little.
PATIENCE = 1000


def make_wait() -> Any:
    """The op `wait`, as an intrinsic.

    Counters only grow, so nothing needs resetting. Writing one's own counter releases what this
    thread wrote before, and reading another's acquires what that thread wrote before it came.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
    from numba.np import arrayobj

    word = ir.IntType(64)
    x86, arm = llvm.get_default_triple().startswith(("x86_64", "i686")), is_arm()

    @intrinsic
    def wait(typing_context, arrivals, index, threads):
        def codegen(context, builder, signature, args):
            table = arrayobj.make_array(signature.args[0])(context, builder, args[0])
            row = cgutils.unpack_tuple(builder, table.strides, 2)[0]
            first = builder.ptrtoint(table.data, word)
            builder.call(waiting(builder.module), [first, row, args[1], args[2]])
            return context.get_dummy_value()

        return types.void(arrivals, types.int64, types.int64), codegen

    def waiting(module: Any) -> Any:
        """A function of this module, since programs wait in many places: of the address of the first
        counter and the bytes from one to the next."""
        name = "tapeless_wait"
        if name in module.globals:
            return module.globals[name]
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [word] * 4), name)
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        first, row, index, threads = function.args

        def counter(index: Any) -> Any:
            return builder.inttoptr(builder.add(first, builder.mul(row, index)), word.as_pointer())

        def call(name: str, result: Any, *given: Any) -> None:
            kind = ir.FunctionType(result, [each.type for each in given])
            builder.call(cgutils.get_or_insert_function(module, kind, name), given)

        mine = counter(index)
        here = builder.add(builder.load(mine), word(1))
        builder.store_atomic(here, mine, "release", 8)
        with cgutils.for_range(builder, threads) as loop:
            other = counter(loop.index)
            looks = cgutils.alloca_once_value(builder, word(0))
            builder.store(word(0), looks)
            look, rest, there = (builder.append_basic_block(name) for name in ("look", "rest", "there"))
            builder.branch(look)
            builder.position_at_end(look)
            missing = builder.icmp_signed("<", builder.load_atomic(other, "acquire", 8), here)
            builder.cbranch(missing, rest, there)
            builder.position_at_end(rest)
            count = builder.load(looks)
            builder.store(builder.add(count, word(1)), looks)
            with builder.if_else(builder.icmp_signed("<", count, word(PATIENCE))) as (soon, late):
                with soon:
                    if x86:
                        call("llvm.x86.sse2.pause", ir.VoidType())
                    if arm:  # `yield` does nothing on most processors, `isb` takes a moment
                        call("llvm.aarch64.isb", ir.VoidType(), ir.Constant(ir.IntType(32), 15))
                with late:
                    call(YIELD, ir.IntType(32))
            builder.branch(look)
            builder.position_at_end(there)
        builder.ret_void()
        return function

    return wait
