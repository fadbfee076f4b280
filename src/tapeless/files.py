"""Writing files so that they last: flushed to the drive, and renamed although others may be reading."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WINDOWS = os.name == "nt"
TRIES, PAUSE = 40, 0.05  # of a rename on Windows, and the seconds between two


def flush(handle: int) -> None:
    """Flush an open file to the drive, and what the drive itself still holds in memory.

    On macOS fsync leaves out the drive's own memory; F_FULLFSYNC does not, but not every file system has it.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def flush_folder(folder: Path) -> None:
    """Flush the names of a folder's files to the drive, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            flush(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and flush their names to the drive."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text as it is, in UTF-8, and flush it to the drive."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        flush(file.fileno())


def replace(path: Path, other: Path) -> None:
    """Rename a file or folder, in place of a file that may be there.

    Windows refuses that while another process has one of them open, which may only last for a moment: there
    it is tried for two seconds.
    """
    for _ in range(TRIES if WINDOWS else 0):
        try:
            os.replace(path, other)
            return
        except PermissionError:
            time.sleep(PAUSE)
    os.replace(path, other)
