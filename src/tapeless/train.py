"""Training: data in, a trained model and a run folder out.

The engine runs many steps a call; between calls ("chunks") this module reports, evaluates, saves, and
looks whether it should stop. The size of a chunk follows the clock and changes no result.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tapeless import plan
from tapeless.config import as_path, whole
from tapeless.data.given import source_of
from tapeless.errors import ConfigError, DataError, RunError
from tapeless.generate import listed
from tapeless.init import MAX_SEED
from tapeless.io import folders, runs, saves
from tapeless.io.lock import Lock
from tapeless.job import Job
from tapeless.meter import Meter, Speed
from tapeless.model import GPT
from tapeless.settings import MAX_STEPS
from tapeless.tokenizer import Tokenizer

CHUNK_SECONDS = 0.1
SAVE_SECONDS = 10.0
SAVE_SHARE = 0.05  # of the time, that saving may take
DISK = 5e8  # bytes a second that a disk writes, until it is known


@dataclass
class Run:
    """What `train` returns: `losses` [steps done], of more than 8 million the last ones, `samples`, the
    trained `model`, its `folder`; by step the losses `val_losses` on what was held out, and `best`, the step
    whose model lies in the folder `best` of the run."""

    model: GPT
    losses: np.ndarray
    samples: list[str]
    folder: Path | None
    steps: int
    val_losses: dict[int, float] = field(default_factory=dict)
    best: int | None = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the present chunk; `run` is what there is, saved if it has a folder.
    `signal` is SIGINT, or SIGTERM, which does the same."""

    def __init__(self, run: Run, signal: int):
        super().__init__(f"interrupted after step {len(run.losses)}")
        self.run, self.signal = run, signal


class Progress(Protocol):
    """What training tells while it runs; see tapeless.progress. Of these, `evaluated` and `sampled` come
    only where there is something to tell, and only to who has them `speed`, at most once a second,
    `stopping`, when Ctrl-C came while something else than a step was done, and `skipped`, for a step that
    was left out."""

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
    `set` changes any model or training setting: `{"n_embd": 32}`; see `GPTConfig` and `Training`. `val`
    is data to validate on, in place of NAME_val.bin beside NAME_train.bin and of `val_fraction`.

    `pretrained` is a model to start from: a run folder, a Hugging Face folder of GPT-2, llm.c's file,
    or a name on the Hugging Face hub. It is trained as `presets.FINETUNING` says, on windows of
    `block_size` tokens if that is set; the last tenth of a text is held out to validate on. A preset given
    beside it must be of its architecture.

    `out` is the run folder to write; None writes nothing. `resume` goes on with the run in `out` as it
    was set up, with whatever is given here changed; data from Python, which a run does not keep, must be
    given again. `overwrite` starts anew over it. `keep` is the number
    of checkpoints that stay there, the newest; None means 2, so that there is one to fall back to.
    `progress=False` is silent.

    Raises `ConfigError`, `DataError` or `RunError` before anything is written or lost,
    `NumericsError` if a loss is not finite (the last good state is saved), and `Interrupted` (a
    KeyboardInterrupt) after Ctrl-C or SIGTERM, with everything saved.
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
        raise ConfigError("resume goes on with a run, overwrite replaces it: choose one of them.")
    if resume and pretrained is not None:
        raise ConfigError("resume goes on with a run's own model, pretrained begins with another one.")
    if resume and folder is None:
        raise RunError("resume needs the run's folder: give out.")
    if progress is None or progress is True:
        from tapeless.progress import Console

        progress = Console()
    with Lock(folder) as lock:
        if resume and folder is not None:
            place = saves.newest(folder, runs.STATE)
            if tokenizer is not None:
                raise ConfigError(f"{folder} keeps its own tokenizer: leave tokenizer out.")
            what = plan.resumed(folder, place, source, held, preset, settings, seed, engine, dtype, threads)
        else:
            if folder is not None:
                folders.refuse(folder, overwrite)
            what = plan.fresh(
                source, held, preset, pretrained, settings, seed, engine, dtype, threads, tokenizer
            )
        if keep is not None:
            what = what._replace(keep=keep)
        return _run(plan.prepare(what, lock, log_every, overwrite), progress or Silent())


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
    t = job.training
    progress.start(job.headline())
    _compile(job, progress)
    # A step that overflows is found by looking at its results; NumPy need not warn as well.
    with _stop_on_signals(progress) as stop, np.errstate(all="ignore"):
        progress.begin(job.step, t.steps)
        try:
            _loop(job, progress, stop)
        except DataError as error:  # it may be mended, and what was done until then is good
            job.save()
            raise DataError(f"{error}{job.kept('go on with --resume when that is mended.')}") from None
        finally:
            progress.finish()
            job.end()
    run = Run(job.model, job.losses.all.copy(), [], job.folder, job.step, job.val_losses, job.best[1] or None)
    if stop.asked and job.step < t.steps:
        raise Interrupted(run, stop.asked)
    if t.samples:
        run.samples = job.generate(t.samples)
        if job.folder is not None:
            with job.told():
                job.log_texts()
                runs.write_text(job.folder / runs.SAMPLES, "".join(listed(run.samples)))
    return run


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
        if job.samples:
            with suppress(KeyboardInterrupt), stop.by_asking_twice():
                progress.sampled(job.step, job.sample())
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


class _Stop:
    """What Ctrl-C does in place of an exception in the middle of a step, and SIGTERM: `asked` is from then
    on the signal that came. What takes long besides steps is left out when one comes twice."""

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


@contextmanager
def _stop_on_signals(progress: Progress) -> Iterator[_Stop]:
    """Only the main thread gets signals; elsewhere nothing is ever asked."""
    stop = _Stop(progress)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
