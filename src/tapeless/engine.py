"""An engine binds a config, its buffers and a set of ops into programs that run.

A program is a loop over the schedule: `gradient` (one batch), `evaluate` (loss and logits), `adamw`
and `sgd` (many training steps), `generate` (many samples). Each is written once, as a function over
groups of views. The reference engine calls that function as it is, with NumPy ops; the CPU engine
compiles it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, did_you_mean
from tapeless.layout import (
    BATCH,
    Plan,
    Tensor,
    activation_grads,
    activations,
    aligned_zeros,
    decay_segments,
    decoding,
    memory,
    n_params,
    parameter_plan,
    parameters,
    view_class,
)
from tapeless.schedule import Schedule, make_schedule

ENGINES = ("cpu", "reference")

# The other groups of views that programs take. Symbols: P parameters, M stream, K steps, B documents
# a step (or tokens a sample), U uniforms.
_FLAT = (Tensor("grads", ("P",)),)
_RESULT = (Tensor("loss", (1,), "float64"),)
_OPTIMISER = (
    Tensor("params", ("P",)),
    Tensor("grads", ("P",)),
    Tensor("m", ("P",)),
    Tensor("v", ("P",)),
    Tensor("powers", (2,), "float64"),
    Tensor("segments", ("R", 3), "int64"),
    Tensor("constants", (6,), "float64"),  # beta1, beta2, eps, weight_decay, momentum, grad_clip
)
_DATA = (
    Tensor("stream", ("M",), "int32"),
    Tensor("spans", ("K", "B", 2), "int64"),
    Tensor("lrs", ("K",), "float64"),
    Tensor("losses", ("K",), "float64"),
)
_SAMPLES = (
    Tensor("tokens", ("K", "B"), "int32"),  # each row begins with the prompt
    Tensor("lengths", ("K",), "int32"),  # tokens of each row, the prompt's included
    Tensor("uniforms", ("U",), "float64"),
    Tensor("used", (1,), "int64"),
    Tensor("probs", ("V",), "float64"),
    Tensor("options", (5,), "float64"),  # prompt length, stop token or -1, temperature, top_k, top_p
)


def _make_evaluate(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    forward = schedule.forward

    def evaluate(groups):
        p, a, batch, result = groups
        result.loss[0] = forward(p, a, batch)

    return evaluate


def _make_gradient(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    forward, backward = schedule.forward, schedule.backward

    def gradient(groups):
        p, g, a, d, batch, flat, result = groups
        flat.grads[:] = 0
        result.loss[0] = forward(p, a, batch)
        backward(p, g, a, d, batch)

    return gradient


def _make_train(schedule: Schedule, ops: Any, block_size: int, adaptive: bool) -> Callable:
    forward, backward, pack = schedule.forward, schedule.backward, ops.pack
    adamw, sgd, global_norm = ops.adamw, ops.sgd, ops.global_norm

    def train(groups):
        p, g, a, d, batch, opt, data = groups
        beta1, beta2, eps = opt.constants[0], opt.constants[1], opt.constants[2]
        weight_decay, momentum, clip = opt.constants[3], opt.constants[4], opt.constants[5]
        for k in range(data.losses.shape[0]):
            pack(batch, data.stream, data.spans[k])
            opt.grads[:] = 0
            data.losses[k] = forward(p, a, batch)
            backward(p, g, a, d, batch)
            lr, scale = data.lrs[k], 1.0
            if clip > 0:
                scale = min(1.0, clip / (global_norm(opt.grads) + 1e-6))
            if adaptive:
                adamw(
                    opt.params, opt.grads, opt.m, opt.v, opt.powers, opt.segments,
                    lr, beta1, beta2, eps, weight_decay, scale,
                )  # fmt: skip
            else:
                sgd(opt.params, opt.grads, opt.m, lr, momentum, scale)

    return train


def _make_generate(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    decode, sample_token = schedule.decode, ops.sample_token

    def generate(groups):
        p, c, batch, out = groups
        prompt, stop = int(out.options[0]), int(out.options[1])
        temperature, top_k, top_p = out.options[2], out.options[3], out.options[4]
        batch.sizes[0] = 1
        used = 0
        cached = 0  # positions of the present row whose keys and values are in the cache
        for k in range(out.tokens.shape[0]):
            row, length = out.tokens[k], prompt
            cached = min(cached, prompt - 1)
            while length < row.shape[0]:
                # Learned positions end at the block: beyond it, read the last T tokens again.
                first = max(0, length - block_size)
                for t in range(0 if first else cached, length - first):
                    batch.tokens[0] = row[first + t]
                    batch.positions[0] = t
                    decode(p, c, batch)
                cached = 0 if first else length
                token = sample_token(out.probs, c.logits[0], temperature, top_k, top_p, out.uniforms[used])
                used += 1
                if token == stop:
                    break
                row[length] = token
                length += 1
            out.lengths[k] = length
        out.used[0] = used

    return generate


_MAKERS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "evaluate": (_make_evaluate, ("p", "a", "batch", "result")),
    "gradient": (_make_gradient, ("p", "g", "a", "d", "batch", "flat", "result")),
    "adamw": (partial(_make_train, adaptive=True), ("p", "g", "a", "d", "batch", "opt", "data")),
    "sgd": (partial(_make_train, adaptive=False), ("p", "g", "a", "d", "batch", "opt", "data")),
    "generate": (_make_generate, ("p", "c", "batch", "out")),
}


def check_engine(name: str, dtype: str | None) -> np.dtype:
    """The dtype an engine computes in. Raises `ConfigError` for an unknown engine or dtype."""
    if name not in ENGINES:
        raise ConfigError(f"no engine is called {name!r}.{did_you_mean(name, ENGINES)}")
    if dtype not in (None, "float32", "float64"):
        raise ConfigError(f"dtype must be float32 or float64, not {dtype!r}.")
    if name == "cpu" and dtype == "float64":
        raise ConfigError("the cpu engine computes in float32; use engine='reference' for float64.")
    return np.dtype(dtype or ("float32" if name == "cpu" else "float64"))


def check_memory(config: GPTConfig, engine: str, dtype: str | None, batch_size: int) -> None:
    """Raise `ConfigError` if training with this batch size, or with 0 just holding a model and its
    gradients, needs more memory than the machine has."""
    tokens = batch_size * config.block_size
    plans = memory(config, check_engine(engine, dtype), tokens, batch_size)
    if batch_size == 0:
        plans = {name: plans[name] for name in ("parameters", "gradients")}
    needed, total = sum(plan.nbytes for plan in plans.values()), machine_memory()
    if needed > total:
        raise ConfigError(
            f"this needs {needed / 1e9:,.1f} GB of memory ({n_params(config):,} parameters, batches of up to "
            f"{tokens:,} tokens) but the machine has {total / 1e9:,.1f} GB: choose smaller sizes."
        )


def machine_memory() -> float:
    """Bytes of physical memory, or infinity where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


class Engine:
    """One model's buffers, and the programs that run on them.

    `params` and `grads` are flat; `p` and `g` are their views. Activation buffers grow to the
    largest batch seen. Raises `ConfigError` for an unknown engine, or one that cannot do `dtype`.
    """

    variant = ""  # of the CPU's ops: a word for the key of the programs compiled with them

    def __init__(self, config: GPTConfig, name: str = "cpu", dtype: str | None = None):
        self.config = config
        self.name = name
        self.dtype = check_engine(name, dtype)
        self.notice: Callable[[], None] = lambda: None  # called before something is compiled
        plan = parameter_plan(config, self.dtype)
        self.params, self.p = self._flat("p", plan)
        self.grads, self.g = self._flat("g", plan)
        self._programs: dict[str, Callable] = {}
        self._capacity = (0, 0)

    def _flat(self, name: str, plan: Plan) -> tuple[np.ndarray, Any]:
        buffer = plan.allocate()
        return buffer.view(self.dtype), plan.views(name, buffer)

    # ------------------------------------------------------------ buffers

    def reserve(self, tokens: int, documents: int) -> None:
        """Make room for batches of this size."""
        n, d = (max(pair) for pair in zip(self._capacity, (tokens, documents), strict=True))
        if (n, d) == self._capacity:
            return
        self.a, self.d, self.batch = (
            self._views(name, tensors, {"N": n, "D": d})
            for name, tensors in (
                ("a", activations(self.config)),
                ("d", activation_grads(self.config)),
                ("batch", BATCH),
            )
        )
        self._capacity = (n, d)

    def _views(self, name: str, tensors: Sequence[Tensor], sizes: Mapping[str, int] | None = None) -> Any:
        plan = Plan(tensors, self.dtype, sizes)
        return plan.views(name, plan.allocate())

    @cached_property
    def _flat_grads(self) -> Any:
        return view_class("flat", _FLAT)(self.grads)

    @cached_property
    def _result(self) -> Any:
        return self._views("result", _RESULT)

    @cached_property
    def optimiser(self) -> Any:
        """Adam's moments and running products, beside the parameters and gradients they belong to."""
        m, v = (aligned_zeros(self.params.nbytes).view(self.dtype) for _ in range(2))
        segments = decay_segments(self.config)
        return view_class("opt", _OPTIMISER)(self.params, self.grads, m, v, np.ones(2), segments, np.zeros(6))

    @cached_property
    def _decoding(self) -> tuple[Any, Any]:
        return (
            self._views("c", decoding(self.config)),
            self._views("batch", BATCH, {"N": 1, "D": 1}),
        )

    # ------------------------------------------------------------ programs

    def program(self, name: str) -> Callable:
        """The program of this name, ready to run: for the CPU, loaded from the cache or compiled."""
        if name not in self._programs:
            make, arguments = _MAKERS[name]
            T = self.config.block_size
            if self.name == "reference":
                from tapeless.ops import reference

                run = make(make_schedule(self.config, reference), reference, T)
                self._programs[name] = lambda *groups: run(groups)
            else:
                from tapeless.ops.cpu import native

                self._programs[name] = native.Program(
                    [native.Group(a, self._tensors(a)) for a in arguments],
                    key=f"{name} {self.variant} {self.config!r}",
                    build=lambda: self._build(make),
                    notice=self.notice,
                )
        return self._programs[name]

    def _build(self, make: Callable) -> Callable:
        from tapeless.ops import cpu

        ops = self.make_ops()
        schedule = Schedule(*(cpu.jit(f, inline="always") for f in make_schedule(self.config, ops)))
        return cpu.jit(make(schedule, ops, self.config.block_size), inline="always")

    def make_ops(self) -> Any:
        """The CPU's ops that programs are compiled with."""
        from tapeless.ops import cpu

        return cpu.make_ops()

    def _tensors(self, argument: str) -> tuple[Tensor, ...]:
        return {
            "p": parameters(self.config),
            "g": parameters(self.config),
            "a": activations(self.config),
            "d": activation_grads(self.config),
            "c": decoding(self.config),
            "batch": BATCH,
            "flat": _FLAT,
            "result": _RESULT,
            "opt": _OPTIMISER,
            "data": _DATA,
            "out": _SAMPLES,
        }[argument]

    # ------------------------------------------------------------ running

    def fill(self, tokens: Any, targets: Any, starts: Any, weights: Any) -> int:
        """Put one packed batch into the batch buffers; returns its number of tokens."""
        n, documents = len(tokens), len(starts) - 1
        self.reserve(n, documents)
        b = self.batch
        b.tokens[:n] = tokens
        b.targets[:n] = targets
        b.starts[: documents + 1] = starts
        b.positions[:n] = np.arange(n) - np.repeat(starts[:-1], np.diff(starts))
        b.weights[:n] = weights
        b.sizes[:] = n, documents
        return n

    def evaluate(self) -> float:
        """Loss of the batch; its logits are in `a.logits`."""
        self.program("evaluate")(self.p, self.a, self.batch, self._result)
        return float(self._result.loss[0])

    def gradient(self) -> float:
        """Loss of the batch; its gradients are in `grads`."""
        self.program("gradient")(self.p, self.g, self.a, self.d, self.batch, self._flat_grads, self._result)
        return float(self._result.loss[0])

    def train(
        self, stream: np.ndarray, spans: np.ndarray, lrs: np.ndarray, optimiser: str = "adamw"
    ) -> np.ndarray:
        """One optimiser step ("adamw" or "sgd") for each of `spans` [K, B, 2] at the learning rates
        `lrs` [K]; returns the K losses. The other constants are in `self.optimiser.constants`."""
        self.reserve(int(spans[..., 1].sum(1).max()), spans.shape[1])
        losses = np.empty(len(spans))
        data = view_class("data", _DATA)(stream, np.ascontiguousarray(spans), np.asarray(lrs), losses)
        self.program(optimiser)(self.p, self.g, self.a, self.d, self.batch, self.optimiser, data)
        return losses

    def generate(
        self,
        prompt: Sequence[int],
        n: int,
        max_tokens: int,
        uniforms: np.ndarray,
        *,
        stop: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> tuple[list[np.ndarray], int]:
        """`n` continuations of the prompt of at most `max_tokens`, and how many uniforms were used."""
        length = len(prompt)
        out = view_class("out", _SAMPLES)(
            np.zeros((n, length + max_tokens), np.int32),
            np.zeros(n, np.int32),
            uniforms,
            np.zeros(1, np.int64),
            np.empty(self.config.vocab),
            np.array([length, stop, temperature, top_k, top_p], np.float64),
        )
        out.tokens[:, :length] = prompt
        self.program("generate")(self.p, *self._decoding, out)
        rows = [row[length:end] for row, end in zip(out.tokens, out.lengths, strict=True)]
        return rows, int(out.used[0])


def uses(engine: str, dtype: np.dtype) -> str:
    """What runs where, for people: "cpu engine (AVX-512, 1 thread, float32)"."""
    if engine == "reference":
        return f"reference engine (NumPy, {dtype})"
    from tapeless.ops.cpu import native

    return f"cpu engine ({native.simd()}, 1 thread, {dtype})"
