"""An engine binds a config, its buffers and a set of ops into programs that run.

A program is a loop over the schedule: `gradient` (one batch), `evaluate` (loss and logits), `adamw`
and `sgd` (many training steps), `generate` (many samples). Each is written once, as a function over
groups of views. The reference engine calls that function as it is, with NumPy ops; the CPU engine
compiles it, and may run it on several threads at once (a team), each with its share of the documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

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
    cut_segments,
    decay_segments,
    decoding,
    memory,
    n_params,
    nbytes,
    parameter_plan,
    parameters,
    view_class,
)
from tapeless.schedule import Schedule, make_schedule
from tapeless.team import check_threads, parts, shares, team_size

ENGINES = ("cpu", "reference")

# The other groups of views that programs take. Symbols: P parameters, M stream, K steps, B documents
# a step (or tokens a sample), U uniforms, W threads (workers), O of them all but the first.
_FLAT = (Tensor("grads", ("P",)),)  # this thread's
_RESULT = (Tensor("loss", (1,), "float64"),)  # of this thread's share
# A thread adds up all threads' gradients of its own part of the parameters, Q of them, and updates it.
_TEAM = (
    Tensor("mine", (2,), "int64"),  # which thread this is, and where its part begins
    Tensor("grads", ("Q",)),  # its part of the first thread's gradients: the sum
    Tensor("others", ("O", "P")),  # the other threads' gradients
    # Of each thread, a cache line apart, so that nobody waits for a line that another one writes:
    Tensor("arrivals", ("W", 8), "int64"),  # how often it has come to a place where all meet
    Tensor("squares", ("W", 8), "float64"),  # the squared norm of its part of the gradient
)
_OPTIMISER = (
    Tensor("params", ("Q",)),
    Tensor("m", ("Q",)),
    Tensor("v", ("Q",)),
    Tensor("powers", (2,), "float64"),
    Tensor("segments", ("R", 3), "int64"),
    Tensor("constants", (6,), "float64"),  # beta1, beta2, eps, weight_decay, momentum, grad_clip
)
_DATA = (
    Tensor("stream", ("M",), "int32"),
    Tensor("spans", ("K", "B", 2), "int64"),
    Tensor("lrs", ("K",), "float64"),
    Tensor("losses", ("K",), "float64"),  # of this thread's share
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
    wait, gather = ops.wait, ops.gather

    def gradient(groups):
        p, g, a, d, batch, flat, result, team = groups
        flat.grads[:] = 0
        result.loss[0] = forward(p, a, batch)
        backward(p, g, a, d, batch)
        wait(team.arrivals, team.mine[0])
        gather(team.grads, team.others, team.mine[1])

    return gradient


def _make_train(schedule: Schedule, ops: Any, block_size: int, adaptive: bool) -> Callable:
    """Every thread runs all steps, on its share of each step's documents and with gradients of its
    own; then it adds up all threads' gradients of its part of the parameters, and updates that."""
    forward, backward, pack = schedule.forward, schedule.backward, ops.pack
    adamw, sgd, global_norm = ops.adamw, ops.sgd, ops.global_norm
    wait, gather = ops.wait, ops.gather

    def train(groups):
        p, g, a, d, batch, flat, opt, data, team = groups
        beta1, beta2, eps = opt.constants[0], opt.constants[1], opt.constants[2]
        weight_decay, momentum, clip = opt.constants[3], opt.constants[4], opt.constants[5]
        me, first = team.mine[0], team.mine[1]
        threads, documents = team.arrivals.shape[0], data.spans.shape[1]
        begin, stop = me * documents // threads, (me + 1) * documents // threads
        for k in range(data.losses.shape[0]):
            pack(batch, data.stream, data.spans[k], begin, stop)
            flat.grads[:] = 0
            data.losses[k] = forward(p, a, batch)
            backward(p, g, a, d, batch)
            wait(team.arrivals, me)
            gather(team.grads, team.others, first)
            lr, scale = data.lrs[k], 1.0
            if clip > 0:
                team.squares[me, 0] = global_norm(team.grads) ** 2
                wait(team.arrivals, me)
                square = 0.0
                for thread in range(threads):
                    square += team.squares[thread, 0]
                scale = min(1.0, clip / (np.sqrt(square) + 1e-6))
            if adaptive:
                adamw(
                    opt.params, team.grads, opt.m, opt.v, opt.powers, opt.segments,
                    lr, beta1, beta2, eps, weight_decay, scale,
                )  # fmt: skip
            else:
                sgd(opt.params, team.grads, opt.m, lr, momentum, scale)
            wait(team.arrivals, me)

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


_TRAINING = ("p", "g", "a", "d", "batch", "flat", "opt", "data", "team")
_MAKERS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "evaluate": (_make_evaluate, ("p", "a", "batch", "result")),
    "gradient": (_make_gradient, ("p", "g", "a", "d", "batch", "flat", "result", "team")),
    "adamw": (partial(_make_train, adaptive=True), _TRAINING),
    "sgd": (partial(_make_train, adaptive=False), _TRAINING),
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


def effective(config: GPTConfig, engine: str) -> GPTConfig:
    """The config whose buffers and passes an engine really has: the compiled engine runs every attention
    in its flash form, whose results are the same and which keeps and moves less."""
    return config.replace(attention="flash") if engine == "cpu" else config


def check_memory(
    config: GPTConfig, engine: str, dtype: str | None, batch_size: int, threads: int | None = None
) -> None:
    """Raise `ConfigError` if training with this batch size, or with 0 just holding a model and its
    gradients, needs more memory than the machine has."""
    check_threads(engine, threads)
    team = 1 if engine == "reference" else team_size(config, batch_size, threads)
    documents = -(-batch_size // team)
    dtype_ = check_engine(engine, dtype)
    plans = memory(effective(config, engine), dtype_, documents * config.block_size, documents)
    if batch_size == 0:
        plans = {name: plans[name] for name in ("parameters", "gradients")}
    needed, total = nbytes(plans, team), machine_memory()
    if needed > total:
        raise ConfigError(
            f"this needs {needed / 1e9:,.1f} GB of memory ({n_params(config):,} parameters, batches of up to "
            f"{batch_size * config.block_size:,} tokens) but the machine has {total / 1e9:,.1f} GB: "
            "choose smaller sizes."
        )


def machine_memory() -> float:
    """Bytes of physical memory, or infinity where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


class _Own(NamedTuple):
    """The groups of views that a thread has for itself: of its gradients and its share of the batch."""

    g: Any
    flat: Any
    a: Any
    d: Any
    batch: Any
    result: Any


class Engine:
    """One model's buffers, and the programs that run on them.

    `params` and `grads` are flat; `p` and `g` are their views. Activation buffers grow to the
    largest batch seen. `threads` share a batch's documents; None leaves it to `team_size`.
    Raises `ConfigError` for an unknown engine, one that cannot do `dtype`, or no number of threads.
    """

    variant = ""  # of the CPU's ops: a word for the key of the programs compiled with them

    def __init__(
        self, config: GPTConfig, name: str = "cpu", dtype: str | None = None, threads: int | None = None
    ):
        self.config = config
        self._runs = effective(config, name)
        self.name = name
        self.dtype = check_engine(name, dtype)
        self.threads = check_threads(name, threads)
        self.notice: Callable[[], None] = lambda: None  # called before something is compiled
        plan = parameter_plan(config, self.dtype)
        self.params, self.p = self._flat("p", plan)
        self.grads, self.g = self._flat("g", plan)
        self._others = self.grads.reshape(1, -1)[:0]  # gradients of the threads after the first
        self._programs: dict[str, Callable] = {}
        self._capacity = (0, 0, 0)
        self._teams: dict[int, list[Any]] = {}

    def _flat(self, name: str, plan: Plan) -> tuple[np.ndarray, Any]:
        buffer = plan.allocate()
        return buffer.view(self.dtype), plan.views(name, buffer)

    # ------------------------------------------------------------ buffers

    def team(self, documents: int) -> int:
        """How many threads share a batch of so many documents."""
        return 1 if self.name == "reference" else team_size(self.config, documents, self.threads)

    def reserve(self, tokens: int, documents: int, threads: int = 1) -> None:
        """Make room for batches of this size on each of so many threads."""
        wanted = (tokens, documents, threads)
        n, d, k = (max(pair) for pair in zip(self._capacity, wanted, strict=True))
        if (n, d, k) == self._capacity:
            return
        others = self._others
        if k > 1 + len(others):
            others = aligned_zeros((k - 1) * self.grads.nbytes).view(self.dtype).reshape(k - 1, -1)
        plan = parameter_plan(self.config, self.dtype)
        views = [self.g, *(plan.views("g", row.view(np.uint8)) for row in others)]
        flats = [view_class("flat", _FLAT)(row) for row in (self.grads, *others)]
        self._own = [
            _Own(
                g,
                flat,
                self._views("a", activations(self._runs), {"N": n, "D": d}),
                self._views("d", activation_grads(self._runs), {"N": n, "D": d}),
                self._views("batch", BATCH, {"N": n, "D": d}),
                self._views("result", _RESULT),
            )
            for g, flat in zip(views, flats, strict=True)
        ]
        self._others, self._capacity = others, (n, d, k)
        self._teams.clear()
        _, _, self.a, self.d, self.batch, self._result = self._own[0]

    def _views(self, name: str, tensors: Sequence[Tensor], sizes: Mapping[str, int] | None = None) -> Any:
        plan = Plan(tensors, self.dtype, sizes)
        return plan.views(name, plan.allocate())

    def _team(self, threads: int) -> list[Any]:
        """The group `team` of each thread."""
        if threads not in self._teams:
            arrivals, squares = (aligned_zeros(64 * threads).reshape(threads, -1) for _ in range(2))
            shared = self._others[: threads - 1], arrivals.view(np.int64), squares.view(np.float64)
            self._teams[threads] = [
                view_class("team", _TEAM)(np.array([k, first], np.int64), self.grads[first:end], *shared)
                for k, (first, end) in enumerate(parts(self.grads.size, threads))
            ]
        return self._teams[threads]

    @cached_property
    def optimiser(self) -> Any:
        """Adam's moments and running products, beside the parameters they belong to."""
        m, v = (aligned_zeros(self.params.nbytes).view(self.dtype) for _ in range(2))
        segments = decay_segments(self.config)
        return view_class("opt", _OPTIMISER)(self.params, m, v, np.ones(2), segments, np.zeros(6))

    def _optimisers(self, threads: int) -> list[Any]:
        """The group `opt` of each thread: its part of the parameters, and running products of its own."""
        opt, optimisers = self.optimiser, []
        for k, (first, end) in enumerate(parts(self.params.size, threads)):
            params, m, v = (flat[first:end] for flat in (opt.params, opt.m, opt.v))
            powers = opt.powers.copy() if k else opt.powers
            segments = cut_segments(opt.segments, first, end)
            optimisers.append(view_class("opt", _OPTIMISER)(params, m, v, powers, segments, opt.constants))
        return optimisers

    @cached_property
    def _decoding(self) -> tuple[Any, Any]:
        return (
            self._views("c", decoding(self._runs)),
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
                    key=f"{name} {self.variant} {self._runs!r}",
                    build=lambda: self._build(make),
                    notice=self.notice,
                )
        return self._programs[name]

    def _build(self, make: Callable) -> Callable:
        from tapeless.ops import cpu

        ops = self.make_ops()
        schedule = Schedule(*(cpu.jit(f, inline="always") for f in make_schedule(self._runs, ops)))
        return cpu.jit(make(schedule, ops, self.config.block_size), inline="always")

    def make_ops(self) -> Any:
        """The CPU's ops that programs are compiled with."""
        from tapeless.ops import cpu

        return cpu.make_ops(self._runs)

    def _tensors(self, argument: str) -> tuple[Tensor, ...]:
        return {
            "p": parameters(self.config),
            "g": parameters(self.config),
            "a": activations(self._runs),
            "d": activation_grads(self._runs),
            "c": decoding(self._runs),
            "batch": BATCH,
            "flat": _FLAT,
            "result": _RESULT,
            "opt": _OPTIMISER,
            "data": _DATA,
            "team": _TEAM,
            "out": _SAMPLES,
        }[argument]

    # ------------------------------------------------------------ running

    def fill(self, tokens: Any, targets: Any, starts: Any, weights: Any) -> int:
        """Put one packed batch into the batch buffers; returns its number of tokens."""
        starts = np.asarray(starts)
        n, documents = len(tokens), len(starts) - 1
        threads = self.team(documents)
        bounds = shares(documents, threads)
        largest = max(int(starts[end] - starts[begin]) for begin, end in bounds)
        self.reserve(largest, max(end - begin for begin, end in bounds), threads)
        self._filled = threads
        positions = np.arange(n) - np.repeat(starts[:-1], np.diff(starts))
        for own, (begin, end) in zip(self._own, bounds, strict=False):
            b, part = own.batch, slice(starts[begin], starts[end])
            size = part.stop - part.start
            for buffer, values in (
                (b.tokens, tokens),
                (b.targets, targets),
                (b.positions, positions),
                (b.weights, weights),
            ):
                buffer[:size] = values[part]
            b.starts[: end - begin + 1] = starts[begin : end + 1] - starts[begin]
            b.sizes[:] = size, end - begin
        return n

    def logits(self) -> np.ndarray:
        """Logits [N, V] of the batch, after `evaluate` or `gradient`."""
        used = self._own[: self._filled]
        return np.concatenate([own.a.logits[: own.batch.sizes[0]] for own in used])

    def evaluate(self) -> float:
        """Loss of the batch; `logits` has its logits."""
        used = self._own[: self._filled]
        self._run("evaluate", [(self.p, own.a, own.batch, own.result) for own in used])
        return sum(float(own.result.loss[0]) for own in used)

    def gradient(self) -> float:
        """Loss of the batch; its gradients are in `grads`."""
        used = self._own[: self._filled]
        self._run(
            "gradient",
            [
                (self.p, own.g, own.a, own.d, own.batch, own.flat, own.result, team)
                for own, team in zip(used, self._team(len(used)), strict=True)
            ],
        )
        return sum(float(own.result.loss[0]) for own in used)

    def train(
        self, stream: np.ndarray, spans: np.ndarray, lrs: np.ndarray, optimiser: str = "adamw"
    ) -> np.ndarray:
        """One optimiser step ("adamw" or "sgd") for each of `spans` [K, B, 2] at the learning rates
        `lrs` [K]; returns the K losses. The other constants are in `self.optimiser.constants`."""
        threads = self.team(spans.shape[1])
        bounds = shares(spans.shape[1], threads)
        largest = max(int(spans[:, begin:end, 1].sum(1).max()) for begin, end in bounds)
        self.reserve(largest, max(end - begin for begin, end in bounds), threads)
        losses = np.empty((threads, len(spans)))
        data = view_class("data", _DATA)(stream, np.ascontiguousarray(spans), np.asarray(lrs), losses[0])
        self._run(
            optimiser,
            [
                (self.p, own.g, own.a, own.d, own.batch, own.flat, opt, data._replace(losses=part), team)
                for own, opt, team, part in zip(
                    self._own[:threads], self._optimisers(threads), self._team(threads), losses, strict=True
                )
            ],
        )
        return sum(losses[1:], start=losses[0])

    def _run(self, name: str, calls: Sequence[tuple[Any, ...]]) -> None:
        """Run a program on one thread for each of `calls`."""
        program: Any = self.program(name)
        if len(calls) == 1:
            program(*calls[0])
        else:
            program.together(calls)

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


def uses(engine: str, dtype: np.dtype, threads: int) -> str:
    """What runs where, for people: "cpu engine (AVX-512, 2 threads, float32)"."""
    if engine == "reference":
        return f"reference engine (NumPy, {dtype})"
    from tapeless.ops.cpu import native

    return f"cpu engine ({native.simd()}, {threads} thread{'s' if threads > 1 else ''}, {dtype})"
