"""Reading files whose name may be that of something else."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """A file, to be read. Raises `OSError` if there is none, or it is no regular file: a pipe would be
    waited for. What is opened is what was looked at."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(None, "it is no regular file")


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a file, without the byte-order mark that editors on Windows begin it with.

    Raises `OSError` as `open_regular` does, and `UnicodeDecodeError`, a `ValueError`, for other encodings.
    """
    with open_regular(path) as file:
        return file.read().decode("utf-8-sig")
