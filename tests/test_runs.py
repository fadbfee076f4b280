"""Run folders: what is saved, what may be replaced, and what survives interruptions and damage."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import pauses
import tapeless as tl
from commands import SMALL, contents, refused, signals, succeeds
from tapeless.errors import NumericsError, RunError

training = importlib.import_module("tapeless.train")  # the module; tapeless.train is the function

FILES = {
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "state.safetensors",
    "metrics.jsonl",
    "samples.txt",
    "checkpoints",
}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in metrics(folder) if row["step"]]  # of step 0 there is a validation at most


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A complete run of 20 steps."""
    folder = tmp_path_factory.mktemp("runs") / "original"
    succeeds("train", *SMALL, "--out", folder, cwd=folder.parent)
    return folder


@pytest.fixture
def run(original, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(original, tmp_path / "run")


@pytest.fixture
def old(run):
    """The same as older versions wrote it, with nothing to fall back to."""
    shutil.rmtree(run / "checkpoints")
    return run


# ---------------------------------------------------------------- what is saved


def test_what_a_run_folder_holds(original):
    assert {p.name for p in original.iterdir()} == FILES
    rows = metrics(original)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[0]["lr"] == 0.01
    assert rows[10]["lr"] == pytest.approx(0.005)
    assert set(load_file(original / "model.safetensors")) == {"wte", "wpe", "wqkv", "wo", "w1", "w2", "head"}
    config = json.loads((original / "config.json").read_text())
    assert config["tapeless"] == tl.__version__
    assert config["model"]["vocab_size"] == 27


def test_metrics_of_every_few_steps(tmp_path):
    tl.train(out=tmp_path, engine="reference", steps=10, samples=0, log_every=4, progress=False)
    assert [row["step"] for row in metrics(tmp_path)] == [4, 8]


# ---------------------------------------------------------------- what may be replaced


def test_a_run_is_not_replaced_by_accident(run):
    before = contents(run)
    error = refused("train", *SMALL, "--out", "run", cwd=run.parent)
    assert "already holds a run" in error
    assert "--resume" in error
    assert "--overwrite" in error
    assert contents(run) == before


def test_a_run_is_replaced_on_request(run):
    (run / "samples.txt").write_text("old")
    succeeds(
        "train", "--engine", "reference", "--steps", "3", "--samples", "0",
        "--out", "run", "--overwrite", cwd=run.parent,
    )  # fmt: skip
    assert len(metrics(run)) == 3
    assert not (run / "samples.txt").exists()


@pytest.mark.parametrize("arguments", [["--set", "n_embd=17"], ["nowhere.txt"], ["--steps", "0"]])
def test_a_mistake_beside_overwrite_costs_nothing(arguments, run):
    before = contents(run)
    refused("train", *arguments, "--out", "run", "--overwrite", cwd=run.parent)
    assert contents(run) == before


@pytest.mark.oracle
@pytest.mark.signals
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_killed_while_it_replaces_a_run(tmp_path, monkeypatch):
    """At each change it makes to the folder: what is there is the old run, or the new one, and no mixture."""
    options = {"engine": "reference", "progress": False}
    old, run = tmp_path / "old", tmp_path / "run"
    held = {"n_embd": 8, "val_fraction": 0.001, "sample_every": 1}
    tl.train(out=old, steps=2, samples=1, set=held, **options)
    before = contents(old)
    seen, calls = [], 0
    while not seen or seen[-1] != "done":
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(old, run)
        calls += 1
        child = os.fork()
        if not child:
            count = iter(range(calls))
            for module, name in ((os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (os, "link")):
                monkeypatch.setattr(module, name, killed_at_last(getattr(module, name), count))
            try:
                tl.train(out=run, steps=3, samples=0, overwrite=True, **options)
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        width = tl.load(run, "reference").config.n_embd
        there = {name: content for name, content in contents(run).items() if name[0] != "."}
        if width == 8:
            assert there == before
        else:
            assert {name.split("/")[0] for name in there} == FILES - {"samples.txt"}
            tl.train(out=run, resume=True, steps=4, samples=0, **options)
            assert len(metrics(run)) == 4
        seen.append("done" if not killed else "old" if width == 8 else "new")
    assert min(seen.count("old"), seen.count("new")) > 10
    assert seen == sorted(seen, key=["old", "new", "done"].index)


def killed_at_last(function, count):
    def instead(*arguments, **options):
        if next(count, None) is None:
            os._exit(9)
        return function(*arguments, **options)

    return instead


def test_overwrite_spares_what_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    assert "no run's" in refused("train", *SMALL, "--out", ".", "--overwrite", cwd=tmp_path)
    assert contents(tmp_path) == {"config.json": b'{"mine": 1}'}


@pytest.mark.parametrize("out", ["file", "file/below/it"])
def test_a_file_in_place_of_the_folder(out, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "is a file; expected a folder" in refused("train", *SMALL, "--out", out, cwd=tmp_path)
    assert contents(tmp_path) == {"file": b"precious"}


# ---------------------------------------------------------------- going on


class StopAt:
    """Progress that presses Ctrl-C once training has come to a step."""

    def __init__(self, step):
        self.step = step

    def start(self, lines): ...
    def compiling(self): ...
    def finish(self): ...

    def begin(self, step, steps):
        self.now = step

    def update(self, losses):
        self.now += len(losses)
        if self.now >= self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("preset", ["microgpt", "esp32gpt"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(preset, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHUNK_SECONDS", 0.0)  # a step a chunk after the first
    options = {
        "preset": preset, "steps": 60, "batch_size": 2, "engine": "reference", "dtype": dtype, "samples": 3,
    }  # fmt: skip
    whole = tl.train(out=tmp_path / "whole", progress=False, **options)
    folder = tmp_path / "parts"
    with pytest.raises(tl.Interrupted) as first:
        tl.train(out=folder, progress=StopAt(17), **options)
    assert first.value.run.steps == len(first.value.run.losses) == 17
    with pytest.raises(tl.Interrupted) as second:
        tl.train(out=folder, resume=True, progress=StopAt(29))
    assert second.value.run.steps == 29
    last = tl.train(out=folder, resume=True, samples=3, progress=False)
    assert last.steps == 60
    parts = np.concatenate([first.value.run.losses, second.value.run.losses, last.losses])
    assert np.array_equal(parts, whole.losses)
    assert last.samples == whole.samples
    for name in FILES:
        if name not in ("config.json", "checkpoints"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_ctrl_c_in_the_last_chunk_changes_nothing(tmp_path):
    run = tl.train(engine="reference", steps=8, samples=2, progress=StopAt(8))
    assert run.steps == 8
    assert len(run.samples) == 2


def interrupt(*arguments, cwd, number=signal.SIGINT, code=130):
    """Start a training, send it a signal when some chunks are done, and return the last line it printed."""
    with pauses.start("train", *arguments, at=["tapeless.job:Job.advance"], cwd=cwd) as process:
        process.reached("Job.advance", 4)
        process.send_signal(number)
        found, out, told = process.end()
    assert (found, out) == (code, ""), told
    assert "Traceback" not in told
    return told.splitlines()[-1]


@signals
def test_ctrl_c_twice_leaves_out_a_long_validation(tmp_path):
    held = ("--set", "val_fraction=0.99", "--eval-every", "5", "--batch-size", "1")
    arguments = ("train", "--engine", "reference", *held, "--out", "run")
    with pauses.start(*arguments, at=["tapeless.model:GPT.loss"], cwd=tmp_path) as process:
        assert "microgpt" in process.stderr.readline()
        process.reached("GPT.loss", 3)  # of thousands of batches
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "Stopping when this is done. Ctrl-C again leaves it out.\n"
        process.reached("GPT.loss", 2)  # the first Ctrl-C did not end the validation
        process.send_signal(signal.SIGINT)
        code, out, told = process.end()
    assert (code, out) == (130, "")
    assert told.splitlines() == ["Interrupted."]
    assert not (tmp_path / "run").exists()


@signals
def test_ctrl_c_once_lets_a_validation_finish(tmp_path):
    held = ("--set", "val_fraction=0.01", "--eval-every", "1", "--batch-size", "16")
    arguments = ("train", "--engine", "reference", *held, "--out", "run")
    points = ["tapeless.model:GPT.loss", "tapeless.job:Job.judge", "tapeless.job:Job.save"]
    with pauses.start(*arguments, at=points, cwd=tmp_path) as process:
        while process.next().name != "Job.save":  # what comes before is the validation before the first step
            pass
        process.reached("GPT.loss", 2)
        process.send_signal(signal.SIGINT)
        while (stop := process.next()).name == "GPT.loss":
            pass
        assert stop.name == "Job.judge"
        code, _, told = process.end()
    assert code == 130
    assert "Stopped after step 1; saved." in told
    last = metrics(tmp_path / "run")[-1]
    assert last["step"] == 1
    assert last["val_loss"] > 0


@signals
def test_generating_shows_texts_as_they_come_and_hears_ctrl_c(run):
    options = ("-n", "100000", "--max-tokens", "16")
    shown = run.parent / "texts.txt"
    with open(shown, "w") as file:
        point = "tapeless.engine:Engine.generate"
        with pauses.start("sample", "run", *options, at=[point], cwd=run.parent, stdout=file) as process:
            process.reached("Engine.generate", 2)
            first = shown.read_text()
            process.send_signal(signal.SIGINT)
            code, _, told = process.end()
    assert code == 130
    assert told.splitlines()[-1] == "Interrupted."
    assert shown.read_text() == first
    assert 0 < len(first.splitlines()) < 100_000


def test_a_large_model_generates_few_texts_at_once(monkeypatch):
    """Ctrl-C is heard between two calls of the engine: none computes more than 10¹⁰ parameters times tokens,
    a few seconds of work."""
    config = tl.presets["microgpt"].model.replace(n_embd=256, n_layer=6, block_size=512, vocab_size=40)
    model, calls = tl.GPT(config, 0, "reference"), []

    def generate(context, n, max_tokens, *_, **options):
        calls.append(n)
        return [np.zeros(max_tokens, np.int32)] * n, n * max_tokens

    monkeypatch.setattr(model.engine, "generate", generate)
    assert len(model.generate(n=1000, max_tokens=400)) == sum(calls) == 1000
    assert max(calls) * 400 * model.n_params <= 1e10
    assert max(calls) * 400 * model.n_params > 5e9  # nor less than it can


@signals
@pytest.mark.parametrize("preset", ["microgpt", "esp32gpt"])
def test_ctrl_c_saves_and_says_how_to_go_on(preset, tmp_path):
    arguments = ["--preset", preset, "--steps", "100000000"]
    parts, whole = tmp_path / "in parts", tmp_path / "whole"
    said = interrupt(*arguments, "--out", "in parts", cwd=tmp_path)
    found = re.fullmatch(
        r"Stopped after step ([\d,]+); saved\. Go on with: tapeless train --resume --out 'in parts'", said
    )
    assert found, said
    first = int(found[1].replace(",", ""))
    assert len(losses(parts)) == first > 0
    interrupt("--resume", "--out", "in parts", cwd=tmp_path)
    interrupt(*arguments, "--out", "whole", cwd=tmp_path)
    a, b = losses(parts), losses(whole)
    both = min(len(a), len(b))
    assert len(a) > first
    assert a[:both] == b[:both]


KILLED = """
import importlib
t = importlib.import_module("tapeless.train")
t.SAVE_SECONDS, t.SAVE_SHARE, t.CHUNK_SECONDS = 0.0, 1e9, 0.0  # each step is saved
t.train(out="run", engine="reference", dtype="float32", steps=60, progress=False, samples=0)
"""


@signals
def test_a_killed_process_leaves_a_run_that_goes_on(tmp_path):
    """Killed as it begins a step, and between the changes of files that make a save."""
    whole = tl.train(engine="reference", dtype="float32", steps=60, samples=0, progress=False).losses
    folder = tmp_path / "run"
    code = KILLED
    points = {"tapeless.job:Job.advance": 3, "os:replace": 12, "os:link": 9, "os:fsync": 20}
    for point, times in points.items():
        with pauses.start(at=[point], cwd=tmp_path, code=code) as process:
            process.reached(point.split(":")[1], times)
            process.kill()
        visible = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
        assert visible == FILES - {"samples.txt"}
        assert tl.load(folder, "reference").n_params == 4192
        code = KILLED.replace("samples=0", "samples=0, resume=True")
    last = tl.train(out=folder, resume=True, samples=0, progress=False)
    assert 0 < len(last.losses) < 60
    assert np.array_equal(losses(folder), whole)
    assert last.steps == 60
    assert {p.name for p in folder.iterdir()} == FILES - {"samples.txt"}


def test_a_complete_run_says_so(run):
    before = contents(run)
    told = succeeds("train", "--resume", "--out", "run", cwd=run.parent)
    assert told.stdout == ""
    assert "run is complete: 20 steps of 20. Give more --steps to go on.\n" in told.stderr
    assert contents(run) == before
    succeeds("train", "--resume", "--out", "run", "--steps", "25", cwd=run.parent)
    assert len(metrics(run)) == 25


def test_only_the_same_run_is_resumed(run):
    more = ("train", "--resume", "--out", "run", "--steps", "30")
    before = contents(run)
    (run.parent / "other.txt").write_text("abcdefghijklmnopqrstuvwxyz\n")
    assert "n_head 4 is not 2" in refused(*more, "--set", "n_head=2", cwd=run.parent)
    assert "preset microgpt, not esp32gpt" in refused(*more, "--preset", "esp32gpt", cwd=run.parent)
    assert "seed 42, not 7" in refused(*more, "--seed", "7", cwd=run.parent)
    assert "not the data" in refused(*more, "other.txt", cwd=run.parent)
    assert contents(run) == before


def test_resume_finds_the_latest_run(tmp_path):
    for _ in range(2):
        succeeds("train", *SMALL, cwd=tmp_path)
    told = succeeds("train", "--resume", "--steps", "22", cwd=tmp_path).stderr
    assert "Going on from step 20." in told
    assert "Saved in runs/microgpt-2." in told


# ---------------------------------------------------------------- damage


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGE = {
    "no config": lambda f: (f / "config.json").unlink(),
    "config truncated": lambda f: truncate(f / "config.json"),
    "config garbage": lambda f: (f / "config.json").write_bytes(b"\x80\x00\xff"),
    "config a list": lambda f: (f / "config.json").write_text("[1]"),
    "config without model": lambda f: edit(f / "config.json", lambda c: c.pop("model")),
    "model a list": lambda f: edit(f / "config.json", lambda c: c.update(model=[])),
    "width text": lambda f: edit(f / "config.json", lambda c: c["model"].update(n_embd="16")),
    "width absurd": lambda f: edit(f / "config.json", lambda c: c["model"].update(n_embd=2**22)),
    "no vocabulary": lambda f: edit(f / "config.json", lambda c: c["model"].update(vocab_size=None)),
    "unknown field": lambda f: edit(f / "config.json", lambda c: c["model"].update(depth=3)),
}
MODEL_DAMAGE = DAMAGE | {
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer truncated": lambda f: truncate(f / "tokenizer.json"),
    "tokenizer a number": lambda f: (f / "tokenizer.json").write_text("3"),
    "tokenizer of another kind": lambda f: edit(f / "tokenizer.json", lambda t: t.update(type="bpe")),
    "characters numbers": lambda f: edit(f / "tokenizer.json", lambda t: t.update(chars=[1, 2])),
    "bos absurd": lambda f: edit(f / "tokenizer.json", lambda t: t.update(bos=99)),
    "characters missing": lambda f: edit(f / "tokenizer.json", lambda t: t.update(chars="abc", bos=3)),
    "no model": lambda f: (f / "model.safetensors").unlink(),
    "model truncated": lambda f: truncate(f / "model.safetensors"),
    "model empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "model garbage": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 999),
    "tensor missing": lambda f: edit_tensors(f / "model.safetensors", lambda t: t.pop("wo")),
    "tensor too many": lambda f: edit_tensors(f / "model.safetensors", lambda t: t.update(b=np.ones(1))),
    "tensor of another shape": lambda f: edit_tensors(
        f / "model.safetensors", lambda t: t.update(wpe=np.ones((8, 16), np.float32))
    ),
    "tensor of whole numbers": lambda f: edit_tensors(
        f / "model.safetensors", lambda t: t.update(wpe=np.ones((16, 16), np.int32))
    ),
}
STATE_DAMAGE = DAMAGE | {
    "no state": lambda f: (f / "state.safetensors").unlink(),
    "state truncated": lambda f: truncate(f / "state.safetensors"),
    "state garbage": lambda f: (f / "state.safetensors").write_bytes(b"{}"),
    "step missing": lambda f: edit_tensors(f / "state.safetensors", lambda t: t.pop("step")),
    "step negative": lambda f: edit_tensors(f / "state.safetensors", lambda t: t["step"].fill(-1)),
    "moments too short": lambda f: edit_tensors(f / "state.safetensors", lambda t: t.update(m=np.zeros(5))),
    "state not finite": lambda f: edit_tensors(f / "state.safetensors", lambda t: t["v"].fill(np.nan)),
    "random state of another generator": lambda f: edit_tensors(
        f / "state.safetensors", lambda t: t.update({"rng.words": np.ones(1, np.uint32)})
    ),
    "random state garbage": lambda f: edit_tensors(
        f / "state.safetensors", lambda t: t["rng.words"].fill(2**32 - 1)
    ),
    "metrics garbage": lambda f: (f / "metrics.jsonl").write_bytes(b"\x00\xff\n1\n"),
    "no training": lambda f: edit(f / "config.json", lambda c: c.pop("training")),
    "training a text": lambda f: edit(f / "config.json", lambda c: c.update(training="x")),
    "steps a text": lambda f: edit(f / "config.json", lambda c: c["training"].update(steps="x")),
    "data a number": lambda f: edit(f / "config.json", lambda c: c.update(data=5)),
    "data gone": lambda f: edit(f / "config.json", lambda c: c.update(data="/nowhere/data.txt")),
    "seed a text": lambda f: edit(f / "config.json", lambda c: c.update(seed="x")),
    "engine a list": lambda f: edit(f / "config.json", lambda c: c.update(engine=[])),
    "no digest": lambda f: edit(f / "config.json", lambda c: c.update(digest=None)),
    "tokenizer unknown": lambda f: edit(f / "config.json", lambda c: c.update(tokenizer="words")),
}


@pytest.mark.parametrize("damage", MODEL_DAMAGE)
def test_a_damaged_model_is_refused(damage, old):
    MODEL_DAMAGE[damage](old)
    if damage == "no tokenizer":  # a model may be saved without; it just cannot speak
        assert tl.load(old, "reference").tokenizer is None
        return
    with pytest.raises(tl.TapelessError) as error:
        tl.load(old, "reference")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", STATE_DAMAGE)
def test_a_damaged_run_is_not_resumed_and_not_harmed(damage, old):
    STATE_DAMAGE[damage](old)
    before = contents(old)
    with pytest.raises(tl.TapelessError) as error:
        tl.train(out=old, resume=True, steps=25, progress=False)
    assert "\n" not in str(error.value)
    assert contents(old) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no config", "config.json"),
        ("width text", "n_embd must be a whole number"),
        ("characters missing", "not of the same run"),
        ("model truncated", "damaged or truncated"),
        ("tensor of another shape", "wpe is [8, 16], but config.json says [16, 16]"),
    ],
)
def test_sampling_from_a_damaged_run(damage, words, old):
    MODEL_DAMAGE[damage](old)
    assert words in refused("sample", "run", "--engine", "reference", cwd=old.parent)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("config truncated", "config.json is damaged"),
        ("no state", "state.safetensors"),
        ("state truncated", "damaged or truncated"),
        ("moments too short", "m is [5]"),
        ("data gone", "/nowhere/data.txt"),
    ],
)
def test_resuming_a_damaged_run(damage, words, old):
    STATE_DAMAGE[damage](old)
    assert words in refused("train", "--resume", "--out", "run", "--steps", "25", cwd=old.parent)


def test_resuming_mends_what_it_does_not_need(old, original):
    (old / "tokenizer.json").unlink()
    truncate(old / "model.safetensors")
    truncate(old / "metrics.jsonl")  # a process killed in the middle of a line
    succeeds("train", "--resume", "--out", "run", "--steps", "21", cwd=old.parent)
    assert tl.load(old, "reference").tokenizer == tl.load(original, "reference").tokenizer
    assert [row["step"] for row in metrics(old)] == [*range(1, 20), 21]


def test_weights_that_are_not_finite_are_refused(old):
    edit_tensors(old / "model.safetensors", lambda t: t["head"].fill(np.nan))
    error = refused("sample", "run", "-n", "1", "--engine", "reference", cwd=old.parent)
    assert "run: head holds NaN; expected finite weights" in error


# ---------------------------------------------------------------- numbers that overflow


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    arguments = ["--preset", "esp32gpt", "--engine", "reference", "--dtype", "float32", "--out", "run"]
    succeeds("train", *arguments, "--steps", "30", "--samples", "0", cwd=tmp_path)
    before = losses(tmp_path / "run")
    error = refused("train", "--resume", "--out", "run", "--steps", "900", "--lr", "9e5", cwd=tmp_path)
    kept = int(re.search(r"keeps the state after step (\d+): resume it with a smaller lr", error)[1])
    assert re.search(r"(the loss is|the update overflows).* at step \d+\.", error)
    assert kept >= 30
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, kept + 1))
    assert losses(tmp_path / "run")[:30] == before
    state = load_file(tmp_path / "run/state.safetensors")
    assert all(np.isfinite(state[name]).all() for name in ("params", "m", "v"))
    model = tl.load(tmp_path / "run", "reference")
    assert np.isfinite(model.loss_and_grad([0, 1, 2], [1, 2, 0]))
    succeeds("train", "--resume", "--out", "run", "--steps", "60", "--lr", "0.001", cwd=tmp_path)
    assert len(losses(tmp_path / "run")) == 60
    assert np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.parametrize("chunk_seconds", [0.0, 0.001, 10.0])
def test_the_last_good_state_does_not_depend_on_chunks(chunk_seconds, tmp_path, monkeypatch):
    options = {"preset": "esp32gpt", "engine": "reference", "dtype": "float32", "progress": False}
    tl.train(out=tmp_path, steps=30, samples=0, **options)
    monkeypatch.setattr(training, "CHUNK_SECONDS", chunk_seconds)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    with pytest.raises(NumericsError) as error:
        tl.train(out=tmp_path, resume=True, steps=900, lr=9e5, progress=False)
    step = int(load_file(tmp_path / "state.safetensors")["step"][0])
    assert f"after step {step}:" in str(error.value)
    assert step == len(metrics(tmp_path)) == 30


def test_the_first_step_may_be_the_one(tmp_path):
    with pytest.raises(NumericsError, match=r"at step 2\..*after step 0:"):
        tl.train(out=tmp_path, preset="esp32gpt", engine="reference", dtype="float32", lr=9e5, progress=False)
    assert tl.train(out=tmp_path, resume=True, steps=5, lr=0.01, samples=0, progress=False).steps == 5


# ---------------------------------------------------------------- disks


def test_a_full_disk_leaves_the_files_as_they_were(run, monkeypatch):
    before = contents(run)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    model = tl.load(run, "reference")
    with pytest.raises(RunError, match=r"cannot write .*config.json: No space left on device"):
        model.save(run)
    with pytest.raises(RunError, match="No space left"):
        tl.train(out=run, resume=True, steps=30, progress=False)
    assert contents(run) == before  # and nothing was left beside them


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
def test_a_file_that_cannot_be_written_whole(run):
    import resource

    before = contents(run)
    limit = len(before["model.safetensors"]) + 1000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    error = refused(
        "train", "--resume", "--out", "run", "--steps", "30", cwd=run.parent, preexec_fn=limited
    )  # fmt: skip
    assert "cannot write run/state.safetensors" in error
    assert error.endswith(" run keeps the state after step 20.")
    assert contents(run) == before
    error = refused("train", *SMALL, "--out", "run", "--overwrite", cwd=run.parent, preexec_fn=limited)
    assert "state.safetensors: File too large" in error
    assert contents(run) == before


def test_saving_over_a_file(run):
    model = tl.load(run, "reference")
    with pytest.raises(RunError, match="cannot write"):
        model.save(run / "samples.txt")
