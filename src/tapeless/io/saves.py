"""Checkpoints of a run: saved as a whole, checked, and kept until the next one is good.

    checkpoints/0012-step-900/    the twelfth save, after 900 steps
        config.json tokenizer.json model.safetensors state.safetensors
        manifest.json             the size and SHA-256 of each, and the size that the logs had

A checkpoint is written aside, flushed to disk, read back from there and compared; then the folder gets
its name, and the files at the top of the run folder become its own (`publish`); then older ones go. So at
every moment there is a whole one, and the newest is that of the highest number. Files are hashed as they are
written, so that nothing is read more than once.

Each time a checkpoint is used, what is read of it is compared first: `newest`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from tapeless import files
from tapeless.errors import Notice, RunError, argument
from tapeless.io import folders, runs
from tapeless.io.runs import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    PART,
    SAMPLES_LOG,
    STATE,
    TOKENIZER,
    Content,
    Saved,
    saved,
)
from tapeless.io.tensors import Checkpoint
from tapeless.regular import open_regular

MANIFEST = "manifest.json"
KEEP, MAX_KEEP = 2, 2**31 - 1  # the newest, and one to fall back to


# ---------------------------------------------------------------- writing


def save(folder: Path, step: int, contents: Mapping[str, Content], keep: int = KEEP) -> None:
    """Make a checkpoint of `contents`, by file name, the newest of the run; `keep` are left.

    Raises `RunError` if that fails, with all as it was.
    """
    before, store = saved(folder), folder / CHECKPOINTS
    place = store / f"{before[0].number + 1 if before else 1:04d}-step-{step}"
    aside = store / PART
    with runs.writing(store):
        files.make_folder(store)
        runs.sweep(folder)
        aside.mkdir()
    try:
        about: dict[str, Any] = {"step": step, "files": {}, "logs": {}}
        for name, content in contents.items():
            with runs.writing(folder / name):
                about["files"][name] = _write(aside / name, content)
        for log in (folder / METRICS, folder / SAMPLES_LOG):
            if log.exists():
                about["logs"][log.name] = log.stat().st_size
        with runs.writing(store):
            _write(aside / MANIFEST, runs.content_of_text(runs.as_json(about)))
            files.flush_folder(aside)
            if problem := damage(aside, contents):
                raise OSError(None, f"{problem} as soon as it was written; the disk may be failing")
            files.replace(aside, place)
            files.flush_folder(store)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    publish(folder, place)
    discard(before[keep - 1 :])


def _write(path: Path, content: Content) -> dict[str, Any]:
    """Write a file, flush it to disk, and take it out of memory, so that it is read from there."""
    with open(path, "wb") as file:
        summed = _Summed(file)
        content(summed)  # type: ignore[arg-type]
        file.flush()
        files.flush(file.fileno())
        with suppress(AttributeError, OSError):  # not every system can
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return {"bytes": file.tell(), "sha256": summed.sha256.hexdigest()}


class _Summed:
    """A file that sums up what is written to it."""

    def __init__(self, file: BinaryIO):
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def publish(folder: Path, place: Path) -> None:
    """Let the files at the top of a run folder be those of a checkpoint."""
    kept = _manifest(place)["files"]
    for name in (CONFIG, TOKENIZER, MODEL, STATE):
        here, there = folder / name, place / name
        if name not in kept:
            runs.remove([here])
        elif there.is_file() and not (here.exists() and here.samefile(there)):
            try:
                runs.write_file(here, lambda aside, there=there: _link(there, aside))  # type: ignore[misc]
            except runs.CannotWrite as error:
                if not error.in_use:
                    raise
                warnings.warn(Notice(f"{error} It is left as it was until the next save."), stacklevel=2)


def _link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # the file system has no links
        shutil.copyfile(path, other)


def discard(old: list[Saved]) -> None:
    """Remove checkpoints; what cannot be removed is no reason to stop."""
    for checkpoint in old:
        try:
            runs.remove_checkpoint(checkpoint.place)
        except RunError as error:
            warnings.warn(Notice(str(error)), stacklevel=2)


# ---------------------------------------------------------------- reading


def newest(folder: Path, kind: str) -> Path:
    """Where the newest checkpoint of a run lies whose config, tokenizer and file `kind` are as they were
    saved. That is `folder` itself if it has none, as runs of older versions and models saved alone.

    Raises `RunError` if there is no such folder, or all are damaged.
    """
    if not folder.is_dir():
        raise RunError(f"no run folder {str(folder)!r}.")
    folders.await_settled(folder)
    problems: list[str] = []
    while found := saved(folder):
        problems = []
        for _, step, place in found:
            problem = damage(place, (CONFIG, TOKENIZER, kind))
            if not problem:
                if problems:
                    warnings.warn(
                        Notice(f"{problems[0]}; what was saved after step {step:,} is used."), stacklevel=2
                    )
                return place
            if not _there(folder, place):  # any more: a process that trains there has saved meanwhile
                break
            problems.append(problem)
        else:
            break
    if problems:
        others = "" if len(problems) == 1 else f", and so are the {len(problems) - 1} before it"
        raise RunError(
            f"{problems[0]}{others}: restore a copy of the run, or train anew with "
            f"{argument('overwrite', True)}."
        )
    return folder


def _there(folder: Path, place: Path) -> bool:
    return any(checkpoint.place == place for checkpoint in saved(folder))


def damage(place: Path, names: Any) -> str:
    """What is wrong with these files of a checkpoint: "" if nothing."""
    try:
        known = _manifest(place)["files"]
        if missing := [name for name in names if name not in known and name != TOKENIZER]:
            return f"{place} has no {missing[0]}"
        for name in names:
            if name in known and (problem := _difference(place / name, known[name])):
                return f"{place / name} is damaged: {problem}"
    except RunError as error:
        return str(error).rstrip(".")
    return ""


def _difference(path: Path, expected: Mapping[str, Any]) -> str:
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) != expected["bytes"]:
                return f"it has {size:,} bytes, and was saved with {expected['bytes']:,}"
            same = hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"]
    except OSError as error:
        return error.strerror or str(error)
    return "" if same else "its checksum is not the one it was saved with"


def _manifest(place: Path) -> dict[str, Any]:
    about = runs.read_json(place / MANIFEST)
    try:
        entries = [(file["bytes"], file["sha256"]) for file in about["files"].values()]
        if all(isinstance(n, int) for n in (*(size for size, _ in entries), *about["logs"].values())):
            return about
    except (KeyError, TypeError, AttributeError):
        pass
    raise RunError(f"{place / MANIFEST} is damaged: it is not one.")


def logged(place: Path) -> dict[str, int]:
    """The sizes of a run's logs when the checkpoint was saved, as far as they are known."""
    return _manifest(place)["logs"] if (place / MANIFEST).exists() else {}


def open_model(folder: Path) -> Checkpoint:
    """The model of a run folder; what is read of it later is still the same, whatever is saved meanwhile."""
    while True:
        place = newest(folder, MODEL)
        try:
            return runs.open_model(folder, place)
        except RunError:
            if place == folder or _there(folder, place):
                raise
