"""Training: windows, gradient accumulation, validation, texts on the way, and starting from a checkpoint."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import signal
import struct
from pydoc_data.topics import topics

import numpy as np
import pytest
from safetensors.numpy import load_file

import tapeless as tl
from commands import contents, refused, succeeds
from helpers import random_model
from shard_files import write_shard
from tapeless.data.documents import read_documents
from tapeless.data.sources import hold_out
from tapeless.data.tokenizers import CharTokenizer
from tapeless.errors import DataError, NumericsError, RunError
from tapeless.meter import Meter, Speed
from test_bpe import gpt2, gpt2_files

GPT2 = tl.presets["gpt2"].model.replace(vocab_size=27, block_size=32, n_layer=2, n_head=2, n_embd=16)
LETTERS = CharTokenizer("\nabcdefghijklmnopqrstuvwxyz", bos=None)
QUIET = ("--engine", "reference", "--samples", "0")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder) if row["step"]]


@pytest.fixture(scope="module")
def text():
    return "\n".join(read_documents("names"))


@pytest.fixture(scope="module")
def here(tmp_path_factory, text):
    """A folder with the names as one text, as token shards, and a small GPT-2."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "text.txt").write_text(text)
    tokens = LETTERS.encode(text)
    (folder / "data").mkdir()
    write_shard(folder / "data/names_train.bin", tokens[:4000])
    write_shard(folder / "data/names_val.bin", tokens[4000:4400])
    model = random_model(GPT2, "cpu")
    model.engine.params[:] *= 0.3
    model.tokenizer = LETTERS
    model.save(folder / "model")
    succeeds("convert", "model", "model.bin", cwd=folder)
    return folder


# ---------------------------------------------------------------- llm.c's session


def llmc_session(model, train, val, B, T, steps, eval_every):
    """llm.c's CPU program, transcribed from its rule: windows read in sequence, back to the beginning
    where a batch and one token more are not left; AdamW with its constants; the mean loss of the first
    20 batches of validation. Losses of the steps, and by step those of validation."""
    p, at = model.engine.params, 0
    m, v = np.zeros_like(p), np.zeros_like(p)
    lr, beta1, beta2, eps = 1e-4, 0.9, 0.999, 1e-8
    starts = np.arange(B + 1) * T
    found, held = [], {}
    for step in range(steps + 1):
        if step % eval_every == 0:
            each = []
            for k in range(min(20, (len(val) - 1) // (B * T))):
                here = val[k * B * T : (k + 1) * B * T + 1]
                each.append(model.loss(here[:-1], here[1:], starts))
            held[step] = np.mean(each)
        if step == steps:
            return found, held
        if at + B * T + 1 > len(train):
            at = 0
        batch = train[at : at + B * T + 1]
        at += B * T
        found.append(model.loss_and_grad(batch[:-1], batch[1:], starts))
        g = model.engine.grads
        m[:] = beta1 * m + (1 - beta1) * g
        v[:] = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        p -= lr * (m_hat / (np.sqrt(v_hat) + eps))
    raise AssertionError


def test_fine_tuning_takes_llmcs_steps(here, text, tmp_path):
    """With nothing but what its session says; 4,000 tokens are 31 batches, so 34 steps start over."""
    told = succeeds(
        "train", here / "data", "--pretrained", here / "model.bin", "--batch-size", "4", "--block-size", "32",
        "--steps", "34", "--eval-every", "10", "--sample-every", "20", "--engine", "reference",
        "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    tokens = np.array(LETTERS.encode(text))
    model = tl.load(here / "model", "reference")
    right, held = llmc_session(model, tokens[:4000], tokens[4000:4385], 4, 32, 34, 10)
    np.testing.assert_allclose(losses(tmp_path / "run"), right, rtol=1e-9)
    assert right[0] - right[31] > 0.01  # of the same windows
    mine = {row["step"]: row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row}
    assert list(mine) == [0, 10, 20, 30, 34]
    assert rows(tmp_path / "run")[0].keys() == {"step", "val_loss"}
    np.testing.assert_allclose(mine[10], held[10], rtol=3e-2)  # of it, this leaves the last 15 tokens out
    shown = re.findall(r"^step (\d+)/34: validation loss (\d\.\d{4})", told.stderr, re.MULTILINE)
    assert [int(step) for step, _ in shown] == [0, 10, 20, 30, 34]
    assert re.search(r"^step 20/34 generates:$", told.stderr, re.MULTILINE)


def test_validation_on_the_first_batches_is_llmcs(here, text):
    """Where validation ends with a whole batch, its losses are llm.c's to the last digit."""
    run = tl.train(
        here / "data", pretrained=here / "model", batch_size=2, steps=4, samples=0, engine="reference",
        progress=False, set={"block_size": 16, "eval_every": 2, "eval_batches": 3},
    )  # fmt: skip
    tokens = np.array(LETTERS.encode(text))
    _, held = llmc_session(
        tl.load(here / "model", "reference"), tokens[:4000], tokens[4000:4097], 2, 16, 4, 2
    )
    assert list(run.val_losses) == [0, 2, 4]
    np.testing.assert_allclose(list(run.val_losses.values()), [held[0], held[2], held[4]], rtol=1e-9)
    steps, values = run.val_curve
    assert steps.tolist() == [0, 2, 4]
    assert values.tolist() == [run.val_losses[step] for step in (0, 2, 4)]


def test_the_compiled_engine_takes_the_same_steps(here):
    options = {"batch_size": 4, "steps": 20, "samples": 0, "progress": False, "set": {"block_size": 32}}
    runs = [
        tl.train(here / "data", pretrained=here / "model", engine=engine, **options)
        for engine in ("cpu", "reference")
    ]
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=1e-5)


# ---------------------------------------------------------------- steps in several batches


@pytest.mark.parametrize("order", ["sequence", "windows"])
def test_several_batches_are_one_large_step(order, here):
    """32 windows a step, at once or 4 at a time: the same windows, so the same gradient."""
    options = {"pretrained": here / "model", "steps": 3, "engine": "reference", "progress": False}
    common = {"order": order, "lr": 1e-2, "grad_clip": 0.5, "samples": 0}
    parts = {"batch_size": 4, "total_batch_tokens": 32 * 32}
    whole = tl.train(here / "data", set=common | {"batch_size": 32}, **options)
    some = tl.train(here / "data", set=common | parts, **options)
    np.testing.assert_allclose(some.losses, whole.losses, rtol=1e-12)
    np.testing.assert_allclose(some.model.engine.params, whole.model.engine.params, atol=1e-12)
    assert whole.losses[0] - whole.losses[-1] > 0.1


@pytest.mark.parametrize("streams", [1, pytest.param(2, marks=pytest.mark.oracle)])
def test_a_step_is_the_mean_over_all_its_tokens(streams):
    """Of documents of different lengths as well: the engine takes any batches."""
    config = GPT2 if streams == 1 else GPT2.replace(residual="mhc", n_streams=streams)
    stream = np.random.default_rng(0).integers(0, 27, 60).astype(np.int32)
    spans = np.array([[[[0, 12], [20, 3]], [[30, 1], [40, 16]]]])  # one step of two batches of two
    places = np.concatenate([np.arange(first, first + n) for first, n in spans.reshape(-1, 2)])
    starts = np.append(0, np.cumsum(spans[..., 1]))
    model = random_model(config)
    before = model.engine.params.copy()
    model.engine.optimiser.constants[:] = 0.0
    [loss] = model.engine.train(stream, spans, np.array([0.1]), "sgd").losses
    moved = before - model.engine.params
    model.engine.params[:] = before
    assert loss == pytest.approx(model.loss_and_grad(stream[places], stream[places + 1], starts), rel=1e-12)
    np.testing.assert_allclose(moved, 0.1 * model.engine.grads, atol=1e-12)
    # The compiled engine does the same.
    results = []
    for engine in ("reference", "cpu"):
        model = random_model(config, engine)
        model.engine.optimiser.constants[:] = 0.9, 0.99, 1e-3, 0.0, 0.0, 0.5
        losses = model.engine.train(stream, np.concatenate([spans] * 3), np.full(3, 0.01)).losses
        results.append((losses, model.engine.params))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)


def test_accumulating_takes_no_more_memory(here):
    options = {"pretrained": here / "model", "steps": 1, "samples": 0, "progress": False}
    small = tl.train(here / "data", set={"batch_size": 2}, **options).model.engine
    large = tl.train(here / "data", set={"batch_size": 2, "total_batch_tokens": 640}, **options).model.engine
    assert small.a.qkv.shape == large.a.qkv.shape


def test_the_step_is_told(here, tmp_path):
    told = succeeds(
        "train", here / "data", "--pretrained", here / "model", "--batch-size", "2", "--block-size", "16",
        "--total-batch-tokens", "128", "--steps", "1", *QUIET, cwd=tmp_path,
    ).stderr  # fmt: skip
    assert "1 steps of 4 × 2 windows of 16 tokens" in told
    error = refused(
        "train", here / "data", "--pretrained", here / "model", "--batch-size", "3", "--block-size", "16",
        "--total-batch-tokens", "128", cwd=tmp_path,
    )  # fmt: skip
    assert "multiple of batch_size × block_size = 3 × 16 = 48 tokens, not 128" in error


# ---------------------------------------------------------------- what is held out


def test_the_end_of_a_text_is_held_out():
    text = "".join(chr(i) for i in range(256)) * 3 + "xyz"
    train, val = hold_out([text], 0.1)
    assert train[0] + val[0] == text
    assert len(train[0]) == int(len(text) * 0.9)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_documents_here_and_there_are_held_out(fraction):
    documents = [str(i) for i in range(1000)]
    train, val = hold_out(documents, fraction)
    assert sorted([*train, *val], key=int) == documents
    assert train == sorted(train, key=int)
    assert abs(len(val) - 1000 * fraction) <= 1
    places = np.array(val, int)
    assert np.diff(places).max() <= math.ceil(1 / fraction)  # everywhere, as densely


def test_validation_of_a_text(tmp_path, text):
    """Of shakespeare-char: the first 90 % to train on, the loss of the rest as `eval` finds it."""
    (tmp_path / "text.txt").write_text(text[:6000])
    settings = ("--set", "n_embd=16", "--set", "n_layer=1", "--set", "n_head=2", "--set", "eval_every=4")
    told = succeeds(
        "train", "text.txt", "--preset", "shakespeare-char", "--steps", "10", "--batch-size", "2", *settings,
        *QUIET, "--out", "run", cwd=tmp_path,
    ).stderr  # fmt: skip
    assert "(5,400 tokens and 600 to validate on, vocabulary 27)" in told
    found = {row["step"]: row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row}
    assert list(found) == [0, 4, 8, 10]
    model = tl.load(tmp_path / "run", "reference")
    held = LETTERS.encode(text[5400:6000])
    assert model.tokenizer.chars == LETTERS.chars
    # Weights are kept in float32.
    assert found[10] == pytest.approx(tl.evaluate(model, held).loss, rel=1e-6)
    shown = succeeds("eval", "run", "--engine", "reference", "--json", cwd=tmp_path).stdout
    assert json.loads(shown)["loss"] == pytest.approx(found[10], rel=1e-6)
    # The best is kept by itself, with its own tokenizer.
    best = min(found, key=found.get)
    about = json.loads((tmp_path / "run/best/config.json").read_text())
    assert (about["step"], about["val_loss"]) == (best, found[best])
    kept = tl.load(tmp_path / "run/best", "reference")
    assert tl.evaluate(kept, held).loss == pytest.approx(found[best], rel=1e-6)
    succeeds("sample", "run/best", "-n", "1", "--max-tokens", "5", "--engine", "reference", cwd=tmp_path)


def test_only_the_best_is_kept(tmp_path):
    """A rate that is far too high: what follows the first evaluation is worse."""
    told = succeeds(
        "train", *QUIET, "--steps", "12", "--set", "val_fraction=0.01", "--eval-every", "2", "--lr", "3",
        "--set", "warmup_steps=100", "--out", "run", cwd=tmp_path,
    ).stderr  # fmt: skip
    found = {row["step"]: row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row}
    best = min(found, key=found.get)
    assert best < 12
    assert json.loads((tmp_path / "run/best/config.json").read_text())["step"] == best
    assert f"The best model, of step {best}, is in run/best." in told
    assert np.abs(
        tl.load(tmp_path / "run/best").engine.params - tl.load(tmp_path / "run").engine.params
    ).max() > 1e-3  # fmt: skip


def test_of_equal_losses_the_first_is_the_best(tmp_path):
    """With the least learning rate there is, no weight changes: nothing gets better than at the start."""
    settings = {"lr": 1e-30, "val_fraction": 0.01, "eval_every": 2, "n_embd": 8}
    options = {"engine": "reference", "samples": 0, "progress": False}
    run = tl.train("names", steps=6, set=settings, out=tmp_path / "run", **options)
    assert len(run.val_losses) == 4
    assert len(set(run.val_losses.values())) == 1
    assert run.best is None
    assert not (tmp_path / "run/best").exists()


def test_data_to_validate_on(here, tmp_path, text):
    (tmp_path / "val.txt").write_text(text[-500:])
    common = (
        "--preset",
        "shakespeare-char",
        "--steps",
        "2",
        "--set",
        "n_embd=8",
        "--batch-size",
        "1",
        *QUIET,
    )
    told = succeeds(
        "train", here / "text.txt", "--val", "val.txt", *common, "--out", "a", cwd=tmp_path
    ).stderr  # fmt: skip
    assert f"({len(text):,} tokens and 500 to validate on" in told  # nothing else is held out
    held = LETTERS.encode(text[-500:])
    expected = tl.evaluate(tl.load(tmp_path / "a", "reference"), held).loss
    assert rows(tmp_path / "a")[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)
    # Token shards bring their own, unless others are given.
    told = succeeds("train", here / "data", "--set", "vocab_size=27", *common, cwd=tmp_path).stderr
    assert "4,000 tokens and 400 to validate on" in told
    write_shard(tmp_path / "other.bin", held[:77])
    told = succeeds(
        "train", here / "data", "--val", "other.bin", "--set", "vocab_size=27", *common, cwd=tmp_path
    ).stderr
    assert "4,000 tokens and 77 to validate on" in told
    (tmp_path / "val.txt").write_text("ABC")
    error = refused("train", here / "text.txt", "--val", "val.txt", *common, cwd=tmp_path)
    assert "val.txt: the tokenizer does not know the character 'A'" in error
    assert "nowhere" in refused("train", here / "text.txt", "--val", "nowhere", *common, cwd=tmp_path)
    error = refused("train", here / "data/names_val.bin", "--set", "vocab_size=27", *common, cwd=tmp_path)
    assert "of token files no part is held out" in error


# ---------------------------------------------------------------- nothing is disturbed


@pytest.mark.parametrize("preset", ["microgpt", "esp32gpt", "shakespeare-char"])
def test_evaluating_and_sampling_change_nothing(preset, here, tmp_path):
    options = {
        "preset": preset, "steps": 25, "batch_size": 2, "engine": "reference", "samples": 3,
        "temperature": 1.0, "progress": False,
    }  # fmt: skip
    data = here / "text.txt" if preset == "shakespeare-char" else None
    tiny = {"n_embd": 8, "max_tokens": 8, "val_fraction": 0.05, "eval_batches": 2}
    plain = tl.train(data, out=tmp_path / "a", set=tiny | {"eval_every": 0}, **options)
    busy = tl.train(
        data, out=tmp_path / "b", set=tiny | {"eval_every": 4, "sample_every": 3}, **options
    )  # fmt: skip
    assert np.array_equal(plain.losses, busy.losses)
    assert plain.samples == busy.samples
    first, second = (load_file(tmp_path / name / "state.safetensors") for name in "ab")
    assert all(first[name].tobytes() == second[name].tobytes() for name in first if name != "best")
    logged = [json.loads(line) for line in (tmp_path / "b/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert all(len(row["samples"]) == 3 for row in logged)
    assert logged[-1]["samples"] == busy.samples
    assert not (tmp_path / "a/samples.jsonl").exists()


def lasting(folder):
    """Of a run's files those that do not depend on when it was saved."""
    return {name: content for name, content in contents(folder).items() if "checkpoints/" not in name}


class StopAt:
    """Progress that presses Ctrl-C once training has come to a step."""

    def __init__(self, step):
        self.step = step

    def begin(self, step, steps):
        self.now = step

    def update(self, losses):
        self.now += len(losses)
        if self.now >= self.step:
            os.kill(os.getpid(), signal.SIGINT)

    def __getattr__(self, name):
        return lambda *_: None


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("kind", ["names", "text", "pretrained", "llmc"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(kind, here, tmp_path):
    settings = {"eval_every": 6, "sample_every": 5, "eval_batches": 3, "max_tokens": 6}
    options = {"steps": 30, "batch_size": 2, "engine": "reference", "samples": 2}
    if kind == "names":
        settings |= {"val_fraction": 0.1, "n_embd": 8}
    elif kind == "text":
        options |= {"data": here / "text.txt", "preset": "shakespeare-char"}
        settings |= {"n_embd": 8, "n_layer": 1, "warmup_steps": 3, "total_batch_tokens": 256}
    else:
        options |= {"data": here / "data", "pretrained": here / "model.bin"}
        settings |= {"block_size": 16, "order": "llmc" if kind == "llmc" else "sequence", "lr": 0.05}
    whole = tl.train(out=tmp_path / "whole", set=settings, progress=False, **options)
    parts = tmp_path / "parts"
    with pytest.raises(tl.Interrupted):
        tl.train(out=parts, set=settings, progress=StopAt(8), **options)
    with pytest.raises(tl.Interrupted) as second:
        tl.train(out=parts, resume=True, progress=StopAt(13))
    assert 13 <= second.value.run.steps < 30
    last = tl.train(out=parts, resume=True, progress=False)
    assert last.samples == whole.samples
    assert last.best == whole.best
    expected, found = lasting(tmp_path / "whole"), lasting(parts)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert {"best/model.safetensors", "samples.jsonl"} <= found.keys()


def test_what_was_validated_on_must_be_the_same(here, tmp_path):
    shutil.copytree(here / "data", tmp_path / "data")
    arguments = ("--pretrained", here / "model", "--batch-size", "2", "--steps", "2", *QUIET, "--out", "run")
    succeeds("train", "data", *arguments, cwd=tmp_path)
    write_shard(tmp_path / "data/names_val.bin", [1] * 400)
    before = contents(tmp_path / "run")
    error = refused("train", "--resume", "--out", "run", "--steps", "4", cwd=tmp_path)
    assert "is not the data that run was trained on" in error
    error = refused("train", "--resume", "--out", "run", "--steps", "4", "--pretrained", "gpt2", cwd=tmp_path)
    assert "is not the data that run was trained on" not in error
    assert re.search(r"run was started from .*model, not from gpt2\.", error)
    assert contents(tmp_path / "run") == before


def test_overwriting_takes_the_best_away(tmp_path):
    held = ("--set", "val_fraction=0.01", "--sample-every", "1")
    succeeds("train", *QUIET, "--steps", "2", *held, "--out", "run", cwd=tmp_path)
    assert (tmp_path / "run/best/model.safetensors").exists()
    (tmp_path / "run/best/mine.txt").write_text("mine")
    succeeds("train", *QUIET, "--steps", "2", "--out", "run", "--overwrite", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "best", "checkpoints", "config.json", "metrics.jsonl", "model.safetensors", "state.safetensors",
        "tokenizer.json",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "run/best").iterdir()] == ["mine.txt"]


# ---------------------------------------------------------------- large models

GUARD = importlib.import_module("tapeless.guard")


def test_a_large_model_is_not_copied(here, tmp_path, monkeypatch):
    """No snapshots, and the first state is not written; all else is the same."""
    options = {"batch_size": 2, "steps": 40, "engine": "reference", "samples": 0, "set": {"lr": 0.05}}
    small = tl.train(here / "data", pretrained=here / "model", out=tmp_path / "a", progress=False, **options)
    monkeypatch.setattr(GUARD, "SNAPSHOTS", 0)
    with pytest.raises(tl.Interrupted):
        tl.train(here / "data", pretrained=here / "model", out=tmp_path / "b", progress=StopAt(4), **options)
    large = tl.train(out=tmp_path / "b", resume=True, progress=False)
    assert np.array_equal(small.losses[-len(large.losses) :], large.losses)
    assert lasting(tmp_path / "a") == lasting(tmp_path / "b")


def test_a_large_model_that_overflows_keeps_what_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(GUARD, "SNAPSHOTS", 0)
    options = {"engine": "reference", "dtype": "float32", "samples": 0, "progress": False}
    with pytest.raises(
        NumericsError, match=r"at step \d\. It was on .*\. First not finite: .*\. Try a smaller"
    ):
        tl.train(preset="esp32gpt", out=tmp_path / "none", steps=900, lr=9e5, **options)
    assert not (tmp_path / "none/state.safetensors").exists()
    tl.train(preset="esp32gpt", out=tmp_path / "run", steps=30, **options)
    before = contents(tmp_path / "run")
    with pytest.raises(NumericsError, match=r"at step 3\d\. .* keeps the state after step 30: resume it"):
        tl.train(out=tmp_path / "run", resume=True, steps=900, lr=9e5, **options)
    assert contents(tmp_path / "run") == before
    tl.train(out=tmp_path / "run", resume=True, steps=60, lr=1e-4, **options)
    assert len(rows(tmp_path / "run")) == 60


def test_a_disk_without_room_is_found_first(here, tmp_path, monkeypatch):
    tl.train(here / "data", pretrained=here / "model", out=tmp_path, steps=2, samples=0, progress=False)
    before = contents(tmp_path)
    monkeypatch.setattr(GUARD, "SNAPSHOTS", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    for more in ({"overwrite": True}, {"resume": True, "steps": 5}):
        given = {} if "resume" in more else {"data": here / "data", "pretrained": here / "model"}
        with pytest.raises(RunError, match=r"the run takes 0\.0 GB, the disk has 0\.0 left"):
            tl.train(**given, out=tmp_path, samples=0, progress=False, **more)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size", ["small", "large"])
def test_an_old_run_stays_until_there_is_a_new_one(size, here, tmp_path, monkeypatch):
    options = {"engine": "reference", "dtype": "float32", "samples": 0, "out": tmp_path / "run"}
    held = {"val_fraction": 0.001, "eval_every": 1}
    tl.train(preset="esp32gpt", steps=3, progress=False, set=held, **options)
    before = contents(tmp_path / "run")
    if size == "large":
        monkeypatch.setattr(GUARD, "SNAPSHOTS", 0)
    write_shard(tmp_path / "bad.bin", [5] * 30 + [27] * 400)
    bad = {"data": tmp_path / "bad.bin", "pretrained": here / "model", "overwrite": True}
    with pytest.raises(
        DataError, match=r"bad\.bin has the token 27 at position 30; the vocabulary has 27 tok"
    ):
        tl.train(progress=False, **bad, **options)
    with pytest.raises(DataError, match="has the token 27"):  # validation before the first step
        tl.train(
            **bad | {"data": here / "data", "val": tmp_path / "bad.bin"}, set={"eval_every": 1},
            progress=False, **options,
        )  # fmt: skip
    if size == "large":
        with pytest.raises(NumericsError, match="Try a smaller lr"):
            tl.train(
                preset="esp32gpt", steps=900, lr=9e5, overwrite=True, set=held, progress=False, **options
            )
    assert contents(tmp_path / "run") == before
    with pytest.raises(tl.Interrupted):
        tl.train(preset="esp32gpt", overwrite=True, progress=StopAt(1), **options)
    assert "best/config.json" not in contents(tmp_path / "run")
    assert tl.train(out=tmp_path / "run", resume=True, samples=0, progress=False).steps == 1000


def test_bad_tokens_at_the_beginning_make_no_folder(here, tmp_path):
    write_shard(tmp_path / "bad.bin", [5] * 30 + [27] * 400)
    arguments = ("--pretrained", here / "model", *QUIET, "--out", "run")
    assert "has the token 27" in refused("train", "bad.bin", *arguments, cwd=tmp_path)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- data that turn out bad


def test_a_bad_token_later_on_costs_no_step(here, tmp_path, text):
    """What was done until then is saved; when the data are mended it goes on as if they had been good."""
    tokens = LETTERS.encode(text)[:20_000]
    write_shard(tmp_path / "good.bin", tokens)
    write_shard(tmp_path / "data.bin", [*tokens[:5000], 999, *tokens[5001:]])
    arguments = ("--pretrained", here / "model", "--block-size", "8", "--batch-size", "4", *QUIET)
    arguments += ("--steps", "200", "--lr", "0.01")
    succeeds("train", "good.bin", *arguments, "--out", "whole", cwd=tmp_path)
    error = refused("train", "data.bin", *arguments, "--out", "run", cwd=tmp_path)
    found = re.search(
        r"data\.bin has the token 999 at position 5,000; .* run keeps the state after step (\d+): "
        r"go on with --resume when that is mended\.$", error
    )  # fmt: skip
    assert found
    done = int(found[1])
    assert 20 < done <= 5000 // 32
    assert len(losses(tmp_path / "run")) == done
    os.replace(tmp_path / "good.bin", tmp_path / "data.bin")
    told = succeeds("train", "--resume", "--out", "run", cwd=tmp_path).stderr
    assert f"Going on from step {done}." in told
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


class Vanish(StopAt):
    """Progress that takes a file away once training has come to a step."""

    def __init__(self, step, path):
        super().__init__(step)
        self.path = path

    def update(self, losses):
        self.now += len(losses)
        if self.now >= self.step and self.path.exists():
            self.path.rename(self.path.with_suffix(".away"))


@pytest.mark.parametrize("what", ["train", "val"])
def test_a_shard_that_vanishes_costs_no_step(what, here, tmp_path):
    shutil.copytree(here / "data", tmp_path / "data")
    path = tmp_path / f"data/names_{what}.bin"
    settings = {"order": "windows", "eval_every": 12, "eval_batches": 2}
    options = {"pretrained": here / "model", "batch_size": 2, "steps": 60, "engine": "reference"}
    options |= {"samples": 0, "set": settings}
    whole = tl.train(tmp_path / "data", progress=False, **options)
    with pytest.raises(
        DataError, match=rf"names_{what}\.bin: No such file.* keeps the state after step \d+:"
    ):
        tl.train(tmp_path / "data", out=tmp_path / "run", progress=Vanish(20, path), **options)
    assert len(losses(tmp_path / "run")) >= 20
    path.with_suffix(".away").rename(path)
    run = tl.train(out=tmp_path / "run", resume=True, progress=False)
    assert np.array_equal(losses(tmp_path / "run"), whole.losses)
    assert np.array_equal(run.model.engine.params, whole.model.engine.params)


# ---------------------------------------------------------------- from a checkpoint


def test_a_checkpoint_brings_its_architecture(here, tmp_path):
    told = succeeds(
        "train", here / "data", "--pretrained", here / "model.bin", "--steps", "1", *QUIET, cwd=tmp_path
    ).stderr
    assert told.startswith("model.bin, pretrained: ")
    assert "Saved in runs/gpt2-1." in told
    about = json.loads((tmp_path / "runs/gpt2-1/config.json").read_text())
    assert about["model"]["n_embd"] == 16
    t = about["training"]
    assert [t[name] for name in ("optimiser", "lr", "schedule", "warmup_steps")] == [
        "adamw",
        1e-4,
        "constant",
        0,
    ]
    assert [t[name] for name in ("beta1", "beta2", "eps", "weight_decay", "grad_clip", "order")] == [
        0.9, 0.999, 1e-8, 0.0, 0.0, "sequence",
    ]  # fmt: skip
    # What it settles may be said again, and how it is trained may change.
    succeeds(
        "train", here / "data", "--pretrained", here / "model", "--steps", "1", "--lr", "0.5",
        "--set", "n_embd=16", "--order", "windows", *QUIET, cwd=tmp_path,
    )  # fmt: skip
    about = json.loads((tmp_path / "runs/gpt2-2/config.json").read_text())
    assert (about["training"]["lr"], about["training"]["order"]) == (0.5, "windows")


def test_a_model_of_documents_goes_on_with_documents(tmp_path):
    succeeds("train", *QUIET, "--steps", "20", "--out", "first", cwd=tmp_path)
    told = succeeds(
        "train", "--pretrained", "first", "--preset", "microgpt", "--steps", "2", *QUIET, cwd=tmp_path
    ).stderr
    assert "4,647 documents and 516 to validate on" in told
    second = tmp_path / "runs/microgpt-1"
    assert json.loads((second / "config.json").read_text())["training"]["order"] == "shuffle"
    assert losses(second)[0] < losses(tmp_path / "first")[0] - 0.2


def test_a_text_to_fine_tune_on_holds_out_its_end(tmp_path):
    text = "To be, or not to be: that is the question.\n" * 30
    (tmp_path / "t.txt").write_text(text)
    small = ("--set", "n_layer=1", "--set", "n_embd=8", "--block-size", "16")
    succeeds("train", "t.txt", "--preset", "shakespeare-char", *small, *QUIET, "--steps", 2, "--out", "first",
             cwd=tmp_path)  # fmt: skip
    fine = ("--pretrained", "first", *QUIET, "--steps", 2)
    told = succeeds("train", "t.txt", *fine, "--out", "fine", cwd=tmp_path).stderr
    assert f"{int(len(text) * 0.9):,} tokens and {len(text) - int(len(text) * 0.9)} to validate on" in told
    assert "10% of the text is held out for validation; --set val_fraction=0 trains on all of it." in told
    assert "validation loss" in told
    told = succeeds("train", "t.txt", *fine, "--set", "val_fraction=0", "--out", "all", cwd=tmp_path).stderr
    assert f"t.txt ({len(text):,} tokens, vocabulary" in told
    # A run that was begun when nothing was held out by default goes on without.
    told = succeeds("train", "--resume", "--out", "all", *QUIET, "--steps", 3, cwd=tmp_path).stderr
    assert f"t.txt ({len(text):,} tokens, vocabulary" in told
    # Nothing is held out of what is then too short for a batch, nor where there is something to validate on.
    (tmp_path / "short.txt").write_text(text[:70])
    told = succeeds("train", "short.txt", *fine, "--out", "short", cwd=tmp_path).stderr
    assert "short.txt (70 tokens, vocabulary" in told
    assert "The text is too short to hold out a part of it for validation." in told
    # What is held out does not change with the batches of a run that goes on.
    for batch, run, size in ((8, "fine", f"{int(len(text) * 0.9):,} tokens and"), (1, "short", "70 tokens,")):
        again = ("--resume", "--out", run, *QUIET, "--steps", 3, "--batch-size", batch)
        assert size in succeeds("train", *again, cwd=tmp_path).stderr
    told = succeeds("train", "t.txt", *fine, "--val", "short.txt", "--out", "val", cwd=tmp_path).stderr
    assert f"{len(text):,} tokens and 70 to validate on" in told
    write_shard(tmp_path / "x.bin", [1] * 100)
    told = succeeds("train", "x.bin", *fine, "--out", "tokens", cwd=tmp_path).stderr
    assert "x.bin (100 tokens, vocabulary" in told
    assert "held out" not in told


def test_the_kind_of_tokens_is_kept_with_the_run(tmp_path):
    """Too few to tell by themselves."""
    (tmp_path / "train.bin").write_bytes(np.arange(8, dtype="<u2").repeat(5).tobytes())
    options = ("--preset", "gpt2", *QUIET, "--engine", "reference", "--batch-size", 1)
    sizes = ("--set", "vocab_size=50257", "--set", "n_layer=1", "--set", "n_head=1", "--set", "n_embd=2",
             "--block-size", 8)  # fmt: skip
    error = refused("train", "train.bin", *options, *sizes, "--steps", 1, cwd=tmp_path)
    assert "probably uint16, as nanoGPT's are. Say which: --token-dtype uint16." in error
    given = (*options, *sizes, "--token-dtype", "uint16", "--out", "run")
    told = succeeds("train", "train.bin", *given, "--steps", 1, cwd=tmp_path).stderr
    assert "train.bin (40 tokens" in told
    succeeds("train", "--resume", "--out", "run", *QUIET, "--steps", 2, cwd=tmp_path)
    assert json.loads((tmp_path / "run/config.json").read_text())["training"]["token_dtype"] == "uint16"
    error = refused("train", "--resume", "--out", "run", "--steps", 3, "--token-dtype", "int32", cwd=tmp_path)
    assert "train.bin read as int32 has 65536 at position 2" in error
    shown = succeeds("eval", "run", "train.bin", "--token-dtype", "uint16", cwd=tmp_path).stdout
    assert "tokens              39" in shown
    assert "probably uint16" in refused("eval", "run", "train.bin", cwd=tmp_path)
    # Whatever the name; but not of what is text.
    (tmp_path / "train.bin").rename(tmp_path / "ids")
    succeeds("eval", "run", "ids", "--token-dtype", "uint16", cwd=tmp_path)
    error = refused("train", "names", "--token-dtype", "uint16", *QUIET, cwd=tmp_path)
    assert "token_dtype applies to token files only; names is not one" in error
    assert "token_dtype cannot be 'uint8'" in refused("train", "ids", "--token-dtype", "uint8", cwd=tmp_path)
    assert "token_dtype cannot be 'uint8'" in refused(
        "eval", "run", "ids", "--token-dtype", "uint8", cwd=tmp_path
    )


def test_dropped_characters_are_counted(tmp_path):
    (tmp_path / "t.txt").write_text("Anna-Lou 3\nbob\n!?\n")
    told = succeeds("train", "t.txt", "--preset", "esp32gpt", *QUIET, "--steps", 1, cwd=tmp_path).stderr
    assert "5 characters were dropped: esp32gpt's tokenizer has a to z only." in told


def test_windows_shorter_than_the_models_block(here, tmp_path):
    succeeds(
        "train", here / "data", "--pretrained", here / "model", "--block-size", "8", "--steps", "3",
        "--lr", "0.1", *QUIET, "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    before, after = tl.load(here / "model"), tl.load(tmp_path / "run")
    assert after.config.block_size == 32
    moved = np.abs(after.params["wpe"] - before.params["wpe"]).max(axis=1)
    assert (moved[:8] > 0.01).all()
    assert (moved[8:] == 0).all()
    # The same options go on with it; a shorter window may be chosen as well.
    more = ("train", "--resume", "--out", "run", *QUIET)
    told = succeeds(*more, "--block-size", "8", "--steps", "4", cwd=tmp_path).stderr
    assert "of 8 tokens" in told
    assert "of 4 tokens" in succeeds(*more, "--block-size", "4", "--steps", "5", cwd=tmp_path).stderr
    assert "the context of run, not 33" in refused(*more, "--block-size", "33", cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pretrained", "nowhere"], ["nowhere"]),
        (["--pretrained", "data"], ["data has no config.json, nor a model file"]),
        (["--pretrained", "text.txt"], ["text.txt is no model"]),
        (["--pretrained", "model", "--set", "n_embd=32"], ["model is another model: n_embd 16 is not 32"]),
        (["--pretrained", "model", "--set", "norm=rms"], ["norm"]),
        (["--pretrained", "model", "--set", "vocab_size=50"], ["vocab_size 27 is not 50"]),
        (["--pretrained", "model", "--block-size", "33"], ["block_size must be at most 32", "not 33"]),
        (["--pretrained", "model", "--set", "window=33"], ["window must be at most", "32, not 33"]),
        (["--pretrained", "model", "--preset", "gpt2"], ["another model", "n_layer 2 is not 12"]),
        (["--pretrained", "model", "--preset", "microgpt"], ["another model", "norm 'layer' is not 'rms'"]),
        (["--pretrained", "model", "--order", "shuffle"], ["without documents"]),
        (["--pretrained", "model", "--batch-size", "500"], ["4,000 tokens", "batch"]),
        (
            ["--pretrained", "model", "--eval-every", "5", "--val", "nowhere.bin"],
            ["no data file", "nowhere.bin"],
        ),
        (["--preset", "gpt2-xl", "--pretrained"], ["gpt2-xl", "hub"]),
        (["--pretrained", "--steps", "3"], ["gpt2", "hub"]),
    ],
)
def test_mistakes_with_checkpoints(arguments, words, here, tmp_path):
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "PYTHONUTF8": "1"}
    before = contents(here)
    error = refused("train", "data", *arguments, "--engine", "reference", cwd=here, env=offline)
    assert all(word in error for word in words), error
    assert contents(here) == before


def test_a_pair_in_different_folders(here, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"data/{split}").mkdir(parents=True)
        shutil.copy(here / f"data/names_{split}.bin", tmp_path / f"data/{split}")
    arguments = ("train", "data", "--pretrained", here / "model", "--steps", "1", *QUIET)
    assert "4,000 tokens and 400 to validate on" in succeeds(*arguments, cwd=tmp_path).stderr
    (tmp_path / "data/other").mkdir()
    other = shutil.copy(here / "data/names_val.bin", tmp_path / "data/other")
    error = refused(*arguments, cwd=tmp_path)
    assert "data/other/names_val.bin, data/val/names_val.bin. Choose one" in error
    assert "400 to validate on" in succeeds(*arguments, "--val", other, cwd=tmp_path).stderr


def test_tokens_of_another_tokenizer(here, tmp_path):
    """Of another size or of the same, to train or to validate on, whatever kind of file it lies in."""
    shutil.copytree(here / "data", tmp_path / "data")
    shutil.copytree(here / "data", tmp_path / "plain")
    model = here / "model"
    train = ("train", "data", "--pretrained", model, "--steps", "1", *QUIET, "--out", "run")
    for chars, size in (("abc", "3"), (LETTERS.chars[::-1], "27")):
        (tmp_path / "data/tokenizer.json").write_text(json.dumps(CharTokenizer(chars, None).to_dict()))
        validate = ("train", "plain", "--val", "data", *train[2:])
        for command in (train, validate, ("eval", model, "data", "--engine", "reference")):
            error = refused(*command, cwd=tmp_path)
            assert f"data/tokenizer.json, beside the tokens, is another tokenizer ({size} tokens)" in error
            assert ("the model" if command[0] == "eval" else str(model)) in error
            assert not (tmp_path / "run").exists()
    write_table(tmp_path / "data/gpt2_tokenizer.bin", LETTERS.chars)
    (tmp_path / "data/tokenizer.json").unlink()
    succeeds(*train, cwd=tmp_path)
    succeeds("eval", model, "data", "--engine", "reference", cwd=tmp_path)


def write_table(path, letters):
    """llm.c's tokenizer file of these tokens; the last one ends documents."""
    header = struct.pack("<256I", 20240328, 2, len(letters), len(letters) - 1, *[0] * 252)
    path.write_bytes(header + b"".join(bytes([len(c.encode())]) + c.encode() for c in letters))


def test_gpt2s_tokenizer_in_other_files_is_the_same(tmp_path):
    """encoder.json and vocab.bpe beside the tokens, tokenizer.json as Hugging Face writes it in the model."""
    tokenizer = gpt2().to_dict()
    for added in tokenizer["added_tokens"]:
        added["normalized"] = True
    model = tl.GPT(GPT2.replace(vocab_size=50257, n_embd=4), tokenizer=gpt2())
    model.save(tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("Before we proceed any further, hear me speak.\n" * 30)
    succeeds("tokenize", "text.txt", "--tokenizer", gpt2_files(), "--out", "data", cwd=tmp_path)
    (tmp_path / "data/tokenizer.json").unlink()
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(gpt2_files() / name, tmp_path / "data")
    arguments = ("--pretrained", "model", "--steps", "1", "--batch-size", "1", *QUIET)
    succeeds("train", "data", *arguments, cwd=tmp_path)
    succeeds("tokenize", "text.txt", "--train-bpe", "300", "--out", "other", cwd=tmp_path)
    error = refused("train", "other", *arguments, cwd=tmp_path)
    assert "other/tokenizer.json" in error
    assert "is another tokenizer (291 tokens) than that of model (50,257 tokens)" in error


def test_vocabularies_that_differ(here, tmp_path):
    shutil.copytree(here / "data", tmp_path / "data")
    (tmp_path / "data/tokenizer.json").write_text(json.dumps(CharTokenizer("abc", None).to_dict()))
    error = refused("train", "data", "--preset", "gpt2", "--set", "vocab_size=2", cwd=tmp_path)
    assert "vocab_size is 2, but the tokenizer of data has 3 tokens; expected at least as many" in error
    (tmp_path / "data/tokenizer.json").unlink()
    assert "the vocabulary is not known" in refused("train", "data", *QUIET, cwd=tmp_path)
    shutil.copy(here / "model.bin", tmp_path / "model.bin")
    (tmp_path / "tokenizer.json").write_text(json.dumps(CharTokenizer("abc", None).to_dict()))
    told = succeeds(
        "train", "data", "--pretrained", "model.bin", "--steps", "1", "--engine", "reference",
        "--samples", "1", "--set", "max_tokens=3", "--batch-size", "1", cwd=tmp_path,
    ).stdout  # fmt: skip
    assert re.fullmatch(r"\d+ \d+ \d+\n", told)  # what lies beside a file need not be its tokenizer


@pytest.mark.parametrize("preset", ["gpt2", "microgpt"])
def test_shards_bring_their_tokenizer(preset, here, tmp_path):
    """The vocabulary is theirs, they are read in sequence whatever the preset, and texts are texts."""
    succeeds("tokenize", here / "text.txt", "--tokenizer", "chars", "--out", "data", cwd=tmp_path)
    sizes = [word for name in ("n_layer=1", "n_head=2", "n_embd=8") for word in ("--set", name)]
    arguments = (
        "--preset", preset, *sizes, "--block-size", "16", "--batch-size", "2", "--steps", "5",
        "--samples", "2", "--engine", "reference", "--set", "max_tokens=9", "--out", "run",
    )  # fmt: skip
    texts = succeeds("train", "data", *arguments, cwd=tmp_path).stdout
    assert set(texts) <= set(LETTERS.chars) | {"-"}
    about = json.loads((tmp_path / "run/config.json").read_text())
    assert (about["model"]["vocab_size"], about["training"]["order"]) == (27, "sequence")
    assert about["val_digest"] is not None
    # Going on needs no tokenizer but the run's own.
    (tmp_path / "data/tokenizer.json").unlink()
    succeeds("train", "--resume", "--out", "run", "--steps", "6", cwd=tmp_path)
    assert tl.load(tmp_path / "run").tokenizer == LETTERS


# ---------------------------------------------------------------- learning, and how fast


def bigram_loss(train, val, vocab):
    """Of a table of pairs, each counted once more than it is there."""
    counts = np.ones((vocab, vocab))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    table = np.log(counts / counts.sum(axis=1, keepdims=True))
    return -table[val[:-1], val[1:]].mean()


def test_fine_tuning_learns_more_than_pairs(tmp_path):
    """A small GPT-2 that has seen nothing yet, on Python's own manual: of the end of it, which it does not
    see, it knows more than what follows each letter."""
    text = "\n".join(topics.values())[:250_000]
    tokenizer = CharTokenizer.from_text([text])
    tokens = np.array(tokenizer.encode(text))
    cut = int(len(text) * 0.9)
    pairs = bigram_loss(tokens[:cut], tokens[cut:], tokenizer.vocab_size)
    config = GPT2.replace(vocab_size=tokenizer.vocab_size, n_embd=48)
    tl.GPT(config, seed=0, tokenizer=tokenizer).save(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    succeeds(
        "train", "text.txt", "--pretrained", "model", "--steps", "500", "--batch-size", "24", "--lr", "4e-3",
        "--order", "windows", "--set", "val_fraction=0.1", "--set", "eval_batches=0", "--eval-every", "250",
        "--set", "schedule=cosine", "--set", "warmup_steps=50", "--set", "grad_clip=1", "--samples", "0",
        "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    found = [row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row and row["step"]]
    print(f"pairs {pairs:.3f}, after 250 and 500 steps {found}")
    assert 2.3 < pairs < 2.8
    assert found[0] > found[1]
    assert found[1] < pairs - 0.2


def test_speed_is_what_was_done_in_a_second_or_more():
    engine = tl.GPT(GPT2, None, "reference").engine
    meter = Meter(engine, 1)
    meter.add(0.25, np.array([[32, 32], [32, 32]]))
    assert meter.speed() is None
    meter.add(1.75, np.full((3, 4), 32))
    speed = meter.speed()
    from tapeless.flops import training_flops

    assert speed == Speed(16 * 32 / 2.0, training_flops(GPT2, [32] * 16) / 2e9, None)
    assert speed.texts() == ["256 tokens/s"]
    assert meter.speed() is None
    assert Speed(36400.4, 181.0, 0.784).texts() == ["36,400 tokens/s", "78 % of peak"]


def test_a_share_of_the_peak_is_at_most_all_of_it(monkeypatch):
    from tapeless.ops.cpu import peak

    measured = iter([10.0, 4.0, 30.0])  # no more often than that
    monkeypatch.setattr(peak, "peak_gflops", lambda threads, **_: next(measured))
    meter = Meter(tl.GPT(GPT2, None, "cpu").engine, 1)

    def share(gflops):
        meter.add(3.0, np.array([32]))
        meter._flops = int(gflops * 3e9)
        return meter.speed().share

    assert share(5.0) == 0.5
    assert share(20.0) is None  # other programs were busy when it was measured, and still are
    assert share(20.0) == pytest.approx(2 / 3)
    assert share(15.0) == 0.5
    assert share(31.0) is None
