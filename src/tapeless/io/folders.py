"""Which folder a run is written into: whether it may be, and how a new run takes the place of an old one."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from tapeless import files
from tapeless.errors import RunError, argument
from tapeless.io.lock import Lock, Locked
from tapeless.io.runs import (
    BEST,
    CONFIG,
    EVERYTHING,
    METRICS,
    read_json,
    remove,
    remove_checkpoints,
    saved,
    writing,
)

NEW = ".new"  # the folder of a new run that has been saved once, and moves into the one above it
PARTS = (".", BEST)  # of a run, that have checkpoints
WAITS = 200  # times 0.05 s


def refuse(folder: Path, overwrite: bool) -> None:
    """Raise `RunError` if a new run must not be written into `folder`, which is locked if it is there."""
    _existing_folder(folder)
    if not holds_a_run(folder):
        return
    if not overwrite:
        raise RunError(
            f"{folder} already holds a run: go on with {argument('resume', True)}, or replace it with "
            f"{argument('overwrite', True)}."
        )
    try:
        ours = "tapeless" in read_json(folder / CONFIG)
    except (RunError, TypeError):
        ours = True  # missing or damaged: what else the folder holds is a run's
    if not ours:
        raise RunError(f"{folder} has a {CONFIG} that is no run's: choose another folder, or remove it.")


def _existing_folder(folder: Path) -> Path:
    """The folder, or what there is of it. Raises `RunError` if that is a file."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"{there} is a file; expected a folder for the run.")
    return there


def holds_a_run(folder: Path) -> bool:
    """Whether there is a run, whole or not, in a folder that is locked if it is there."""
    settle(folder)
    return bool(saved(folder)) or any((folder / name).exists() for name in EVERYTHING)


def claim(folder: Path, lock: Lock, overwrite: bool) -> Path:
    """Make `folder` this process's own to write a new run into. Returns where to write it: aside, until
    `replace` is called when it has been saved for the first time. So long an old run stays, and where there
    is none, there is none yet.

    Raises `RunError` where `refuse` does, also if another process claimed it meanwhile.
    """
    _existing_folder(folder)
    with writing(folder):
        files.make_folder(folder)
    lock.take()
    refuse(folder, overwrite)
    place = folder / f"{NEW}.part"
    abandon(place)  # by a killed process
    with writing(place):
        place.mkdir()
    with writing(place / METRICS):
        (place / METRICS).touch()
    return place


def abandon(aside: Path) -> None:
    """Remove a run that was begun aside."""
    shutil.rmtree(aside, ignore_errors=True)


def replace(folder: Path, aside: Path) -> None:
    """Let the run that lies complete `aside` take the place of the one in `folder`."""
    with writing(folder / NEW):
        files.replace(aside, folder / NEW)  # from here on the new run is the one there is
        files.flush_folder(folder)
    settle(folder)


def await_settled(folder: Path) -> None:
    """For who has not locked the folder: let a new run that is on its way come to its place."""
    for _ in range(WAITS):
        if not (folder / NEW).is_dir():
            return
        try:
            with Lock(folder):
                settle(folder)
        except Locked:  # by the process that moves it
            time.sleep(0.05)
    raise RunError(f"{folder} is just being replaced: try again when that is done.")


def settle(folder: Path) -> None:
    """Move a new run to its place. If the process that began to is killed, the next one that asks for
    the run goes on where it stopped."""
    new = folder / NEW
    if not new.is_dir():
        return
    if (new / CONFIG).exists():  # it moves first: as long as it is here, what lies there is old
        remove(folder / name for name in EVERYTHING if name != CONFIG)
        for part in PARTS:
            remove_checkpoints(folder / part)
        with suppress(OSError):  # it is not there, or holds something else
            (folder / BEST).rmdir()
    for name in EVERYTHING:
        if (new / name).exists():
            with writing(folder / name):
                (folder / name).parent.mkdir(exist_ok=True)
                files.replace(new / name, folder / name)
    for path in [checkpoint.place for part in PARTS for checkpoint in saved(new / part)]:
        place = folder / path.relative_to(new)
        with writing(place):
            files.make_folder(place.parent)
            files.replace(path, place)
            files.flush_folder(place.parent)
    with writing(folder):
        files.flush_folder(folder)
    abandon(new)


def check_room(folder: Path, nbytes: int) -> None:
    """Raise `RunError` if the disk has no room for so much more."""
    with writing(folder):
        free = shutil.disk_usage(_existing_folder(folder)).free
    if free < nbytes:
        needed, left = nbytes / 1e9, free / 1e9
        raise RunError(
            f"cannot write {folder}: the run takes {needed:,.1f} GB, the disk has {left:,.1f} left."
        )


def numbered_runs(preset: str, base: Path = Path("runs")) -> dict[int, Path]:
    """The folders `base/<preset>-<n>`, by n."""
    pattern = re.compile(re.escape(preset) + r"-(\d+)")
    found = {}
    if base.is_dir():
        for path in base.iterdir():
            if match := pattern.fullmatch(path.name):
                found[int(match[1])] = path
    return found


def next_run(preset: str, base: Path = Path("runs")) -> Path:
    """The folder for a new run: `base/<preset>-<n>`, the next free number."""
    return base / f"{preset}-{max(numbered_runs(preset, base), default=0) + 1}"
