"""One command for every state of a run folder: what a supervisor starts again and again."""

from __future__ import annotations

import importlib
import json
import os
import re
import warnings

import numpy as np
import pytest

import tapeless as tl
from commands import contents, refused, succeeds
from shard_files import write_shard
from tapeless import plan
from test_runs import StopAt, killed_at_last, losses
from test_saves import CHANGES, checkpoints, forks, save_always, steps
from test_training import lasting

training = importlib.import_module("tapeless.train")
HELD = {"n_embd": 8, "val_fraction": 0.01, "eval_every": 3, "eval_batches": 1, "sample_every": 2}
OPTIONS = {"engine": "reference", "steps": 4, "samples": 1, "seed": 3, "set": HELD, "progress": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        save_always(monkeypatch)
        tl.train("names", out=folder, **OPTIONS)
    return folder


COMMAND = (
    "train", "names", "--preset", "microgpt", "--engine", "reference", "--steps", 6, "--samples", 1,
    "--set", "n_embd=8", "--seed", 5, "--resume", "--out", "run",
)  # fmt: skip


def test_the_same_command_begins_goes_on_and_ends(tmp_path):
    told = succeeds(*COMMAND, cwd=tmp_path)
    assert "Going on" not in told.stderr
    assert len(told.stdout.split()) == 1
    done = contents(tmp_path / "run")
    told = succeeds(*COMMAND, cwd=tmp_path)
    assert "run is complete: 6 steps of 6. Give more --steps to go on.\n" in told.stderr
    assert told.stdout == ""
    assert contents(tmp_path / "run") == done
    more = [12 if word == 6 else word for word in COMMAND]
    told = succeeds(*more, cwd=tmp_path)
    assert "Going on from step 6. Changed: steps 6 → 12." in told.stderr
    assert len(losses(tmp_path / "run")) == 12


def test_without_out_it_is_the_latest_run(tmp_path):
    command = COMMAND[:-2]
    assert "Saved in runs/microgpt-1." in succeeds(*command, cwd=tmp_path).stderr
    assert "runs/microgpt-1 is complete" in succeeds(*command, cwd=tmp_path).stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["microgpt-1"]


@pytest.mark.parametrize("state", ["no folder", "an empty folder", "others' files", "a killed process's"])
def test_where_no_run_was_saved_one_is_begun(state, tmp_path):
    run = tmp_path / "run"
    if state != "no folder":
        run.mkdir()
    if state == "others' files":
        (run / "notes.txt").write_text("mine")
    if state == "a killed process's":
        (run / ".new.part/checkpoints/.part").mkdir(parents=True)
        (run / ".new.part/metrics.jsonl").write_text('{"step": 1}\n')
        (run / ".lock").write_text("process 1 on nowhere")
    succeeds(*COMMAND, cwd=tmp_path)
    assert len(losses(run)) == 6
    assert [name for name in contents(run) if name.startswith(".")] == []
    assert (run / "notes.txt").exists() == (state == "others' files")


@pytest.mark.parametrize("given", [("--steps", 3), ("--set", "n_embd=32"), ("--seed", 1)])
def test_what_does_not_say_what_to_train_begins_nothing(given, tmp_path):
    """A mistyped folder is an error, as long as nothing to train is named."""
    assert "no run folder 'rnu'" in refused("train", "--resume", "--out", "rnu", *given, cwd=tmp_path)
    assert "there is no run runs/microgpt-N to resume" in refused("train", "--resume", *given, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_damaged_is_not_begun_anew(tmp_path):
    succeeds(*COMMAND, cwd=tmp_path)
    for path in checkpoints(tmp_path / "run"):
        (path / "config.json").write_text("{}")
    before = contents(tmp_path / "run")
    assert "damaged" in refused(*COMMAND, cwd=tmp_path)
    assert contents(tmp_path / "run") == before


def test_another_command_is_refused(tmp_path):
    succeeds(*COMMAND, cwd=tmp_path)
    before = contents(tmp_path / "run")
    for was, now, difference in (
        ("n_embd=8", "n_embd=16", "n_embd 8 is not 16"),
        (5, 7, "seed 5, not 7"),
        ("microgpt", "esp32gpt", "preset microgpt, not esp32gpt"),
    ):
        assert difference in refused(*[now if word == was else word for word in COMMAND], cwd=tmp_path)
    from_other = [*COMMAND, "--pretrained", "run"]
    assert "run was started from new weights, not from run." in refused(*from_other, cwd=tmp_path)
    assert contents(tmp_path / "run") == before


def test_a_run_from_a_checkpoint_goes_on_by_the_same_command(tmp_path):
    succeeds(*COMMAND, cwd=tmp_path)
    command = ("train", "names", "--pretrained", "run", "--engine", "reference", "--samples", 0)
    command += ("--resume", "--out", "tuned")
    succeeds(*command, "--steps", 3, cwd=tmp_path)
    assert "Going on from step 3." in succeeds(*command, "--steps", 5, cwd=tmp_path).stderr
    (tmp_path / "tuned").rename(tmp_path / "other")
    succeeds(*command, "--steps", 2, cwd=tmp_path)
    again = [word if word != "run" else "other" for word in command]
    error = refused(*again, "--steps", 9, cwd=tmp_path)
    assert re.search(r"tuned was started from .*run, not from other\.", error)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_name_on_the_hub_is_the_same_model(name, tmp_path):
    """By where huggingface_hub keeps its copies."""
    kept = pytest.importorskip("huggingface_hub.file_download").repo_folder_name(
        repo_id=name, repo_type="model"
    )
    copy = tmp_path / kept / "snapshots" / ("a" * 40)
    assert plan._came_from(str(copy), name)
    assert not plan._came_from(str(copy), f"{name}-medium")
    assert not plan._came_from(None, name)


@forks
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.oracle), 15])
def test_killed_at_any_change_the_same_call_ends_it(every, whole, tmp_path, monkeypatch):
    """From the first file on: at each moment there is nothing, or a model that loads; and the same call, made
    once more, ends with the same bytes."""
    found = []
    for calls in range(1, 10_000, every):
        folder = tmp_path / f"run-{calls}"
        child = os.fork()
        if not child:
            try:
                count = iter(range(calls))
                for name in CHANGES:
                    monkeypatch.setattr(os, name, killed_at_last(getattr(os, name), count))
                save_always(monkeypatch)
                tl.train("names", out=folder, resume=True, **OPTIONS)
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            visible = [name for name in contents(folder) if name[0] != "."] if folder.exists() else []
            moving = (folder / ".new").exists()
            if visible or moving:
                tl.load(folder, "reference")
            found.append("new" if moving else "run" if visible else "nothing")
            tl.train("names", out=folder, resume=True, **OPTIONS)
            assert lasting(folder) == lasting(whole)
        if not killed:
            break
    assert min(found.count(state) for state in ("nothing", "new", "run")) >= 10 // every
    assert found.count("run") >= 100 // every
    assert found == sorted(found, key=["nothing", "new", "run"].index)


# ---------------------------------------------------------------- steps by one, or many at once


def texts(folder):
    chance = np.random.default_rng(1)
    words = ["".join(chance.choice(list("abcde"), chance.integers(2, 9))) for _ in range(80)]
    (folder / "lines.txt").write_text("\n".join(words))
    (folder / "text.txt").write_text(" ".join(words))
    write_shard(folder / "part_0.bin", chance.integers(0, 27, 300).tolist())
    write_shard(folder / "part_1.bin", chance.integers(0, 27, 350).tolist())
    return folder


ORDERS = {
    "shuffle": ("lines.txt", {"preset": "microgpt"}),
    "draw": ("lines.txt", {"preset": "esp32gpt"}),
    "windows": ("text.txt", {"preset": "shakespeare-char", "set": {"n_layer": 1, "n_embd": 8, "n_head": 2}}),
    "llmc": ("part_*.bin", {"preset": "microgpt", "set": {"vocab_size": 27}}),
}


def many_steps(order, folder, more):
    """A run whose steps are spikes, or not, as they come."""
    data, about = ORDERS[order]
    settings = {"order": order, "lr": 0.05, "schedule": "constant", "warmup_steps": 0, "batch_size": 1}
    settings |= {"block_size": 8, "val_fraction": 0.0, "eval_every": 0, "samples": 2, "grad_clip": 0.0}
    settings |= about.get("set", {}) | more
    options = {"preset": about["preset"], "engine": "reference", "seed": 1}
    return texts(folder) / data, options | {"set": settings}


def at_once(monkeypatch, seconds):
    """1 step, then 8, 64 and so on; or, for 0, one each time."""
    monkeypatch.setattr(training, "CHUNK_SECONDS", seconds)


def skipped(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "skipped" in row]


@pytest.mark.parametrize("order", ORDERS)
def test_steps_are_skipped_alike_however_many_a_call_does(order, tmp_path, monkeypatch):
    """Also in the middle of a call: what is drawn for later steps is what they would have drawn."""
    data, options = many_steps(order, tmp_path, {"bad_steps": "skip", "spike": 1.3, "steps": 160})
    for name, seconds in (("one", 0.0), ("many", 1e9)):
        at_once(monkeypatch, seconds)
        tl.train(data, out=tmp_path / name, progress=False, **options)
    assert len(skipped(tmp_path / "one")) >= 3
    assert skipped(tmp_path / "one") == skipped(tmp_path / "many")
    assert lasting(tmp_path / "one") == lasting(tmp_path / "many")


@pytest.mark.parametrize("order", ORDERS)
def test_a_spike_stops_alike_however_many_steps_a_call_does(order, tmp_path, monkeypatch):
    """The state before it is kept, and the run that goes on from there is the one that skips it."""
    data, options = many_steps(order, tmp_path, {"bad_steps": "stop", "spike": 1.3, "steps": 160})
    said = []
    for name, seconds in (("one", 0.0), ("many", 1e9)):
        at_once(monkeypatch, seconds)
        with pytest.raises(tl.errors.NumericsError) as stopped:
            tl.train(data, out=tmp_path / name, progress=False, **options)
        said.append(str(stopped.value).replace(name, "run"))
    assert said[0] == said[1]
    assert int(re.search(r"at step (\d+)", said[0])[1]) > 10  # in the middle of a call of 64
    assert lasting(tmp_path / "one") == lasting(tmp_path / "many")
    tl.train(out=tmp_path / "many", resume=True, set={"bad_steps": "skip"}, progress=False)
    options["set"]["bad_steps"] = "skip"
    at_once(monkeypatch, 0.0)
    tl.train(data, out=tmp_path / "skips", progress=False, **options)
    assert losses(tmp_path / "many") == losses(tmp_path / "skips")


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_goes_on_exactly_from_within_many_steps(order, tmp_path, monkeypatch):
    """Interrupted after single steps, and undisturbed with up to 64 steps a call."""
    data, options = many_steps(order, tmp_path, {"steps": 90})
    at_once(monkeypatch, 1e9)
    tl.train(data, out=tmp_path / "whole", progress=False, **options)
    at_once(monkeypatch, 0.0)
    for stop in (4, 31):
        with pytest.raises(tl.Interrupted):
            tl.train(data, out=tmp_path / "parts", resume=True, progress=StopAt(stop), **options)
        assert steps(tmp_path / "parts")[-1] == stop
    at_once(monkeypatch, 1e9)
    tl.train(data, out=tmp_path / "parts", resume=True, progress=False, **options)
    assert lasting(tmp_path / "parts") == lasting(tmp_path / "whole")


# ---------------------------------------------------------------- skipped steps and the learning rate


def test_a_skipped_step_uses_up_its_learning_rate(tmp_path, monkeypatch):
    """By hand: with lr 0.02, min_lr 0 and 10 steps, linear, step i (from 1) has 0.02·(1 − (i − 1)/10),
    skipped or not. A skipped one changes nothing, and the next has the next rate."""
    engine = importlib.import_module("tapeless.engine")
    train, seen = engine.Engine.train, []
    # To say which op it was, the step is done again.
    monkeypatch.setattr(importlib.import_module("tapeless.guard"), "first_not_finite", lambda *_: "")

    def spoilt(self, stream, spans, lrs, *more):
        before = self.params.copy()
        if len(seen) == 4:
            self.params[:] = np.nan  # the loss of the fifth step is no number
        done = train(self, stream, spans, lrs, *more)
        if len(seen) == 4:
            self.params[:] = before
        seen.append((float(lrs[0]), done.wrong))
        return done

    monkeypatch.setattr(engine.Engine, "train", spoilt)
    at_once(monkeypatch, 0.0)
    settings = {"lr": 0.02, "schedule": "linear", "min_lr": 0.0, "warmup_steps": 0, "bad_steps": "skip"}
    tl.train("names", engine="reference", steps=10, samples=0, out=tmp_path, set=settings, progress=False)
    rates = [0.02, 0.018, 0.016, 0.014, 0.012, 0.01, 0.008, 0.006, 0.004, 0.002]
    assert [rate for rate, _ in seen] == pytest.approx(rates, rel=1e-12)
    assert [bool(wrong) for _, wrong in seen] == [i == 5 for i in range(1, 11)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-12)
    assert [row["step"] for row in rows if "skipped" in row] == [5]
    assert rows[4]["loss"] is None
