"""What this machine can do at most: multiply-adds that never leave the registers, and reading memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from tapeless.layout import aligned_zeros
from tapeless.ops.cpu import native

UNROLLED = 4  # multiply-adds of each accumulator in one turn of the loop
READ = 512  # bytes that one turn of the loop that reads takes


def peak_gflops(threads: int = 1, *, seconds: float = 0.01, repeats: int = 20) -> float:
    """The float32 multiply-add peak of `threads` cores together, in GFLOP/s, a multiply-add being two
    operations: the best of `repeats` measurements of about `seconds` each."""
    loop, chains, lanes = kernel()

    def run(turns: int) -> None:
        vectors = aligned_zeros((2 + chains) * lanes * 4).view(np.float32)
        vectors[:] = 0.5  # x becomes x/2 + 1/2 and stays between 0 and 1
        vectors[2 * lanes :] = np.linspace(0, 1, chains * lanes)
        loop(turns, vectors.ctypes.data)

    with ThreadPoolExecutor(threads) as pool:

        def measure(turns: int) -> float:
            """Seconds until every thread has done `turns`. They run at once, without the GIL."""
            began = time.perf_counter()
            for done in [pool.submit(run, turns) for _ in range(threads)]:
                done.result()
            return time.perf_counter() - began

        turns = 1 << 10
        while (took := measure(turns)) < seconds:
            turns = int(turns * min(4.0, 1.2 * seconds / took))
        best = min(measure(turns) for _ in range(repeats))
    return threads * turns * UNROLLED * chains * lanes * 2 / best / 1e9


def bandwidth(threads: int = 1, *, nbytes: int = 1 << 29, repeats: int = 20) -> float:
    """GB/s that `threads` threads together can read from memory: the best of `repeats` sums of an array
    of `nbytes`, which should be far more than the caches hold. Each thread reads a part of its own."""
    total = reader()
    memory = aligned_zeros(nbytes).view(np.float32)
    memory[:] = 1  # pages that were never written are one page of zeros
    parts = [memory[len(memory) * t // threads :] for t in range(threads)]
    blocks = nbytes // threads // READ

    def read(part: np.ndarray) -> None:
        result = np.empty(1, np.float32)
        total(result.ctypes.data, part.ctypes.data, blocks)

    with ThreadPoolExecutor(threads) as pool:

        def measure() -> float:
            """Seconds until every thread has read its part. They run at once, without the GIL."""
            began = time.perf_counter()
            for done in [pool.submit(read, part) for part in parts]:
                done.result()
            return time.perf_counter() - began

        best = min(measure() for _ in range(repeats))
    return threads * blocks * READ / best / 1e9


@cache
def kernel() -> tuple[Callable[[int, int], None], int, int]:
    """The loop peak(turns, address of its vectors), its number of chains, and the floats of a vector."""
    native.check_compiler()
    from tapeless.ops.cpu.simd import LANES, REGISTERS

    # Enough independent chains to hide a multiply-add's latency, few enough for the registers.
    chains = REGISTERS - REGISTERS // 4
    code = native.cached("peak", lambda: native._emit(_make(chains, LANES), "tapeless_peak", 2))
    loop = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(native._load(code, "tapeless_peak"))
    return loop, chains, LANES


@cache
def reader() -> Callable[[int, int, int], None]:
    """The loop total(address of a float, address, number): that float is the sum of so many READ bytes."""
    native.check_compiler()
    from tapeless.ops.cpu.simd import LANES

    code = native.cached("reader", lambda: native._emit(_make_reader(LANES), "tapeless_total", 3))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(native._load(code, "tapeless_total"))


def _make(chains: int, lanes: int) -> Callable:
    """peak(turns, vectors): each of `chains` vectors x becomes a·x + b, `UNROLLED` times a turn.

    `vectors` is the address of a, b and the first x of each chain; the last are written back, so that
    the work is not optimised away.
    """
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    word, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)

    @intrinsic
    def multiply_adds(typing_context, turns, vectors):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            # Where there is no fused multiply-add, a multiplication and an addition.
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}f32"
            )
            base = builder.inttoptr(args[1], vector.as_pointer())
            places = [builder.gep(base, [ir.Constant(word, i)]) for i in range(2 + chains)]
            a, b, *first = (builder.load(place, align=4) for place in places)
            before = builder.block
            loop, done = builder.append_basic_block("turn"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            turn = builder.phi(word)
            x = [builder.phi(vector) for _ in range(chains)]
            new = list(x)
            for _ in range(UNROLLED):
                new = [builder.call(fma, [a, value, b]) for value in new]
            following = builder.add(turn, ir.Constant(word, 1))
            turn.add_incoming(ir.Constant(word, 0), before)
            turn.add_incoming(following, loop)
            for phi, start, end in zip(x, first, new, strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(end, loop)
            builder.cbranch(builder.icmp_signed("<", following, args[0]), loop, done)
            builder.position_at_end(done)
            for value, place in zip(new, places[2:], strict=True):
                builder.store(value, place, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    loop: Any = multiply_adds  # called without a typing context

    def peak(turns, vectors):
        loop(turns, vectors)

    return peak


def _make_reader(lanes: int) -> Callable:
    """total(result, data, blocks): the sum of floats, a vector of sums for each vector of a block."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    from tapeless.ops.cpu.simd import fold

    word, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)
    size = 4 * lanes

    @intrinsic
    def read(typing_context, result, data, blocks):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            result, data, blocks = args
            before = builder.block
            loop, done = builder.append_basic_block("block"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            i = builder.phi(word)
            sums = [builder.phi(vector) for _ in range(READ // size)]
            place = builder.add(data, builder.mul(i, ir.Constant(word, READ)))
            new = []
            for k, s in enumerate(sums):
                at = builder.inttoptr(builder.add(place, ir.Constant(word, k * size)), vector.as_pointer())
                new.append(builder.fadd(s, builder.load(at, align=4)))
            following = builder.add(i, ir.Constant(word, 1))
            i.add_incoming(ir.Constant(word, 0), before)
            i.add_incoming(following, loop)
            for s, value in zip(sums, new, strict=True):
                s.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
                s.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, blocks), loop, done)
            builder.position_at_end(done)
            whole = new[0]
            for value in new[1:]:
                whole = builder.fadd(whole, value)
            place = builder.inttoptr(result, ir.FloatType().as_pointer())
            builder.store(fold(builder, whole, builder.fadd), place)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    loop: Any = read  # called without a typing context

    def total(result, data, blocks):
        loop(result, data, blocks)

    return total
