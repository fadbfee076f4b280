"""The command line from outside: what it prints, and what it makes of mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import typer

from commands import (
    COMMAND,
    SMALL,
    bound_by_permissions,
    environment,
    on_a_terminal,
    refused,
    start,
    succeeds,
    tapeless,
    without_privileges,
)
from tapeless import __main__ as main
from tapeless.cli import app
from tapeless.errors import ConfigError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a short run in `run`."""
    folder = tmp_path_factory.mktemp("trained")
    succeeds("train", *SMALL, "--out", "run", cwd=folder)
    return folder


# ---------------------------------------------------------------- what it prints


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_commands(arguments, tmp_path):
    out = succeeds(*arguments, cwd=tmp_path).stdout
    assert all(word in out for word in ("train", "sample", "presets", "--version", "Usage: tapeless"))


@pytest.mark.parametrize(
    "command", ["train", "sample", "eval", "tokenize", "check", "budget", "convert", "export", "settings"]
)
def test_each_command_has_help_that_fits_the_terminal(command, tmp_path):
    out = succeeds(command, "--help", cwd=tmp_path).stdout
    assert f"Usage: tapeless {command}" in out
    assert max(map(len, out.splitlines())) <= 80
    about = out.partition("╭")[0].splitlines()[3:]
    broken = [
        line for line, after in pairwise(about) if line.strip() and after.strip() and len(line.rstrip()) < 40
    ]
    assert not broken, "a line of the docstring is too long to be shown as it is"


def test_commands_that_take_any_model_say_so(tmp_path):
    for command in ("train", "sample", "eval", "check", "budget", "convert", "export"):
        words = re.sub(r"[│\s]+", " ", succeeds(command, "--help", cwd=tmp_path).stdout)
        assert "run folder, a Hugging Face folder, an llm.c file, or a name on the hub." in words, command


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["gradient accumulation", "gradient checkpointing", "mixed precision"]),
        ("sample", ["nucleus", "greedy", "mixed precision"]),
        ("export", ["quantization"]),
        ("bench", ["MFU"]),
        ("check", ["gradcheck"]),
    ],
)
def test_help_has_the_words_that_people_search_for(command, words, tmp_path):
    out = re.sub(r"[│\s]+", " ", succeeds(command, "--help", cwd=tmp_path).stdout)
    assert all(word in out for word in words)


def test_help_tells_the_defaults(tmp_path):
    words = re.sub(r"[│\s]+", " ", succeeds("train", "--help", cwd=tmp_path).stdout)
    for default in ("names", "microgpt", "42", "cpu", "the preset's"):
        assert f"[default: {default}]" in words


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["tokenize", "--help"], ["nonsense"]]
)
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys; from tapeless.__main__ import run\n"
        f"run({arguments!r})\n"
        "heavy = {'numpy', 'numba', 'llvmlite', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment())


def test_version(tmp_path):
    import tapeless as tl

    assert succeeds("--version", cwd=tmp_path).stdout == f"tapeless {tl.__version__}\n"


def test_presets_fit_80_columns(tmp_path):
    from tapeless import presets

    out = succeeds("presets", cwd=tmp_path).stdout
    for name, preset in presets.items():
        assert re.search(rf"^ *{name} +[\d,]+( +\d+){{4}} *$", out, re.MULTILINE)
        assert re.search(rf"^ *{name} +{re.escape(preset.summary)}", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


def test_the_first_command_of_all(tmp_path):
    """Nothing given: microgpt on the built-in names."""
    result = succeeds("train", cwd=tmp_path)
    assert "microgpt: 4,192 parameters · names" in result.stderr
    assert len(result.stdout.splitlines()) == 20
    assert "tapeless sample runs/microgpt-1" in result.stderr


def test_training_speaks_plainly_into_a_pipe(tmp_path):
    result = succeeds("train", *SMALL, cwd=tmp_path)
    lines = result.stderr.splitlines()
    for word in ("microgpt", "4,192 parameters", "names", "20 steps", "reference engine"):
        assert word in lines[0]
    assert [line for line in lines if re.fullmatch(r"step [\d,]+/20: loss \d+\.\d{4} \(mean of 2\)", line)]
    assert "\x1b" not in result.stderr
    assert "\r" not in result.stderr
    assert lines[-1] == "Saved in runs/microgpt-1. More with: tapeless sample runs/microgpt-1"
    # Texts go to standard output, and nothing else does.
    samples = (tmp_path / "runs/microgpt-1/samples.txt").read_text()
    assert result.stdout == samples
    assert len(samples.splitlines()) == 2


def test_training_shows_a_bar_on_a_terminal(tmp_path):
    arguments = ["train", "--engine", "reference", "--steps", "1500", "--samples", "0", "--out", "run"]
    text = on_a_terminal(*arguments, cwd=tmp_path)
    assert re.search(
        r"step +\d+/1500 .*loss \d\.\d{4} \(mean of \d+\) [\d,]+ steps/s \d:\d\d:\d\d left", text
    )


def test_cut_documents_are_counted_once(tmp_path):
    (tmp_path / "long.txt").write_text("abcdefghijklmnop\nabcdefghijklmno\n" + "ab" * 40 + "\n")
    told = succeeds("train", "long.txt", *SMALL, cwd=tmp_path).stderr
    assert told.count("truncated") == 1
    assert "2 of 3 documents were longer than the context of 16 tokens and were truncated" in told
    assert "--preset shakespeare-char" in told
    told = succeeds("train", "long.txt", *SMALL, "--set", "block_size=17", cwd=tmp_path).stderr
    assert "1 of 3 documents was longer than the context of 17 tokens and was truncated" in told


def test_runs_are_numbered(tmp_path):
    for n in (1, 2):
        assert f"Saved in runs/microgpt-{n}." in succeeds("train", *SMALL, cwd=tmp_path).stderr
    (tmp_path / "runs/microgpt-7").mkdir()
    assert "Saved in runs/microgpt-8." in succeeds("train", *SMALL, cwd=tmp_path).stderr


def test_sampling(trained):
    out = succeeds("sample", "run", "-n", "3", "--prompt", "an", "--engine", "reference", cwd=trained).stdout
    assert len(out.splitlines()) == 3
    assert all(line.startswith("an") for line in out.splitlines())
    again = succeeds(
        "sample", "run", "-n", "3", "--prompt", "an", "--engine", "reference", cwd=trained
    ).stdout
    assert again == out
    other = succeeds("sample", "run", "-n", "9", "--seed", "1", "--engine", "reference", cwd=trained).stdout
    assert len(other.splitlines()) == 9


def test_a_reader_that_leaves_early_is_no_error(trained):
    sampling = start("sample", "run", "-n", "3000", "--engine", "reference", cwd=trained)
    assert sampling.stdout is not None
    assert sampling.stderr is not None
    sampling.stdout.close()
    assert sampling.stderr.read() == ""
    assert sampling.wait() == 141  # what a shell reports of programs that SIGPIPE ends


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output(trained):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, "sample", "run", "--engine", "reference"],
            cwd=trained, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False,
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines() == ["error: output: No space left on device."]


def test_texts_that_the_terminal_cannot_show(tmp_path):
    (tmp_path / "names.txt").write_text("Zoë\nŁucja\n愛\n", encoding="utf-8")
    narrow = environment(PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert succeeds("train", "names.txt", *SMALL, cwd=tmp_path, env=narrow).stdout


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "microgtp"], ["microgtp", "Did you mean 'microgpt'?"]),
        (["--engine", "cppu"], ["cppu", "Did you mean 'cpu'?"]),
        (["--dtype", "float16"], ["float32 or float64"]),
        (["--dtype", "float64"], ["float32", "reference"]),
        (["--set", "n_emb=3"], ["n_emb", "Did you mean 'n_embd'?"]),
        (["--set", "n_embd"], ["KEY=VALUE"]),
        (["--set", "n_embd=abc"], ["n_embd", "whole number", "abc"]),
        (["--set", "n_embd=17"], ["n_embd must be divisible by n_head", "17"]),
        (["--set", "n_embd=0"], ["n_embd", "from 1 to"]),
        (["--set", "n_head=-1"], ["n_head", "-1"]),
        (["--set", "n_embd=1000000"], ["GB of memory", "smaller"]),
        (["--set", "n_embd=1" + "0" * 40], ["n_embd", "from 1 to"]),
        (["--set", "block_size=16777216"], ["GB of memory"]),
        (["--set", "vocab_size=5"], ["vocab_size is 5", "27 tokens"]),
        (["--set", "norm=none"], ["norm_embed, norm_attn, norm_mlp are true"]),
        (["--set", "steps=0"], ["steps", "from 1 to"]),
        (["--set", "beta1=2"], ["beta1", "at least 0 and below 1"]),
        (["--set", "eps=-1"], ["eps", "at least 1e-30"]),
        (["--set", "lr=nan"], ["lr", "at least 1e-30", "nan"]),
        (["--set", "temperature=-1"], ["temperature", "at least 0"]),
        (["--set", "temperature=inf"], ["temperature", "inf"]),
        (["--set", "order=shufle"], ["shufle", "'shuffle'"]),
        (["--set", "max_tokens=100000000000"], ["max_tokens", "from 1 to"]),
        (["--set", "tied=maybe"], ["tied", "true or false"]),
        (["--steps", "-5"], ["steps", "-5"]),
        (["--steps", "9" * 30], ["steps", "from 1 to"]),
        (["--batch-size", "1000000000"], ["GB of memory"]),
        (["--batch-size", "0"], ["batch_size", "from 1 to"]),
        (["--samples", "1000000000000"], ["samples", "from 0 to"]),
        (["--seed", "-1"], ["seed", "from 0 to"]),
        (["--log-every", "0"], ["log_every"]),
        (["--steps", "1e3"], ["--steps", "integer", "tapeless train --help"]),
        (["--lr", "fast"], ["--lr", "tapeless train --help"]),
        (["--stepz", "3"], ["--stepz", "tapeless train --help"]),
        (["names", "names"], ["unexpected", "tapeless train --help"]),
        (["--resume"], ["no run", "--out"]),
        (["--resume", "--out", "nowhere"], ["no run folder", "nowhere"]),
        (["--resume", "--overwrite", "--out", "nowhere"], ["resume", "overwrite"]),
        (["nowhere.txt"], ["nowhere.txt", "one document a line", "names"]),
        ([""], ["DATA is empty"]),
    ],
)
def test_mistakes_in_training_are_refused_at_once(arguments, words, tmp_path):
    error = refused("train", *arguments, cwd=tmp_path)
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["no run folder", "nowhere"]),
        (["."], ["config.json", "not a run folder"]),
        (["run", "--prompt", "Ann"], ["'A'", "abcdefghijklmnopqrstuvwxyz"]),
        (["run", "--engine", "gpu"], ["gpu", "cpu"]),
        (["run", "-n", "0"], ["n must be", "from 1 to"]),
        (["run", "-n", "1" + "0" * 12], ["n must be", "from 1 to"]),
        (["run", "--max-tokens", "1" + "0" * 12], ["max_tokens", "from 1 to"]),
        (["run", "--temperature", "-1"], ["temperature", "at least 0"]),
        (["run", "--temperature", "nan"], ["temperature", "nan"]),
        (["run", "--top-k", "-1"], ["top_k", "from 0 to"]),
        (["run", "--top-p", "0"], ["top_p", "above 0 and at most 1"]),
        (["run", "--seed", "-3"], ["seed"]),
        ([], ["MODEL", "tapeless sample --help"]),
    ],
)
def test_mistakes_in_sampling(arguments, words, trained):
    error = refused("sample", *arguments, cwd=trained)
    assert all(word in error for word in words), error


def test_an_unknown_command(tmp_path):
    assert "Did you mean 'train'?" in refused("trian", cwd=tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty or has only blank lines"),
        (b"\n \r\n\t\n", "empty or has only blank lines"),
        (bytes(range(128)), "is not text: it holds null bytes"),
        (b"emma\n\xff\xfe\xfa\n", "not UTF-8 text (byte 5)"),
        ("emma\n".encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_data_that_is_no_text(content, words, tmp_path):
    (tmp_path / "data.txt").write_bytes(content)
    error = refused("train", "data.txt", cwd=tmp_path)
    assert words in error
    assert "data.txt" in error


def test_data_that_is_no_file(tmp_path):
    assert "is a folder" in refused("train", tmp_path, cwd=tmp_path)
    if os.path.exists("/dev/zero"):
        assert "no regular file" in refused("train", "/dev/zero", cwd=tmp_path)


@bound_by_permissions
def test_data_without_permission(tmp_path):
    (tmp_path / "data.txt").write_text("emma\n")
    (tmp_path / "data.txt").chmod(0)
    assert "Permission denied" in refused("train", "data.txt", cwd=tmp_path, preexec_fn=without_privileges)


def test_letters_need_letters(tmp_path):
    (tmp_path / "data.txt").write_text("愛\n123\n", encoding="utf-8")
    error = refused("train", "data.txt", "--preset", "esp32gpt", cwd=tmp_path)
    assert "no document holds a character that the tokenizer knows" in error


@pytest.mark.parametrize(("preset", "seed"), [("esp32gpt", 0), ("microgpt", 2**63 - 1)])
def test_the_ends_of_the_range_of_seeds(preset, seed, tmp_path):
    result = tapeless("train", *SMALL, "--preset", preset, "--seed", seed, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def every_value():
    """Each argument and option of every command that takes a value."""
    for name, command in typer.main.get_command(app).commands.items():
        required = [p for p in command.params if p.required]
        for parameter in command.params:
            if getattr(parameter, "is_flag", False) or parameter.name == "help":
                continue
            yield pytest.param(name, command, parameter, required, id=f"{name}-{parameter.name}")


@pytest.mark.parametrize(("name", "command", "parameter", "required"), list(every_value()))
def test_no_value_may_be_empty(name, command, parameter, required, tmp_path, monkeypatch):
    """As a path, each would be the present folder. Only a prompt may be."""
    monkeypatch.chdir(tmp_path)
    words = []
    for each in dict.fromkeys([*required, parameter]):
        value = "" if each is parameter else "x"
        words += [value] if each.param_type_name == "argument" else [each.opts[0], value]
    if parameter.name == "prompt":
        assert main.run([name, *words]) == 2  # there is no x
        return
    with pytest.raises(ConfigError, match="is empty: give a value, or leave it out"):
        command.make_context(name, list(words))
    assert not list(tmp_path.iterdir())


def test_pretrained_without_a_value_is_the_preset(tmp_path):
    error = refused("train", "names", "--preset", "microgpt", "--pretrained", cwd=tmp_path)
    assert "no run folder or model 'microgpt'" in error
