"""No race between the threads of a step, and no barrier that is not needed: see races.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tapeless

CHILD = """
import json, sys
import numpy as np
sys.path.insert(0, {tests!r})
import races
from tapeless import layout
layout.LARGE = 64  # so that small matrices are streamed as large ones are
races.install()
import tapeless as tl
from helpers import random_batch, random_model
from tapeless.config import GPTConfig
from tapeless.engine import Engine

SIZES = dict(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=8, n_hidden=12)
NORMS = dict(norm_attn=True, norm_mlp=True, norm_gain=True)
CONFIGS = {{
    "plain": {{}},
    "rms": dict(NORMS, norm="rms", norm_embed=True, norm_final=True, bias=True, recompute=True),
    "bare": dict(norm="rms", norm_attn=True, norm_mlp=True, recompute=True),
    "again": dict(NORMS, norm="layer", norm_bias=True, norm_embed=True, norm_attn=False, recompute=True),
    "layer": dict(NORMS, norm="layer", norm_bias=True, norm_final=True, tied=True, activation="gelu",
                  n_embd=6, recompute=True),
    "mhc": dict(norm="rms", norm_attn=True, norm_mlp=True, residual="mhc", n_streams=2),
    "streams": dict(NORMS, norm="rms", norm_embed=True, residual="mhc", n_streams=3, tied=True, n_layer=1),
    "large": dict(n_embd=16, n_hidden=32, bias=True, tied=True),
    "large, bf16": dict(n_embd=16, n_hidden=32, precision="bf16"),
}}

def engines(name, threads):
    races.memory.forget()
    config = GPTConfig(**SIZES | CONFIGS[name])
    exact = Engine(config, "reference", "float64")
    exact.params[:] = random_model(config).engine.params
    watched = races.WatchedEngine(config, "cpu", threads=threads)
    watched.params[:] = exact.params
    for engine in (exact, watched):
        engine.optimiser.constants[:] = 0.9, 0.99, 1e-3, 0.1, 0.5, 0.7
        engine.optimiser.limits[:] = 1, 5
    return config, exact, watched

def gradient(name, threads, lengths):
    config, *both = engines(name, threads)
    batch = random_batch(config, lengths, 0)
    weights = np.full(len(batch.tokens), 1 / len(batch.tokens))
    found = []
    for engine in both:
        engine.fill(batch.tokens, batch.targets, batch.starts, weights)
        found.append((engine.evaluate(), engine.logits(), engine.gradient(), engine.grads.copy()))
    return found

def training(name, threads, optimiser):
    config, *both = engines(name, threads)
    rng = np.random.default_rng(0)
    stream = rng.integers(0, config.vocab, 60, dtype=np.int32)
    spans = np.stack([rng.integers(0, 40, (2, 2, 3)), rng.integers(1, 4, (2, 2, 3))], axis=3)
    return [(*engine.train(stream, spans, np.array([0.01, 0.02]), optimiser)[:2], engine.params.copy())
            for engine in both]

def generating(name, threads, prompt):
    config, *both = engines(name, threads)
    found = []
    for engine in both:
        rows, used = engine.generate(list(range(prompt)), 2, 2, np.linspace(0.1, 0.9, 60), eos=[0])
        found.append((used, *rows))
    return found

CASES = [(gradient, name, threads, lengths) for name in CONFIGS
         for threads, lengths in ((2, [3, 1, 2, 4]), (3, [5, 3]))]
CASES += [(training, "rms", 2, "adamw"), (training, "layer", 3, "adamw"), (training, "plain", 2, "sgd"),
          (training, "mhc", 2, "adamw")]
CASES += [(generating, name, 2, prompt) for name in ("plain", "layer", "streams", "large", "large, bf16")
          for prompt in (1, 11)]

def run(case):
    "Run a case, and compare what it finds with the reference; bfloat16 rounds otherwise."
    exact, watched = case[0](*case[1:])
    if "bf16" not in case[1]:
        for a, b in zip(exact, watched, strict=True):
            np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-4)

"""
PROVE = """
for case in CASES:
    run(case)
print(json.dumps(sorted(races.team.places)))
"""
LEAVE_OUT = """
wanted, missed = {places!r}, []
visits = {}
for case in CASES:
    races.team.places.clear()
    case[0](*case[1:])
    for place in races.team.places:
        visits.setdefault(place, []).append(case)
for place in wanted:
    races.team.without = place
    for case in visits[place]:
        try:
            case[0](*case[1:])
        except races.Race:
            break
    else:
        missed.append(place)
print(json.dumps(missed))
"""
TESTS = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def barriers(child):
    return json.loads(child(CHILD.format(tests=TESTS) + PROVE))


def test_no_two_threads_use_a_number_at_the_same_time(barriers):
    """All ops and programs, with results like the reference's; and every barrier in the code was come to."""
    written = set()
    package = Path(tapeless.__file__).parent
    for path in [package / "programs.py", *(package / "ops" / "cpu").glob("*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            call = re.match(r"\s+meet(_if_\w+)?\(", line)
            within_meet = path.name == "attention.py" and line.strip() in ("meet(docs.rows)", "meet(rows)")
            if call and not within_meet:
                written.add(f"{path.name}:{number}")
    assert {place.split()[0] for place in barriers} == written


@pytest.mark.oracle
def test_leaving_out_any_barrier_is_noticed(barriers, child):
    """One after the other: so each is needed, and none can be lost without a test that fails."""
    code = CHILD.format(tests=TESTS) + LEAVE_OUT.replace("{places!r}", repr(barriers))
    assert json.loads(child(code)) == []
