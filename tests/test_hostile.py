"""Files that are not what they seem: every reader succeeds or says so in a line, and takes no memory on a
file's word. The readers, and how their files are changed, are those of fuzz/, which does this for longer."""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file

import tapeless as tl
from commands import tapeless
from tapeless.data.tokenizers import read_tokenizer, tokenizer_from_dict
from tapeless.errors import ConfigError, DataError, RunError
from tapeless.io import runs, safetensors
from tapeless.settings import read_toml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "fuzz"))
targets = importlib.import_module("targets")
fuzzing = importlib.import_module("run")
NAMES = sorted(targets.TARGETS)
CORPUS = sorted(path for path in (ROOT / "fuzz" / "corpus").glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def folder():
    place = targets.place()
    yield place
    shutil.rmtree(place)


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_are_read(name, folder):
    seeds = targets.TARGETS[name].seeds(folder)
    assert seeds
    for data in seeds:
        assert targets.check(name, data, folder)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_a_fault_once(path, folder):
    targets.check(path.parent.name, path.read_bytes(), folder)


def few(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, suppress_health_check=checks)


def changed(name, folder, data, many):
    """A whole file changed in some places, and cut off somewhere."""
    target = targets.TARGETS[name]
    content = data.draw(st.sampled_from(target.seeds(folder)))
    for seed in data.draw(st.lists(st.integers(0, 2**32), min_size=1, max_size=many)):
        content = targets.change(target.kind, content, random.Random(seed))
    cut = data.draw(st.integers(0, 2 * len(content)))
    return content[:cut] if cut < len(content) else content


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@few(40)
def test_changed_files(name, folder, data):
    targets.check(name, changed(name, folder, data, 4), folder)


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@few(1500)
def test_many_changed_files(name, folder, data):
    targets.check(name, changed(name, folder, data, 12), folder)


@pytest.mark.parametrize("name", NAMES)
@given(content=st.binary(max_size=300))
@few(30)
def test_any_bytes(name, folder, content):
    targets.check(name, content, folder)


def test_all_targets_are_fuzzed():
    assert sorted(fuzzing.NAMES) == NAMES


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("text", ["a\nb", "\x1b[31mred\x07", "\ud800", "x" * 10**6, "a\u2028b", "\0"])
def test_messages_are_one_short_line(text):
    message = str(RunError(f"cannot read {text}."))
    assert message.isprintable()
    assert len(message) <= 2001  # with the ellipsis


# ---------------------------------------------------------------- headers that lie


def limited(megabytes):
    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20,) * 2)

    return limit


LIES = {
    "vocabulary": {"vocab_size": 2**31 - 1},
    "layers": {"n_layer": 10**9},
    "width": {"n_embd": 2**30, "n_head": 1},
    "block": {"block_size": 2**31 - 1},
    "all": {"vocab_size": 2**31 - 1, "n_layer": 2**20, "n_embd": 2**20, "block_size": 2**20},
    "what a config may say": {"vocab_size": 2**24, "n_embd": 2**10, "n_layer": 2**10},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    tl.train(engine="reference", steps=2, samples=0, out=folder, progress=False)
    shutil.rmtree(folder / "checkpoints")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(
    "command", [("sample", "run"), ("eval", "run", "names"), ("convert", "run", "out", "--to", "run")]
)
def test_a_config_that_lies_takes_no_memory(lie, command, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    about = json.loads((copy / "config.json").read_text())
    about["model"] |= LIES[lie] | ({"n_hidden": 4 * LIES[lie]["n_embd"]} if "n_embd" in LIES[lie] else {})
    (copy / "config.json").write_text(json.dumps(about))
    done = tapeless(*command, cwd=tmp_path, preexec_fn=limited(3000))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "not enough memory" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
def test_headers_that_lie_take_no_memory(tmp_path):
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, 3, 1024, 2**31 - 1, 2**20, 1, 2**30, 2**31 - 1
    (tmp_path / "model.bin").write_bytes(header.tobytes() + bytes(64))
    header[:3] = 20240520, 1, 2**31 - 1
    (tmp_path / "tokens.bin").write_bytes(header.tobytes() + bytes(64))
    for command in (("sample", "model.bin"), ("train", "tokens.bin", "--preset", "gpt2")):
        done = tapeless(*command, cwd=tmp_path, preexec_fn=limited(3000))
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
def test_resuming_takes_no_memory_on_a_configs_word(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    about = json.loads((copy / "config.json").read_text())
    about["model"] |= {"n_layer": 20_000, "n_embd": 32, "n_hidden": 128}
    (copy / "config.json").write_text(json.dumps(about))
    arguments = ("train", "--resume", "--out", "run", "--steps", 9)
    done = tapeless(*arguments, cwd=tmp_path, preexec_fn=limited(3000))
    assert done.returncode == 2, done.stderr
    assert "state.safetensors has" in done.stderr


def test_the_length_of_a_safetensors_header_is_not_believed(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for length in (2**63, 2**40, 10**9):
        (copy / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(RunError, match="damaged or truncated"):
            tl.load(copy, "reference")


# ---------------------------------------------------------------- what bytes changed at random do not find


def resumed(run, place, **numbers):
    """Resume a copy of the run with other numbers in its state."""
    copy = shutil.copytree(run, place)
    state = {name: np.array(t.map()) for name, t in safetensors.open_file(copy / "state.safetensors").items()}
    for name, value in numbers.items():
        state[name.replace("rng_", "rng.")][...] = value
    runs.write_content(copy / "state.safetensors", runs.content_of_tensors(state))
    return tl.train(out=copy, resume=True, steps=4, samples=0, progress=False)


@pytest.mark.parametrize("best", [np.nan, np.inf, -np.inf])
def test_a_best_score_that_is_none(best, run, tmp_path):
    with pytest.raises(RunError, match="best score or random state is invalid"):
        resumed(run, tmp_path / "run", best=best)


@pytest.mark.parametrize(("preset", "words"), [("esp32gpt", 0), ("transformerlm", 2**32 - 1)])
def test_a_random_state_that_is_none(preset, words, tmp_path):
    tl.train(preset=preset, engine="reference", steps=2, samples=0, out=tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(RunError, match="random state is invalid"):
        resumed(tmp_path / "run", tmp_path / "copy", rng_words=words)


def test_a_state_whose_numbers_do_not_fit(run, tmp_path):
    """It may be of another engine: float64's are rounded, but not to infinity."""
    copy = shutil.copytree(run, tmp_path / "run")
    for value in (0.1, -1e300):
        state = {
            name: np.array(t.map()) for name, t in safetensors.open_file(copy / "state.safetensors").items()
        }
        assert state["params"].dtype == np.float64
        state["params"][7] = value
        runs.write_content(copy / "state.safetensors", runs.content_of_tensors(state))
        more = {"steps": 4, "samples": 0, "progress": False, "engine": "reference", "dtype": "float32"}
        if value == 0.1:
            assert tl.train(out=copy, resume=True, **more).model.engine.dtype == np.float32
            shutil.rmtree(copy)
            shutil.copytree(run, copy)
        else:
            with pytest.raises(RunError, match=r"params holds -1e\+300, which does not fit in float32"):
                tl.train(out=copy, resume=True, **more)


@pytest.mark.parametrize("table", ["model", "training"])
def test_a_setting_that_is_missing_or_unknown(table, run, tmp_path):
    """No default stands in for what a run's config does not say; older versions had fewer settings."""
    copy = shutil.copytree(run, tmp_path / "run")
    whole = json.loads((copy / "config.json").read_text())
    more = {"steps": 3, "samples": 0, "progress": False}
    later = {
        "model": ["attention_tile", "recompute", "precision"],
        "training": ["bad_steps", "spike", "token_dtype"],
    }[table]
    for name in whole[table]:
        about = whole | {table: {key: value for key, value in whole[table].items() if key != name}}
        (copy / "config.json").write_text(json.dumps(about))
        if name in later:
            runs.read_config(copy)
        else:
            with pytest.raises(RunError, match=rf"config\.json does not describe.*: {name} is missing"):
                tl.train(out=copy, resume=True, **more)
    (copy / "config.json").write_text(json.dumps(whole | {table: whole[table] | {"gated": True}}))
    with pytest.raises(RunError, match="this version has no setting 'gated'"):
        tl.train(out=copy, resume=True, **more)
    old = {name: value for name, value in whole[table].items() if name not in later}
    (copy / "config.json").write_text(json.dumps(whole | {table: old}))
    assert len(tl.train(out=copy, resume=True, **more).losses) == 1


def test_byte_order_marks_in_a_run(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    expected = tl.load(copy, "reference").generate(n=2, seed=3)
    for path in copy.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert tl.load(copy, "reference").generate(n=2, seed=3) == expected
    assert len(tl.train(out=copy, resume=True, steps=3, samples=0, progress=False).losses) == 1


def test_byte_order_marks_in_toml(tmp_path):
    (tmp_path / "my.toml").write_bytes(b'\xef\xbb\xbflr = 0.25\n[model]\nnorm = "rms"\n')
    assert read_toml(tmp_path / "my.toml") == {"lr": 0.25, "norm": "rms"}
    (tmp_path / "my.toml").write_text("lr = 0.25", encoding="utf-16")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(tmp_path / "my.toml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and FIFOs")
def test_a_lock_that_is_something_else(tmp_path):
    """A run from elsewhere may hold a link to any file of the user's, which is not to be emptied."""
    tl.train(engine="reference", steps=2, samples=0, out=tmp_path / "run", progress=False)
    (tmp_path / "mine").write_text("precious")
    arguments = ("train", "--resume", "--out", "run", "--steps", 3, "--samples", 0)
    (tmp_path / "run/.lock").symlink_to(tmp_path / "mine")
    assert tapeless(*arguments, cwd=tmp_path).returncode == 2
    assert (tmp_path / "mine").read_text() == "precious"
    (tmp_path / "run/.lock").unlink()
    os.mkfifo(tmp_path / "run/.lock")
    done = tapeless(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot write run: .lock is no regular file" in done.stderr


@pytest.mark.parametrize("setting", ["steps", "lr", "order", "bias", "seed"])
def test_numbers_of_any_length_in_toml(setting, tmp_path):
    (tmp_path / "my.toml").write_text(f"{setting} = 0x{'f' * 6000}")
    with pytest.raises(ConfigError, match="64 bits"):
        read_toml(tmp_path / "my.toml")


def test_keys_within_keys_in_toml(tmp_path):
    (tmp_path / "my.toml").write_text(".".join("a" * 20_000) + " = 1")
    with pytest.raises(ConfigError, match="too long for settings"):
        read_toml(tmp_path / "my.toml")


@pytest.mark.parametrize("between", [0, 4, -4], ids=["as it should be", "a hole", "overlapping"])
def test_tensors_that_do_not_follow_each_other(between, tmp_path):
    """The safetensors library is the judge of what is whole."""
    begin = 8 + between
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [begin, begin + 8]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(begin + 8))
    if not between:
        assert load_file(path).keys() == safetensors.open_file(path).keys() == {"a", "b"}
        return
    with pytest.raises(SafetensorError):
        load_file(path)
    with pytest.raises(RunError, match="is damaged or truncated"):
        safetensors.open_file(path)


def test_layers_of_any_number(tmp_path):
    model = shutil.copytree(targets.GOLDEN / "huggingface", tmp_path / "hf")
    content = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[f"h.{'9' * 5000}.x"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    rest = content[8 + length :]
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + rest)
    with pytest.raises(RunError, match=r"'h\.9999"):
        tl.load(model, "reference")


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "b"}},
        {"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 4}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}},
        {"model": {"continuing_subword_prefix": "##########"}},
    ],
)  # fmt: skip
def test_tokenizers_that_make_their_library_panic(change, tmp_path):
    about = json.loads(targets.TARGETS["tokenizer"].seeds(tmp_path)[0])
    change = change | ({"model": about["model"] | change["model"]} if "model" in change else {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(about | change))
    with pytest.raises(DataError, match="tokenizer"):
        read_tokenizer(tmp_path / "tokenizer.json").encode("a" * 50 + "!")


def test_a_token_longer_than_llmcs_file_can_hold():
    tokens = [*map(chr, range(256)), "aa", "a" * 10_000]
    with pytest.raises(DataError, match="not a tokenizer"):
        tokenizer_from_dict({"type": "table", "tokens": tokens, "bos": None})


def test_names_in_a_config_do_not_write_to_the_terminal(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"preset": "\x1b]0;title\x07"}))
    arguments = ("train", "--resume", "--out", "run", "--steps", 3, "--samples", 0)
    done = tapeless(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a FIFO")
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints/model.safetensors", "checkpoints/config.json"]
)
def test_pipes_in_a_run_are_not_waited_for(name, tmp_path):
    tl.train(engine="reference", steps=2, samples=0, out=tmp_path / "run", progress=False)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    path = newest / Path(name).name if "/" in name else tmp_path / "run" / name
    path.unlink()
    os.mkfifo(path)
    if "/" in name:  # the one before is taken
        assert tapeless("sample", "run", "-n", 1, cwd=tmp_path).returncode == 0
    else:
        arguments = ("train", "--resume", "--out", "run", "--steps", 3, "--samples", 0)
        done = tapeless(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "no regular file" in done.stderr


# ---------------------------------------------------------------- code


FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "code", "pty"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "np.load", "numpy.load", "__import__"}


def test_nothing_in_the_source_runs_what_a_file_says():
    """No pickle, eval, or shell: by the syntax of every module."""
    seen = 0
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not {name.split(".")[0] for name in names} & FORBIDDEN_MODULES, path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in FORBIDDEN_CALLS, f"{path}: {called}"
                shell = [k for k in node.keywords if k.arg in ("shell", "allow_pickle")]
                assert not shell, f"{path}: {ast.unparse(node)}"
                seen += 1
    assert seen > 1000


@pytest.mark.skipif(os.name == "nt", reason="looks for a file made by a shell")
def test_names_are_not_taken_for_commands(tmp_path):
    name = "$(touch harm);`touch harm`|touch harm.txt"
    (tmp_path / name).write_text("emma\nanna\n")
    options = ("--engine", "reference", "--steps", 2, "--samples", 1, "--out", f"run {name}")
    assert tapeless("train", name, *options, cwd=tmp_path).returncode == 0
    assert tapeless("sample", f"run {name}", "-n", 1, cwd=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {name, f"run {name}"}
