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

import tapeless as tl
from commands import tapeless
from tapeless.errors import LONGEST, RunError

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
    for data in targets.TARGETS[name].seeds(folder):
        assert targets.check(name, data, folder)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_a_fault_once(path, folder):
    targets.check(path.parent.name, path.read_bytes(), folder)


def few(examples):
    return settings(
        max_examples=examples, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip


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
    assert len(message) <= LONGEST + 1


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
    "command", [("sample", "run"), ("eval", "run", "names"), ("convert", "run", "out", "--to", "tapeless")]
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


def test_the_length_of_a_safetensors_header_is_not_believed(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for length in (2**63, 2**40, 10**9):
        (copy / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(RunError, match="damaged or truncated"):
            tl.load(copy, "reference")


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
