"""What lives when in a trace, and so what may share memory: a plan of one static buffer.

A value is written by one call, changed by some, and last read by another; from then on its memory is
free for others. Two values share memory only if they are never needed at once, or if an op may write one
over the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tapeless.export.ops import OPS
from tapeless.export.trace import Call, Ref, Trace


@dataclass(eq=False)
class Value:
    """What one part of a buffer holds from the call `first` to the call `last`, both included."""

    name: str
    size: int
    first: int
    last: int
    offset: int = -1


class Placed(NamedTuple):
    """A call, with the value behind each of its arguments that lies in the shared buffer."""

    call: Call
    values: dict[str, Value]


@dataclass
class Arena:
    """Values with their places in one buffer of `size` numbers."""

    calls: list[Placed]
    values: list[Value]
    size: int = 0


def plan(calls: Sequence[Call], kept: Iterable[str] = (), results: Iterable[str] = ()) -> Arena:
    """Places for everything the calls work on but parameters, their gradients and `opt`.

    `kept` are tensors that live from one run of the calls to the next, `results` those that are read after
    it. Raises `ValueError` where a call reads what none has written.
    """
    kept, results = set(kept), set(results)
    end = len(calls)
    values: list[Value] = []
    now: dict[Ref, Value] = {}
    names: dict[str, int] = {}
    placed: list[Placed] = []
    joined: list[tuple[Value, Value]] = []

    def new(name: str, size: int, first: int) -> Value:
        names[name] = names.get(name, 0) + 1
        value = Value(name if names[name] == 1 else f"{name} {names[name]}", size, first, first)
        values.append(value)
        return value

    for i, call in enumerate(calls):
        op = OPS[call.op]
        here: dict[str, Value] = {}
        given = {k: a for k, a in call.args.items() if isinstance(a, Ref) and a.size and a.buffer in "adc"}
        given = {k: a for k, a in given.items() if k in _used(op.c)}
        for name, ref in given.items():
            if name in op.writes.split():
                continue
            if ref not in now:
                if ref.name not in kept:
                    raise ValueError(f"{call.op} reads {ref}, which nothing has written.")
                now[ref] = new(ref.name, ref.size, 0)
                now[ref].last = end
            here[name] = now[ref]
            here[name].last = max(here[name].last, i)
        old = dict(now)
        for name in op.writes.split():
            if name in given and given[name] not in (given[k] for k in given if k not in op.writes.split()):
                here[name] = now[given[name]] = new(given[name].name, given[name].size, i)
                if given[name].name in results:
                    here[name].last = end
            elif name in given:  # in place already
                here[name] = old[given[name]]
        if op.in_place:
            y, x = op.in_place.split()
            if y in here and x in here and here[y] is not here[x]:
                joined.append((here[y], here[x]))
        if op.scratch:
            here["*"] = new(f"{call.writes[0].buffer}.scratch", dimension(call, op.scratch), i)
        placed.append(Placed(call, here))
    return _place(placed, values, joined)


def plans(trace: Trace) -> tuple[Arena, Arena]:
    """Of a training step and of a decoding step, whose keys and values stay for the next one."""
    caches = {ref.name for call in trace.decode for ref in call.updates if ref.tensor == "cache"}
    return plan(trace.step), plan(trace.decode, caches, ["c.logits"])


def _used(c: str) -> set[str]:
    return {word.split(".")[0] for word in c.split()}


def dimension(call: Call, word: str) -> int:
    """`x.1` is the second dimension of the argument x, `tile` the argument of that name."""
    name, dot, axis = word.partition(".")
    return call.args[name].shape[int(axis)] if dot else int(call.args[name])


# ---------------------------------------------------------------- places


def _place(calls: list[Placed], values: list[Value], joined: list[tuple[Value, Value]]) -> Arena:
    blocks = {id(v): [v] for v in values}
    for y, x in joined:
        a, b = blocks[id(y)], blocks[id(x)]
        if a is not b and x.last == y.first and x.size == y.size:
            b += a
            for v in a:
                blocks[id(v)] = b
    distinct = list({id(block): block for block in blocks.values()}.values())
    spans = [(max(v.size for v in b), min(v.first for v in b), max(v.last for v in b)) for b in distinct]
    orders: list[Callable[[int], tuple[int, ...]]] = [
        lambda k: (-spans[k][0], spans[k][1]),
        lambda k: (spans[k][1], -spans[k][0]),
        lambda k: (spans[k][1] - spans[k][2], -spans[k][0]),
        lambda k: (-spans[k][0] * (spans[k][2] - spans[k][1] + 1),),
    ]
    plans = [_first_fit(spans, sorted(range(len(spans)), key=order)) for order in orders]
    offsets, size = min(plans, key=lambda plan: plan[1])
    for block, offset in zip(distinct, offsets, strict=True):
        for value in block:
            value.offset = offset
    return Arena(calls, values, size)


def _first_fit(spans: list[tuple[int, int, int]], order: list[int]) -> tuple[list[int], int]:
    """Each block in turn at the lowest place that is free all its life."""
    offsets = [-1] * len(spans)
    top = 0
    for k in order:
        size, first, last = spans[k]
        taken = sorted(
            (offsets[j], offsets[j] + spans[j][0])
            for j in range(len(spans))
            if offsets[j] >= 0 and spans[j][1] <= last and first <= spans[j][2]
        )
        offset = 0
        for begin, end in taken:
            if offset + size <= begin:
                break
            offset = max(offset, end)
        offsets[k] = offset
        top = max(top, offset + size)
    return offsets, top
