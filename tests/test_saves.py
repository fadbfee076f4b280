"""Checkpoints: whole or not there, checked, and one to fall back to; and who may write into a run folder."""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import warnings
from contextlib import ExitStack

import numpy as np
import pytest
from safetensors.numpy import load_file

import pauses
import tapeless as tl
from commands import (
    SMALL,
    bound_by_permissions,
    contents,
    refused,
    signals,
    succeeds,
    without_privileges,
)
from tapeless.errors import Notice, RunError
from tapeless.io import folders, lock
from test_runs import interrupt, killed_at_last, losses
from test_training import StopAt, lasting

training = importlib.import_module("tapeless.train")
QUIET = {"engine": "reference", "progress": False}
HELD = {"n_embd": 8, "val_fraction": 0.01, "eval_every": 20, "eval_batches": 1, "sample_every": 2}
CHANGES = ("replace", "unlink", "rmdir", "mkdir", "link", "fsync")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def checkpoints(folder):
    """The oldest first."""
    return sorted((folder / "checkpoints").glob("[!.]*"))


def steps(folder):
    return [int(path.name.split("-step-")[1]) for path in checkpoints(folder)]


def newest(folder):
    return checkpoints(folder)[-1]


def params(folder):
    return load_file(folder / "model.safetensors")["wte"]


def save_always(monkeypatch):
    """After every step."""
    for name, value in (("CHUNK_SECONDS", 0.0), ("SAVE_SECONDS", 0.0), ("SAVE_SHARE", 1e9)):
        monkeypatch.setattr(training, name, value)


def finish(folder, **options):
    """Go on to the end, if that is not done."""
    assert failure(folder, **options) == ""


def failure(folder, **options):
    """What going on with a run fails with."""
    try:
        tl.train(out=folder, resume=True, progress=False, **options)
    except RunError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of 25 steps, interrupted and saved after 12 and after 20, with a model that was the best."""
    folder = tmp_path_factory.mktemp("saves") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(training, "CHUNK_SECONDS", 0.0)
        with pytest.raises(tl.Interrupted):
            tl.train(out=folder, engine="reference", steps=25, samples=1, set=HELD, progress=StopAt(12))
        with pytest.raises(tl.Interrupted):
            tl.train(out=folder, resume=True, progress=StopAt(20))
    assert steps(folder) == [12, 20]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, with nothing in its way."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    tl.train(out=folder, steps=25, samples=1, set=HELD, **QUIET)
    return folder


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


# ---------------------------------------------------------------- what is saved


def test_the_files_at_the_top_are_the_newest_checkpoint(run):
    tl.train(out=run, resume=True, progress=False)
    assert steps(run) == [20, 25]
    manifest = json.loads((newest(run) / "manifest.json").read_text())
    assert manifest["step"] == 25
    assert manifest["logs"]["metrics.jsonl"] == (run / "metrics.jsonl").stat().st_size
    assert manifest["logs"]["samples.jsonl"] < (run / "samples.jsonl").stat().st_size  # the last come later
    assert {p.name for p in newest(run).iterdir()} == {*manifest["files"], "manifest.json"}
    for name, about in manifest["files"].items():
        assert (run / name).samefile(newest(run) / name)
        assert (run / name).stat().st_size == about["bytes"]
    # A checkpoint is a run folder of its own.
    assert np.array_equal(tl.load(newest(run), "reference").params["wte"], params(run))


def test_how_many_are_kept(tmp_path, monkeypatch):
    save_always(monkeypatch)
    told = succeeds("train", *SMALL, "--keep", "1", "--out", "one", cwd=tmp_path).stderr
    assert "note" not in told
    assert steps(tmp_path / "one") == [20]
    assert "keep must be a whole number from 1" in refused("train", *SMALL, "--keep", "0", cwd=tmp_path)
    folder = tmp_path / "run"
    tl.train(out=folder, steps=9, samples=0, keep=4, **QUIET)
    assert steps(folder) == [6, 7, 8, 9]
    tl.train(out=folder, resume=True, steps=12, progress=False)  # it is still asked for
    assert steps(folder) == [9, 10, 11, 12]
    tl.train(out=folder, resume=True, steps=14, keep=2, progress=False)
    assert steps(folder) == [13, 14]


def test_runs_of_older_versions(run, whole):
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "best/checkpoints")
    config = json.loads((run / "config.json").read_text())
    del config["keep"]
    (run / "config.json").write_text(json.dumps(config))
    assert np.array_equal(tl.load(run, "reference").params["wte"], params(run))
    finish(run)
    assert lasting(run).keys() == lasting(whole).keys()
    assert lasting(run) == lasting(whole)


def test_a_model_saved_over_a_run_is_the_one_there(run):
    model = tl.GPT(tl.load(run, "reference").config, 5, "reference")
    model.save(run)
    assert np.array_equal(tl.load(run, "reference").params["wte"], model.params["wte"])
    assert "does not describe a training run" in refused("train", "--resume", "--out", run, cwd=run)
    assert not (run / "checkpoints").exists()


def test_what_else_lies_beside_checkpoints_stays(tmp_path):
    mine = tmp_path / "run/checkpoints"
    (mine / "mine-step-3").mkdir(parents=True)
    (mine / ".mine").write_text("mine")
    for options in ((), ("--overwrite",)):
        succeeds("train", *SMALL, *options, "--out", "run", cwd=tmp_path)
    tl.load(tmp_path / "run").save(tmp_path / "run")
    assert {path.name for path in mine.iterdir()} == {"mine-step-3", ".mine"}


def test_a_file_system_without_links(run, whole, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    finish(run)
    assert lasting(run) == lasting(whole)
    assert not (run / "state.safetensors").samefile(newest(run) / "state.safetensors")


# ---------------------------------------------------------------- damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WAYS = {
    "a bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
MANIFESTS = {
    "a list": "[]",
    "no files": '{"logs": {}}',
    "none of them": '{"files": {}, "logs": {}}',
    "sizes of text": '{"files": {"config.json": {"bytes": "3", "sha256": ""}}, "logs": {}}',
    "deep": "[" * 100_000,
}
FILES = ("config.json", "tokenizer.json", "model.safetensors", "state.safetensors", "manifest.json")
DAMAGE = [(name, way) for name in FILES for way in WAYS] + [("manifest.json", way) for way in MANIFESTS]


def spoil(path, way):
    if way in WAYS:
        WAYS[way](path)
    else:
        path.write_text(MANIFESTS[way])


@pytest.mark.parametrize(("name", "way"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(name, way, run, whole):
    """For what reads the file that is damaged; and going on ends with the same bytes as if nothing had been.
    A bit of a manifest may stand in what nothing depends on."""
    before, last = checkpoints(run)
    expected = params(last)
    spoil(last / name, way)
    (run / name).unlink(missing_ok=True)  # where a file has two names, both are damaged
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = tl.load(run, "reference")
    spoilt = name != "state.safetensors"
    assert len(told) == spoilt
    assert np.array_equal(model.params["wte"], params(before) if spoilt else expected)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        finish(run)
    spoilt = name != "model.safetensors"
    assert [message.category for message in told] == [Notice] * spoilt
    assert all(re.search(r"/0004-step-20.* is used\.$", str(message.message)) for message in told)
    assert lasting(run) == lasting(whole)
    assert steps(run) == [12, 25] if spoilt else [20, 25]


def test_what_is_said_about_damage(run, whole):
    flip(newest(run) / "state.safetensors")
    flip(newest(run) / "model.safetensors")
    why = "is damaged: its checksum is not the one it was saved with; what was saved after step 12 is used."
    for command, name in (("sample", "model"), ("train", "state")):
        options = ("-n", "1", "run") if command == "sample" else ("--resume", "--out", "run")
        told = succeeds(command, *options, "--engine", "reference", cwd=run.parent).stderr.splitlines()
        notes = [line for line in told if line.startswith("note: ")]
        assert notes == [f"note: run/checkpoints/0004-step-20/{name}.safetensors {why}"]
    assert lasting(run) == lasting(whole)


def test_nothing_to_fall_back_to(run):
    for path in (run / "checkpoints").iterdir():
        flip(path / "config.json")
    before = contents(run)
    for command in (("sample", "run"), ("train", "--resume", "--out", "run"), ("eval", "run")):
        error = refused(*command, cwd=run.parent)
        assert "0004-step-20/config.json is damaged: its checksum" in error
        assert "and so are the 1 before it: restore a copy of the run" in error
    assert contents(run) == before
    shutil.rmtree(run / "checkpoints/0003-step-12")
    assert "saved with: restore" in refused("sample", "run", cwd=run.parent)


def test_what_was_logged_when_the_machine_broke_down(run, whole):
    """Beyond what was saved there may be anything; within it may not."""
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 21, "loss": 1.0, "lr": 0.1}\n' + bytes(500) + b"\n\n")
    finish(run)
    assert lasting(run) == lasting(whole)
    content = bytearray((run / "metrics.jsonl").read_bytes())
    content[0] = 0
    (run / "metrics.jsonl").write_bytes(content)
    with pytest.raises(RunError, match="damaged in line 1: mend or remove it"):
        tl.train(out=run, resume=True, steps=26, progress=False)


# ---------------------------------------------------------------- killed, or refused by the system


def at_each_change(run, work, monkeypatch):
    """Call `work` in child processes on copies of `run`; in the first it ends at the first change made to
    files, in the second at the second, until it comes to its end. Yields each copy."""
    for calls in range(1, 10_000):
        copy = shutil.copytree(run, run.parent / "copy")
        child = os.fork()
        if not child:
            try:
                count = iter(range(calls))
                for name in CHANGES:
                    monkeypatch.setattr(os, name, killed_at_last(getattr(os, name), count))
                work(copy)
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        yield copy
        shutil.rmtree(copy)
        if not killed:
            return


@forks
@pytest.mark.signals
@pytest.mark.oracle
def test_a_process_killed_anywhere_in_a_save(run, whole, monkeypatch):
    """What is there is a checkpoint of before or one of now, never both in one; and it goes on from there to
    the same bytes, with the texts at the end."""
    known = {params(run).tobytes(), params(whole).tobytes()}
    done, kills = set(), 0
    for copy in at_each_change(run, finish, monkeypatch):
        kills += 1
        loaded = tl.load(copy, "reference").params["wte"].tobytes()
        assert loaded in known
        done.add(loaded)
        tl.load(copy / "best", "reference")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is damaged
            finish(copy)
        assert lasting(copy) == lasting(whole)
        assert (copy / "model.safetensors").samefile(newest(copy) / "model.safetensors")
        assert not [name for name in contents(copy / "checkpoints") if name.startswith(".")]
    assert done == known
    assert kills > 100


@pytest.mark.oracle
def test_a_system_that_refuses_anything_in_a_save(run, whole, monkeypatch):
    """At each change: one line, and all that was good is good."""
    count, refusing = 0, False

    def full(function):
        def instead(*arguments, **options):
            nonlocal count
            count -= 1
            if count <= 0 and refusing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **options)

        return instead

    for name in ("replace", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, full(getattr(os, name)))
    warnings.simplefilter("ignore", Notice)  # of what could not be removed
    before = params(newest(run)).tobytes()
    refused = 0
    while True:
        copy = shutil.copytree(run, run.parent / "copy")
        refusing, count = True, refused + 1
        error = failure(copy)
        refusing = False
        if not error:
            break
        refused += 1
        assert re.match("cannot write .*No space left on device", error)
        assert "\n" not in error
        found = tl.load(copy, "reference").params["wte"].tobytes()
        assert found in (before, params(newest(whole)).tobytes())
        finish(copy)
        assert lasting(copy) == lasting(whole)
        shutil.rmtree(copy)
    assert refused > 50


def test_a_disk_that_returns_something_else(run, monkeypatch):
    saves = importlib.import_module("tapeless.io.saves")
    monkeypatch.setattr(saves.hashlib, "file_digest", lambda *_: saves.hashlib.sha256(b"something else"))
    monkeypatch.setattr(saves, "newest", lambda folder, kind: newest(folder))
    before = contents(run)
    with pytest.raises(
        RunError, match="is not the one it was saved with as soon as it was written; the disk"
    ):
        tl.train(out=run, resume=True, progress=False)
    assert contents(run) == before


@bound_by_permissions
def test_a_folder_that_may_not_be_written(run):
    before = contents(run)
    folders = [run, run / "checkpoints"]
    try:
        for folder in folders:
            folder.chmod(0o555)
        more = ("train", "--resume", "--out", "run")
        for command in (more, ("train", *SMALL, "--out", "run", "--overwrite")):
            error = refused(*command, cwd=run.parent, preexec_fn=without_privileges)
            assert error == "error: cannot write run: Permission denied."
        succeeds("sample", "run", "-n", "1", cwd=run.parent, preexec_fn=without_privileges)
        run.chmod(0o755)
        error = refused(*more, cwd=run.parent, preexec_fn=without_privileges)
        assert error.startswith("error: cannot write run/checkpoints: Permission denied.")
        assert error.endswith("run keeps the state after step 20.")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert contents(run) == before


class Remove(StopAt):
    """Progress that takes something away once training has come to a step."""

    def __init__(self, step, path):
        super().__init__(step)
        self.path = path

    def update(self, losses):
        self.now += len(losses)
        if self.now >= self.step and self.path.is_dir():
            shutil.rmtree(self.path)
        elif self.now >= self.step:
            self.path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", [".", "metrics.jsonl"])
def test_a_log_that_vanishes_is_missed(name, run):
    kept = contents(run / "checkpoints")
    with pytest.raises(RunError, match=r"cannot write .*: No such file or directory") as error:
        tl.train(out=run, resume=True, progress=Remove(22, run / name))
    assert "keeps the state after step 20" in str(error.value)
    if name != ".":
        assert kept["0004-step-20/state.safetensors"] in contents(run / "checkpoints").values()


@pytest.mark.parametrize("name", ["checkpoints", "model.safetensors", "state.safetensors", "config.json"])
def test_what_else_vanishes_comes_back(name, run, whole):
    tl.train(out=run, resume=True, progress=Remove(22, run / name))
    assert lasting(run) == lasting(whole)


# ---------------------------------------------------------------- the end


def test_texts_that_were_not_written_yet(whole, tmp_path):
    """By a process killed after its last save."""
    run = shutil.copytree(whole, tmp_path / "run")
    assert "is complete" in succeeds("train", "--resume", "--out", "run", cwd=run.parent).stderr
    (run / "samples.txt").unlink()
    succeeds("train", "--resume", "--out", "run", cwd=run.parent)
    assert lasting(run) == lasting(whole)


@signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_stops_a_run_saves_it(number, code, tmp_path):
    arguments = ("--engine", "reference", "--steps", "1000000", "--out", "run")
    told = interrupt(*arguments, cwd=tmp_path, number=number, code=code)
    done = int(re.match(r"Stopped after step ([\d,]+); saved\. Go on with", told)[1].replace(",", ""))
    assert len(losses(tmp_path / "run")) == done == steps(tmp_path / "run")[-1]
    with pytest.raises(tl.Interrupted) as stopped:
        tl.train(engine="reference", steps=1_000_000, progress=StopAt(done))
    assert losses(tmp_path / "run") == stopped.value.run.losses[:done].tolist()


# ---------------------------------------------------------------- two processes

BUSY = """
import importlib
t = importlib.import_module("tapeless.train")
t.SAVE_SECONDS, t.CHUNK_SECONDS, t.SAVE_SHARE = 0.0, 0.0, 1e9
t.train(out="run", engine="reference", steps=10**6, samples=0, progress=False)
"""


CHANGES_OF_FILES = [f"os:{name}" for name in CHANGES]


@signals
def test_one_process_trains_in_a_folder(tmp_path):
    folder = tmp_path / "run"
    with pauses.start(at=["tapeless.job:Job.advance"], cwd=tmp_path, code=BUSY) as process:
        process.reached("Job.advance", 3)
        for options in (("--resume",), ("--overwrite", *SMALL), SMALL):
            error = refused("train", *options, "--out", "run", cwd=tmp_path)
            assert f"process {process.pid} on {socket.gethostname()} is training in run: wait" in error
        succeeds("sample", "run", "-n", "1", "--engine", "reference", cwd=tmp_path)
        process.kill()
    assert (folder / ".lock").exists()  # but nobody has it
    done = max(steps(folder))
    told = succeeds("train", "--resume", "--out", "run", "--steps", str(done + 9), cwd=tmp_path).stderr
    assert "note" not in told
    assert not (folder / ".lock").exists()
    assert len(losses(folder)) == done + 9


class Looks:
    """Counts what is opened or listed below a folder, and does something before one of these."""

    def __init__(self, folder, monkeypatch):
        self.folder = str(folder)
        self.begin(0, None)
        for owner, name in ((os, "open"), (io, "open"), (builtins, "open"), (os, "listdir"), (os, "scandir")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def begin(self, which, work):
        self.count, self.which, self.work = 0, which, work

    def counted(self, function):
        def instead(path, *arguments, **options):
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder):
                self.count += 1
                if self.count == self.which:
                    self.work()
            return function(path, *arguments, **options)

        return instead


@signals
@pytest.mark.parametrize("waits", ["writer", "reader"])
def test_who_reads_sees_a_checkpoint_whole(waits, tmp_path, monkeypatch):
    """While another process saves after every step and removes what is old. A model is read at each change
    that the writer makes to files; or the writer saves three times before each file that the reader opens."""
    folder = tmp_path / "run"
    seen = set()

    def load():
        seen.add(tl.load(folder, "reference").engine.params.tobytes())

    points = ["tapeless.job:Job.advance", *(CHANGES_OF_FILES if waits == "writer" else ())]
    with pauses.start(at=points, cwd=tmp_path, code=BUSY) as process, warnings.catch_warnings():
        warnings.simplefilter("error")
        while process.next().name != "Job.advance":  # the run has come to its place
            pass
        if waits == "writer":
            for _ in range(150):
                process.next()
                load()
        else:
            with monkeypatch.context() as patched:
                looks = Looks(folder, patched)
                while looks.which <= looks.count:
                    looks.begin(looks.which + 1, lambda: process.reached("Job.advance", 3))
                    load()
                assert looks.which > 10
        last = max(steps(folder))
        process.kill()
    assert len(seen) > 3
    save_always(monkeypatch)
    with pytest.raises(tl.Interrupted):
        tl.train(out=tmp_path / "again", engine="reference", steps=10**6, keep=10**6, progress=StopAt(last))
    known = [tl.load(place, "reference").engine.params for place in checkpoints(tmp_path / "again")]
    assert seen <= {params.tobytes() for params in known}


def test_a_lock_that_is_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.warns(Notice, match="files cannot be locked here"):
        tl.train(out=tmp_path / "run", steps=3, samples=0, **QUIET)
    assert steps(tmp_path / "run") == [0, 3]


def test_two_that_looked_before_either_began(tmp_path):
    with lock.Lock(tmp_path / "run") as first, lock.Lock(tmp_path / "run") as second:
        folders.claim(tmp_path / "run", first, False)
        with pytest.raises(RunError, match=f"process {os.getpid()} on .* is training in"):
            folders.claim(tmp_path / "run", second, False)


@signals
@pytest.mark.oracle
def test_an_empty_compile_cache_shared_by_three(run, tmp_path, monkeypatch):
    """Two trainings and a sampler that all compile before one of them is done, and one that finds what they
    left."""
    monkeypatch.setenv("TAPELESS_CACHE_DIR", str(tmp_path / "cache"))
    train = ("train", "--steps", "30", "--samples", "1", "--set", "n_embd=8", "--out")
    commands = [(*train, "a"), (*train, "b"), ("sample", "run", "-n", "1")]
    with ExitStack() as stack:
        point = "tapeless.ops.cpu.native:compile_object"
        processes = [
            stack.enter_context(pauses.start(*command, at=[point], cwd=tmp_path)) for command in commands
        ]
        for process in processes:
            process.reached("compile_object")
        for process in processes:
            process.let_go()
        said = [process.end() for process in processes]
    assert [code for code, _, _ in said] == [0, 0, 0], said
    alone = succeeds(*train, "c", cwd=tmp_path)
    assert "Compiling" not in alone.stderr
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(tmp_path / "c")
    assert said[0][1] == said[1][1] == alone.stdout
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".o"]
