"""Signals that ask a process to stop, handled for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, a supervisor, and a terminal that was closed: on Windows that is SIGBREAK.
STOPPING: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
HANGUP = getattr(signal, "SIGHUP", None)


@contextmanager
def handled(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """Let `handler` handle these signals in the body of a with statement.

    Some are left alone: all of them outside the main thread, since Python handles signals there only; those
    with a handler that was not installed from Python, which could not be restored; and a hang-up that is
    ignored, as nohup does.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number, was in before.items() if not _left_alone(number, was)]
    try:
        for number in taken:
            signal.signal(number, handler)
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _left_alone(number: int, handler: Any) -> bool:
    return handler is None or (number == HANGUP and handler == signal.SIG_IGN)
