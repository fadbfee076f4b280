"""Progress for people: a line at each tenth of the way, and a bar on a terminal; on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from tapeless.generate import listed
from tapeless.meter import Speed
from tapeless.streams import Display

TOLD = 10  # skipped steps, each in a line
COMPILING = "Compiling for this model and processor: a few seconds, first run only."


class Console:
    """Training's progress. Losses shown are means, since single documents differ a lot: in a line over
    the steps since the line before, on the bar over the last 200 steps; each says of how many. Times are
    of training alone, without what is evaluated and generated in between."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole

        # Training goes on although what it shows cannot be written.
        file: Any = None if sys.stderr is None else Display(sys.stderr)
        self._console = RichConsole(file=file, stderr=True, highlight=False, soft_wrap=True, markup=False)
        self._bar: Any = None
        self._compiled = False
        self._speed: Speed | None = None  # told since the last line
        self._last: list[str] = []  # the speed, for the bar
        self._val = ""
        self._skipped = 0

    def start(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(line)

    def compiling(self) -> None:
        # Generating is a second program, compiled when training is done.
        self._console.print("Compiling the sampler." if self._compiled else COMPILING)
        self._compiled = True

    def begin(self, step: int, steps: int) -> None:
        self._first = self._step = self._shown = step
        self._steps = steps
        self._seconds, self._mark = 0.0, time.monotonic()
        self._recent = self._unsaid = np.empty(0)
        if self._console.is_terminal:
            self._bar = _make_bar(self._console)
            self._task = self._bar.add_task("", total=steps, completed=step, loss="", rate="", more="")
            self._bar.start()

    def update(self, losses: np.ndarray) -> None:
        now = time.monotonic()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        self._step += len(losses)
        self._recent = np.concatenate([self._recent, losses])[-200:]
        self._unsaid = np.concatenate([self._unsaid, losses])
        tenth = -(-self._steps // 10)
        while (due := min((self._shown // tenth + 1) * tenth, self._steps)) <= self._step > self._shown:
            said, self._unsaid = np.split(self._unsaid, [due - self._shown])
            speed, self._speed = self._speed, None
            texts = [_mean(said), *(() if speed is None else speed.texts())]
            self._console.print(f"step {due:,}/{self._steps:,}: {' · '.join(texts)}")
            self._shown = due
        if self._bar is not None:
            rate = (self._step - self._first) / max(self._seconds, 1e-9)
            self._bar.update(
                self._task,
                completed=self._step,
                loss=_mean(self._recent),
                rate=f"{rate:,.{0 if rate >= 10 else 2}f} steps/s",
                more=self._more(),
            )

    def _more(self) -> str:
        """Of what there is to tell besides, as much as the terminal has room for."""
        shown, room = [], self._console.width - 80
        for text in (*self._last, self._val):
            if text and len(text) <= room:
                shown.append(text)
                room -= len(text) + 3
        return " · ".join(shown)

    def speed(self, speed: Speed) -> None:
        self._speed, self._last = speed, speed.texts()

    def evaluated(self, step: int, loss: float, best: bool) -> None:
        self._val = f"val {loss:.4f}"
        mark = " (best so far)" if best and step else ""
        self._console.print(f"step {step:,}/{self._steps:,}: validation loss {loss:.4f}{mark}")
        self._mark = time.monotonic()

    def sampled(self, step: int, texts: list[str]) -> None:
        self._console.print(f"step {step:,}/{self._steps:,} generates:")
        self._console.out("".join(listed(texts)), end="", highlight=False)
        self._mark = time.monotonic()

    def stopping(self) -> None:
        self._console.print("Stopping when this is done. Ctrl-C again leaves it out.")

    def skipped(self, what: str) -> None:
        self._skipped += 1
        if self._skipped <= TOLD:
            self._console.print(what)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._skipped:
            steps = "step was" if self._skipped == 1 else "steps were"
            self._console.print(f"{self._skipped:,} {steps} skipped: metrics.jsonl says which.")
        if done := self._step - self._first:
            self._console.print(
                f"{done:,} steps in {self._seconds:,.2f} s: {duration(self._seconds / done)} a step."
            )


class Counting:
    """A bar for work that tells how much of it is done; elsewhere than on a terminal a line at each tenth
    of the way, at most one a second. `say` prints a line without disturbing the bar."""

    def __init__(self, unit: str) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = RichConsole(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self._unit, self._tenth, self._said = unit, 0, time.monotonic()
        columns = (
            MofNCompleteColumn(),
            TextColumn(unit),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._bar = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )

    def __enter__(self) -> Counting:
        self._task = self._bar.add_task("", total=None)
        self._bar.start()
        return self

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        tenth = 10 * done // max(total, 1)
        if self._bar.disable and tenth > self._tenth and time.monotonic() - self._said > 1:
            self._tenth, self._said = tenth, time.monotonic()
            self.say(f"{done:,} of {total:,} {self._unit}")

    def say(self, line: str) -> None:
        self._console.print(line)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _mean(losses: np.ndarray) -> str:
    """The mean loss, of steps that were not skipped because they had none."""
    finite = losses[np.isfinite(losses)]
    loss = f"loss {finite.mean() if finite.size else float('nan'):.4f}"
    return loss if losses.size == 1 else f"{loss} (mean of {losses.size:,})"


def duration(seconds: float) -> str:
    """A time for people: "12.3 ms"."""
    for unit, scale in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def _make_bar(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[more]}"),
        console=console,
    )
