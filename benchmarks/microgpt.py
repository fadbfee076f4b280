"""How long microgpt takes: a training step, a whole command, the first run ever, the help text.

    python benchmarks/microgpt.py

Prints medians over several repetitions, with machine, date and versions.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

import tapeless as tl
from tapeless.data.documents import Corpus, Shuffled, read_documents
from tapeless.data.tokenizers import CharTokenizer
from tapeless.engine import uses
from tapeless.rng import PythonRandom


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def step_seconds(engine: str, steps: int, repeats: int) -> float:
    """Seconds a training step of microgpt takes, one document a step: the median of some runs."""
    documents = read_documents("names")
    tokenizer = CharTokenizer.from_documents(documents)
    model = tl.GPT(tl.presets["microgpt"].model.replace(vocab_size=tokenizer.vocab_size), engine=engine)
    corpus = Corpus.from_documents(documents, tokenizer, model.config.block_size)
    spans = Shuffled(corpus, PythonRandom(42), 1).take(0, steps)
    model.engine.optimiser.constants[:3] = 0.85, 0.99, 1e-8
    rates = 0.01 * (1 - np.arange(steps) / steps)
    model.engine.train(corpus.stream, spans[:10], rates[:10])
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        losses = model.engine.train(corpus.stream, spans, rates)
        seconds.append((time.perf_counter() - began) / steps)
    assert np.isfinite(losses).all()
    print(f"  ({uses(engine, model.engine.dtype, model.engine.team(1))})")
    return statistics.median(seconds)


def command_seconds(*arguments: str, repeats: int, fresh: bool = False) -> float:
    """Wall time of a whole `tapeless` process; `fresh` gives it an empty cache of compiled code."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "TAPELESS_CACHE_DIR": folder} if fresh else None
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "tapeless", *arguments],
                cwd=folder, env=env, check=True, capture_output=True,
            )  # fmt: skip
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("tapeless", "numpy", "numba", "llvmlite"))
    print(f"{processor()}, {os.cpu_count()} cores; {platform.system()}, Python {platform.python_version()}")
    print(f"{versions}; {datetime.date.today()}")
    print("microgpt, one document a step, built-in names:")
    print(f"  cpu engine        {step_seconds('cpu', 20_000, 7) * 1e6:8.1f} µs a step")
    print(f"  reference engine  {step_seconds('reference', 300, 3) * 1e6:8.1f} µs a step")
    train = ("train", "--steps", "1000")
    print("whole processes:")
    print(
        f"  tapeless train --steps 1000, first ever   {command_seconds(*train, repeats=2, fresh=True):6.2f} s"
    )
    print(f"  tapeless train --steps 1000, again        {command_seconds(*train, repeats=7):6.2f} s")
    print(f"  tapeless --help                           {command_seconds('--help', repeats=7):6.2f} s")


if __name__ == "__main__":
    main()
