"""Settings: from options, --set, TOML and presets, in that order; and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tapeless as tl
from commands import refused, succeeds
from tapeless.config import GPTConfig
from tapeless.errors import ConfigError
from tapeless.presets import changed_by
from tapeless.settings import Training, describe, names, parse_setting, read_toml

QUICK = ("--engine", "reference", "--samples", "0", "--out", "run")


def saved(folder):
    """What a run was trained with: model and training settings together."""
    config = json.loads((folder / "run/config.json").read_text())
    return config["model"] | config["training"]


@pytest.mark.parametrize(
    "toml",
    [
        'steps = 3\nn_embd = 8\nlr = 1\nschedule = "cosine"\nnorm_final = true\n',
        '[training]\nsteps = 3\nlr = 1\nschedule = "cosine"\n[model]\nn_embd = 8\nnorm_final = true\n',
        'steps = 3\n[training]\nlr = 1.0\nschedule = "cosine"\n[model]\nn_embd = 8\nnorm_final = true\n',
    ],
    ids=["flat", "tables", "both"],
)
def test_a_file_of_settings(toml, tmp_path):
    (tmp_path / "my.toml").write_text(toml)
    succeeds("train", *QUICK, "--config", "my.toml", cwd=tmp_path)
    used = saved(tmp_path)
    assert (used["steps"], used["n_embd"], used["lr"], used["schedule"]) == (3, 8, 1.0, "cosine")
    assert used["norm_final"] is True
    assert used["beta1"] == 0.85  # the preset's


def test_options_go_before_set_before_the_file_before_the_preset(tmp_path):
    (tmp_path / "my.toml").write_text("steps = 5\nbatch_size = 5\nblock_size = 5\nbeta1 = 0.5\n")
    succeeds(
        "train", *QUICK, "--config", "my.toml", "--set", "batch_size=4", "--set", "block_size=4",
        "--set", "steps=4", "--steps", "3", "--block-size", "3", cwd=tmp_path,
    )  # fmt: skip
    used = saved(tmp_path)
    names = ("steps", "block_size", "batch_size", "beta1", "beta2")
    assert [used[name] for name in names] == [3, 3, 4, 0.5, 0.99]


def test_every_hyper_parameter_can_be_set(tmp_path):
    values = {
        "warmup_steps": 2, "min_lr": 1e-4, "weight_decay": 0.2, "grad_clip": 0.5, "eps": 1e-6,
        "val_fraction": 0.2, "eval_every": 2, "eval_batches": 3, "sample_every": 2, "window": 9,
        "optimiser": "adamw", "order": "draw", "temperature": 1.5, "max_tokens": 3,
    }  # fmt: skip
    pairs = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    succeeds("train", *QUICK, "--steps", "4", *pairs, cwd=tmp_path)
    used = saved(tmp_path)
    assert {name: used[name] for name in values} == values


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("n_emb = 8", ["no setting is called 'n_emb'", "Did you mean 'n_embd'?"]),
        ("[model]\nn_emb = 8", ["no setting is called 'n_emb'", "Did you mean 'n_embd'?"]),
        ("[model]\nlr = 8", ["lr is a setting of [training], not of [model]"]),
        ("[training]\nn_embd = 8", ["n_embd is a setting of [model], not of [training]"]),
        ("[optimiser]\nlr = 8", ["no table is called [optimiser]", "[model] or [training]"]),
        ("optimizer = 'sgd'", ["no setting is called 'optimizer'", "Did you mean 'optimiser'?"]),
        ("model = 3", ["model must be a table"]),
        ("lr = 1\n[training]\nlr = 2", ["lr is there twice"]),
        ("lr = \nsteps = 3", ["is not TOML", "line 1"]),
        ("lr = 1\nlr = 2", ["is not TOML"]),
        ("steps = 2.5", ["steps must be a whole number"]),
        ("steps = '3'", ["steps must be a whole number"]),
        ("lr = 'fast'", ["lr must be a number"]),
        ("lr = nan", ["lr must be a number"]),
        ("order = 3", ["order cannot be 3"]),
        ("tied = 1", ["tied must be true or false"]),
        (b"lr = 1 # \xff", ["is not TOML"]),
    ],
)
def test_mistakes_in_a_file(toml, words, tmp_path):
    (tmp_path / "my.toml").write_bytes(toml if isinstance(toml, bytes) else toml.encode())
    error = refused("train", *QUICK, "--config", "my.toml", cwd=tmp_path)
    assert error.startswith("error: my.toml")
    assert all(word in error for word in words), error
    assert [path.name for path in tmp_path.iterdir()] == ["my.toml"]


def test_a_mistake_elsewhere_does_not_name_the_file(tmp_path):
    (tmp_path / "my.toml").write_text("steps = 2.5\nlr = 1")
    error = refused("train", *QUICK, "--config", "my.toml", "--steps", "0", cwd=tmp_path)
    assert error.startswith("error: steps must be a whole number")


@pytest.mark.parametrize("toml", ["seed = 7", "[training]\nseed = 7"])
def test_the_seed_may_stand_in_the_file(toml, tmp_path):
    (tmp_path / "my.toml").write_text(f"{toml}\nsteps = 1")
    succeeds("train", *QUICK, "--config", "my.toml", cwd=tmp_path)
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 7
    again = ("train", *QUICK, "--overwrite", "--config", "my.toml")
    succeeds(*again, "--seed", "8", cwd=tmp_path)
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 8
    (tmp_path / "my.toml").write_text("seed = -1")
    assert "my.toml: seed must be a whole number" in refused(*again, cwd=tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a FIFO")
def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    os.mkfifo(tmp_path / "fifo.bin")
    (tmp_path / "text.txt").write_text("emma\n")
    tokenize = ("tokenize", "text.txt", "--out", "data", "--tokenizer")
    for arguments in (
        ("train", "fifo"), ("train", "fifo.bin"), ("train", "--val", "fifo"), ("train", "--config", "fifo"),
        ("train", "--pretrained", "fifo"), (*tokenize, "fifo"), ("tokenize", "fifo", *tokenize[2:], "chars"),
    ):  # fmt: skip
        error = refused(*arguments, *(QUICK if arguments[0] == "train" else ()), cwd=tmp_path)
        assert "fifo" in error
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "fifo.bin", "text.txt"}


def test_a_file_that_cannot_be_read(tmp_path):
    assert "no settings file 'my.toml'" in refused("train", "--config", "my.toml", cwd=tmp_path)
    assert "cannot read ." in refused("train", "--config", ".", cwd=tmp_path)


def test_an_unknown_name_in_a_file_names_the_file(tmp_path):
    (tmp_path / "my.toml").write_text("n_emb = 3")
    with pytest.raises(ConfigError, match=r"my\.toml: no setting"):
        read_toml(tmp_path / "my.toml")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"val_fraction": 1.0}, "val_fraction must be a number at least 0 and below 1"),
        ({"eval_every": -1}, "eval_every must be a whole number"),
        ({"total_batch_tokens": 64}, "total_batch_tokens counts the tokens of windows"),
        ({"window": 17}, "window must be at most the model's block_size, 16, not 17"),
        ({"eval_every": 5}, "eval_every=5 needs data to validate on"),
        ({"val_fraction": 1e-9}, "too short to hold out"),
        ({"order": "sequence", "val_fraction": 0.99999999}, "too short to hold out"),
    ],
)
def test_settings_that_cannot_work(wrong, words):
    with (
        pytest.raises(ConfigError, match=words)
        if "too short" not in words
        else pytest.raises(tl.TapelessError, match=words)
    ):
        tl.train(set=wrong, engine="reference", steps=3, samples=0, progress=False)


def test_a_step_in_several_batches_is_whole():
    t = Training(order="windows", batch_size=4, total_batch_tokens=512)
    assert t.batches(64) == 2
    assert Training(order="windows", batch_size=4).batches(64) == 1
    for tokens in (128, 300, 700):
        t = Training(order="windows", batch_size=4, total_batch_tokens=tokens)
        with pytest.raises(ConfigError, match=rf"multiple of .* 4 × 64 = 256 tokens, not {tokens}"):
            t.batches(64)


# ---------------------------------------------------------------- what is told about them


def test_every_setting_is_described():
    for name in names():
        one = describe(name)
        assert re.fullmatch(r"[A-Za-z].*\.", one.about), name
        where = GPTConfig if one.table == "model" else Training
        assert one.about.split()[0] in where.__doc__
        assert f"    {name} (" in where.__doc__
        if one.default != "from the data":  # and its default is one of its values, as they are written
            assert parse_setting(name, one.default) == getattr(where, name)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "activation",
            ["values +relu, gelu", "default +relu", "gelu: transformerlm, shakespeare-char, gpt2"],
        ),
        ("lr", ["values +at least 1e-30", "default +0.01", "0.003: transformerlm", r"table +\[training\]"]),
        ("n_embd", ["type +int", "values +at least 1", "64: transformerlm", r"table +\[model\]"]),
        ("val_fraction", ["at least 0, below 1", "0.1: shakespeare-char"]),
        ("tied", ["values +true, false", "default +false"]),
    ],
)
def test_one_setting(name, lines, tmp_path):
    out = succeeds("settings", name, cwd=tmp_path).stdout
    assert out.startswith(f"{name}: ")
    for line in lines:
        assert re.search(line, out), out


def test_the_list_of_settings(tmp_path):
    out = succeeds("settings", cwd=tmp_path).stdout
    assert max(map(len, out.splitlines())) <= 80
    listed = re.findall(r"^ (\w+)  ", out, re.MULTILINE)
    assert [name for name in listed if name in names()] == names()
    assert "Did you mean 'optimiser'?" in refused("settings", "optimizer", cwd=tmp_path)


def test_presets_that_change_a_setting():
    """As the presets themselves have it; what only follows from another setting is not counted."""
    assert changed_by("n_layer") == {
        "2": ["transformerlm"], "4": ["shakespeare-char"], "12": ["gpt2"], "24": ["gpt2-medium"],
        "36": ["gpt2-large"], "48": ["gpt2-xl"],
    }  # fmt: skip
    assert changed_by("n_hidden") == changed_by("n_streams") == changed_by("spike") == {}


def test_a_wrong_word_is_told_the_right_ones():
    for where in (GPTConfig, Training):
        words = {name: describe(name).values.split(", ") for name in names() if hasattr(where, name)}
        for name, values in words.items():
            if describe(name).type == "str":
                assert len(values) > 1
                with pytest.raises(ConfigError) as caught:
                    where(**{name: "zzz"})
                assert f"{name} cannot be 'zzz'. Expected one of: {', '.join(values)}." == str(caught.value)


def test_no_guess_misleads(tmp_path):
    """ "swiglu" is no slip of the fingers for "gelu"."""
    error = refused("train", "--set", "activation=swiglu", cwd=tmp_path)
    assert error == "error: activation cannot be 'swiglu'. Expected one of: relu, gelu."
    assert "Did you mean 'gelu'? Expected one of: relu, gelu." in refused(
        "train", "--set", "activation=gelU", cwd=tmp_path
    )


def test_the_page_on_settings_is_of_this_code():
    script = Path(__file__).parents[1] / "docs" / "settings.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
