"""Standard output and error, which may go away: a closed terminal, a pipe without a reader, a full disk."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any

# The stream is gone; it is closed; a signal handler writes while something else is being written.
FAILURES = (OSError, ValueError, RuntimeError)


class Display:
    """A text stream that drops what it cannot write: work goes on although nobody sees its progress."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(*FAILURES):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(*FAILURES):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OutputClosed(Exception):
    """The output has no reader any more. Not an OSError: rich handles BrokenPipeError in its own way."""


class Output:
    """A text stream that raises `OutputClosed` once its reader has ended, as in `tapeless … | head`."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _closed(error) from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise _closed(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _closed(error: OSError) -> Exception:
    # Windows says "invalid argument" of a pipe without a reader.
    broken = isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL)
    return OutputClosed() if broken else error


def open_closed() -> None:
    """Open the standard streams that are closed, as after `>&-`, on the null device.

    Otherwise a file that is opened later gets their number, and what LLVM or a child process prints is
    written to that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(null, True)
            stream = os.fdopen(null, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def settle(stream: Any) -> None:
    """Write what is buffered. Raises what that raises; Python does not try it again on its way out."""
    try:
        stream.flush()
    except Exception:
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, stream.fileno())
        os.close(handle)
        raise
