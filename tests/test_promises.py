"""The numbers that docs/reliability.md tells, written here as numbers."""

from __future__ import annotations

import importlib
import types

import numpy as np
import pytest

import tapeless as tl
from test_saves import steps

training = importlib.import_module("tapeless.train")


class Clock:
    """One that only goes on when something takes its time: a step so much, a save so much."""

    def __init__(self, monkeypatch, step, save):
        self.now, self.sizes = 0.0, []
        saves = importlib.import_module("tapeless.io.saves")
        engine = importlib.import_module("tapeless.engine")

        def saved(*given, save_=saves.save, **options):
            self.now += save
            return save_(*given, **options)

        def trained(model, stream, spans, *more, train=engine.Engine.train):
            self.now += step * len(spans)
            self.sizes.append(len(spans))
            return train(model, stream, spans, *more)

        monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(saves, "save", saved)
        monkeypatch.setattr(engine.Engine, "train", trained)


OPTIONS = {"engine": "reference", "samples": 0, "keep": 1000, "progress": False}


def test_a_save_comes_every_ten_seconds(tmp_path, monkeypatch):
    Clock(monkeypatch, step=1.0, save=0.1)
    tl.train(out=tmp_path, steps=50, **OPTIONS)
    # Of steps of a second, after the first with which more than ten have passed.
    assert steps(tmp_path) == [0, 11, 22, 33, 44, 50]


def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    Clock(monkeypatch, step=1.0, save=2.0)
    tl.train(out=tmp_path, steps=200, **OPTIONS)
    assert steps(tmp_path) == [0, 11, 52, 93, 134, 175, 200]  # then every 2 / 0.05 = 40 seconds


@pytest.mark.parametrize(("step", "expected"), [(0.001, [1, 8, 64, 100, 27]), (1.0, [1] * 200)])
def test_a_chunk_takes_a_tenth_of_a_second(step, expected, monkeypatch):
    clock = Clock(monkeypatch, step, save=0.0)
    tl.train(steps=200, **OPTIONS)
    assert clock.sizes == expected


def test_two_checkpoints_are_kept(tmp_path, monkeypatch):
    Clock(monkeypatch, step=1.0, save=0.1)
    tl.train(out=tmp_path, steps=50, **OPTIONS | {"keep": None})
    assert steps(tmp_path) == [44, 50]


def test_a_spike_is_measured_by_the_last_hundred_steps_roughly_and_from_the_twentieth_on(monkeypatch):
    """By hand: the mean of the good steps, each of which has a weight of 1/100 once there are a hundred."""
    factor, skipped = 1.35, []

    class Tells(types.SimpleNamespace):
        def __getattr__(self, name):
            return lambda *_: None

        def skipped(self, what):
            skipped.append(int(what.split()[1]))

    monkeypatch.setattr(training, "CHUNK_SECONDS", 0.0)
    seen, engine = [], importlib.import_module("tapeless.engine")
    train = engine.Engine.train

    def watched(*given):
        done = train(*given)
        seen.append((done.losses[0], done.norms[0]))
        return done

    monkeypatch.setattr(engine.Engine, "train", watched)
    settings = {"bad_steps": "skip", "spike": factor, "schedule": "constant"}
    run = tl.train(steps=400, seed=5, engine="reference", samples=0, set=settings, progress=Tells())
    means, count, bad = np.zeros(2), 0, []
    for step, found in enumerate(seen, 1):
        if count >= 20 and (found > factor * means).any():
            bad.append(step)
            continue
        count += 1
        means += (found - means) / min(count, 100)
    assert run.steps == len(seen) == 400
    assert bad == skipped
    assert bad[0] == 21  # the first that is looked at
    assert 10 < len(bad) < 300
    assert count > 100
    # A rule that counts sooner, or over more or fewer steps, leaves out others.
    np.testing.assert_allclose(run.model.engine.optimiser.means[:3], [count, *means], rtol=1e-12)


def test_losses_are_kept_of_eight_million_steps():
    from tapeless.job import Losses

    assert 8_000_000 <= Losses.MOST < 9_000_000


def test_states_to_go_back_to_are_kept_of_models_up_to_eight_million_parameters():
    from tapeless import guard

    assert guard.SNAPSHOTS == 4 * 2**23
