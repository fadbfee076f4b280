"""Saves that a power cut cannot undo: what is flushed to the drive, in which order; and files and locks on
systems that are not at hand."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import types
import warnings
from pathlib import Path

import pytest

import tapeless as tl
from commands import contents
from tapeless import convert, files
from tapeless.data import tokenize
from tapeless.errors import Notice, RunError
from tapeless.io import lock, runs, saves
from test_runs import StopAt

training = importlib.import_module("tapeless.train")
QUIET = {"engine": "reference", "samples": 1, "progress": False}


class Recorder:
    """What is done to files, in order: ("flush", path, None), ("rename", old, new), ("remove", path, None).
    `sizes` are those that files had when they were flushed, by event."""

    def __init__(self, monkeypatch):
        self.events, self.sizes = [], {}
        for name in ("fsync", "replace", "unlink", "link"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name, function):
        def instead(*given, **options):
            done = function(*given, **options)
            if name == "fsync":
                about = os.fstat(given[0])
                self.sizes[len(self.events)] = about.st_ino, about.st_size
                self.events.append(("flush", Path(os.readlink(f"/proc/self/fd/{given[0]}")), None))
            elif name == "replace":
                self.events.append(("rename", Path(given[0]).absolute(), Path(given[1]).absolute()))
            elif name == "unlink" and "dir_fd" not in options:
                self.events.append(("remove", Path(given[0]).absolute(), None))
            return done

        return instead

    def first(self, kind, path, after=-1):
        """The place of the first such event after another one."""
        for i, (what, *paths) in enumerate(self.events):
            if i > after and what == kind and path in paths:
                return i
        raise AssertionError(f"{path}: no {kind} after event {after}")

    def flushed_before(self, path, event):
        """The size of a file or folder when it was last flushed before an event, under whatever name."""
        sizes = [size for i, (file, size) in self.sizes.items() if i < event and file == os.stat(path).st_ino]
        assert sizes, f"{path} was not flushed"
        return sizes[-1]


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")


@linux
def test_a_save_is_flushed_in_order(tmp_path, monkeypatch):
    """The files, then their names, before the folder gets its own; then that; only then an older one goes."""
    folder = tmp_path / "run"
    monkeypatch.setattr(training, "CHUNK_SECONDS", 0.0)
    with pytest.raises(tl.Interrupted):
        tl.train(out=folder, **QUIET | {"progress": StopAt(3)}, steps=9)
    with pytest.raises(tl.Interrupted):
        tl.train(out=folder, resume=True, progress=StopAt(6))
    seen = Recorder(monkeypatch)
    tl.train(out=folder, resume=True, progress=False)
    store = folder / "checkpoints"
    aside, place = store / ".part", max(store.iterdir())
    assert place.name.endswith("-step-9")
    named = seen.first("rename", place)
    assert seen.events[named] == ("rename", aside, place)
    names = {path.name for path in place.iterdir()}
    assert names == {
        "config.json", "tokenizer.json", "model.safetensors", "state.safetensors", "manifest.json"
    }  # fmt: skip
    for name in names:
        assert seen.flushed_before(place / name, named) == (place / name).stat().st_size
    last = max(seen.first("flush", aside / name) for name in names)
    assert last < seen.first("flush", aside) < named
    # The rows that belong to the state, before the state.
    assert seen.flushed_before(folder / "metrics.jsonl", named) == (folder / "metrics.jsonl").stat().st_size
    # Its name, before anything older is renamed or removed.
    kept = seen.first("flush", store, after=named)
    gone = next(i for i, (_, _, now) in enumerate(seen.events) if i > named and str(now).endswith(".gone"))
    assert kept < gone
    others = [what for what, *_ in seen.events[named + 1 : kept]]
    assert others == []
    # Files at the top, each by itself; and the texts.
    for name in ("config.json", "model.safetensors", "state.safetensors", "samples.txt"):
        moved = seen.first("rename", folder / name, after=named)
        assert seen.flushed_before(folder / name, moved) == (folder / name).stat().st_size
        assert seen.first("flush", folder, after=moved)


@linux
def test_a_new_run_is_flushed_as_a_whole(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "new"
    seen = Recorder(monkeypatch)
    tl.train(out=folder, steps=3, **QUIET)
    # Its name, those of the folders above it, and, before it appears, all that is in it.
    appears = seen.first("rename", folder / ".new")
    aside = folder / ".new.part"
    for path in (tmp_path, folder.parent, aside, aside / "checkpoints"):
        assert seen.first("flush", path) < appears
    assert seen.first("flush", folder, after=appears) < seen.first("rename", folder / "config.json")
    moved = seen.first("rename", folder / "checkpoints/0001-step-0")
    assert seen.first("flush", folder / "checkpoints", after=moved)
    assert seen.first("flush", folder, after=moved)


@linux
def test_other_files_are_flushed_before_they_get_their_names(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("some words and some more\n" * 100)
    config = tl.presets["gpt2"].model.replace(vocab_size=27, block_size=8, n_layer=1, n_head=2, n_embd=8)
    tl.GPT(config, 0).save(tmp_path / "model")
    seen = Recorder(monkeypatch)
    progress = types.SimpleNamespace(begin=lambda *_: 0, advance=lambda *_: 0, finish=lambda: 0)
    tokenize.tokenize([text], tmp_path / "shards", tokenizer="chars", progress=progress)
    convert.convert(tmp_path / "model", tmp_path / "hf")
    convert.convert(tmp_path / "model", tmp_path / "llmc" / "model.bin")
    for folder in ("shards", "hf", "llmc"):
        written = contents(tmp_path / folder)
        assert len(written) >= {"shards": 3, "hf": 2, "llmc": 1}[folder]
        for name, content in written.items():
            path = (tmp_path / folder / name).resolve()
            moved = seen.first("rename", path)
            assert seen.flushed_before(path, moved) == len(content)
            assert seen.first("flush", path.parent, after=moved)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_flushed(error, tmp_path, monkeypatch):
    """Some systems do not flush folders, and say so; what is said of a failing drive is not dropped."""

    def failing(handle):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(files, "flush", failing)
    if error in (errno.EINVAL, errno.ENOTSUP):
        files.flush_folder(tmp_path)
        return
    with pytest.raises(OSError, match=os.strerror(error)):
        files.flush_folder(tmp_path)


# ---------------------------------------------------------------- macOS


@pytest.mark.parametrize("works", [True, False])
def test_a_drive_is_flushed_where_fsync_leaves_it_out(works, tmp_path, monkeypatch):
    called = []

    def fcntl(handle, command):
        called.append(command)
        if not works:
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files, "fcntl", types.SimpleNamespace(F_FULLFSYNC=51, fcntl=fcntl))
    monkeypatch.setattr(os, "fsync", lambda handle: called.append("fsync"))
    with open(tmp_path / "file", "w") as file:
        files.flush(file.fileno())
    assert called == ([51] if works else [51, "fsync"])
    called.clear()
    tl.train(out=tmp_path / "run", steps=2, **QUIET)
    assert set(called) == ({51} if works else {51, "fsync"})


# ---------------------------------------------------------------- Windows


@pytest.fixture
def windows(monkeypatch):
    """Renames that fail as long as `busy` says of a path that another process has it open."""
    state, replace = types.SimpleNamespace(busy=lambda old, new: False, tried=0), os.replace

    def refusing(old, new):
        state.tried += 1
        if state.busy(Path(old), Path(new)):
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(old))
        replace(old, new)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "PAUSE", 0.0)
    monkeypatch.setattr(os, "replace", refusing)
    return state


def test_a_rename_waits_for_who_reads_the_file(windows, tmp_path):
    (tmp_path / "old").write_text("new text")
    (tmp_path / "new").write_text("old text")
    windows.busy = lambda old, new: windows.tried < 3
    files.replace(tmp_path / "old", tmp_path / "new")
    assert windows.tried == 3
    assert (tmp_path / "new").read_text() == "new text"


def test_a_rename_does_not_wait_for_ever(windows, tmp_path):
    (tmp_path / "old").write_text("new text")
    windows.busy = lambda old, new: True
    with pytest.raises(PermissionError):
        files.replace(tmp_path / "old", tmp_path / "new")
    assert 20 <= windows.tried <= 100
    with pytest.raises(RunError, match=r"cannot write .*new: The process cannot access the file\."):
        runs.write_text(tmp_path / "new", "text")
    assert not (tmp_path / "new").exists()


def test_who_holds_a_file_at_the_top_open_does_not_end_training(windows, tmp_path):
    """The checkpoint is what counts; what other programs see is brought up to date with the next save."""
    tl.train(out=tmp_path / "run", steps=3, **QUIET)
    before = (tmp_path / "run/model.safetensors").read_bytes()
    windows.busy = lambda old, new: new == tmp_path / "run/model.safetensors"
    with pytest.warns(Notice, match=r"model\.safetensors: .* It is left as it was until the next save\."):
        tl.train(out=tmp_path / "run", resume=True, steps=6, progress=False)
    assert (tmp_path / "run/model.safetensors").read_bytes() == before
    assert tl.load(tmp_path / "run", "reference").params["wte"].tobytes() not in before
    windows.busy = lambda old, new: False
    tl.train(out=tmp_path / "run", resume=True, steps=7, progress=False)
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert (tmp_path / "run/model.safetensors").samefile(newest / "model.safetensors")


def test_an_old_checkpoint_that_is_being_read_stays(windows, tmp_path):
    tl.train(out=tmp_path / "run", steps=3, **QUIET)
    windows.busy = lambda old, new: old.name.startswith("0001")
    with pytest.warns(Notice, match="0001-step-0: The process cannot access"):
        tl.train(out=tmp_path / "run", resume=True, steps=6, progress=False)
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 3


@pytest.fixture
def msvcrt(monkeypatch):
    """A lock on a byte, as Windows has it, by what there is here; and files that cannot be removed while one
    has them open."""
    fcntl = pytest.importorskip("fcntl")
    is_open, close, unlink = {}, os.close, os.unlink

    def locking(handle, mode, count):
        assert (mode, count) == (2, 1)
        assert os.lseek(handle, 0, os.SEEK_CUR) == 2**30
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EACCES, "Permission denied") from None
        is_open[handle] = os.fstat(handle).st_ino

    def closing(handle):
        close(handle)
        is_open.pop(handle, None)

    def unlinking(path, **options):
        if not options and os.stat(path).st_ino in is_open.values():
            raise PermissionError(errno.EACCES, "it is open")
        unlink(path, **options)

    monkeypatch.setattr(lock, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(os, "close", closing)
    monkeypatch.setattr(os, "unlink", unlinking)


def test_the_lock_of_windows(msvcrt, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lock.Lock(tmp_path) as first:
            with pytest.raises(RunError, match=f"process {os.getpid()} on .* is training in"):
                lock.Lock(tmp_path).take()
            first.take()  # it has it already
        assert contents(tmp_path) == {}
        with lock.Lock(tmp_path):
            assert (tmp_path / ".lock").exists()
        assert contents(tmp_path) == {}


def test_text_has_the_same_bytes_on_every_system(tmp_path, monkeypatch):
    """make takes no CRLF, and checksums are of bytes: what is written has its line ends stated."""
    import builtins
    import io

    from tapeless.export import export

    class Translating(io.TextIOWrapper):
        def __init__(self, buffer, **options):
            super().__init__(buffer, **options | {"newline": options.get("newline") or "\r\n"})

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more, **other):
        if "b" in mode or not set(mode) & set("wax"):
            return original(file, mode, buffering, encoding, errors, newline, *more, **other)
        buffer = original(file, mode + "b", *more, **other)
        return Translating(buffer, encoding=encoding, errors=errors, newline=newline)

    original = builtins.open
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    (tmp_path / "probe").write_text("a\n")
    assert (tmp_path / "probe").read_bytes() == b"a\r\n"  # as Windows writes
    (tmp_path / "text.txt").write_bytes(b"anna\nbob\n" * 600)
    progress = types.SimpleNamespace(begin=lambda *_: 0, advance=lambda *_: 0, finish=lambda: 0)
    tokenize.tokenize([tmp_path / "text.txt"], tmp_path / "shards", tokenizer="chars", progress=progress)
    for kind in ("c", "esp-idf"):
        export.export("microgpt", kind, tmp_path / kind)
    tl.train(out=tmp_path / "run", steps=2, **QUIET)
    written = {
        name: content
        for name, content in contents(tmp_path).items()
        if name != "probe" and not name.endswith((".bin", ".safetensors"))
    }
    assert len(written) > 20
    assert [name for name, content in written.items() if b"\r" in content] == []


# ---------------------------------------------------------------- locks


def held(folder):
    """Whether somebody trains there."""
    try:
        with lock.Lock(folder):
            return False
    except lock.Locked:
        return True


def test_a_lock_has_one_holder_whenever_it_is_released(tmp_path, monkeypatch):
    """One that is taken the moment another one gives it back: nobody else gets it."""
    pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    first, second = lock.Lock(tmp_path / "run"), lock.Lock(tmp_path / "run")
    first.take()
    close, mine = os.close, first._file

    def closing(handle):
        close(handle)
        if handle == mine:
            monkeypatch.undo()
            second.take()

    monkeypatch.setattr(os, "close", closing)
    first.__exit__()
    assert held(tmp_path / "run")
    second.__exit__()
    assert not held(tmp_path / "run")


def test_a_lock_is_held_until_its_file_is_removed(tmp_path, monkeypatch):
    """Whoever had it by then would lose its file."""
    pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    unlink, found = os.unlink, []

    def unlinking(path, **options):
        found.append(held(tmp_path / "run"))
        unlink(path, **options)

    with lock.Lock(tmp_path / "run"):
        monkeypatch.setattr(os, "unlink", unlinking)
    assert found == [True]
    assert contents(tmp_path / "run") == {}


def test_a_lock_file_that_is_removed_before_it_is_locked(tmp_path, monkeypatch):
    """Opened while another one had it, locked when that had removed it: it is not the folder's any more."""
    pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    first, second = lock.Lock(tmp_path / "run"), lock.Lock(tmp_path / "run")
    first.take()
    flock = lock._flock

    def late(handle):
        monkeypatch.setattr(lock, "_flock", flock)
        first.__exit__()
        return flock(handle)

    monkeypatch.setattr(lock, "_flock", late)
    second.take()
    assert held(tmp_path / "run")
    second.__exit__()


def test_the_manifest_has_the_checksums_of_what_was_written(tmp_path):
    """By sha256 of the bytes, computed here."""
    import hashlib

    tl.train(out=tmp_path / "run", steps=2, **QUIET)
    place = saves.newest(tmp_path / "run", runs.STATE)
    about = json.loads((place / "manifest.json").read_text())
    for name, file in about["files"].items():
        content = (place / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
