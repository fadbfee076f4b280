"""Runs that go on for long, and runs that are killed: memory stays flat, nothing is lost."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys

import kills
import numpy as np
import pytest

import tapeless as tl
from commands import environment, signals
from tapeless.job import Losses

SOAK = """
import importlib, json, os, sys
train = importlib.import_module("tapeless.train")
train.SAVE_SECONDS, train.SAVE_SHARE, train.CHUNK_SECONDS = 0.0, 1e9, 0.0005  # each chunk is saved
job = importlib.import_module("tapeless.job")
job.Losses.MOST, job.UNLOGGED = 2**12, 2**10
importlib.import_module("tapeless.meter").WORTHWHILE = 0.0  # Numba, which that imports, comes before we look
os.fsync = lambda _: None  # which takes most of the time here, and no memory

class Watch:
    def __init__(self): self.steps, self.chunks, self.measured = 0, 0, False
    def speed(self, _): self.measured = True
    def update(self, losses):
        self.steps += len(losses)
        self.chunks += self.measured
        if self.measured and self.chunks % 20 == 0:
            resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            left = sum(len(names) + len(folders) for _, folders, names in os.walk("run"))
            print(json.dumps([self.steps, resident, files, threads, left]), flush=True)
    def __getattr__(self, name): return lambda *_: None

try:
    train.train(out="run", steps=10**9, progress=Watch(), log_every=100, threads=2, set={
        "batch_size": 4, "eval_every": 50, "val_fraction": 0.01, "sample_every": 100,
        "schedule": "constant", "bad_steps": "skip", "spike": 3.0})
except train.Interrupted:
    pass
"""


@signals
@pytest.mark.oracle
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_in_a_long_run(tmp_path):
    """1,500 chunks, each of them saved: as many saves as in four hours."""
    command = [sys.executable, "-c", SOAK]
    options = {"cwd": tmp_path, "env": environment(), "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **options) as process:
        lines = [process.stdout.readline() for _ in range(75)]
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 0
    steps, resident, files, threads, left = np.array([json.loads(line) for line in lines]).T
    settled = len(steps) // 4
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} >= set(range(100, int(steps[-1]) // 100 * 100, 100))
    assert resident[settled:].max() - resident[settled:].min() < 4e6, resident.tolist()
    for counts in (files, threads, left):
        assert counts[settled:].max() <= counts[1:settled].max() + 2, counts.tolist()


@pytest.mark.parametrize("most", [1, 4, 1000])
def test_losses_of_long_runs(most, monkeypatch):
    """All as long as they are few, the last ones in any case."""
    monkeypatch.setattr(Losses, "MOST", most)
    losses, every = Losses(), np.empty(0)
    for k in (1, 1000, 30, 2000, 5, 7, 3):
        new = np.random.default_rng(k).random(k)
        losses.append(new)
        every = np.append(every, new)
        kept = len(losses.all)
        assert kept >= min(most, len(every))
        assert np.array_equal(losses.all, every[len(every) - kept :])
    losses.drop(2)
    assert np.array_equal(losses.all, every[len(every) - kept : -2])


def test_rows_of_more_steps_than_are_kept(tmp_path, monkeypatch):
    """Each step has its own row, with its own loss, whatever is kept in memory."""
    whole = tl.train(engine="reference", steps=300, samples=0, progress=False).losses
    for name, value in (("MOST", 64), ("ROOM", 16)):
        monkeypatch.setattr(Losses, name, value)
    monkeypatch.setattr(importlib.import_module("tapeless.job"), "UNLOGGED", 32)
    monkeypatch.setattr(importlib.import_module("tapeless.train"), "CHUNK_SECONDS", 0.001)
    run = tl.train(engine="reference", steps=300, samples=0, progress=False, out=tmp_path)
    assert len(run.losses) < 300
    assert np.array_equal(run.losses, whole[-len(run.losses) :])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == list(enumerate(whole.tolist(), 1))


def test_a_run_keeps_all_of_eight_million_losses():
    assert Losses.MOST >= 8e6


# ---------------------------------------------------------------- killed at random


@signals
@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("KILL", 10),
        ("TERM", 5),
        ("INT", 5),
    ],
)
def test_killed_at_random_moments(name, count):
    """Every run ends as one that nobody disturbed. `benchmarks/kills.py` does this as often as one likes."""
    told = kills.kill(count, getattr(signal, f"SIG{name}"), seed=count, steps=1000)
    assert told["kills"] >= count
    assert told["whole runs"] >= 1
