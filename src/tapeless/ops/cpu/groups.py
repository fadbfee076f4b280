"""Groups of tensors in compiled code: an address, from which an array is made where one is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, lower_getattr_generic, models, register_model
from numba.np import arrayobj

from tapeless.layout import Tensor
from tapeless.ops.cpu.native import Group

_WORD = ir.IntType(64)


class GroupType(types.Type):
    """A NamedTuple of tensors, as the address of its part of a program's table."""

    def __init__(self, group: Group):
        super().__init__(name=f"group({group.name})")
        self.group = group
        self.arrays = {t.name: _array_type(t) for t in group.tensors}

    @property
    def key(self) -> Group:  # types of one key are the same
        return self.group


def _array_type(tensor: Tensor) -> Any:
    scalar = types.float32 if tensor.dtype == "float" else getattr(types, tensor.dtype)
    return types.Array(scalar, len(tensor.shape), "C")


@register_model(GroupType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _WORD)


@infer_getattr
class _Tensors(AttributeTemplate):
    key = GroupType

    def generic_resolve(self, kind, name):  # type: ignore[override]
        return kind.arrays.get(name)


@lower_getattr_generic(GroupType)
def _tensor(context, builder, kind, address, name):
    symbols, names = kind.group.symbols, [t.name for t in kind.group.tensors]
    table = builder.inttoptr(address, _WORD.as_pointer())

    def entry(i: int) -> Any:
        return builder.load(builder.gep(table, [ir.Constant(_WORD, i)]))

    at = names.index(name)
    sizes = kind.group.tensors[at].shape
    array = arrayobj.make_array(kind.arrays[name])(context, builder)
    itemsize = kind.arrays[name].dtype.bitwidth // 8
    shape = [entry(symbols.index(s)) if isinstance(s, str) else ir.Constant(_WORD, s) for s in sizes]
    strides: list[Any] = []
    step = ir.Constant(_WORD, itemsize)
    for size in reversed(shape):
        strides.insert(0, step)
        step = builder.mul(step, size)
    arrayobj.populate_array(
        array,
        data=builder.inttoptr(entry(len(symbols) + at), array.data.type),
        shape=shape,
        strides=strides,
        itemsize=itemsize,
        meminfo=None,
    )
    return array._getvalue()


def make_bind(groups: Sequence[Group]) -> Any:
    """An intrinsic that turns a table's address into a tuple of its groups."""
    kinds = [GroupType(group) for group in groups]

    @intrinsic
    def bind(typing_context, table):
        def codegen(context, builder, signature, args):
            parts = []
            (address,) = args
            for group in groups:
                parts.append(address)
                address = builder.add(address, ir.Constant(_WORD, 8 * group.size))
            return context.make_tuple(builder, signature.return_type, parts)

        return types.Tuple(kinds)(types.int64), codegen

    return bind
