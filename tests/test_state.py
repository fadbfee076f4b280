"""`tapeless check --state` and `tapeless convert --state`: debug states of llm.c."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

import golden
import tapeless as tl
from commands import refused, succeeds, tapeless
from helpers import random_model
from tapeless import debugstate
from tapeless.__main__ import run
from tapeless.convert import convert
from tapeless.errors import RunError
from tapeless.io import llmc

FILES = golden.FILES
B, S, V, C = golden.B, golden.S, golden.V, golden.C
# The sizes of the golden files, so that only one model is compiled.
SIZES = tl.presets["gpt2"].model.replace(
    vocab_size=V, block_size=golden.T, n_layer=golden.L, n_head=golden.H, n_embd=C
)
LOGITS = 1024 + 8 * B * S  # bytes before them, before the loss, and before the gradients
LOSS = LOGITS + 4 * B * S * V
GRADS = LOSS + 4


@pytest.fixture
def refusal(here, monkeypatch, capsys):
    """The one line of error of a command that must be refused, without a process of its own."""
    monkeypatch.chdir(here)

    def refusal(*arguments):
        assert run(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return refusal


@pytest.fixture
def here(tmp_path):
    for name in ("llmc_v1.bin", "llmc_v3.bin", "llmc_v5.bin", "llmc_state.bin"):
        shutil.copy(FILES / name, tmp_path / name)
    return tmp_path


def spoil(path, offset, value, dtype="<f4"):
    content = bytearray(path.read_bytes())
    number = np.array(value, dtype).tobytes()
    content[offset : offset + len(number)] = number
    path.write_bytes(bytes(content))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("model", ["llmc_v1.bin", "llmc_v5.bin", FILES / "huggingface"])
def test_the_golden_state_agrees(model, engine, here):
    """Logits, loss and gradients by automatic differentiation of another program."""
    out = succeeds("check", model, "--state", "llmc_state.bin", "--engine", engine, cwd=here).stdout
    rows = out.splitlines()
    assert "2 × 5 tokens, loss 9.436" in rows[0]
    assert [row.split()[0] for row in rows[2:20]] == ["logits", "loss", *golden.OURS.values()]
    assert all(row.split()[-1] == "ok" for row in rows[2:20])
    assert rows[-1] == "All tensors agree."
    assert max(map(len, rows[1:])) <= 80


def test_states_without_padding_are_read(here):
    state = FILES / "llmc_state_v1.bin"
    succeeds("check", "llmc_v1.bin", "--state", state, "--engine", "reference", cwd=here)


@pytest.mark.parametrize(
    ("offset", "value", "named"),
    [
        (LOGITS + 40, 50.0, "logits"),
        (LOSS, 9.45, "loss"),
        (LOSS, np.nan, "loss"),
        (GRADS + 4 * (V * C - 1), 3.0, "wte"),
        (GRADS + 4 * 128 * C, 3.0, "wpe"),
        (GRADS + 4 * 128 * C, np.nan, "wpe"),
        (-4, 0.5, "normf_b"),
    ],
)
def test_a_difference_is_named(offset, value, named, here):
    path = here / "llmc_state.bin"
    spoil(path, offset % path.stat().st_size, value)
    result = tapeless("check", "llmc_v3.bin", "--state", "llmc_state.bin", "--engine", "reference", cwd=here)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == f"FAILED: {named}"


def test_numbers_of_the_padding_mean_nothing(here):
    spoil(here / "llmc_state.bin", GRADS + 4 * V * C, 3.0)
    succeeds("check", "llmc_v3.bin", "--state", "llmc_state.bin", "--engine", "reference", cwd=here)


def test_small_gradients_are_compared_as_well():
    """Where all of them are below what llm.c's test allows, one that is wrong must still show."""
    right = np.full((2, 8, 32), 1e-3)
    right[1] *= -2  # blocks that differ, or one compared with another's place would pass
    for expected, ok in ((right, True), (right * 1.009, True), (right * 1.02, False), (0 * right, False)):
        row = debugstate._difference("w1", "dfcw", [expected[:1], expected[1:]], right, debugstate.GRADS, 1.0)
        assert row.ok == ok
        assert row.largest == pytest.approx(np.abs(expected - right).max())
    row = debugstate._difference("w1", "dfcw", [right * np.nan], right, debugstate.GRADS, 1.0)
    assert (row.ok, row.largest) == (False, np.inf)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("source", ["run", "hf"])
def test_what_is_written_is_what_the_model_computes(source, tmp_path):
    model = random_model(SIZES, dtype="float32")
    model.save(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf")
    arguments = ["--state", "--batch-size", "3", "--block-size", "4", "--seed", "5"]
    told = succeeds("convert", source, "state.bin", *arguments, cwd=tmp_path).stderr
    content = (tmp_path / "state.bin").read_bytes()
    header = np.frombuffer(content[:1024], "<i4")
    assert header[:4].tolist() == [20240327, 2, 3, 4]
    assert not header[4:].any()
    tokens, targets = np.frombuffer(content[1024:], "<i4", 24).reshape(2, 3, 4)
    assert (tokens.ravel()[1:] == targets.ravel()[:-1]).all()
    assert len(np.unique(tokens)) > 5
    starts = [0, 4, 8, 12]
    loss = model.loss_and_grad(tokens.ravel(), targets.ravel(), starts)
    floats = np.frombuffer(content[1024 + 96 :], "<f4")
    logits, floats = floats[: 12 * V], floats[12 * V :]
    np.testing.assert_allclose(logits.reshape(12, V), model.logits(tokens.ravel(), starts), 1e-4, 1e-4)
    assert floats[0] == pytest.approx(loss, rel=1e-6)
    assert f"3 × 4 tokens, loss {loss:.4f}"[:-1] in told
    grads = floats[1:]
    wte, grads = grads[: 128 * C].reshape(128, C), grads[128 * C :]
    np.testing.assert_allclose(wte[:V], model.grads["wte"], rtol=1e-4, atol=1e-5)
    assert not wte[V:].any()
    for name, ours in list(golden.OURS.items())[1:]:
        expected = model.grads[ours]
        expected = np.swapaxes(expected, 1, 2) if golden.is_linear(name) else expected
        part, grads = grads[: expected.size], grads[expected.size :]
        np.testing.assert_allclose(part.reshape(expected.shape), expected, rtol=1e-3, atol=1e-5, err_msg=name)
    assert not grads.size
    succeeds("check", "run", "--state", "state.bin", "--engine", "reference", cwd=tmp_path)


def test_a_model_without_biases(tmp_path):
    """The state has gradients of the biases that llm.c would have, at zero."""
    random_model(SIZES.replace(bias=False, norm_bias=False)).save(tmp_path / "run")
    succeeds("convert", "run", "model.bin", cwd=tmp_path)
    succeeds("convert", "run", "state.bin", "--state", cwd=tmp_path)
    for model in ("run", "model.bin"):
        succeeds("check", model, "--state", "state.bin", cwd=tmp_path)
    state = llmc.open_state(tmp_path / "state.bin", tl.load(tmp_path / "model.bin", "reference").config)
    assert state.grads.tensors["bqkv"][0].map().any()
    assert state.tokens.shape == (4, 6)  # no longer than the model's block


@pytest.mark.parametrize("how", [{"recompute": True}, {"precision": "bf16"}])
def test_how_a_run_was_computed_is_no_part_of_its_model(how, tmp_path):
    model = random_model(SIZES.replace(**how), dtype="float32")
    model.save(tmp_path / "run")
    for target in ("model.bin", "hf", "model.gguf"):
        convert(tmp_path / "run", tmp_path / target)
    for source in ("model.bin", "hf"):
        other = tl.load(tmp_path / source, "reference", dtype="float32")
        assert other.config == SIZES.replace(init="gpt2")
        assert all((other.params[name] == value).all() for name, value in model.params.items())
    state = FILES / "llmc_state.bin"
    result = tapeless("check", "run", "--state", state, "--engine", "reference", cwd=tmp_path)
    assert result.returncode == 1, result.stderr  # it is another model, but one that can be compared
    assert "FAILED: logits" in result.stdout


@pytest.mark.parametrize("shard", ["llmc_tokens_v1.bin", "llmc_tokens_v7.bin"])
def test_tokens_of_a_shard(shard, here):
    stream = golden.stream()
    sizes = ["--batch-size", "3", "--block-size", "4"]
    succeeds("convert", "llmc_v3.bin", "out.bin", "--state", "--data", FILES / shard, *sizes, cwd=here)
    tokens, targets = np.frombuffer((here / "out.bin").read_bytes()[1024:], "<i4", 24).reshape(2, 12)
    assert tokens.tolist() == stream[:12].tolist()
    assert targets.tolist() == stream[1:13].tolist()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, 20240326, "is no debug state of llm.c: it begins with 20240326, not 20240327"),
        (4, 3, "is a debug state of version 3; the versions known are 1, 2"),
        (8, 0, "a batch of 0 × 5 tokens"),
        (8, 3, "does not fit this model: 12,876 bytes, but with 3 × 5 tokens its state has 13,136"),
        (8, 1, "does not fit this model: 12,876 bytes, but with 1 × 5 tokens its state has 12,616"),
        (12, 7, "has texts of 7 tokens, but the model's block is 6"),
        (1024, V, "has tokens that the model does not know: expected ids from 0 to 10"),
        (1028, -1, "has tokens that the model does not know"),
    ],
)
def test_states_that_are_spoilt(offset, value, words, here, refusal):
    spoil(here / "llmc_state.bin", offset, value, "<i4")
    assert words in refusal("check", "llmc_v3.bin", "--state", "llmc_state.bin")


def test_the_state_of_another_model(here, refusal):
    random_model(SIZES.replace(n_layer=1)).save(here / "run")
    error = refusal("check", "run", "--state", "llmc_state.bin")
    assert "llmc_state.bin does not fit this model: 12,876 bytes" in error
    assert error.endswith("It may belong to another model.")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_a_pipe_is_not_waited_for(here):
    os.mkfifo(here / "pipe")
    error = refused("check", "llmc_v3.bin", "--state", "pipe", cwd=here)
    assert "cannot read pipe: it is no regular file" in error


def test_states_that_are_none(here):
    (here / "short").write_bytes(bytes(900))
    with pytest.raises(RunError, match="truncated"):
        llmc.open_state(here / "short", SIZES)
    assert "No such file" in refused("check", "llmc_v3.bin", "--state", "none.bin", cwd=here)
    assert "Is a directory" in refused("check", "llmc_v3.bin", "--state", ".", cwd=here)
    tl.GPT(tl.presets["microgpt"].model.replace(vocab_size=9), 0, "reference").save(here / "run")
    error = refused("check", "run", "--state", "llmc_state.bin", cwd=here)
    assert "not GPT-2's architecture" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--block-size", "7"], "block_size must be a whole number from 1 to 6"),
        (["--batch-size", "0"], "batch_size must be a whole number from 1"),
        (["--seed", "-1"], "seed must be"),
        (["--to", "hf"], "leave --to and --dtype out"),
        (["--dtype", "bf16"], "leave --to and --dtype out"),
        (["--data", "llmc_v1.bin"], "is an llm.c model; expected token ids"),
        (["--data", "none.bin"], "none.bin is no file; expected token ids"),
        (["--data", "shard.bin"], "has 3 tokens; expected 25 at least"),
        (["--data", "large.bin"], "has the token 400 at position 0; the vocabulary has 11 tokens"),
    ],
)
def test_states_that_cannot_be_written(arguments, words, here, refusal):
    (here / "shard.bin").write_bytes(golden.header(20240520, 1, 3) + bytes(6))
    (here / "large.bin").write_bytes(golden.header(20240520, 1, 99) + np.full(99, 400, "<u2").tobytes())
    assert words in refusal("convert", "llmc_v3.bin", "out.bin", "--state", *arguments)
    assert not (here / "out.bin").exists()


@pytest.mark.parametrize("target", ["out.gguf", "out.safetensors"])
def test_a_state_is_not_called_something_else(target, here, refusal):
    assert "cannot be a debug state of llm.c" in refusal("convert", "llmc_v3.bin", target, "--state")
    assert not (here / target).exists()


def test_options_of_a_preset_do_not_go_with_a_state(here):
    error = refused("check", "llmc_v3.bin", "--state", "llmc_state.bin", "--set", "n_layer=1", cwd=here)
    assert "leave --set, --report, --entries and --all out" in error
