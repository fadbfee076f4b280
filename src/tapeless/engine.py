"""An engine binds a config, its buffers and a set of ops into programs that run.

The reference engine calls a program as it is, with NumPy ops; the CPU engine compiles it, and may run
it on several threads at once (a team), each with its share of a step.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, argument, did_you_mean
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
    decoding_sizes,
    parameter_plan,
    parameters,
    stored_parameters,
    streamed_width,
    view_class,
)
from tapeless.programs import DATA, FLAT, OPTIMISER, PROGRAMS, RESULT, SAMPLES, WEIGHTS, moments
from tapeless.schedule import make_schedule
from tapeless.team import by_documents, check_threads, decoding_team, parts, shares, team_size

ENGINES = ("cpu", "reference")


def check_engine(name: str, dtype: str | None) -> np.dtype:
    """The dtype an engine computes in. Raises `ConfigError` for an unknown engine or dtype."""
    if name not in ENGINES:
        raise ConfigError(f"no engine is called {name!r}.{did_you_mean(name, ENGINES)}")
    if dtype not in (None, "float32", "float64"):
        raise ConfigError(f"dtype must be float32 or float64, not {dtype!r}.")
    if name == "cpu" and dtype == "float64":
        raise ConfigError(
            f"the cpu engine computes in float32; use {argument('engine', 'reference')} for float64."
        )
    return np.dtype(dtype or ("float32" if name == "cpu" else "float64"))


def effective(config: GPTConfig, engine: str) -> GPTConfig:
    """The config whose buffers and passes an engine really has: the compiled engine runs every attention
    in its flash form, in tiles of its own; results are the same, and less is kept and moved."""
    return config.replace(attention="flash", attention_tile=1) if engine == "cpu" else config


# Parameters times tokens that one call of a generating program reads: a fraction of a second.
GENERATING = 2_000_000_000


class Steps(NamedTuple):
    """Results of the training steps that were done: losses [K]; norms of the gradients [K], zero where
    nothing asked for them; `wrong`: the status code of the last step, as in `tapeless.programs`."""

    losses: np.ndarray
    norms: np.ndarray
    wrong: int


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _exclusive(method: _Method) -> _Method:
    """The method with the engine's lock held."""

    @wraps(method)
    def locked(self: Engine, *args: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *args, **options)

    return cast(_Method, locked)


class Engine:
    """One model's buffers, and the programs that run on them.

    `params` and `grads` are flat; `p` and `g` are their views. Activation buffers grow to the
    largest batch seen. `threads` share a batch; None leaves it to `team_size`. Raises
    `ConfigError` for an unknown engine, one that cannot do `dtype`, or no number of threads.

    All calls work in the same buffers, so each holds `lock`, which is re-entrant. Hold it around calls
    that belong together, such as `fill` and `evaluate`. A copy and an unpickled engine have the same
    parameters, gradients and optimiser state, in buffers of their own.
    """

    variant = ""  # of the CPU's ops: a word for the key of the programs compiled with them

    def __init__(
        self, config: GPTConfig, name: str = "cpu", dtype: str | None = None, threads: int | None = None
    ):
        self.lock = threading.RLock()
        _engines.add(self)
        self.config = config
        self._runs = effective(config, name)
        self.name = name
        self.dtype = check_engine(name, dtype)
        self.threads = check_threads(name, threads)
        self.notice: Callable[[], None] = lambda: None  # called before something is compiled
        plan = parameter_plan(config, self.dtype)
        self.params, self.p = self._flat("p", plan)
        self.grads, self.g = self._flat("g", plan)
        self._programs: dict[str, Callable] = {}
        self._teams: dict[int, tuple[list[Any], list[Any]]] = {}
        self._capacity = (0, 0, 0)

    def _flat(self, name: str, plan: Plan) -> tuple[np.ndarray, Any]:
        buffer = plan.allocate()
        return buffer.view(self.dtype), plan.views(name, buffer)

    # ------------------------------------------------------------ copies

    @_exclusive
    def __getstate__(self) -> dict[str, Any]:
        groups = {"params": self.params, "grads": self.grads}
        if "optimiser" in self.__dict__:
            fields = self.optimiser._asdict().items()
            groups |= {f"optimiser.{name}": array for name, array in fields if array.size}
        arrays = {name: array.copy() for name, array in groups.items()}
        return {"made": (self.config, self.name, str(self.dtype), self.threads), "arrays": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Engine.__init__(self, *state["made"])
        arrays = state["arrays"]
        self.reserve_moments([name for name in ("m", "v") if f"optimiser.{name}" in arrays])
        for name, array in arrays.items():
            attrgetter(name)(self)[:] = array

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        engine = type(self).__new__(type(self))
        engine.__setstate__(self.__getstate__())
        return engine

    # ------------------------------------------------------------ buffers

    def team(self, documents: int) -> int:
        """How many threads share a batch of so many documents."""
        return 1 if self.name == "reference" else team_size(self.config, documents, self.threads)

    @_exclusive
    def reserve(self, tokens: int, documents: int, threads: int = 1) -> None:
        """Make room for batches of this size, shared by so many threads."""
        wanted = (tokens, documents, threads)
        n, d, w = (max(pair) for pair in zip(self._capacity, wanted, strict=True))
        if (n, d, w) == self._capacity:
            return
        sizes = {"N": n, "D": d, "W": w, "X": 0}
        self.a = self._views("a", activations(self._runs), sizes)
        self.d = self._views("d", activation_grads(self._runs), sizes)
        self.batch = self._views("batch", BATCH, sizes)
        self._result = self._views("result", RESULT, sizes)
        self._capacity = (n, d, w)
        self._teams.clear()

    def _views(self, name: str, tensors: Sequence[Tensor], sizes: Mapping[str, int] | None = None) -> Any:
        plan = Plan(tensors, self.dtype, sizes)
        return plan.views(name, plan.allocate())

    def _team(self, threads: int) -> tuple[list[Any], list[Any]]:
        """The groups `batch` and `flat` of each thread: the same batch, but what is its share of it, and its
        part of the gradients."""
        if threads not in self._teams:
            flats = [view_class("flat", FLAT)(self.grads[i:j]) for i, j in parts(self.grads.size, threads)]
            self._teams[threads] = _shares(self.batch, threads), flats
        self.batch.arrivals[:] = 0
        return self._teams[threads]

    @cached_property
    def optimiser(self) -> Any:
        """What an optimiser keeps, beside the parameters. The moments `m` and `v` are empty until
        `reserve_moments` makes room for them."""
        none = np.empty(0, self.dtype)
        segments = decay_segments(self.config)
        rest = np.ones(2), np.zeros(4), segments, np.zeros(6), np.zeros(2)
        return view_class("opt", OPTIMISER)(self.params, none, none, *rest)

    @_exclusive
    def reserve_moments(self, names: Sequence[str]) -> None:
        """Make room for these moments, as `moments` names them; new ones are zero."""
        for name in names:
            if not getattr(self.optimiser, name).size:
                zeros = aligned_zeros(self.params.nbytes).view(self.dtype)
                self.optimiser = self.optimiser._replace(**{name: zeros})

    @property
    def state(self) -> dict[str, np.ndarray]:
        """All that training steps change, without moments that the optimiser does not keep."""
        arrays = {name: getattr(self.optimiser, name) for name in ("params", "m", "v", "powers", "means")}
        return {name: array for name, array in arrays.items() if array.size}

    def _optimisers(self, threads: int) -> list[Any]:
        """The group `opt` of each thread: its part of the parameters, products and means of its own."""
        opt, optimisers = self.optimiser, []
        for k, (first, end) in enumerate(parts(self.params.size, threads)):
            params, m, v = (flat[first:end] for flat in (opt.params, opt.m, opt.v))
            powers, means = (own.copy() if k else own for own in (opt.powers, opt.means))
            segments = cut_segments(opt.segments, first, end)
            group = params, m, v, powers, means, segments, opt.constants, opt.limits
            optimisers.append(view_class("opt", OPTIMISER)(*group))
        return optimisers

    @cached_property
    def _decoding(self) -> list[tuple[Any, Any]]:
        """The groups `c` and `batch` of each thread."""
        threads = decoding_team(self.config, self.threads) if self.name == "cpu" else 1
        sizes = decoding_sizes(self.config, threads)
        c, batch = self._views("c", decoding(self._runs), sizes), self._views("batch", BATCH, sizes)
        batch.sizes[1] = 1
        return [(c, part) for part in _shares(batch, threads)]

    @cached_property
    def _stored(self) -> tuple[np.ndarray, Any]:
        """A copy of all parameters in bfloat16, and the parameters as `stored_parameters` has them: its
        matrices, and the others of the model itself."""
        copy = aligned_zeros(2 * self.params.size).view(np.uint16)
        views: list[np.ndarray] = []
        end = 0
        for tensor, view in zip(stored_parameters(self.config), self.p, strict=True):
            first, end = end, end + view.size
            views.append(copy[first:end].reshape(view.shape) if tensor.dtype == "uint16" else view)
        return copy, view_class("stored", stored_parameters(self.config))(*views)

    # ------------------------------------------------------------ programs

    @_exclusive
    def program(self, name: str) -> Callable:
        """The program of this name, ready to run: for the CPU, loaded from the cache or compiled."""
        if name not in self._programs:
            make, arguments = PROGRAMS[name]
            T = self.config.block_size
            if self.name == "reference":
                ops = self.make_ops(decoding=False)
                run = make(make_schedule(self.config, ops), ops, T)
                self._programs[name] = lambda *groups: run(groups)
            else:
                from tapeless.ops.cpu import native

                self._programs[name] = native.Program(
                    [native.Group(a, self._tensors(a)) for a in arguments],
                    key=f"{name} {self.variant} {self._runs!r}",
                    build=lambda: self._build(name, make),
                    notice=self.notice,
                )
        return self._programs[name]

    def _build(self, name: str, make: Callable) -> Callable:
        from tapeless.ops import cpu

        ops = self.make_ops(decoding=name.startswith("generate"))
        if name == "generate_stored":
            ops.embed_forward = ops.embed_stored_forward

        schedule = make_schedule(self._runs, ops, cpu.jit)
        return cpu.jit(make(schedule, ops, self.config.block_size))

    def make_ops(self, decoding: bool) -> Any:
        """The ops that programs are made with."""
        from tapeless.ops import cpu, reference

        if self.name == "reference":
            return reference.in_bfloat16() if self.config.precision == "bf16" else reference
        return cpu.make_ops(self._runs, decoding)

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
            "out": SAMPLES,
            "stored": stored_parameters(self.config),
            "weights": WEIGHTS,
        }[argument]

    # ------------------------------------------------------------ running

    @_exclusive
    def fill(self, tokens: Any, targets: Any, starts: Any, weights: Any) -> int:
        """Put one packed batch into the batch buffers; returns its number of tokens."""
        starts = np.asarray(starts)
        n, documents = len(tokens), len(starts) - 1
        threads = self.team(documents)
        self.reserve(n, documents, threads)
        b = self.batch
        b.tokens[:n], b.targets[:n], b.weights[:n] = tokens, targets, weights
        b.positions[:n] = np.arange(n) - np.repeat(starts[:-1], np.diff(starts))
        b.starts[: documents + 1] = starts
        b.sizes[:] = n, documents
        whole = by_documents(documents, threads)
        bounds = starts[np.array(shares(documents, threads))] if whole else shares(n, threads)
        self._filled = threads
        for part, (begin, end) in zip(self._team(threads)[0], bounds, strict=True):
            part.share[:3] = begin, end, n
        return n

    @_exclusive
    def logits(self) -> np.ndarray:
        """Logits [N, V] of the batch, after `evaluate` or `gradient`."""
        return self.a.logits[: self.batch.sizes[0]].copy()

    @_exclusive
    def evaluate(self) -> float:
        """Loss of the batch; `logits` has its logits."""
        self._result.loss[:] = 0
        batches, _ = self._team(self._filled)
        self._run("evaluate", [(self.p, self.a, batch, self._result) for batch in batches])
        return float(self._result.loss.sum())

    @_exclusive
    def gradient(self) -> float:
        """Loss of the batch; its gradients are in `grads`."""
        self._result.loss[:] = 0
        self._run(
            "gradient",
            [
                (self.p, self.g, self.a, self.d, batch, flat, self._result)
                for batch, flat in zip(*self._team(self._filled), strict=True)
            ],
        )
        return float(self._result.loss.sum())

    @_exclusive
    def train(
        self, stream: np.ndarray, spans: np.ndarray, lrs: np.ndarray, optimiser: str = "adamw"
    ) -> Steps:
        """One optimiser step ("adamw" or "sgd") for each of `spans` [K, B, 2] or [K, A, B, 2], whose
        gradients are those of A batches, at the learning rates `lrs` [K]. The other constants are in
        `self.optimiser.constants`. A step that is bad is the last one, and changes nothing."""
        spans = np.ascontiguousarray(spans.reshape(len(spans), -1, *spans.shape[-2:]))
        documents = spans.shape[2]
        threads = self.team(documents)
        self.reserve_moments(moments(optimiser, self.optimiser.constants[4]))
        self.reserve(int(spans[..., 1].sum(-1).max()), documents, threads)
        losses, norms = np.zeros((self._capacity[2], len(spans))), np.zeros(len(spans))
        ended = np.zeros(2, np.int64)
        data = view_class("data", DATA)(stream, spans, np.asarray(lrs), losses, norms, ended)
        self._run(
            optimiser,
            [
                (self.p, self.g, self.a, self.d, batch, flat, opt, data)
                for batch, flat, opt in zip(*self._team(threads), self._optimisers(threads), strict=True)
            ],
        )
        done, wrong = ended.tolist()
        return Steps(losses.sum(0)[:done], norms[:done], wrong)

    def _run(self, name: str, calls: Sequence[tuple[Any, ...]]) -> None:
        """Run a program on one thread for each of `calls`."""
        program: Any = self.program(name)
        if len(calls) == 1:
            program(*calls[0])
        else:
            program.together(calls)

    @_exclusive
    def generate(
        self,
        prompt: Sequence[int],
        n: int,
        max_tokens: int,
        uniforms: np.ndarray,
        *,
        eos: Sequence[int] = (),
        drawn: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> tuple[list[np.ndarray], int]:
        """`n` continuations of the prompt of at most `max_tokens`, and how many uniforms were used.

        A text ends before any of `eos`. Only the first `drawn` ids are drawn; None is the whole vocabulary.

        Compiled code hears no Ctrl-C, so it comes back every now and then."""
        length, at_once = len(prompt), max(1, GENERATING // self.params.size)
        out = view_class("out", SAMPLES)(
            np.zeros((n, length + max_tokens), np.int32),
            np.zeros(n, np.int32),
            uniforms,
            np.array([0, length, 0, 0]),
            np.empty(self.config.vocab if drawn is None else drawn),
            np.array(list(eos) or [-1], np.int64),
            np.array([length, at_once, temperature, top_k, top_p], np.float64),
        )
        out.tokens[:, :length] = prompt
        self._decoding[0][1].arrivals[:] = 0
        name, weights = "generate", [self.p]
        if self.name == "cpu" and self.config.precision == "bf16" and streamed_width(self.config):
            name, weights = "generate_stored", [self.p, self._stored[1]]
            pieces = [slice(*ends) for ends in parts(self.params.size, len(self._decoding))]
            rounding = view_class("weights", WEIGHTS)
            self._run("round", [(rounding(self.params[i], self._stored[0][i]),) for i in pieces])
        while out.state[0] < n:
            self._run(name, [(*weights, c, batch, out) for c, batch in self._decoding])
        rows = [row[length:end] for row, end in zip(out.tokens, out.lengths, strict=True)]
        return rows, int(out.state[3])


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _free_locks() -> None:
    """Give engines new locks in a forked process whose parent had other threads in them."""
    for engine in _engines:
        if engine.lock.acquire(blocking=False):
            engine.lock.release()
        else:
            engine.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_locks)


def uses(engine: Engine, documents: int) -> str:
    """What runs where, for people: "cpu engine (AVX-512, 2 threads, float32)"."""
    half = engine.config.precision == "bf16"
    if engine.name == "reference":
        return f"reference engine (NumPy, {engine.dtype}{', products in bfloat16' if half else ''})"
    from tapeless.ops.cpu import native

    threads = engine.team(documents)
    products = f", products in bfloat16, {native.bf16_path()}" if half else ""
    return f"cpu engine ({native.simd()}, {threads} thread{'s' if threads > 1 else ''}, float32{products})"


def _shares(batch: Any, threads: int) -> list[Any]:
    """A batch for each of so many threads: the same buffers, and each thread's own share."""
    return [batch._replace(share=np.array([0, 0, 0, k, threads], np.int64)) for k in range(threads)]
