"""Training: data in, a trained model and a run folder out.

The engine runs many steps a call; between calls ("chunks") this module reports, evaluates, saves, and
looks whether it should stop. The size of a chunk follows the clock and changes no result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tapeless import plan
from tapeless.config import as_path, whole
from tapeless.data.given import source_of
from tapeless.errors import ConfigError, RunError, argument
from tapeless.generate import listed
from tapeless.init import MAX_SEED
from tapeless.io import folders, runs, saves
from tapeless.io.lock import Lock
from tapeless.job import Job
from tapeless.meter import Meter, Speed
from tapeless.model import GPT
from tapeless.settings import MAX_STEPS
from tapeless.signals import STOPPING, handled
from tapeless.tokenizer import Tokenizer

CHUNK_SECONDS = 0.1
SAVE_SECONDS = 10.0
SAVE_SHARE = 0.05  # of the time, that saving may take
DISK = 5e8  # bytes a second that a disk writes, until it is known


class Curve(NamedTuple):
    """Losses to plot: `plt.plot(*run.val_curve)`."""

    steps: np.ndarray  # [K], from 1; 0 is before the first step
    values: np.ndarray  # [K]


@dataclass
class Run:
    """What `train` returns.

    `model` is the trained model and `samples` the texts it generated. `losses` are those of the steps that
    were done, of more than 8 million the last ones; `val_losses` those of the validations, by step, 0 being
    before the first one. `loss_curve` and `val_curve` give both as arrays of steps and values. `folder` is
    the run's, if it has one, and `best` the step whose model lies in its folder `best`.
    """

    model: GPT
    losses: np.ndarray
    samples: list[str]
    folder: Path | None
    steps: int
    val_losses: dict[int, float] = field(default_factory=dict)
    best: int | None = None

    @property
    def loss_curve(self) -> Curve:
        """The training loss of each step."""
        return Curve(np.arange(self.steps - len(self.losses) + 1, self.steps + 1), self.losses)

    @property
    def val_curve(self) -> Curve:
        """The validation losses."""
        steps = np.array(list(self.val_losses), np.int64)
        return Curve(steps, np.array(list(self.val_losses.values()), np.float64))

    def __repr__(self) -> str:
        lines = [f"Run({self.steps:,} steps, {self.model!r}"]
        if len(self.losses):
            last = self.losses[-100:]
            mean = f"mean of the last {len(last)}: {last.mean():.4f}"
            lines.append(f"  losses {self.losses[0]:.4f} … {self.losses[-1]:.4f}, {mean}")
        if self.val_losses:
            step, loss = list(self.val_losses.items())[-1]
            best = "" if self.best is None else f", best at step {self.best:,}"
            lines.append(f"  validation loss {loss:.4f} at step {step:,}{best}")
        lines.append(f"  {len(self.samples):,} samples, folder {self.folder})")
        return "\n".join(lines)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the present chunk; `run` is what there is, saved if it has a folder.
    `signal` is SIGINT, or SIGTERM or SIGHUP, which do the same."""

    def __init__(self, run: Run, signal: int):
        super().__init__(f"interrupted after step {len(run.losses)}")
        self.run, self.signal = run, signal


class Progress(Protocol):
    """What training tells while it runs; see tapeless.progress. `evaluated` and `sampled` come only where
    there is something to tell. These methods are optional: `speed`, at most once a second, `stopping`, when
    Ctrl-C came while something else than a step was done, and `skipped`, for a step that was left out. If
    one of them raises, training ends: what was done is saved, then `train` raises that."""

    def start(self, lines: list[str]) -> None: ...
    def compiling(self) -> None: ...
    def begin(self, step: int, steps: int) -> None: ...
    def update(self, losses: np.ndarray) -> None: ...
    def speed(self, speed: Speed) -> None: ...
    def evaluated(self, step: int, loss: float, best: bool) -> None: ...
    def sampled(self, step: int, texts: list[str]) -> None: ...
    def stopping(self) -> None: ...
    def skipped(self, what: str) -> None: ...
    def finish(self) -> None: ...


def train(
    data: str | Path | Sequence[str] | Sequence[int] | np.ndarray | None = None,
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
    val: str | Path | Sequence[str] | Sequence[int] | np.ndarray | None = None,
    pretrained: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    token_dtype: str | None = None,
    log_every: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    keep: int | None = None,
    progress: bool | Progress | None = None,
) -> Run:
    """Train a model on documents or a long text, and let it generate `samples` texts.

    `data` is a text file (one document a line, or one text where the preset reads windows of it),
    token shards (a file, folder or glob of them), or a built-in set ("names", the default). From Python it
    may also be a list of texts, each a document, or a list or array [N] of token ids; the vocabulary of
    these is that of `tokenizer`, or `set={"vocab_size": V}`. `token_dtype` ("uint16", "uint32", "int32" or
    "int64") says what token files without a header hold, where their content does not settle it.
    `tokenizer`, a `tl.Tokenizer`, takes the place of the preset's.

    `preset` names the model ("microgpt" by default); None elsewhere means the preset's value, seed
    42, engine "cpu", and as many threads as there are processors if a step is large enough for that
    to pay. Results repeat bit for bit for a fixed number of threads; other numbers round differently.
    `set` changes any model or training setting: `{"n_embd": 32}`; `help(tl.GPTConfig)` and
    `help(tapeless.settings.Training)` list them. `val`
    is data to validate on, in place of NAME_val.bin beside NAME_train.bin and of `val_fraction`.

    `pretrained` is a model to start from: a run folder, a Hugging Face folder of GPT-2, llm.c's file,
    or a name on the Hugging Face hub. It is trained as `presets.FINETUNING` says, on windows of
    `block_size` tokens if that is set; the last tenth of a text is held out to validate on. A preset given
    beside it must be of its architecture.

    `out` is the run folder to write; None writes nothing. `resume` goes on with the run in `out` as it
    was set up, with whatever is given here changed; data from Python, which a run does
    not keep, must be given again. If there is none yet, it begins one, provided that
    `data`, `preset` or `pretrained` says what to train; if it is complete, it does nothing more. So the
    same call does, however often it is interrupted. `overwrite` starts anew over a run. `keep` is the number
    of checkpoints that stay there, the newest; None means 2, so that there is one to fall back to.
    `progress=False` is silent.

    Raises `ConfigError`, `DataError` or `RunError` before anything is written or lost,
    `NumericsError` if a loss is not finite (the last good state is saved), and `Interrupted` (a
    KeyboardInterrupt) after Ctrl-C, SIGTERM or SIGHUP, with everything saved. Whatever else is raised
    between steps, for instance by `progress`, is raised when everything is saved.
    """
    log_every = whole("log_every", log_every, 1, MAX_STEPS)
    seed = None if seed is None else whole("seed", seed, 0, MAX_SEED)
    keep = None if keep is None else whole("keep", keep, 1, saves.MAX_KEEP)
    if not isinstance(tokenizer, Tokenizer | None):
        raise ConfigError(f"tokenizer must be a tl.Tokenizer, not {type(tokenizer).__name__}.")
    if not isinstance(set or {}, Mapping):
        raise ConfigError(f"set must be a dictionary of settings by name, not {set!r}.")
    folder = None if out is None else as_path("out", out)
    pretrained = None if pretrained is None else as_path("pretrained", pretrained)
    source = None if data is None else source_of(data)
    held = None if val is None else source_of(val, "val")
    given = {
        "steps": steps, "batch_size": batch_size, "lr": lr, "samples": samples, "temperature": temperature,
        "token_dtype": token_dtype,
    }  # fmt: skip
    settings = dict(set or {}) | {name: value for name, value in given.items() if value is not None}
    if resume and overwrite:
        raise ConfigError(f"{argument('resume', True)} and {argument('overwrite', True)} cannot be combined.")
    if resume and folder is None:
        raise RunError(f"{argument('resume', True)} needs the run's folder: give {argument('out')}.")
    if progress is None or progress is True:
        from tapeless.progress import Console

        progress = Console()
    with Lock(folder) as lock:
        named = any(given is not None for given in (data, preset, pretrained))  # what to begin a run with
        if resume and folder is not None and (folders.holds_a_run(folder) or not named):
            place = saves.newest(folder, runs.STATE)
            if tokenizer is not None:
                raise ConfigError(f"{folder} keeps its own tokenizer: leave tokenizer out.")
            what = plan.resumed(
                folder, place, source, held, preset, pretrained, settings, seed, engine, dtype, threads
            )
        else:
            if folder is not None:
                folders.refuse(folder, overwrite)
            what = plan.fresh(
                source, held, preset, pretrained, settings, seed, engine, dtype, threads, tokenizer
            )
        if keep is not None:
            what = what._replace(keep=keep)
        job = plan.prepare(what, lock, log_every, overwrite)
        try:
            return _run(job, progress or Silent())
        finally:
            job.model.engine.notice = lambda: None  # its user may have it compile something else later


class Silent:
    """Progress that says nothing."""

    def start(self, lines: list[str]) -> None: ...
    def compiling(self) -> None: ...
    def begin(self, step: int, steps: int) -> None: ...
    def update(self, losses: np.ndarray) -> None: ...
    def speed(self, speed: Speed) -> None: ...
    def evaluated(self, step: int, loss: float, best: bool) -> None: ...
    def sampled(self, step: int, texts: list[str]) -> None: ...
    def stopping(self) -> None: ...
    def skipped(self, what: str) -> None: ...
    def finish(self) -> None: ...


# ---------------------------------------------------------------- the loop


def _run(job: Job, progress: Progress) -> Run:
    t, stop = job.training, _Stop(progress)
    progress.start(job.headline())
    if job.complete:
        return _result(job)
    _compile(job, progress)
    # A step that overflows is found by looking at its results; NumPy need not warn as well.
    with handled(STOPPING, stop), np.errstate(all="ignore"):
        progress.begin(job.step, t.steps)
        try:
            with job.rescued():
                _loop(job, progress, stop)
        finally:
            try:
                progress.finish()
            finally:
                job.end()
    run = _result(job)
    if stop.asked and job.step < t.steps:
        raise Interrupted(run, stop.asked)
    if t.samples:
        with job.rescued():
            run.samples = job.generate(t.samples)
            if job.folder is not None:
                with job.told():
                    job.log_texts()
                    runs.write_text(job.folder / runs.SAMPLES, "".join(listed(run.samples)))
    return run


def _result(job: Job) -> Run:
    losses, best = job.losses.all.copy(), job.best[1] or None
    return Run(job.model, losses, [], job.folder, job.step, job.val_losses, best)


def _compile(job: Job, progress: Progress) -> None:
    """Make ready what runs while training: compiling must not come between steps."""
    engine, documents = job.model.engine, job.training.batch_size
    engine.notice = cache(progress.compiling)  # said once
    engine.reserve(job.order.longest * documents, documents, engine.team(documents))
    engine.program(job.program)
    if job.data.val is not None:
        engine.program("evaluate")
    if job.training.sample_every:
        engine.program("generate")
    engine.notice = progress.compiling


def _loop(job: Job, progress: Progress, stop: _Stop) -> None:
    t, engine = job.training, job.model.engine
    meter = Meter(engine, engine.team(t.batch_size))
    tell_speed = getattr(progress, "speed", Silent().speed)
    tell_skipped = getattr(progress, "skipped", Silent().skipped)
    job.guard.keep()
    job.try_data()
    if t.eval_every and job.step == 0:
        _evaluate(job, progress, stop)
    if stop.asked and not job.resumed:
        # There is nothing yet that would be worth a folder, or another run's place.
        raise KeyboardInterrupt(stop.asked)
    # Only now that nothing else can go wrong is a run begun in the folder.
    job.begin()
    chunk, saved = 1, time.monotonic()
    pause = max(SAVE_SECONDS, job.nbytes / DISK / SAVE_SHARE)
    while job.step < t.steps and not stop.asked:
        k = min(chunk, job.until_pause())
        began = time.monotonic()
        steps, lengths = job.advance(k)
        seconds = time.monotonic() - began
        said = job.guard.check(steps)
        progress.update(steps.losses)
        if said:
            tell_skipped(said)
        meter.add(seconds, lengths)
        if (speed := meter.speed()) is not None:
            tell_speed(speed)
        if job.evaluates:
            _evaluate(job, progress, stop)
        if job.samples and (texts := _sample(job, stop)):
            progress.sampled(job.step, texts)
        job.log()
        if not steps.wrong:
            chunk = max(1, min(8 * chunk, int(k * CHUNK_SECONDS / max(seconds, 1e-9))))
        if job.folder is not None and job.step < t.steps and (began := time.monotonic()) - saved > pause:
            job.save()
            saved = time.monotonic()
            pause = max(SAVE_SECONDS, (saved - began) / SAVE_SHARE)
    job.close()


def _evaluate(job: Job, progress: Progress, stop: _Stop) -> None:
    try:
        with stop.by_asking_twice():
            loss = job.validate()
    except KeyboardInterrupt:
        return
    progress.evaluated(job.step, loss, job.judge(loss))


def _sample(job: Job, stop: _Stop) -> list[str]:
    with job.same_draws(), suppress(KeyboardInterrupt), stop.by_asking_twice():
        return job.sample()
    return []


class _Stop:
    """What Ctrl-C does in place of an exception in the middle of a step, and so do SIGTERM and SIGHUP:
    `asked` is from then on the signal that came. What takes long besides steps is left out when one comes
    twice."""

    def __init__(self, progress: Progress):
        self.asked = 0
        self._long = False
        self._tell = getattr(progress, "stopping", Silent().stopping)

    def __call__(self, number: int, _: object) -> None:
        if self._long and self.asked:
            raise KeyboardInterrupt
        self.asked = number
        if self._long:
            self._tell()

    @contextmanager
    def by_asking_twice(self) -> Iterator[None]:
        """Here a second Ctrl-C raises."""
        self._long = True
        try:
            yield
        finally:
            self._long = False
