"""The schedule run with ops that only write down how they are called: the trace.

A training step of one document, the optimiser, and one decoding step, as lists of `Call`s on parts of
named buffers. What is known before anything runs, what lives when, and the C program, all follow from
these lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError
from tapeless.export.ops import OPS, arguments
from tapeless.layout import (
    D,
    N,
    Tensor,
    W,
    activation_grads,
    activations,
    decay_segments,
    decoding,
    n_params,
    parameters,
    view_class,
)
from tapeless.schedule import make_schedule
from tapeless.settings import Training


@dataclass(frozen=True)
class Ref:
    """A part of a tensor: `buffer` is p, g, a, d or c as in the schedule, or opt; `offset` counts numbers
    from the tensor's beginning."""

    buffer: str
    tensor: str
    index: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def name(self) -> str:
        """As the schedule has it: "a.qkv[0]"."""
        return f"{self.buffer}.{self.tensor}" + "".join(f"[{i}]" for i in self.index)

    def __getitem__(self, key: Any) -> Ref:
        head, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(head, slice):  # of nothing: how the schedule says that there is no bias
            assert head == slice(None, 0), key
            return replace(self, shape=(0, *self.shape[1:]))
        size = prod(self.shape[1:])
        inner = Ref(self.buffer, self.tensor, (*self.index, head), self.offset + head * size, self.shape[1:])
        return inner[tuple(rest)] if rest else inner

    def __str__(self) -> str:
        return f"{self.name}{list(self.shape)}" if self.size else "-"


class Call(NamedTuple):
    """One op on parts of buffers."""

    op: str
    args: dict[str, Any]  # by the reference's names: a Ref, a number, or a word for what is known at run time

    def refs(self, names: str) -> list[Ref]:
        """Those of these arguments that are parts of buffers."""
        found = (self.args[name] for name in names.split())
        return [arg for arg in found if isinstance(arg, Ref) and arg.size]

    @property
    def writes(self) -> list[Ref]:
        return self.refs(OPS[self.op].writes)

    @property
    def updates(self) -> list[Ref]:
        return self.refs(OPS[self.op].updates)

    def __str__(self) -> str:
        return f"{self.op}({', '.join(f'{name}={arg}' for name, arg in self.args.items())})"


class Trace(NamedTuple):
    """What a model does: a training step of one document, the optimiser, and one decoding step."""

    step: list[Call]
    optimiser: list[Call]
    decode: list[Call]

    def __str__(self) -> str:
        parts = zip(("step", "optimiser", "decode"), self, strict=True)
        return "\n\n".join("\n".join([name, *(f"  {call}" for call in calls)]) for name, calls in parts)


class Recorder:
    """Ops that write down their calls in `calls`. A document's rows are the word "n"."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def rows(self, batch: Any) -> str:
        return "n"

    documents = rows

    def __getattr__(self, op: str) -> Callable[..., float]:
        names = arguments(op)

        def record(*args: Any) -> float:
            self.calls.append(Call(op, dict(zip(names, args, strict=True))))
            return 0.0

        return record

    def taken(self) -> list[Call]:
        """The calls so far, which are forgotten here."""
        calls, self.calls = self.calls, []
        return calls


class Batch(NamedTuple):
    """What the schedule asks of a batch, as words: in C a document's tokens are read where they lie."""

    tokens: str = "tokens"
    targets: str = "targets"
    positions: str = "position"
    weights: str = "weight"
    sizes: tuple[int, int] = (1, 1)


def group(buffer: str, tensors: Sequence[Tensor], rows: int) -> Any:
    """A group of the schedule: parts of buffers in place of arrays, for documents of up to `rows` tokens."""
    sizes = {N: rows, D: 1, W: 1}
    refs = (Ref(buffer, t.name, (), 0, t.resolve(sizes)) for t in tensors)
    return view_class(buffer, tensors)(*refs)


def record(config: GPTConfig, training: Training) -> Trace:
    """The trace of a model and how it is trained, with ops joined where C has one for two.

    Raises `ConfigError` for a model with ops that have no C version.
    """
    ops = Recorder()
    schedule = make_schedule(config, ops)
    T, batch = config.block_size, Batch()
    p, g = (group(buffer, parameters(config), T) for buffer in "pg")
    a, d = group("a", activations(config), T), group("d", activation_grads(config), T)
    schedule.forward(p, a, batch)
    schedule.backward(p, g, a, d, batch)
    step = ops.taken()
    _record_optimiser(ops, config, training)
    optimiser = ops.taken()
    schedule.decode(p, group("c", decoding(config, 1), 1), batch)
    trace = Trace(step, optimiser, ops.taken())
    if missing := sorted({call.op for calls in trace for call in calls} - OPS.keys()):
        raise ConfigError(f"{', '.join(missing)}: no C version yet, so this model cannot be exported.")
    return Trace(fused(trace.step), trace.optimiser, fused(trace.decode))


def _record_optimiser(ops: Any, config: GPTConfig, training: Training) -> None:
    """As `programs` calls it, but for each run of parameters that decay, or do not, on its own."""
    buffers = [Ref("opt", name, (), 0, (n_params(config),)) for name in ("params", "grads", "m", "v")]
    t = training
    if t.grad_clip:
        ops.global_norm(buffers[1])
    if t.optimiser == "sgd":
        m = buffers[2] if t.momentum else replace(buffers[2], shape=(0,))
        ops.sgd(*buffers[:2], m, "lr", t.momentum, "scale")
        return
    segments = decay_segments(config) if t.weight_decay else [(0, n_params(config), 0)]
    for first, end, decays in segments:
        params, grads, m, v = (replace(b, offset=int(first), shape=(int(end - first),)) for b in buffers)
        decay = t.weight_decay if decays else 0.0
        ops.adamw(params, grads, m, v, "powers", "segments", "lr", t.beta1, t.beta2, t.eps, decay, "scale")


# ---------------------------------------------------------------- two ops as one


def fused(calls: list[Call]) -> list[Call]:
    """Calls that C does in one go, joined: a product and the residual it is added to, the loss and its
    gradient; and ReLU in place, whose gradient only asks where its result is above zero."""
    out: list[Call] = []
    for call in _in_place(calls):
        before = out[-1] if out else None
        if before is not None and (joined := _joined(before, call)) is not None:
            out[-1] = joined
        else:
            out.append(call)
    for call in out:
        if not OPS[call.op].c:
            raise ConfigError(
                f"{call.op} has a C version only behind another op, so this cannot be exported."
            )
    return out


def _joined(first: Call, second: Call) -> Call | None:
    a, b = first.args, second.args
    match first.op, second.op:
        case "linear_forward", "add_forward" if a["y"] == b["f"]:
            return Call(
                "linear_add_forward", {"y": b["y"], "r": b["x"]} | {k: a[k] for k in ["x", "w", "b", "n"]}
            )
        case "linear_backward", "accumulate" if a["dx"] == b["x"]:
            return Call("linear_add_backward", a | {"dx": b["y"]})
        case "cross_entropy_forward", "cross_entropy_backward":
            names = ["dlogits", "logits", "targets", "weights", "n"]
            return Call("cross_entropy", {name: b[name] for name in names})
    return None


def _in_place(calls: list[Call]) -> Iterator[Call]:
    same = {call.args["u"]: call.args["v"] for call in calls if call.op == "relu_forward"}
    for call in calls:
        yield Call(
            call.op, {k: same.get(arg, arg) if isinstance(arg, Ref) else arg for k, arg in call.args.items()}
        )
