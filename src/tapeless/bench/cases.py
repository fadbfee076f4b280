"""What `tapeless bench` measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tapeless.bench.workload import SEED, Differs, Workload, compare
from tapeless.engine import Engine
from tapeless.flops import forward_flops
from tapeless.io import runs
from tapeless.presets import get_preset
from tapeless.machine import processors

Say = Callable[[str], None]


@dataclass
class Session:
    """How long each case is measured, and who hears of it."""

    seconds: float  # of repetitions, for each case
    say: Say

    def repeat(self, measure: Callable[[], Any]) -> list[Any]:
        """What `measure` returned, called for as long as this session gives, three times at least."""
        end, results = time.perf_counter() + self.seconds, [measure()]
        while len(results) < 3 or time.perf_counter() < end:
            results.append(measure())
        return results

    def ready(self, engine: Engine, program: str) -> Engine:
        """The engine with this program compiled."""
        from tapeless.progress import COMPILING

        engine.notice = lambda: self.say(f"  {COMPILING}")
        engine.program(program)
        return engine


@dataclass(frozen=True)
class TrainingCase:
    """Training steps: from the first weights again and again, the best time of all."""

    preset: str
    work: str
    steps: int  # of a repetition
    checked: int  # of them compared with the reference
    settings: dict[str, Any] = field(default_factory=dict)
    threads: int = 1

    @cached_property
    def workload(self) -> Workload:
        preset = get_preset(self.preset).with_settings(self.settings | {"steps": self.steps})
        return Workload(preset, self.steps)

    @cached_property
    def reference(self) -> np.ndarray:
        """The losses of the first steps on the reference engine, float64."""
        return self.workload.run(self.workload.engine("reference"), self.checked)[1]

    def measure(self, session: Session) -> dict[str, Any]:
        work = self.workload
        engine = session.ready(work.engine(threads=self.threads), "adamw")
        times, losses = zip(*session.repeat(lambda: work.run(engine)), strict=True)
        difference = compare(np.stack(losses), self.reference)
        return {
            "us_per_step": min(times) / self.steps * 1e6,
            "tokens_per_step": float(work.spans[..., 1].sum() / self.steps),
            "gflops": work.flops / min(times) / 1e9,
            "loss_difference": difference,
        }

    def profile(self, session: Session) -> dict[str, dict[str, float]]:
        """Where the time of a step goes, on one thread: for each family of ops, µs and share.

        Reading the clock takes time itself. What the profiled step takes longer than the plain one is
        spread evenly over the readings and taken off.
        """
        from tapeless.ops.cpu import profile

        work = self.workload
        plain, profiled = (
            session.ready(work.engine(kind=kind), "adamw") for kind in (Engine, profile.ProfiledEngine)
        )

        def both() -> tuple[float, float, dict[str, int], dict[str, int], np.ndarray]:
            without, _ = work.run(plain)
            profile.reset()
            took, losses = work.run(profiled)
            return without, took, *profile.counts(), losses

        withouts, tooks, cycles, readings, losses = zip(*session.repeat(both), strict=True)
        compare(np.stack(losses), self.reference)
        cycle = min(took / sum(each.values()) for took, each in zip(tooks, cycles, strict=True))  # in seconds
        spent = {name: cycle * min(each[name] for each in cycles) for name in profile.FAMILIES}
        step = min(withouts) / self.steps
        reading = max(0.0, sum(spent.values()) - min(withouts)) / sum(readings[0].values())
        spent = {name: max(0.0, seconds - readings[0][name] * reading) for name, seconds in spent.items()}
        total = sum(spent.values())
        return {
            name: {"us": seconds / total * step * 1e6, "share": seconds / total}
            for name, seconds in spent.items()
        }


@dataclass(frozen=True)
class GenerationCase:
    """Names by a microgpt that has been trained a little, so that they are as long as names are."""

    texts: int
    checked: int  # of them compared with the reference's

    @property
    def work(self) -> str:
        return f"{self.texts:,} names"

    def measure(self, session: Session) -> dict[str, Any]:
        from tapeless.model import GPT
        from tapeless.train import train

        model = train("names", steps=1000, threads=1, samples=0, progress=False).model
        reference = GPT(model.config, None, "reference", tokenizer=model.tokenizer)
        reference.engine.params[:] = model.engine.params
        session.ready(model.engine, "generate")

        def timed() -> tuple[float, list[str]]:
            began = time.perf_counter()
            texts = model.generate("", self.texts, 0.5, SEED)
            return time.perf_counter() - began, texts

        results = session.repeat(timed)
        seconds, texts = min(seconds for seconds, _ in results), results[0][1]
        expected = reference.generate("", self.checked, 0.5, SEED)
        for _, generated in results:
            for i, (text, wanted) in enumerate(zip(generated, expected, strict=False)):
                if text != wanted:
                    raise Differs(f"texts differ from the reference: number {i} is {text!r}, not {wanted!r}")
        # The last token of a text is drawn but not read again, unless it was the end of the text.
        lengths = [min(1 + len(text), model.config.block_size) for text in texts]
        characters = sum(map(len, texts))
        return {
            "characters_per_second": characters / seconds,
            "characters_per_text": characters / len(texts),
            "gflops": forward_flops(model.config, lengths) / seconds / 1e9,
        }


@dataclass(frozen=True)
class WarmStart:
    """A whole process that finds its compiled code on disk: start, data, training, texts, saving."""

    work: str = "train --steps 1000"

    def measure(self, session: Session) -> dict[str, Any]:
        from tapeless.train import train

        arguments = [sys.executable, "-m", "tapeless", "train", "--steps", "1000", "--overwrite", "--out"]
        with tempfile.TemporaryDirectory() as folder:

            def process() -> float:
                began = time.perf_counter()
                _child([*arguments, folder + "/run"])
                return time.perf_counter() - began

            process()  # the first may compile
            seconds = min(session.repeat(process))
            rows = (Path(folder) / "run" / runs.METRICS).read_text(encoding="utf-8").splitlines()
        losses = np.array([json.loads(row)["loss"] for row in rows])
        reference = train("names", steps=1000, samples=0, engine="reference", progress=False).losses
        return {"seconds": seconds, "loss_difference": compare(losses, reference)}


@dataclass(frozen=True)
class FirstCompile:
    """What a preset's first use costs: a fresh process with an empty cache of compiled code."""

    case: str  # the training case that names the preset

    @property
    def work(self) -> str:
        return TRAINING[self.case].preset

    def measure(self, session: Session) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            code = f"from tapeless.bench.cases import first_compile; first_compile({self.case!r})"
            out = _child([sys.executable, "-c", code], TAPELESS_CACHE_DIR=folder)
        result = json.loads(out)
        difference = compare(np.array(result.pop("losses")), TRAINING[self.case].reference)
        return {"seconds": sum(result.values()), **result, "loss_difference": difference}


def first_compile(name: str) -> None:
    """In a process of its own: compile the programs of a training case, and print as JSON what each
    took and the first losses."""
    case = TRAINING[name]
    work = case.workload
    engine, took = work.engine(threads=case.threads), {}
    for what, program in (("training_seconds", "adamw"), ("generating_seconds", "generate")):
        began = time.perf_counter()
        engine.program(program)
        took[what] = time.perf_counter() - began
    print(json.dumps(took | {"losses": work.run(engine, case.checked)[1].tolist()}))


def _child(arguments: list[str], **environment: str) -> str:
    """What a process printed. Raises `Differs` if it failed."""
    done = subprocess.run(
        arguments, env=os.environ | environment, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise Differs(f"{' '.join(arguments[1:5])} … failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    return done.stdout


def _width(width: int, steps: int, checked: int) -> TrainingCase:
    # At the preset's learning rate the wider ones are chaotic: float32 and float64 soon part, and so do
    # any two orders of summation. Adam's rates want to fall with the width.
    settings = {"n_embd": width, "batch_size": 16, "lr": 0.01 * 16 / width}
    return TrainingCase("microgpt", "16 documents", steps, checked, settings)


TRAINING = {
    "microgpt": TrainingCase("microgpt", "1 document", 10_000, 200),
    "width-16": _width(16, 1000, 100),
    "width-32": _width(32, 500, 100),
    "width-64": _width(64, 200, 50),
    "width-128": _width(128, 50, 20),
    "shakespeare-char": TrainingCase("shakespeare-char", "12 windows", 5, 5, threads=processors()),
}
CASES: dict[str, Any] = TRAINING | {
    "generate": GenerationCase(20_000, 100),
    "warm-start": WarmStart(),
    "first-compile": FirstCompile("microgpt"),
    "first-compile-text": FirstCompile("shakespeare-char"),
}
