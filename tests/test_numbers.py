"""Numbers gone bad: steps that are skipped or stopped at, what is told of them, what they leave behind."""

from __future__ import annotations

import importlib
import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

import tapeless as tl
from commands import refused, succeeds, tapeless
from shard_files import write_shard
from tapeless import plan, programs
from tapeless.data.sources import open_data
from tapeless.errors import ConfigError, NumericsError
from tapeless.replay import described
from test_runs import StopAt

OUTLIERS = (70, 150)  # steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents that are soon learnt, and two unlike them, at these steps of the order with seed 42."""
    place = tmp_path_factory.mktemp("data") / "data.txt"
    lines = ["abab"] * 200
    place.write_text("\n".join([*lines[:-1], "zq"]))
    job = prepared(place, {})
    order = job.order.take(0, 200)[:, 0, 0]
    for step in OUTLIERS:
        document = int(np.searchsorted(job.data.train.spans[:, 0], order[step - 1]))
        lines[document] = "zqzq"
    place.write_text("\n".join(lines))
    return place


def prepared(data, settings, engine="reference"):
    settings = {"steps": 200, "schedule": "constant", "lr": 0.02} | settings
    return plan.prepare(plan.fresh(data, None, "microgpt", None, settings, 42, engine, None, None))


def skipped(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["skipped"] for row in rows if "skipped" in row}


OPTIONS = ("--steps", 200, "--set", "schedule=constant", "--lr", 0.02, "--set", "spike=5", "--samples", 0)


# ---------------------------------------------------------------- spikes


def test_a_spike_stops_the_run_before_it_does_harm(data, tmp_path):
    error = refused("train", data, *OPTIONS, "--out", "run", cwd=tmp_path)
    assert re.fullmatch(
        r"error: the (loss|gradient's norm), [\d.e+]+, is more than 5 times its mean of late, [\d.e-]+, "
        r"at step 70\. It was on document \d+ 'zqzq'\. run keeps the state after step 69: resume it with "
        r"bad_steps=skip, a larger spike or a smaller lr \(it was 0\.02\)\.",
        error,
    )
    lines = data.read_text().split("\n")
    assert lines[int(re.search(r"document (\d+)", error)[1]) - 1] == "zqzq"
    # What is kept is what the same steps give that meet no spike.
    before = tl.train(data, steps=69, lr=0.02, samples=0, set={"schedule": "constant"}, progress=False)
    assert np.array_equal(load_file(tmp_path / "run/state.safetensors")["params"], before.model.engine.params)
    told = succeeds("train", "--resume", "--out", "run", "--set", "bad_steps=skip", cwd=tmp_path).stderr
    assert re.search(r"^step 70 is skipped: .* It was on document \d+ 'zqzq'\.$", told, re.MULTILINE)
    assert "2 steps were skipped: metrics.jsonl says which." in told
    assert skipped(tmp_path / "run").keys() == set(OUTLIERS)


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_skipped_step_leaves_no_trace(engine, optimiser, data):
    """The same as if it had never been there; all engines skip the same."""
    settings = {"optimiser": optimiser, "lr": 0.02 if optimiser == "adam" else 0.5}
    watching = settings | {"bad_steps": "skip", "spike": 5.0, "steps": 160, "schedule": "constant"}
    run = tl.train(data, engine=engine, samples=0, set=watching, progress=False)
    job = prepared(data, settings, engine)
    losses = []
    while job.step < 160:
        if job.step + 1 in OUTLIERS:
            job.order.take(job.step, 1)
            job.step += 1
        else:
            losses.append(job.advance(1)[0].losses[0])
    assert np.array_equal(np.delete(run.losses, [step - 1 for step in OUTLIERS]), losses)
    for name, array in job.model.engine.state.items():
        if name != "means":
            assert np.array_equal(array, run.model.engine.state[name]), name


def test_threads_decide_the_same(data):
    settings = {"bad_steps": "skip", "spike": 2.0, "batch_size": 4, "schedule": "constant", "lr": 0.02}
    runs = [
        tl.train(data, steps=60, threads=threads, samples=0, set=settings, progress=False)
        for threads in (1, 2)
    ]
    counts = [run.model.engine.optimiser.means[0] for run in runs]
    assert 20 < counts[0] == counts[1] < 60
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=1e-4)


def test_going_on_after_skipped_steps_is_exact(data, tmp_path):
    options = ("train", data, "--set", "bad_steps=skip", "--set", "schedule=constant", "--set", "spike=5")
    rest = ("--lr", 0.02, "--samples", 0)
    succeeds(*options, *rest, "--steps", 200, "--out", "whole", cwd=tmp_path)
    for steps in (75, 150, 200):
        begin = ("train", "--resume") if steps > 75 else (*options, *rest)
        succeeds(*begin, "--steps", steps, "--out", "parts", cwd=tmp_path)
    assert skipped(tmp_path / "parts").keys() == set(OUTLIERS)
    for name in ("metrics.jsonl", "state.safetensors", "model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


@pytest.mark.parametrize("wrong", [{"spike": 1.0}, {"spike": -1}, {"bad_steps": "ignore"}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        tl.train(set=wrong, progress=False)


def test_runs_of_before_there_were_running_means_go_on(data, tmp_path):
    from safetensors.numpy import save_file

    tl.train(data, steps=5, samples=0, out=tmp_path, progress=False)
    state = load_file(tmp_path / "state.safetensors")
    del state["means"]
    for path in (tmp_path / "checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    save_file(state, tmp_path / "state.safetensors")
    assert tl.train(out=tmp_path, resume=True, steps=9, samples=0, progress=False).steps == 9


# ---------------------------------------------------------------- numbers that are none


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model of three layers whose keys overflow in the last one."""
    folder = tmp_path_factory.mktemp("model")
    settings = {"n_layer": 3, "n_embd": 16, "n_head": 2, "block_size": 16, "vocab_size": 27}
    model = tl.train(preset="transformerlm", steps=2, samples=0, set=settings, progress=False).model
    model.params["wqkv"][2] = np.copysign(np.float32(3e38), model.params["wqkv"][2])
    model.save(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_the_first_op_is_found(engine, poisoned, tmp_path):
    options = ("--engine", engine, "--dtype", "float32", "--steps", 5, "--out", "run")
    error = refused("train", "names", "--pretrained", poisoned, *options, cwd=tmp_path)
    assert re.search(r"the loss is nan at step 1\. It was on document [\d,]+ '\w+', .* and 1 more\. ", error)
    assert "First not finite: linear_forward, in a.qkv[2]. run keeps the state after step 0" in error


def test_positions_in_a_text(poisoned, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("anna bob " * 50)
    (tmp_path / "set.toml").write_text(
        "n_layer=1\nwarmup_steps=0\nschedule='constant'\nlr=9e5\nmin_lr=0\noptimiser='sgd'\ngrad_clip=0\n"
        "weight_decay=0\nval_fraction=0\neval_every=0\nblock_size=8\nbatch_size=5\norder='windows'\n"
    )
    options = ("--preset", "shakespeare-char", "--config", "set.toml")
    error = refused("train", text, *options, cwd=tmp_path)
    places = r"It was on tokens \d+ to \d+ of text\.txt, tokens .*, tokens .* and 2 more\. "
    # LayerNorm of numbers whose squares overflow is zero in the reference.
    assert re.search(
        places + r"(First not finite: \w+, in|The reference engine does this step without)", error
    )


def test_positions_in_several_files(tmp_path):
    """Each file's are counted from its own beginning."""
    for name, size in (("part_0.bin", 300), ("part_1.bin", 350)):
        write_shard(tmp_path / name, [1] * size)
    data = open_data(tmp_path / "part_*.bin", None, None, 27, 8, lines=False, val_fraction=0.0)
    told = described(data, "part_*.bin", np.array([[[292, 7], [340, 8]]]))
    assert told == "tokens 292 to 299 of part_0.bin, tokens 40 to 48 of part_1.bin"


@pytest.mark.parametrize("name", ["params", "m", "v"])
def test_an_update_that_overflows_is_undone(name, tmp_path, monkeypatch):
    """Also where the loss does not show it: with an infinite second moment a weight would never move again.
    The fifth step, of eight in one call, leaves such a number. The last good state is the one from which a
    step led to a finite state: that after the third."""
    training, engine = importlib.import_module("tapeless.train"), importlib.import_module("tapeless.engine")
    train, fifth = engine.Engine.train, 0.02 * (1 - 4 / 12)

    def spoilt(self, stream, spans, lrs, *more):
        done = train(self, stream, spans, lrs, *more)
        if np.isclose(lrs, fifth, rtol=1e-9).any():
            self.state[name][-1] = np.inf
        return done

    monkeypatch.setattr(engine.Engine, "train", spoilt)
    monkeypatch.setattr(training, "CHUNK_SECONDS", 1e9)
    options = {"steps": 12, "samples": 0, "engine": "reference", "dtype": "float32", "progress": False}
    with pytest.raises(NumericsError, match=r"the update overflows at step 5\. .* the state after step 3:"):
        tl.train("names", out=tmp_path / "run", lr=0.02, set={"schedule": "linear"}, **options)
    monkeypatch.undo()
    state = load_file(tmp_path / "run/state.safetensors")
    assert state["step"].tolist() == [3]
    assert all(np.isfinite(state[each]).all() for each in ("params", "m", "v"))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    # The rows and the state are those of a run that was never spoilt.
    monkeypatch.setattr(training, "CHUNK_SECONDS", 0.0)
    with pytest.raises(tl.Interrupted):
        tl.train("names", out=tmp_path / "three", lr=0.02, **options | {"progress": StopAt(3)})
    expected = load_file(tmp_path / "three/state.safetensors")
    assert expected["step"].tolist() == [3]
    assert all(np.array_equal(state[each], expected[each]) for each in ("params", "m", "v", "rng.words"))


def test_a_gradient_that_is_not_finite_is_bad_although_the_loss_is_not(monkeypatch):
    """Looked at before the update, which would spoil the model."""
    job = prepared("names", {"bad_steps": "skip"})
    before = {name: array.copy() for name, array in job.model.engine.state.items()}
    backward = job.model.engine.g.head
    run = job.model.engine.program("adamw")
    original = job.model.engine._programs["adamw"]
    assert run is original
    from tapeless.ops import reference

    linear_backward = reference.linear_backward

    def overflowing(dx, dw, db, dy, x, w, n):
        linear_backward(dx, dw, db, dy, x, w, n)
        if dw is backward:
            dw[0, 0] = np.inf

    monkeypatch.setattr(reference, "linear_backward", overflowing)
    job.model.engine._programs.clear()
    steps, _ = job.advance(3)
    assert steps.wrong == programs.BAD_NORM
    assert len(steps.losses) == job.step == 1
    assert np.isfinite(steps.losses).all()
    for name, array in job.model.engine.state.items():
        if name != "means":
            assert np.array_equal(array, before[name]), name
    assert "step 1 is skipped: the gradient's norm is inf." in job.guard.check(steps)


def test_skipping_for_ever_ends(poisoned, tmp_path):
    arguments = ("train", "names", "--pretrained", poisoned, "--set", "bad_steps=skip", "--steps", 500)
    done = tapeless(*arguments, "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "100 steps in a row were bad: the loss is nan at step 100. run keeps" in last
    assert len(re.findall("is skipped", done.stderr)) == 10
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 101))
    assert {(row["loss"], row["skipped"]) for row in rows} == {(None, "the loss is nan")}


def test_bad_steps_with_good_ones_between_do_not_end_a_run(monkeypatch):
    """The hundred that end it are in a row: here every other step is bad."""
    engine, guard = (importlib.import_module(f"tapeless.{name}") for name in ("engine", "guard"))
    train, wrong = engine.Engine.train, []
    monkeypatch.setattr(importlib.import_module("tapeless.train"), "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(guard, "first_not_finite", lambda *_: "")

    def spoilt(self, *given):
        before = self.params.copy()
        bad = len(wrong) % 2 == 1
        if bad:
            self.params[:] = np.nan
        done = train(self, *given)
        if bad:
            self.params[:] = before
        wrong.append(bool(done.wrong))
        return done

    monkeypatch.setattr(engine.Engine, "train", spoilt)
    settings = {"bad_steps": "skip", "n_embd": 8}
    tl.train("names", steps=210, samples=0, engine="reference", set=settings, progress=False)
    assert wrong == [False, True] * 105


def test_where_a_program_would_not_skip_it_is_not_exported(tmp_path):
    for setting in ("bad_steps=skip", "spike=5"):
        error = refused("export", "microgpt", "--set", setting, "--out", "c", cwd=tmp_path)
        assert "bad_steps=skip and spike have no C version yet" in error


def test_the_python_api_raises(poisoned):
    with pytest.raises(NumericsError, match=r"First not finite: linear_forward, in a\.qkv\[2\]"):
        tl.train("names", pretrained=poisoned, steps=3, progress=False)
