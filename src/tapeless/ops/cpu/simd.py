"""Explicit vectors for Numba: a portable vector type.

A vector is `LANES` floats in one register of the processor, a value like any other in the ops' code:
`load` and `store` at the indices of an array, `+ - * /` and `>` between vectors and with scalars
(which count for every lane), `fma`, `maximum`, `minimum`, `where`, sums over all lanes or over groups
of them, and `exp`, `tanh` and `rsqrt` by polynomials. A row whose length is no multiple of LANES ends
in a vector that is not full: `load` fills it, `store` leaves out what is beyond, and where lengths
are constants the compiler forgets that there was a question.

LLVM turns vectors of any width into what the processor has; `LANES` and `REGISTERS` say what that is.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from numba.np import arrayobj

from tapeless.ops.cpu.native import jit, processor

intrinsic: Any = extending.intrinsic  # what it makes has another signature than its definition
_FEATURES = processor()[1].split(",")
# Floats in a vector, and vector registers: AVX-512 16 and 32, NEON 4 and 32, AVX 8 and 16, SSE 4 and 16.
LANES = 16 if "+avx512f" in _FEATURES else 8 if "+avx" in _FEATURES else 4
REGISTERS = 32 if "+avx512f" in _FEATURES or "+neon" in _FEATURES else 16

I1, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (1, 16, 32, 64)), ir.FloatType())
VEC, MASK, WORDS = (ir.VectorType(t, LANES) for t in (F32, I1, I32))


def _all(value: float) -> ir.Constant:
    return ir.Constant(VEC, [value] * LANES)


ZERO = _all(0.0)
_INFINITY = float("inf")


class _Type(types.Type):
    def __init__(self, name: str):
        super().__init__(name=name)


vector = _Type(f"f32x{LANES}")
mask = _Type(f"mask{LANES}")


@register_model(_Type)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, VEC if kind is vector else MASK)


# ---------------------------------------------------------------- building blocks in LLVM's terms


def constant(n: int) -> ir.Constant:
    return ir.Constant(I64, n)


def call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, f"llvm.fmuladd.v{LANES}f32", VEC, [a, b, c])


def broadcast(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    undef = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(undef, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undef, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _shuffle(builder: Any, value: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(value, value, ir.Constant(WORDS, lanes))


def _lanes_below(builder: Any, count: Any, lanes: int = LANES) -> Any:
    """The mask of lanes 0 … count − 1."""
    numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, broadcast(builder, builder.trunc(count, I32), lanes))


def _masked(kind: Any) -> tuple[str, ir.Constant]:
    """What LLVM calls a vector in memory, and how such a vector may lie there."""
    size = 4 if kind.element == F32 else kind.element.width // 8
    return f"v{kind.count}{'f' if kind.element == F32 else 'i'}{8 * size}.p0", ir.Constant(I32, size)


def load_first(builder: Any, kind: Any, place: Any, count: Any) -> Any:
    """The first `count` lanes of a vector in memory; the others are 0, and not read."""
    (name, align), some = _masked(kind), _lanes_below(builder, count, kind.count)
    return call(builder, f"llvm.masked.load.{name}", kind, [place, align, some, kind(None)])


def store_first(builder: Any, value: Any, place: Any, count: Any) -> None:
    """Let the first `count` lanes of a vector in memory be these; the others are not touched."""
    (name, align), some = _masked(value.type), _lanes_below(builder, count, value.type.count)
    call(builder, f"llvm.masked.store.{name}", ir.VoidType(), [value, place, align, some])


def _as_vector(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if kind is vector:
        return value
    return broadcast(builder, context.cast(builder, value, kind, types.float32))


# ---------------------------------------------------------------- operators

_SCALARS = (types.float32, types.float64, types.int64)
_PAIRS = [(vector, vector), *((vector, s) for s in _SCALARS), *((s, vector) for s in _SCALARS)]


def _operator(function: Any, instruction: str, result: Any = vector) -> None:
    infer_global(function)(
        type("_", (ConcreteTemplate,), {"cases": [signature(result, a, b) for a, b in _PAIRS]})
    )

    def lower(context, builder, sig, args):
        a, b = (_as_vector(context, builder, k, v) for k, v in zip(sig.args, args, strict=True))
        if result is mask:
            return builder.fcmp_ordered(instruction, a, b)
        return getattr(builder, instruction)(a, b)

    for pair in _PAIRS:
        lower_builtin(function, *pair)(lower)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_function, _instruction)
_operator(operator.gt, ">", mask)
_operator(operator.lt, "<", mask)


def _intrinsic(result: Any, *wanted: Any) -> Callable[[Callable], Any]:
    """A function of Numba code from one that builds it: (builder, LLVM values …) -> LLVM value.

    It takes arguments of the types `wanted`; a scalar where a vector is wanted counts for every lane.
    """

    def wrap(build: Callable) -> Any:
        def typed(typing_context, *given):
            def codegen(context, builder, sig, args):
                values = [
                    _as_vector(context, builder, kind, value) if want is vector else value
                    for want, kind, value in zip(wanted, sig.args, args, strict=True)
                ]
                return build(builder, *values)

            kinds = (g if w is vector else w for w, g in zip(wanted, given, strict=True))
            return result(*kinds), codegen

        typed.__name__, typed.__doc__ = build.__name__, build.__doc__
        typed.__signature__ = inspect.signature(build)  # type: ignore[attr-defined]
        return intrinsic(typed)

    return wrap


# ---------------------------------------------------------------- arrays


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> tuple[Any, Any, Any]:
    """A pointer to the vector that begins at this index, how much of its row is left, and whether that is
    enough for the vector: a constant when the row's length is one and a multiple of LANES."""
    made = arrayobj.make_array(kind)(context, builder, array)
    shape = cgutils.unpack_tuple(builder, made.shape, kind.ndim)
    strides = cgutils.unpack_tuple(builder, made.strides, kind.ndim)
    item = cgutils.get_item_pointer2(
        context, builder, made.data, shape, strides, kind.layout, index, wraparound=False
    )
    left = builder.sub(shape[-1], index[-1])
    all_whole = builder.icmp_unsigned("==", builder.urem(shape[-1], constant(LANES)), constant(0))
    whole = builder.or_(all_whole, builder.icmp_signed(">=", left, constant(LANES)))
    return builder.bitcast(item, VEC.as_pointer()), left, whole


def _integers(context: Any, builder: Any, kinds: Any, packed: Any) -> list[Any]:
    values = cgutils.unpack_tuple(builder, packed, len(kinds))
    return [context.cast(builder, v, k, types.int64) for k, v in zip(kinds, values, strict=True)]


def _load(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    place, left, whole = _place(context, builder, kind, array, index)
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            every, block = builder.load(place, align=4), builder.block
        with otherwise:
            some = load_first(builder, VEC, place, left)
            other = builder.block
    result = builder.phi(VEC)
    result.add_incoming(every, block)
    result.add_incoming(some, other)
    return result


@intrinsic
def load(typing_context, array, *index):
    """The vector that begins at array[index]; what lies beyond the row's end is 0.

    The index lies in the row. Rows of a multiple of LANES are never asked whether a vector ends in
    them: there its last index must be such a multiple, too.
    """
    kinds: Any = index[0] if len(index) == 1 and isinstance(index[0], types.BaseTuple) else index

    def codegen(context, builder, sig, args):
        return _load(context, builder, sig.args[0], args[0], _integers(context, builder, kinds, args[1]))

    return vector(array, types.StarArgTuple.from_types(tuple(kinds))), codegen


@intrinsic
def store(typing_context, value, array, *index):
    """Let the vector begin at array[index], as for `load`; what lies beyond the row's end is left out."""
    kinds: Any = index[0] if len(index) == 1 and isinstance(index[0], types.BaseTuple) else index

    def codegen(context, builder, sig, args):
        value = _as_vector(context, builder, sig.args[0], args[0])
        place, left, whole = _place(
            context, builder, sig.args[1], args[1], _integers(context, builder, kinds, args[2])
        )
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                builder.store(value, place, align=4)
            with otherwise:
                store_first(builder, value, place, left)
        return context.get_dummy_value()

    return types.void(value, array, types.StarArgTuple.from_types(tuple(kinds))), codegen


@intrinsic
def matrix(typing_context, array, offset, rows, columns, stride):
    """The 2-D view of `rows` rows of `columns` numbers, `stride` apart, whose first is number `offset` of
    the array's data. Nothing is checked."""
    kind = types.Array(array.dtype, 2, "A")

    def codegen(context, builder, sig, args):
        size = context.get_abi_sizeof(context.get_data_type(array.dtype))
        data = arrayobj.make_array(sig.args[0])(context, builder, args[0]).data
        view = arrayobj.make_array(kind)(context, builder)
        arrayobj.populate_array(
            view,
            data=builder.gep(data, [args[1]]),
            shape=[args[2], args[3]],
            strides=[builder.mul(args[4], constant(size)), constant(size)],
            itemsize=constant(size),
            meminfo=None,
        )
        return view._getvalue()

    n = types.int64
    return kind(array, n, n, n, n), codegen


# ---------------------------------------------------------------- arithmetic


@_intrinsic(vector, vector)
def splat(builder, x):
    """A scalar in every lane."""
    return x


@_intrinsic(vector, vector, vector, vector)
def fma(builder, a, b, c):
    """a·b + c, rounded once where the processor has an instruction for it."""
    return multiply_add(builder, a, b, c)


@_intrinsic(vector, vector, vector)
def maximum(builder, a, b):
    """The greater of two lanes; a where one is NaN."""
    return builder.select(builder.fcmp_unordered(">", a, b), a, b)


@_intrinsic(vector, vector, vector)
def minimum(builder, a, b):
    """The smaller of two lanes; a where one is NaN."""
    return builder.select(builder.fcmp_unordered("<", a, b), a, b)


@_intrinsic(vector, mask, vector, vector)
def where(builder, condition, a, b):
    """a in the lanes where the condition holds, b elsewhere."""
    return builder.select(condition, a, b)


@_intrinsic(vector, types.int64, vector, vector)
def first(builder, count, a, b):
    """a in the first `count` lanes, b elsewhere."""
    return builder.select(_lanes_below(builder, count), a, b)


def fold(builder: Any, value: Any, combine: Callable) -> Any:
    """Lane 0 of log₂ LANES rounds of combining one half with the other."""
    half = LANES // 2
    while half:
        value = combine(value, _shuffle(builder, value, [(i + half) % LANES for i in range(LANES)]))
        half //= 2
    return builder.extract_element(value, ir.Constant(I32, 0))


@_intrinsic(types.float32, vector)
def hsum(builder, a):
    """The sum of all lanes."""
    return fold(builder, a, builder.fadd)


@_intrinsic(types.float32, vector)
def hmax(builder, a):
    """The greatest of all lanes."""
    return fold(builder, a, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@_intrinsic(vector, vector, types.int64)
def group_sum(builder, a, size):
    """In every lane the sum of its group: lanes 0 … size − 1, size … 2·size − 1, and so on, for a size
    that is a power of two up to LANES."""
    step = 1
    while step < LANES:
        together = builder.fadd(a, _shuffle(builder, a, [i ^ step for i in range(LANES)]))
        a = builder.select(builder.icmp_signed("<", constant(step), size), together, a)
        step *= 2
    return a


def _by_size(builder: Any, a: Any, size: Any, lanes: Callable[[int], list[int]]) -> Any:
    """One shuffle of several, chosen by a size that is a power of two: the compiler keeps that one."""
    step = 2
    while step <= LANES:
        chosen = builder.icmp_signed("==", size, constant(step))
        a = builder.select(chosen, _shuffle(builder, a, lanes(step)), a)
        step *= 2
    return a


@_intrinsic(vector, vector, types.int64)
def spread(builder, a, size):
    """Lane i gets lane i // size: a number each for groups of lanes."""
    return _by_size(builder, a, size, lambda step: [i // step for i in range(LANES)])


@_intrinsic(vector, vector, types.int64)
def collect(builder, a, size):
    """Lane i gets lane i·size, the first of its group; the lanes after those repeat the last."""
    return _by_size(builder, a, size, lambda step: [min(i * step, LANES - step) for i in range(LANES)])


# ---------------------------------------------------------------- functions by polynomials


@_intrinsic(vector, vector)
def rounded(builder, a):
    """To the nearest whole number, for |a| < 2³¹."""
    if any(f in _FEATURES for f in ("+sse4.1", "+avx", "+neon")):
        return call(builder, f"llvm.rint.v{LANES}f32", VEC, [a])
    half = builder.select(builder.fcmp_ordered("<", a, ZERO), _all(-0.5), _all(0.5))
    return builder.sitofp(builder.fptosi(builder.fadd(a, half), WORDS), VEC)


@_intrinsic(vector, vector)
def power_of_two(builder, n):
    """2ⁿ for whole n from −126 to 127: the float with n + 127 in the exponent's bits."""
    biased = builder.add(builder.fptosi(n, WORDS), ir.Constant(WORDS, [127] * LANES))
    return builder.bitcast(builder.shl(biased, ir.Constant(WORDS, [23] * LANES)), VEC)


_ROOT_HALF = 0x3F3504F3  # ½√2 as float32


def _exponents(builder: Any, x: Any) -> Any:
    above = builder.sub(builder.bitcast(x, WORDS), ir.Constant(WORDS, [_ROOT_HALF] * LANES))
    return builder.ashr(above, ir.Constant(WORDS, [23] * LANES))


@_intrinsic(vector, vector)
def exponent(builder, x):
    """The k for which 2⁻ᵏ·x lies between ½√2 and √2, for positive normal x."""
    return builder.sitofp(_exponents(builder, x), VEC)


@_intrinsic(vector, vector)
def significand(builder, x):
    """2⁻ᵏ·x for that k; exact, where a product with 2⁻ᵏ would need numbers that float32 lacks."""
    shifted = builder.shl(_exponents(builder, x), ir.Constant(WORDS, [23] * LANES))
    return builder.bitcast(builder.sub(builder.bitcast(x, WORDS), shifted), VEC)


@_intrinsic(vector, vector)
def rsqrt_guess(builder, x):
    """x^-½ to 3.5 %, by halving the exponent (Lomont 2003, "Fast inverse square root")."""
    halved = builder.lshr(builder.bitcast(x, WORDS), ir.Constant(WORDS, [1] * LANES))
    return builder.bitcast(builder.sub(ir.Constant(WORDS, [0x5F375A86] * LANES), halved), VEC)


_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_EXP_LOWEST, _EXP_HIGHEST = -87.33, 88.37


@jit
def exp(x):
    """eˣ, to 1.3e-7 of its value; 0 below −87.33 and infinity above 88.37.

    x = n·ln 2 + r with |r| ≤ ½ ln 2, then 2ⁿ·(1 + r + r²·q(r)); q is fitted so that the whole is exact
    to 3.2e-9 before rounding.
    """
    z = minimum(maximum(x, _EXP_LOWEST), _EXP_HIGHEST)
    n = rounded(z * _LOG2E)
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, z))
    q = fma(fma(fma(fma(0.0013950631, r, 0.00836897), r, 0.041666204), r, 0.16666518), r, 0.50000001)
    e = fma(fma(q, r, 1.0), r, 1.0) * power_of_two(n)
    return where(x < _EXP_LOWEST, 0.0, where(x > _EXP_HIGHEST, _INFINITY, e))


@jit
def tanh(x):
    """The hyperbolic tangent, to 4e-7 of its value: x·P(x²)/Q(x²), fitted for |x| ≤ 9.02, beyond which
    it is 1 to the last bit."""
    z = minimum(maximum(x, -9.02), 9.02)
    u = z * z
    p = fma(fma(fma(fma(5.0762562e-08, u, 3.1589161e-05), u, 0.0040085135), u, 0.13785368), u, 1.0)
    q = fma(fma(fma(7.3745020e-10, u, 1.6174930e-06), u, 0.00042074158), u, 0.027737525)
    q = fma(fma(q, u, 0.471187), u, 1.0)
    return z * p / q


@jit
def log(x):
    """The natural logarithm, to 1e-7 of its value, for positive normal x; of infinity and NaN, themselves.

    x = 2ᵏ·(1 + f) with ½√2 ≤ 1 + f < √2. With s = f/(2 + f), log(1 + f) = 2·artanh(s) = f − s·(f − R), R
    being the series of 2·artanh(s)/s after its first term: f itself, most of it, is not rounded.
    """
    k = exponent(x)
    f = significand(x) - 1.0
    s = f / (f + 2.0)
    u = s * s
    rest = u * fma(fma(fma(2 / 9, u, 2 / 7), u, 2 / 5), u, 2 / 3)
    whole = fma(k, _LN2_HIGH, fma(k, _LN2_LOW, fma(s, rest - f, f)))
    return where(x < _INFINITY, whole, x)


@jit
def rsqrt(x):
    """x^-½, to 1.8e-7 of its value for positive normal x: two steps of Halley's iteration, which triples
    the digits, y ← y·(1 + ½e + ⅜e²) with e = 1 − x·y²."""
    y = rsqrt_guess(x)
    e = fma(x * y, -1.0 * y, 1.0)
    y = fma(y, e * fma(e, 0.375, 0.5), y)
    e = fma(x * y, -1.0 * y, 1.0)
    return fma(y, e * fma(e, 0.375, 0.5), y)


# ---------------------------------------------------------------- transposes


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """LANES vectors as the columns of a block instead of its rows: log₂ LANES rounds of interleaving rows
    r and r + LANES/2."""
    half = LANES // 2
    pairs = [i for k in range(LANES) for i in (k, k + LANES)]
    low, high = (ir.Constant(WORDS, part) for part in (pairs[:LANES], pairs[LANES:]))
    for _ in range(LANES.bit_length() - 1):
        rows = [builder.shuffle_vector(rows[r], rows[r + half], m) for r in range(half) for m in (low, high)]
    return rows


@intrinsic
def transpose_rows(typing_context, y, row, column, x, first_row, last_row, first_column):
    """y[row + c, column + r] = x[first_row + r, first_column + c] for LANES × LANES numbers of two arrays;
    rows after `last_row` repeat it, and what lies beyond the ends of x's rows is 0."""

    def codegen(context, builder, sig, args):
        y, row, column, x, first_row, last_row, first_column = args
        rows = []
        for r in range(LANES):
            wanted = builder.add(first_row, constant(r))
            wanted = builder.select(builder.icmp_signed("<", wanted, last_row), wanted, last_row)
            rows.append(_load(context, builder, sig.args[3], x, [wanted, first_column]))
        for c, turned in enumerate(transposed(builder, rows)):
            place, _, _ = _place(context, builder, sig.args[0], y, [builder.add(row, constant(c)), column])
            builder.store(turned, place, align=4)
        return context.get_dummy_value()

    n = types.int64
    return types.void(y, n, n, x, n, n, n), codegen
