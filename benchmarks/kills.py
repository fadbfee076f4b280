"""Kill training at random moments, over and over, and look whether anything is lost.

    python benchmarks/kills.py [--kills N] [--signal KILL|TERM|INT] [--seed S] [--json]

A run that saves after nearly every chunk of steps is a process of its own, killed at a moment drawn at
random and started again by the same command, whatever state the folder is in, as a supervisor would; and so
on until it has been killed N times, with a new folder whenever a run came to its end. After each kill the
folder holds a model that loads, or nothing yet, and at each end metrics.jsonl, the model and the optimiser's
state must be, byte for byte, those of a run that nobody disturbed. Told are also how many kills came while
something was being written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import tapeless as tl

TRAIN = """
import importlib, sys
train = importlib.import_module("tapeless.train")
train.SAVE_SECONDS, train.SAVE_SHARE = 0.0, 1e9  # each chunk is saved
train.CHUNK_SECONDS = {chunk}
try:
    train.train("names", out={out!r}, resume=True, progress=False, steps={steps}, seed=7, samples=0,
                set={{"val_fraction": 0.1, "eval_every": 2000, "eval_batches": 50}})
except train.Interrupted:
    sys.exit(3)
"""
COMPARED = ("metrics.jsonl", "model.safetensors", "state.safetensors")


def command(folder: Path, steps: int, chunk: float = 0.0015) -> list[str]:
    return [sys.executable, "-c", TRAIN.format(out=str(folder), steps=steps, chunk=chunk)]


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in COMPARED}


def begun(folder: Path) -> bool:
    """Whether a run is in the folder, or about to move there."""
    return folder.exists() and any(path.name[0] != "." or path.name == ".new" for path in folder.iterdir())


def newest(folder: Path) -> str:
    """The name of the last checkpoint."""
    return max((path.name for path in folder.glob("checkpoints/*-step-*")), default="")


def being_written(folder: Path) -> bool:
    """Whether a killed process left something that it was writing or removing."""
    return any(path.name.startswith(".") and path.name != ".lock" for path in folder.rglob("*"))


def kill(kills: int, number: int, seed: int, steps: int = 6000) -> dict[str, Any]:
    """The figures of so many kills by this signal. Raises `AssertionError` if something is lost."""
    chance = random.Random(seed)
    told = {"kills": 0, "while writing": 0, "before the first save": 0, "whole runs": 0}
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        began = time.monotonic()
        subprocess.run(command(whole, steps), check=True)
        lasts, expected, turn = time.monotonic() - began, digests(whole), 0
        while told["kills"] < kills:
            folder = Path(name) / f"run-{turn}"
            turn += 1
            patience, reached = 0.75 * lasts, ""
            while True:
                options: Any = {"stderr": subprocess.PIPE, "text": True}
                process = subprocess.Popen(command(folder, steps), **options)
                try:
                    _, errors = process.communicate(timeout=chance.uniform(0, patience))
                    assert process.returncode == 0, errors
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
                _, errors = process.communicate()
                if process.returncode == 0:  # it had come to its end
                    break
                told["kills"] += 1
                # While Python still imports, a signal is what the imports make of it.
                early = "KeyboardInterrupt" in errors or "ImportError" in errors
                gentle = "Traceback" not in errors or early
                assert number == signal.SIGKILL or gentle, errors
                # On a machine that has become slower it needs more time to come any further at all.
                before, reached = reached, newest(folder)
                patience = 1.5 * patience if reached == before else 0.75 * lasts
                if not begun(folder):
                    told["before the first save"] += 1
                    continue
                told["while writing"] += being_written(folder)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # nothing may be damaged
                    tl.load(folder, "reference")
            assert digests(folder) == expected, f"{folder} is not what it should be"
            told["whole runs"] += 1
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", default="KILL", choices=("KILL", "TERM", "INT"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    told = kill(given.kills, getattr(signal, f"SIG{given.signal}"), given.seed)
    print(json.dumps(told) if given.json else ", ".join(f"{name}: {count}" for name, count in told.items()))


if __name__ == "__main__":
    if os.name == "nt":
        sys.exit("this sends signals that Windows does not have")
    main()
