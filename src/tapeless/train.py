"""Training: data in, a trained model and a run folder out.

The engine runs many steps a call; between calls ("chunks") this module reports, logs, saves, and
looks whether it should stop. The size of a chunk follows the clock and changes no result.
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tapeless.config import GPTConfig, whole
from tapeless.data.documents import BUILT_IN, Corpus, Order, make_order, read_documents
from tapeless.data.tokenizers import make_tokenizer
from tapeless.engine import check_engine, uses
from tapeless.errors import ConfigError, NumericsError, RunError
from tapeless.generate import generate, listed
from tapeless.init import MAX_SEED, generator
from tapeless.io import runs
from tapeless.memory import check_memory
from tapeless.model import GPT
from tapeless.optim import learning_rates
from tapeless.presets import MAX_STEPS, Preset, Training, get_preset
from tapeless.rng import Random
from tapeless.team import check_threads

CHUNK_SECONDS = 0.1
SAVE_SECONDS = 10.0


@dataclass
class Run:
    """What `train` returns: `losses` [steps done], `samples`, the trained `model`, its `folder`."""

    model: GPT
    losses: np.ndarray
    samples: list[str]
    folder: Path | None
    steps: int


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the present chunk; `run` is what there is, saved if it has a folder."""

    def __init__(self, run: Run):
        super().__init__(f"interrupted after step {len(run.losses)}")
        self.run = run


class Progress(Protocol):
    """What training tells while it runs; see tapeless.progress."""

    def start(self, lines: list[str]) -> None: ...
    def compiling(self) -> None: ...
    def begin(self, step: int, steps: int) -> None: ...
    def update(self, losses: np.ndarray) -> None: ...
    def finish(self) -> None: ...


def train(
    data: str | Path | None = None,
    preset: str | None = None,
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    engine: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    out: str | Path | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    set: dict[str, Any] | None = None,
    log_every: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | Progress | None = None,
) -> Run:
    """Train a model on documents or a long text, and let it generate `samples` texts.

    `data` is a text file (one document a line, or one text where the preset reads windows of it), or
    a built-in set ("names", the default);
    `preset` names the model ("microgpt" by default); None elsewhere means the preset's value, seed
    42, engine "cpu", and as many threads as there are processors if a step is large enough for that
    to pay. Results repeat bit for bit for a fixed number of threads; other numbers round differently.
    `set` changes any model or training setting: `{"n_embd": 32}`. `out` is the
    run folder to write; None writes nothing. `resume` goes on with the run in `out` as it was set
    up, with whatever is given here changed; `overwrite` starts anew over it. `progress=False` is
    silent.

    Raises `ConfigError`, `DataError` or `RunError` before anything is written or lost,
    `NumericsError` if a loss is not finite (the last good state is saved), and `Interrupted` (a
    KeyboardInterrupt) after Ctrl-C, with everything saved.
    """
    log_every = whole("log_every", log_every, 1, MAX_STEPS)
    seed = None if seed is None else whole("seed", seed, 0, MAX_SEED)
    if not isinstance(set or {}, Mapping):
        raise ConfigError(f"set must be a dictionary of settings by name, not {set!r}.")
    folder = None if out is None else Path(out)
    given = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "samples": samples, "temperature": temperature
    }  # fmt: skip
    settings = dict(set or {}) | {name: value for name, value in given.items() if value is not None}
    if resume:
        if overwrite:
            raise ConfigError("resume goes on with a run, overwrite replaces it: choose one of them.")
        plan = _resumed(folder, data, preset, seed, engine, dtype, threads)
    else:
        if folder is not None:
            runs.refuse(folder, overwrite)
        plan = _fresh(data, preset, seed, engine, dtype, threads)
    job = _prepare(plan, settings, folder, log_every, overwrite)
    if progress is None or progress is True:
        from tapeless.progress import Console

        progress = Console()
    return job.run(progress or Silent())


class Silent:
    """Progress that says nothing."""

    def start(self, lines: list[str]) -> None: ...
    def compiling(self) -> None: ...
    def begin(self, step: int, steps: int) -> None: ...
    def update(self, losses: np.ndarray) -> None: ...
    def finish(self) -> None: ...


# ---------------------------------------------------------------- before the first step


class _Plan(NamedTuple):
    """What to train: new, or taken from a saved run."""

    name: str  # of the preset
    preset: Preset
    data: str | Path
    seed: int
    engine: str
    dtype: str | None
    threads: int | None
    digest: str | None  # of the data a saved run was trained on


def _fresh(data, preset, seed, engine, dtype, threads) -> _Plan:
    name = "microgpt" if preset is None else preset
    data = "names" if data is None else data
    seed = 42 if seed is None else seed
    engine = "cpu" if engine is None else engine
    return _Plan(name, get_preset(name), data, seed, engine, dtype, threads, None)


def _resumed(folder, data, preset, seed, engine, dtype, threads) -> _Plan:
    if folder is None:
        raise RunError("resume needs the run's folder: give out.")
    config, saved = runs.read_config(folder)
    try:
        whole("seed", saved["seed"], 0, MAX_SEED)
        if not all(isinstance(saved[k], str) for k in ("preset", "tokenizer", "data", "engine", "digest")):
            raise TypeError
        if threads is None and engine in (None, saved["engine"]):
            threads = check_threads(saved["engine"], saved.get("threads"))
        base = Preset(saved["preset"], config, Training(**saved["training"]), saved["tokenizer"])
        plan = _Plan(
            saved["preset"],
            base,
            saved["data"] if data is None else data,
            saved["seed"],
            saved["engine"] if engine is None else engine,
            saved["dtype"] if engine is None and dtype is None else dtype,
            threads,
            saved["digest"],
        )
    except (KeyError, TypeError, ConfigError):
        raise RunError(
            f"{folder / runs.CONFIG} does not describe a training run, so it cannot be resumed."
        ) from None
    for what, was, now in (("preset", plan.name, preset), ("seed", plan.seed, seed)):
        if now is not None and now != was:
            raise RunError(f"{folder} was started with {what} {was}, not {now}.")
    return plan


def _prepare(
    plan: _Plan,
    settings: dict[str, Any],
    folder: Path | None,
    log_every: int,
    overwrite: bool,
) -> _Job:
    """Read the data and build the model; everything that can be refused is refused here."""
    chosen = plan.preset.with_settings(settings)
    training = chosen.training
    check_engine(plan.engine, plan.dtype)
    check_threads(plan.engine, plan.threads)
    documents = read_documents(plan.data, whole=training.order == "windows")
    tokenizer = make_tokenizer(chosen.tokenizer, documents)
    config = chosen.model.replace(vocab_size=chosen.model.vocab_size or tokenizer.vocab_size)
    if config.vocab != tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size is {config.vocab}, but {plan.data} has {tokenizer.vocab_size} tokens: leave it out."
        )
    check_memory(config, plan.engine, plan.dtype, training.batch_size, plan.threads)
    corpus = Corpus.from_documents(documents, tokenizer, config.block_size)
    if plan.digest is not None:
        if config != plan.preset.model:
            difference = _difference(plan.preset.model, config)
            raise RunError(f"{folder} has another model: {difference}. Resume without changing it.")
        if corpus.digest != plan.digest:
            raise RunError(f"{plan.data} is not the data that {folder} was trained on.")

    rng = generator(config, plan.seed)
    order = make_order(training.order, corpus, rng, training.batch_size, config.block_size)
    model = GPT(config, rng, plan.engine, dtype=plan.dtype, threads=plan.threads, tokenizer=tokenizer)
    about = {
        "preset": plan.name,
        "tokenizer": chosen.tokenizer,
        "training": dataclasses.asdict(training),
        "data": plan.data if str(plan.data) in BUILT_IN else str(Path(plan.data).resolve()),
        "documents": len(documents),
        "digest": corpus.digest,
        "seed": plan.seed,
        "engine": plan.engine,
        "dtype": str(model.engine.dtype),
        "threads": model.engine.team(training.batch_size),
    }
    job = _Job(model, training, corpus, order, rng, about, folder, log_every, overwrite)
    if plan.digest is not None:
        job.restore()
    return job


def _difference(old: GPTConfig, new: GPTConfig) -> str:
    pairs = zip(old.to_dict().items(), new.to_dict().values(), strict=True)
    return ", ".join(f"{name} {a!r} is not {b!r}" for (name, a), b in pairs if a != b)


# ---------------------------------------------------------------- the loop


@dataclass
class _Job:
    """One training run: what it needs, how far it is, and how it is saved."""

    model: GPT
    training: Training
    corpus: Corpus
    order: Order
    rng: Random
    about: dict[str, Any]  # what config.json says besides the model
    folder: Path | None
    log_every: int
    overwrite: bool  # a run that stands in the folder
    resumed: bool = False
    step: int = 0
    losses: list[np.ndarray] = field(default_factory=list)
    _logged: int = 0  # steps already in metrics.jsonl

    def __post_init__(self) -> None:
        t = self.training
        constants = t.beta1, t.beta2, t.eps, t.weight_decay, t.momentum, t.grad_clip
        self.model.engine.optimiser.constants[:] = constants

    def run(self, progress: Progress) -> Run:
        engine = self.model.engine
        engine.notice = progress.compiling
        progress.start(self._headline())
        documents = self.training.batch_size
        engine.reserve(self.order.longest * documents, documents, engine.team(documents))
        engine.program(self._program)
        # Only now that nothing else can go wrong is a run that stands there replaced.
        if self.folder is not None:
            if not self.resumed:
                runs.claim(self.folder, self.overwrite)
            self._save()
        progress.begin(self.step, self.training.steps)
        try:
            # A step that overflows is found by looking at its results; NumPy need not warn as well.
            with _stop_on_interrupt() as stop, np.errstate(all="ignore"):
                self._loop(progress, stop)
                interrupted = stop.is_set() and self.step < self.training.steps
        finally:
            progress.finish()
        losses = np.concatenate(self.losses) if self.losses else np.empty(0)
        run = Run(self.model, losses, [], self.folder, self.step)
        if interrupted:
            raise Interrupted(run)
        if self.training.samples:
            run.samples = generate(
                self.model,
                "",
                self.training.samples,
                temperature=self.training.temperature,
                rng=self.rng,
                max_tokens=self.training.max_tokens,
            )
            if self.folder is not None:
                runs.write_text(self.folder / runs.SAMPLES, listed(run.samples))
        return run

    def _loop(self, progress: Progress, stop: threading.Event) -> None:
        steps = self.training.steps
        chunk, last_save = 8, time.monotonic()
        snapshots = deque([self._snapshot()], maxlen=2)
        while self.step < steps and not stop.is_set():
            k = min(chunk, steps - self.step)
            began = time.monotonic()
            losses = self._advance(k)
            seconds = time.monotonic() - began
            self._check(losses, snapshots)
            snapshots.append(self._snapshot())
            self.losses.append(losses)
            progress.update(losses)
            chunk = max(1, min(8 * k, int(k * CHUNK_SECONDS / max(seconds, 1e-9))))
            if self.folder is not None and time.monotonic() - last_save > SAVE_SECONDS:
                self._save()
                last_save = time.monotonic()
        if self.folder is not None:
            self._save()

    def _advance(self, k: int) -> np.ndarray:
        spans = self.order.take(self.step, k)
        rates = learning_rates(self.training, self.step, k)
        losses = self.model.engine.train(self.corpus.stream, spans, rates, self._program)
        self.step += k
        return losses

    @property
    def _program(self) -> str:
        """The engine's program for this optimiser: Adam is AdamW without decay."""
        return "sgd" if self.training.optimiser == "sgd" else "adamw"

    # ------------------------------------------------------------ state

    def _snapshot(self) -> tuple[Any, ...]:
        opt = self.model.engine.optimiser
        return self.step, self.rng.state(), *(a.copy() for a in (opt.params, opt.m, opt.v, opt.powers))

    def _restore(self, snapshot: tuple[Any, ...]) -> None:
        opt = self.model.engine.optimiser
        self.step, state, *arrays = snapshot
        self.rng.restore(state)
        for target, source in zip((opt.params, opt.m, opt.v, opt.powers), arrays, strict=True):
            target[...] = source

    def _check(self, losses: np.ndarray, snapshots: deque[tuple[Any, ...]]) -> None:
        """If the last chunk spoilt the model, go back to the last good state, save it, and raise.

        A state is good if a step from it gives a finite loss and a finite state:
        hence two snapshots, the older one known to be good. From there the steps are done again one
        by one, so that where training ends up does not depend on the size of chunks.
        """
        if np.isfinite(losses).all() and self._finite():
            return
        seen = np.concatenate([*self.losses, losses])
        first = self.step - len(seen)
        good = snapshots[0]
        self._restore(good)
        while True:
            here, loss = self._snapshot(), self._advance(1)[0]
            if not (np.isfinite(loss) and self._finite()):
                break
            good = here
        what = "the update overflows" if np.isfinite(loss) else f"the loss is {loss}"
        message = f"{what} at step {self.step:,}."
        self._restore(good)
        self.losses = [seen[: self.step - first]]
        lr = f"a smaller lr (it was {self.training.lr:g})."
        if self.folder is not None:
            runs.cut_metrics(self.folder / runs.METRICS, self.step)
            self._logged = min(self._logged, self.step)
            self._save()
            message += f" {self.folder} keeps the state after step {self.step:,}: resume it with {lr}"
        else:
            message += f" Try {lr}"
        raise NumericsError(message)

    def _finite(self) -> bool:
        opt = self.model.engine.optimiser
        return all(bool(np.isfinite(array).all()) for array in (opt.params, opt.m, opt.v))

    def _state(self) -> dict[str, np.ndarray]:
        """What state.safetensors holds."""
        opt, random = self.model.engine.optimiser, self.rng.state()
        return {
            "params": opt.params,
            "m": opt.m,
            "v": opt.v,
            "powers": opt.powers,
            "step": np.array([self.step], np.int64),
            "rng.words": random["words"],
            "rng.spare": random["spare"],
        }

    def _save(self) -> None:
        assert self.folder is not None
        rows = self._new_rows()
        if rows:
            runs.append_metrics(self.folder / runs.METRICS, rows)
        runs.write_tensors(self.folder / runs.STATE, self._state())
        runs.save_model(
            self.folder, self.model.config, self.model.tokenizer, dict(self.model.params), self.about
        )

    def _new_rows(self) -> list[dict[str, Any]]:
        first = self.step - sum(map(len, self.losses))
        losses = np.concatenate(self.losses) if self.losses else np.empty(0)
        rates = learning_rates(self.training, first, len(losses))
        rows = [
            {"step": first + i + 1, "loss": float(losses[i]), "lr": float(rates[i])}
            for i in range(max(self._logged - first, 0), len(losses))
            if (first + i + 1) % self.log_every == 0
        ]
        self._logged = self.step
        return rows

    def restore(self) -> None:
        """Take up the state saved in the run folder."""
        assert self.folder is not None
        path = self.folder / runs.STATE
        state = self._state()
        runs.read_into(state, path)
        self.step = int(state["step"][0])
        try:
            self.rng.restore({"words": state["rng.words"], "spare": state["rng.spare"]})
        except ValueError:
            raise RunError(f"{path} is damaged: its random state is none.") from None
        if self.step < 0 or not self._finite():
            raise RunError(f"{path} is damaged: it holds numbers that training cannot go on from.")
        if self.step >= self.training.steps:
            raise RunError(
                f"{self.folder} is complete: {self.step} steps of {self.training.steps}. "
                "Give more --steps to go on."
            )
        self.resumed = True
        self._logged = self.step
        runs.cut_metrics(self.folder / runs.METRICS, self.step)

    def _headline(self) -> list[str]:
        c, t = self.model.config, self.training
        engine = self.model.engine
        if t.order == "windows":
            size, each = f"{len(self.corpus.stream):,} tokens", "window"
        else:
            size, each = f"{self.about['documents']:,} documents", "document"
        each += "s" if t.batch_size > 1 else ""
        machinery = uses(engine.name, engine.dtype, engine.team(t.batch_size))
        lines = [
            f"{self.about['preset']}: {self.model.n_params:,} parameters · "
            f"{Path(str(self.about['data'])).name} ({size}, vocabulary {c.vocab:,}) · "
            f"{t.steps:,} steps of {t.batch_size} {each} · {machinery}"
        ]
        if self.corpus.n_cut and t.order != "windows":
            verb = "cut to it" if t.order == "shuffle" else "left out"
            what = "document is" if self.corpus.n_cut == 1 else "documents are"
            lines.append(
                f"{self.corpus.n_cut:,} {what} longer than the block of {c.block_size} tokens: {verb}."
            )
        if self.step:
            lines.append(f"Going on from step {self.step:,}.")
        return lines


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, in place of an exception in the middle of a step. Only the main
    thread gets signals; elsewhere the event stays unset."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
