"""What fits in memory, what is said where it does not, and recomputing activations to make it fit."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

import tapeless as tl
from commands import refused, succeeds
from helpers import PRESETS, random_batch, random_model
from tapeless import memory, plan
from tapeless.errors import ConfigError
from tapeless.settings import Training

GPT2 = tl.presets["gpt2"].model


def of(batch_size):
    return Training(batch_size=batch_size)


def free(monkeypatch, gigabytes):
    monkeypatch.setattr(memory, "free_memory", lambda: gigabytes * 1e9)


@pytest.mark.parametrize(
    ("gigabytes", "expected"),
    [
        (100, None),
        (5, "recompute=true"),
        (3.8, "batch_size=1 or batch_size=3 with recompute=true"),
        (2.8, "batch_size=1 with recompute=true"),
        (1.5, None),
    ],
)
def test_a_run_that_does_not_fit_is_told_what_would(monkeypatch, gigabytes, expected):
    free(monkeypatch, gigabytes)
    if gigabytes == 100:
        memory.check_memory(GPT2, "cpu", None, of(4), 2)
        return
    with pytest.raises(ConfigError) as caught:
        memory.check_memory(GPT2, "cpu", None, of(4), 2)
    message = str(caught.value)
    assert "6.4 GB of memory" in message
    if expected is None:
        assert "choose a smaller model" in message
        return
    # What it names fits, and one document more does not.
    assert expected in message
    for option in message.split(": ")[1].removesuffix(" would fit.").split(" or "):
        config = GPT2.replace(recompute="recompute" in option)
        size = int(re.search(r"batch_size=(\d+)", option)[1]) if "batch" in option else 4
        memory.check_memory(config, "cpu", None, of(size), 2)
        if size < 4:
            with pytest.raises(ConfigError):
                memory.check_memory(config, "cpu", None, of(size + 1), 2)


ALLOCATED = """
import json, tracemalloc, numpy as np, tapeless as tl
from tapeless import guard, memory, plan
from tapeless.train import Silent

memory.SNAPSHOTS = guard.SNAPSHOTS = {snapshots}
jobs, prepare = [], plan.prepare

def kept(*args):
    jobs.append(prepare(*args))
    return jobs[-1]

plan.prepare = kept

class Watching(Silent):
    def begin(self, step, steps):
        if tracemalloc.is_tracing():
            tracemalloc.reset_peak()
    def finish(self):
        if not tracemalloc.is_tracing():
            return
        self.peak = tracemalloc.get_traced_memory()[1]
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        traces = tracemalloc.take_snapshot().filter_traces([arrays]).traces
        self.arrays = sum(trace.size for trace in traces)

def train():
    watching = Watching()
    tl.train({data!r}, {preset!r}, steps={steps}, batch_size={batch}, threads={threads}, engine={engine!r},
             set={settings!r}, progress=watching, samples=2, out={out!r}, overwrite=True)
    return watching, jobs.pop()

train()  # so that modules and compiled code are there
tracemalloc.start()
watching, job = train()
model = job.model
plans, _ = memory.training_memory(
    model.config, job.training, {engine!r}, model.engine.dtype, {threads}, {longest},
    **plan.data_memory(job.data, job.order))
sizes = {{name: each.nbytes for name, each in plans.items()}}
print(json.dumps([watching.arrays, watching.peak, sizes]))
"""
WIDE = {"n_embd": 256, "n_head": 4, "n_layer": 1, "max_tokens": 9}


@pytest.mark.parametrize(
    ("preset", "settings", "engine", "threads", "longest", "snapshots", "steps", "batch"),
    [
        ("microgpt", {"block_size": 6}, "reference", None, 6, 2**25, 6, 4),
        (
            "microgpt",
            {"block_size": 6, "val_fraction": 0.1, "eval_every": 500},
            "cpu",
            None,
            6,
            2**25,
            2000,
            16,
        ),
        pytest.param(
            *("flashmicrogpt", {"block_size": 6, "val_fraction": 0.01, "eval_every": 4}),
            *("cpu", 2, 6, 2**25, 6, 4),
            marks=pytest.mark.oracle,
        ),
        pytest.param(
            *("microgpt", {"block_size": 6, "optimiser": "sgd", "sample_every": 4}, "cpu", 1, 6, 2**25, 6, 4),
            marks=pytest.mark.oracle,
        ),
        pytest.param(
            *("shakespeare-char", WIDE | {"sample_every": 4, "recompute": True}, "cpu", 2, 64, 0, 6, 4),
            marks=pytest.mark.oracle,
        ),
        pytest.param(
            "shakespeare-char",
            WIDE | {"precision": "bf16", "block_size": 96, "window": 40, "sample_every": 4},
            *("cpu", 1, 40, 2**25, 6, 4),
            marks=pytest.mark.oracle,
        ),
    ],
    ids=["reference", "validating", "documents", "sgd", "large", "bf16"],
)
def test_the_budget_is_what_training_really_takes(
    child, tmp_path, preset, settings, engine, threads, longest, snapshots, steps, batch
):
    """Measured by tracemalloc, which NumPy tells of every array. The arrays that are there at the end of
    training are at least those that the budget counts exactly; and the most that Python took meanwhile, its
    own objects included, is at most all of the budget."""
    (tmp_path / "text").write_text("to be or not to be, that is the question.\n" * 300)
    data, out = "names" if "micro" in preset else str(tmp_path / "text"), str(tmp_path / "run")
    arrays, peak, sizes = json.loads(child(ALLOCATED.format(**locals())).splitlines()[-1])
    bounded = {
        "losses",
        "documents of a call",
        "texts of a call",
        "looking at the state",
        "validating",
        "saving",
    }
    exact = sum(size for name, size in sizes.items() if name not in bounded)
    if "sample_every" not in settings:  # texts come after the end
        exact -= sum(size for name, size in sizes.items() if "sampling" in name or name == "generating texts")
    assert exact <= arrays <= peak <= sum(sizes.values()) + 200_000  # of Python's own objects


@pytest.mark.parametrize(("optimiser", "momentum"), [("adam", 0.0), ("sgd", 0.0), ("sgd", 0.9)])
def test_the_budget_has_the_copies_of_the_state_that_are_kept(optimiser, momentum):
    settings = {"optimiser": optimiser, "momentum": momentum}
    job = plan.prepare(plan.fresh("names", None, None, None, settings, 1, "reference", None, None))
    for _ in range(3):
        job.advance(1)
        job.guard.keep()
    kept = sum(array.nbytes for copy in job.guard._good for array in copy.arrays.values())
    config, training = job.model.config, job.training
    plans, _ = memory.training_memory(config, training, "reference", job.model.engine.dtype, None, 16)
    assert plans["two copies of the state"].nbytes == kept


def test_a_run_is_refused_before_it_starts(tmp_path):
    message = refused("train", "--batch-size", 10**9, "--out", "run", cwd=tmp_path)
    assert "GB are free" in message
    assert "batch_size=" in message
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- recomputing


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *((name, "reference") for name in ("microgpt", "flashmicrogpt", "transformerlm", "gpt2")),
        ("microgpt", "cpu"),
        *(
            pytest.param(name, "cpu", marks=pytest.mark.oracle)
            for name in ("flashmicrogpt", "transformerlm", "gpt2")
        ),
    ],
)
def test_recomputing_changes_no_bit(name, engine):
    config = PRESETS[name].replace(n_layer=3)
    kept, again = (random_model(config.replace(recompute=r), engine) for r in (False, True))
    again.engine.params[:] = kept.engine.params
    batch = random_batch(config, [config.block_size, 3, 1], 0)
    assert kept.loss_and_grad(*batch) == again.loss_and_grad(*batch)
    assert np.array_equal(kept.engine.grads, again.engine.grads)
    assert np.array_equal(kept.logits(batch.tokens, batch.starts), again.logits(batch.tokens, batch.starts))
    sizes = [sum(view.nbytes for view in model.engine.a) for model in (kept, again)]
    assert sizes[1] < 0.75 * sizes[0]
    prompt = list(range(1, 4))
    texts = [
        model.engine.generate(prompt, 2, 2 * config.block_size, np.linspace(0, 0.999, 999))
        for model in (kept, again)
    ]
    assert [row.tolist() for row in texts[0][0]] == [row.tolist() for row in texts[1][0]]


def test_gradients_of_a_recomputing_model_pass_the_check(tmp_path):
    result = succeeds("check", "gpt2", "--set", "recompute=true", "--set", "n_layer=2", "--set",
                      "n_embd=12", "--set", "n_head=3", "--set", "vocab_size=11", "--set",
                      "block_size=8", "--entries", 50, "--engine", "reference", cwd=tmp_path)  # fmt: skip
    assert "disagree" not in result.stdout


def test_the_budget_tells_what_recomputing_saves(tmp_path):
    def total(*options):
        out = succeeds("budget", "gpt2", "--batch-size", 4, "--block-size", 1024, "--target", "cpu",
                       "--threads", 2, *options, cwd=tmp_path).stdout  # fmt: skip
        return int(re.search(r"total +([\d,]+)", out)[1].replace(",", ""))

    training = dataclasses.replace(tl.presets["gpt2"].training, batch_size=4)
    plans, _ = memory.training_memory(GPT2, training, "cpu", "float32", 2, 1024)
    assert total() == sum(plan.nbytes for plan in plans.values())
    assert total("--recompute") < 0.7 * total()
    assert "target" in refused("budget", "gpt2", "--target", "moon", cwd=tmp_path)
