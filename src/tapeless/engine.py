"""An engine binds a config, its buffers and a set of ops into programs that run.

The reference engine calls a program as it is, with NumPy ops; the CPU engine compiles it, and may run
it on several threads at once (a team), each with its share of the documents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
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
from tapeless.programs import DATA, FLAT, OPTIMISER, PROGRAMS, RESULT, SAMPLES, TEAM
from tapeless.schedule import Schedule, make_schedule
from tapeless.team import check_threads, parts, shares, team_size

ENGINES = ("cpu", "reference")


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
    in its flash form, in tiles of its own; results are the same, and less is kept and moved."""
    return config.replace(attention="flash", attention_tile=1) if engine == "cpu" else config


def training_memory(
    config: GPTConfig, engine: str, dtype: Any, batch_size: int, threads: int | None
) -> tuple[dict[str, Plan], int]:
    """What training with this batch size allocates, by buffer, and how many threads share a step (those
    in `layout.PER_THREAD` are there once for each). Raises `ConfigError` for no number of threads."""
    check_threads(engine, threads)
    team = 1 if engine == "reference" else team_size(config, batch_size, threads)
    documents = -(-batch_size // team)
    return memory(effective(config, engine), dtype, documents * config.block_size, documents), team


def check_memory(
    config: GPTConfig, engine: str, dtype: str | None, batch_size: int, threads: int | None = None
) -> None:
    """Raise `ConfigError` if training with this batch size, or with 0 just holding a model and its
    gradients, needs more memory than the machine has."""
    plans, team = training_memory(config, engine, check_engine(engine, dtype), batch_size, threads)
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
        flats = [view_class("flat", FLAT)(row) for row in (self.grads, *others)]
        self._own = [
            _Own(
                g,
                flat,
                self._views("a", activations(self._runs), {"N": n, "D": d}),
                self._views("d", activation_grads(self._runs), {"N": n, "D": d}),
                self._views("batch", BATCH, {"N": n, "D": d}),
                self._views("result", RESULT),
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
                view_class("team", TEAM)(np.array([k, first], np.int64), self.grads[first:end], *shared)
                for k, (first, end) in enumerate(parts(self.grads.size, threads))
            ]
        return self._teams[threads]

    @cached_property
    def optimiser(self) -> Any:
        """Adam's moments and running products, beside the parameters they belong to."""
        m, v = (aligned_zeros(self.params.nbytes).view(self.dtype) for _ in range(2))
        segments = decay_segments(self.config)
        return view_class("opt", OPTIMISER)(self.params, m, v, np.ones(2), segments, np.zeros(6))

    def _optimisers(self, threads: int) -> list[Any]:
        """The group `opt` of each thread: its part of the parameters, and running products of its own."""
        opt, optimisers = self.optimiser, []
        for k, (first, end) in enumerate(parts(self.params.size, threads)):
            params, m, v = (flat[first:end] for flat in (opt.params, opt.m, opt.v))
            powers = opt.powers.copy() if k else opt.powers
            segments = cut_segments(opt.segments, first, end)
            optimisers.append(view_class("opt", OPTIMISER)(params, m, v, powers, segments, opt.constants))
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
            make, arguments = PROGRAMS[name]
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
            "flat": FLAT,
            "result": RESULT,
            "opt": OPTIMISER,
            "data": DATA,
            "team": TEAM,
            "out": SAMPLES,
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
        data = view_class("data", DATA)(stream, np.ascontiguousarray(spans), np.asarray(lrs), losses[0])
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
        out = view_class("out", SAMPLES)(
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
