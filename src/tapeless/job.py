"""One training run: what it needs, how far it is, and how it is evaluated, saved and taken up again."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from tapeless.data.documents import Corpus
from tapeless.data.orders import Order
from tapeless.data.sources import Data
from tapeless.engine import Steps, uses
from tapeless.errors import DataError, NumericsError, RunError, argument, printable
from tapeless.evaluate import score
from tapeless.generate import generate
from tapeless.guard import Guard
from tapeless.io import folders, runs, saves
from tapeless.io.lock import Lock
from tapeless.memory import LOSSES, steps_at_once
from tapeless.model import GPT
from tapeless.optim import learning_rates
from tapeless.programs import moments
from tapeless.remarks import remarks
from tapeless.rng import Random
from tapeless.settings import Training

UNLOGGED = 2**16  # steps, at most, of which no rows are written
SHOWN = 3  # texts generated while training, at most


class Losses:
    """The losses of the last steps, `MOST` of them at least if there were so many: training for days must not
    take ever more memory."""

    MOST, ROOM = LOSSES, 2**10

    def __init__(self) -> None:
        self._room, self._size = np.empty(self.ROOM), 0

    def append(self, losses: np.ndarray) -> None:
        if self._size + len(losses) > len(self._room):
            kept = self.all[-self.MOST :]
            size = len(kept) + len(losses)
            self._room = np.concatenate([kept, losses, np.empty(min(size, self.MOST))])
            self._size = size
        else:
            self._room[self._size : self._size + len(losses)] = losses
            self._size += len(losses)

    @property
    def all(self) -> np.ndarray:
        """A view of them, until there are more."""
        return self._room[: self._size]

    def drop(self, count: int) -> None:
        """Forget the last ones."""
        self._size -= min(count, self._size)


@dataclass
class Job:
    """A model in training. `batches` of `batch_size` windows or documents, none longer than `longest`,
    make a step."""

    model: GPT
    training: Training
    data: Data
    order: Order
    batches: int
    longest: int
    rng: Random
    about: dict[str, Any]  # what config.json says besides the model
    lock: Lock  # on the run folder
    log_every: int
    overwrite: bool  # a run that stands in the folder
    resumed: bool = False
    step: int = 0
    losses: Losses = field(default_factory=Losses)
    val_losses: dict[int, float] = field(default_factory=dict)  # by step
    best: tuple[float, int] = (math.inf, 0)  # the lowest of them of all times, and its step
    texts: dict[int, list[str]] = field(default_factory=dict)  # generated while training
    complete: bool = False  # it was resumed, and nothing is left to do
    settled: bool = True  # the state is that of `step`: False while steps are done and looked at
    _changed: str = ""  # settings that differ from the saved run
    _recorded: int = 0  # steps whose losses were recorded
    _logged: int = 0  # steps already in metrics.jsonl
    _saved: int | None = None  # the step of the state in the folder
    _unwritable: bool = False  # the system refused to write something
    _taken: Path | None = None  # the checkpoint it was resumed from
    _place: Path | None = None  # where files are written, once it has begun: `folder`, or aside at first

    def __post_init__(self) -> None:
        t = self.training
        constants = t.beta1, t.beta2, t.eps, t.weight_decay, t.momentum, t.grad_clip
        self.model.engine.optimiser.constants[:] = constants
        self.model.engine.reserve_moments(moments(t.optimiser, t.momentum))
        self.folder = self.lock.folder
        self.guard = Guard(self)

    # ------------------------------------------------------------ steps

    @property
    def program(self) -> str:
        """The engine's program for this optimiser: Adam is AdamW without decay."""
        return "sgd" if self.training.optimiser == "sgd" else "adamw"

    def until_pause(self) -> int:
        """Steps until the next one after which there is something else to do."""
        t = self.training
        reads = not isinstance(self.data.train, Corpus)
        left = [t.steps - self.step, steps_at_once(t, self.longest, reads)]
        left += [every - self.step % every for every in (t.eval_every, t.sample_every) if every]
        return min(left)

    def advance(self, k: int) -> tuple[Steps, np.ndarray]:
        """Do k steps, or as many as there are up to a bad one; and the lengths of what they were done on.
        `last` is what the last of them was done on, as spans [A, B, 2] of the data."""
        self._before = self.step, self.rng.state()
        try:
            places = self._take(k)
            stream, spans = self.data.train.take(places)
            rates = learning_rates(self.training, self.step, k)
        except BaseException:
            self.rewind(0)  # of steps that were not done no trace is saved
            raise
        self.settled = False
        steps = self.model.engine.train(stream, spans, rates, self.program)
        done = len(steps.losses)
        if done < k:
            self.rewind(done)
        self.step = self._before[0] + done
        self.last = places[done - 1]
        return steps, spans[:done, ..., 1]

    def _take(self, k: int) -> np.ndarray:
        """What the next k steps are done on: spans [k, A, B, 2] of the data."""
        A, B = self.batches, self.training.batch_size
        return self.order.take(self.step * A, k * A).reshape(k, A, B, 2)

    def rewind(self, done: int) -> None:
        """Let step and random numbers be as if only so many of the steps had been taken that `advance` took
        last."""
        self.step, before = self._before
        self.rng.restore(before)
        if done:
            self._take(done)
        self.step += done

    def record(self, losses: np.ndarray) -> None:
        """Keep the losses of the steps that were done last."""
        self.losses.append(losses)
        self._recorded = self.step

    def try_data(self) -> None:
        """Raise `DataError` if the next step cannot be done."""
        with self.same_draws():
            self.data.train.take(self._take(1))

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Leave no trace in the random numbers of training."""
        before = self.rng.state()
        try:
            yield
        finally:
            self.rng.restore(before)

    # ------------------------------------------------------------ between steps

    @property
    def evaluates(self) -> bool:
        """Whether to evaluate now: every `eval_every` steps, and at the end."""
        t = self.training
        due = self.step == t.steps or (t.eval_every and self.step % t.eval_every == 0)
        return self.data.val is not None and bool(due)

    def validate(self) -> float:
        """The loss on what is held out."""
        assert self.data.val is not None
        t, size = self.training, self.longest
        return score(self.model, self.data.val, size, size, t.batch_size, batches=t.eval_batches).loss

    def judge(self, loss: float) -> bool:
        """Whether a validation's loss is the best so far; then the model is saved in the folder `best`."""
        better = loss < self.best[0]
        if better:
            if self._place is not None and self.step:
                contents = self._contents(self.about | {"step": self.step, "val_loss": loss})
                with self.told():
                    saves.save(self._place / runs.BEST, self.step, contents, keep=1)
            self.best = (loss, self.step)  # only now that it is there
        if math.isfinite(loss):
            self.val_losses[self.step] = loss
        return better

    @property
    def samples(self) -> bool:
        """Whether to generate texts now. At the end there are some anyway."""
        every = self.training.sample_every
        return bool(every) and self.step % every == 0 and self.step < self.training.steps

    def sample(self) -> list[str]:
        """Some texts, to be shown while training."""
        return self.generate(min(SHOWN, self.training.samples) or 1)

    def generate(self, n: int) -> list[str]:
        """`n` texts of the model as it is now; they go into the run's log if it has one."""
        t = self.training
        texts = list(generate(self.model, "", n, t.temperature, self.rng, max_tokens=t.max_tokens))
        if t.sample_every:
            self.texts[self.step] = texts
        return texts

    # ------------------------------------------------------------ files

    @property
    def nbytes(self) -> int:
        """Of the files that a save writes, roughly."""
        return 4 * self.model.engine.params.nbytes

    def begin(self) -> None:
        """Make the folder this run's own, and write what there is. The first state of a large model can
        be had again for less than it takes to write it."""
        if self.folder is None:
            return
        there = runs.saved(self.folder) if self.resumed else []
        if not self.guard.small:
            more = max(1, min(self.about["keep"], saves.KEEP) + 1 - len(there))
            folders.check_room(self.folder, self.nbytes * more)
        if self.resumed:
            self._place = self.folder
            saves.discard(list(takewhile(lambda checkpoint: checkpoint.place != self._taken, there)))
            runs.begin_log(self.folder / runs.METRICS)
        else:
            self._place = folders.claim(self.folder, self.lock, self.overwrite)
        if self.guard.small:
            self.save()

    def log(self) -> None:
        """Write the rows of many steps that are not saved yet: a save, whose time says when the next one is
        due, must not take ever longer, and `losses` keeps not all of them for ever."""
        if self._place is not None and self.step - self._logged >= UNLOGGED:
            with self.told():
                self._write_rows(self._place, flush=False)

    def save(self) -> None:
        """Write the run's files, if it has begun to have any. Raises `NumericsError` instead if the state
        is not finite."""
        if self._place is None:
            return
        if not self.guard.small and not self.guard.finite():
            self.guard.overflowed()
        with self.told():
            self._write_rows(self._place)
            self.log_texts()
            state = {runs.STATE: runs.content_of_tensors(self._state())}
            saves.save(self._place, self.step, self._contents(self.about) | state, self.about["keep"])
            if self.folder is not None and self._place != self.folder:
                folders.replace(self.folder, self._place)
                self._place = self.folder
        self._saved = self.step

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """Save what was done, whatever goes wrong between steps, before the error is raised.

        In the middle of a step the state of a small model is the one before it, of which a large model has
        no more than its last save. Numbers gone bad, and what cannot be written, tell what is kept.
        """
        try:
            yield
        except NumericsError:
            raise
        except BaseException as error:
            self._rescue()
            if isinstance(error, DataError):
                advice = f"go on with {argument('resume', True)} when that is mended."
                raise DataError(f"{error}{self.kept(advice)}") from None
            if kept := self.kept().strip():
                error.add_note(kept)
            raise

    def _rescue(self) -> None:
        if self._unwritable or (not self.settled and not self.guard.undo()):
            return
        self.losses.drop(self._recorded - self.step)
        self.settled, self._recorded = True, self.step
        if self._saved != self.step:
            with suppress(Exception):  # what is raised is the error that it comes from
                self.save()

    def forget(self, count: int) -> None:
        """Let the present step be the last one that was done, without the last `count`, and save that."""
        self.losses.drop(count)
        self._recorded = self.step
        self.val_losses = {step: loss for step, loss in self.val_losses.items() if step <= self.step}
        self.texts = {step: texts for step, texts in self.texts.items() if step <= self.step}
        if self._place is not None:
            self._logged = min(self._logged, self.step)
            self.save()  # first: as long as an older state is the last one, its rows must be there
            for log in (runs.METRICS, runs.SAMPLES_LOG):
                runs.cut_log(self._place / log, self.step or -1)

    def close(self) -> None:
        """Save for the last time. Texts of an earlier end go first: whether there are any tells `restore`
        if all was done at this one."""
        if self._place is not None and self.step == self.training.steps and self.training.samples:
            with self.told():
                runs.remove([self._place / runs.SAMPLES])
        self.save()

    def _contents(self, about: dict[str, Any]) -> dict[str, runs.Content]:
        """What the model's files hold now."""
        params = runs.content_of_tensors(dict(self.model.params))
        model = self.model
        return runs.contents_of_model(model.config, model.tokenizer, model.ends, params, about)

    @contextmanager
    def told(self) -> Iterator[None]:
        """What cannot be written is an error that tells what was."""
        try:
            yield
        except RunError as error:
            self._unwritable = True
            raise RunError(f"{error}{self.kept()}") from None

    def log_texts(self) -> None:
        """Append to samples.jsonl the texts that are not there yet."""
        if self.texts and self._place is not None:
            rows = [{"step": step, "samples": texts} for step, texts in self.texts.items()]
            runs.begin_log(self._place / runs.SAMPLES_LOG)
            runs.append_rows(self._place / runs.SAMPLES_LOG, rows)
        self.texts = {}

    def kept(self, advice: str = "") -> str:
        """What an error may end with: the state that the folder keeps, if it has one."""
        if self._saved is None:
            return ""
        return f" {self.folder} keeps the state after step {self._saved:,}" + (
            f": {advice}" if advice else "."
        )

    def end(self) -> None:
        """Leave nothing that is not saved beside an older run."""
        if self._place is not None and self._place != self.folder:
            folders.abandon(self._place)

    def _state(self) -> dict[str, np.ndarray]:
        """What state.safetensors holds."""
        random = self.rng.state()
        return {
            **self.model.engine.state,
            "step": np.array([self.step], np.int64),
            "best": np.array(self.best),
            "rng.words": random["words"],
            "rng.spare": random["spare"],
        }

    def _write_rows(self, place: Path, flush: bool = True) -> None:
        """Append to metrics.jsonl what is not there yet."""
        if rows := self._new_rows():
            runs.append_rows(place / runs.METRICS, rows, flush)
        self._logged = self.step
        self.guard.skipped.clear()

    def _new_rows(self) -> list[dict[str, Any]]:
        first = self._logged
        kept = self.losses.all
        losses = kept[len(kept) - (self.step - first) :]
        assert len(losses) == self.step - first
        rates = learning_rates(self.training, first, len(losses))
        rows: list[dict[str, Any]] = []
        if first == 0 < len(losses) and 0 in self.val_losses:  # with the first steps, so that it comes once
            rows.append({"step": 0, "val_loss": self.val_losses[0]})
        for i in range(len(losses)):
            step = first + i + 1
            skipped = self.guard.skipped.get(step, "")
            if step % self.log_every == 0 or step in self.val_losses or skipped:
                loss = float(losses[i]) if math.isfinite(losses[i]) else None  # JSON has no other numbers
                row: dict[str, Any] = {"step": step, "loss": loss, "lr": float(rates[i])}
                if step in self.val_losses:
                    row["val_loss"] = self.val_losses[step]
                if skipped:
                    row["skipped"] = skipped
                rows.append(row)
        return rows

    def restore(self, place: Path) -> None:
        """Take up the state saved in `place`: a checkpoint of the run folder, or that folder itself."""
        assert self.folder is not None
        path = place / runs.STATE
        state = self._state()
        optional, unused = ["means"], []  # older versions had no means
        if self.training.optimiser == "sgd":
            # Momentum may have been changed, and older versions kept two moments of any optimiser.
            optional, unused = ["means", "m"], [name for name in ("m", "v") if name not in state]
        runs.read_into(state, path, optional, unused)
        self.step = int(state["step"][0])
        try:
            self.best = (float(state["best"][0]), int(state["best"][1]))
            self.rng.restore({"words": state["rng.words"], "spare": state["rng.spare"]})
        except (ValueError, OverflowError):
            raise RunError(f"{path} is damaged: its best score or random state is invalid.") from None
        if self.step < 0 or not self.guard.finite():
            raise RunError(f"{path} is damaged: it holds numbers that training cannot go on from.")
        if place != self.folder:
            saves.publish(self.folder, place)  # a killed process may not have come to that
        t, texts = self.training, self.folder / runs.SAMPLES
        ended = self.step == t.steps
        self.complete = self.step > t.steps or (ended and (texts.exists() or not t.samples))
        if self.complete:
            return
        self.resumed, self._taken = True, place
        self._logged = self._saved = self._recorded = self.step
        sizes = saves.logged(place)
        # At the end, texts come after the last save; they are still to be generated.
        for log, steps in ((runs.METRICS, self.step), (runs.SAMPLES_LOG, self.step - ended)):
            # Rows of step 0 come with those of the first steps.
            runs.cut_log(self.folder / log, steps or -1, sizes.get(log, sys.maxsize))

    def change(self, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Record what is from now on otherwise than before."""
        if changes:
            self.about["changes"].append({"step": self.step} | {k: list(v) for k, v in changes.items()})
            self._changed = ", ".join(f"{k} {was} → {now}" for k, (was, now) in changes.items())

    # ------------------------------------------------------------ for people

    def headline(self) -> list[str]:
        c, t, engine = self.model.config, self.training, self.model.engine
        each = "document" if self.data.lines else f"window of {self.longest:,} tokens"
        if t.batch_size * self.batches > 1:
            each = each.replace("document", "documents").replace("window", "windows")
        times = f"{self.batches:,} × {t.batch_size:,}" if self.batches > 1 else f"{t.batch_size:,}"
        machinery = uses(engine, t.batch_size)
        source = self.about["pretrained"]
        name = self.about["preset"] if source is None else f"{Path(source).name}, pretrained"
        lines = [
            f"{name}: {self.model.n_params:,} parameters · "
            f"{Path(str(self.about['data'])).name} ({self.data.sizes()}, vocabulary {c.vocab:,}) · "
            f"{t.steps:,} steps of {times} {each} · {machinery}"
        ]
        lines += remarks(self.data, t, self.about, self.longest)
        if self.complete:
            done = f"{self.folder} is complete: {self.step:,} steps of {t.steps:,}."
            lines.append(f"{done} Give more {argument('steps')} to go on.")
        elif self.step:
            changed = f" Changed: {self._changed}." if self._changed else ""
            lines.append(f"Going on from step {self.step:,}.{changed}")
        return [printable(line) for line in lines]  # the names are from config.json
