"""Explicit vectors for Numba: a register tile of a matrix product, and a block transpose.

Each is an intrinsic whose body is written by a Python loop: vectors of `LANES` floats held in LLVM
values, so that accumulators stay in registers. (Accumulators kept in an array would be stored and
loaded again at every step, since Numba's arguments may overlap for all that LLVM knows.) LLVM turns
vectors of any width into what the processor has; `LANES` and `REGISTERS` say what that is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tapeless.ops.cpu.native import processor

_FEATURES = processor()[1].split(",")
# Floats in a vector, and vector registers: AVX-512 16 and 32, NEON 4 and 32, AVX 8 and 16, SSE 4 and 16.
LANES = 16 if "+avx512f" in _FEATURES else 8 if "+avx" in _FEATURES else 4
REGISTERS = 32 if "+avx512f" in _FEATURES or "+neon" in _FEATURES else 16

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_VEC = ir.VectorType(_F32, LANES)
_ZERO = ir.Constant(_VEC, [0.0] * LANES)


def _const(n: int) -> ir.Constant:
    return ir.Constant(_I64, n)


def _floats(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _F32.as_pointer())


def _vector_at(builder: Any, data: Any, index: Any) -> Any:
    return builder.bitcast(builder.gep(data, [index]), _VEC.as_pointer())


def _splat(builder: Any, scalar: Any) -> Any:
    undef = ir.Constant(_VEC, ir.Undefined)
    one = builder.insert_element(undef, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, undef, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


@cache
def tile(rows: int, vecs: int) -> Any:
    """An intrinsic: the register tile  y[r, c] (+)= Σ_i x[r, i]·w[i, c]  of `rows` rows and `vecs` vectors.

    tile(y, at, ldy, x, from, step_row, step_i, w, column, ldw, k, shift, add): y, x and w are
    addresses; `at`, `from` and `column` the indices of the tile's first elements from there; x is read at
    from + r·step_row + i·step_i, so that xᵀ does as well. The last vector lies `shift` to the left
    of where it would follow, to end with the row; what it shares with the one before is computed
    twice and stored alike. `add` begins from y instead of from zero. k ≥ 1.
    """

    @intrinsic
    def kernel(typing_context, y, at, ldy, x, first, step_row, step_i, w, column, ldw, k, shift, add):
        def codegen(context, builder, signature, args):
            ydata, xdata, wdata = (_floats(builder, args[i]) for i in (0, 3, 7))
            _, at, ldy, _, first, step_row, step_i, _, column, ldw, k, shift, add = args
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VEC, [_VEC] * 3), f"llvm.fma.v{LANES}f32"
            )
            places = [_const(c * LANES) for c in range(vecs)]
            places[-1] = builder.sub(places[-1], shift)
            outputs = [
                [
                    _vector_at(
                        builder, ydata, builder.add(builder.add(at, builder.mul(ldy, _const(r))), place)
                    )
                    for place in places
                ]
                for r in range(rows)
            ]
            adding = builder.icmp_signed("!=", add, ir.Constant(add.type, 0))
            initial = [
                [builder.select(adding, builder.load(pointer, align=4), _ZERO) for pointer in row]
                for row in outputs
            ]
            row_starts = [builder.add(first, builder.mul(step_row, _const(r))) for r in range(rows)]
            before = builder.block
            loop, done = builder.append_basic_block("tile"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            i = builder.phi(_I64)
            i.add_incoming(_const(0), before)
            sums = [[builder.phi(_VEC) for _ in range(vecs)] for _ in range(rows)]
            row_of_w = builder.add(column, builder.mul(i, ldw))
            weights = [
                builder.load(_vector_at(builder, wdata, builder.add(row_of_w, place)), align=4)
                for place in places
            ]
            offset = builder.mul(i, step_i)
            new = []
            for r in range(rows):
                scalar = builder.load(builder.gep(xdata, [builder.add(row_starts[r], offset)]))
                factor = _splat(builder, scalar)
                new.append([builder.call(fma, [factor, weights[c], sums[r][c]]) for c in range(vecs)])
            following = builder.add(i, _const(1))
            i.add_incoming(following, loop)
            for r in range(rows):
                for c in range(vecs):
                    sums[r][c].add_incoming(initial[r][c], before)
                    sums[r][c].add_incoming(new[r][c], loop)
            builder.cbranch(builder.icmp_signed("<", following, k), loop, done)
            builder.position_at_end(done)
            for r in range(rows):
                for c in range(vecs):
                    builder.store(new[r][c], outputs[r][c], align=4)
            return context.get_dummy_value()

        n = types.int64
        return types.void(*[n] * 13), codegen

    return kernel


@intrinsic
def transpose_block(typing_context, y, at, ldy, x, first, ldx):
    """y[c, r] = x[r, c] for a block of LANES × LANES, from and to these indices after the addresses x and y.

    log₂ LANES rounds of interleaving rows r and r + LANES/2.
    """

    def codegen(context, builder, signature, args):
        ydata, xdata = (_floats(builder, args[i]) for i in (0, 3))
        _, at, ldy, _, first, ldx = args
        rows = [
            builder.load(_vector_at(builder, xdata, builder.add(first, builder.mul(ldx, _const(r)))), align=4)
            for r in range(LANES)
        ]
        half = LANES // 2
        pairs = [i for k in range(LANES) for i in (k, k + LANES)]
        low, high = (ir.Constant(ir.VectorType(_I32, LANES), part) for part in (pairs[:LANES], pairs[LANES:]))
        for _ in range(LANES.bit_length() - 1):
            rows = [
                builder.shuffle_vector(rows[r], rows[r + half], mask)
                for r in range(half)
                for mask in (low, high)
            ]
        for r, row in enumerate(rows):
            builder.store(
                row, _vector_at(builder, ydata, builder.add(at, builder.mul(ldy, _const(r)))), align=4
            )
        return context.get_dummy_value()

    n = types.int64
    return types.void(*[n] * 6), codegen


@intrinsic
def copy_one(typing_context, y, at, x, first):
    """y[at] = x[first], counted from the addresses y and x."""

    def codegen(context, builder, signature, args):
        y, at, x, first = args
        value = builder.load(builder.gep(_floats(builder, x), [first]))
        builder.store(value, builder.gep(_floats(builder, y), [at]))
        return context.get_dummy_value()

    n = types.int64
    return types.void(n, n, n, n), codegen
