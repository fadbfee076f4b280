"""One process at a time trains in a folder: by a lock that the system takes back with the process."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from tapeless.errors import Notice, RunError

fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:
    fcntl = None
try:
    import msvcrt
except ImportError:  # not Windows
    msvcrt = None

LOCK = ".lock"
BEYOND = 2**30  # of the file, which can then be read while its byte at this place is locked
BUSY = (errno.EACCES, errno.EDEADLK)  # what Windows says of a locked byte


class Locked(RunError):
    """Another process trains in the folder."""


class Lock:
    """The lock on a folder, taken on entering if there is such a folder, or by `take`. None is no folder.

    Its file tells people who has it; the lock itself is the system's, and does not outlive the process.
    Readers need none.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._file: int | None = None

    def __enter__(self) -> Lock:
        if self.folder is not None and self.folder.is_dir():
            self.take()
        return self

    def take(self) -> None:
        """Raises `Locked` if another process has it, `RunError` where the folder cannot be written."""
        if self._file is not None or self.folder is None:
            return
        try:
            while self._file is None:
                self._file = self._attempt(self.folder / LOCK)
        except BlockingIOError:
            raise Locked(f"{self._owner()} is training in {self.folder}: wait, or choose another.") from None
        except OSError as error:
            raise RunError(f"cannot write {self.folder}: {error.strerror or error}.") from None

    def _attempt(self, path: Path) -> int | None:
        """The open file once it is locked; None if it was removed by the process that had it."""
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _flock(file):
                text = f"{self.folder}: files cannot be locked here; let no other process train in it."
                warnings.warn(Notice(text), stacklevel=4)
            # Windows does not remove a file that is open.
            if msvcrt is None and not os.path.samestat(os.fstat(file), os.stat(path)):
                raise FileNotFoundError
        except BaseException as error:
            os.close(file)
            if isinstance(error, FileNotFoundError):
                return None
            raise
        with suppress(OSError):  # it is for people only
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return file

    def _owner(self) -> str:
        assert self.folder is not None
        try:
            return (self.folder / LOCK).read_text(errors="replace") or "another process"
        except OSError:
            return "another process"

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        assert self.folder is not None
        if msvcrt is not None:  # an open file cannot be removed, be it this process's or another's
            os.close(self._file)
        with suppress(OSError):  # while it is still locked: afterwards it may be another's
            os.unlink(self.folder / LOCK)
        if msvcrt is None:
            os.close(self._file)
        self._file = None


NOWHERE = Lock(None)


def _lock_byte(file: int) -> bool:
    """The same on Windows."""
    os.lseek(file, BEYOND, os.SEEK_SET)
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in BUSY:
            raise BlockingIOError(error.errno, error.strerror) from None
        return False
    finally:
        os.lseek(file, 0, os.SEEK_SET)
    return True


def _flock(file: int) -> bool:
    """Lock a file, or raise `BlockingIOError`. False where that is not to be had."""
    if msvcrt is not None:
        return _lock_byte(file)
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
