"""Threads that work on one step together: how many there are, and how they start and end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from queue import SimpleQueue

from tapeless.config import GPTConfig, whole
from tapeless.errors import ConfigError
from tapeless.layout import ALIGN, n_params
from tapeless.machine import processors

MAX_THREADS = 1024
# Parameters times tokens of a step from which more threads pay: some 100 µs of one thread's work. They
# meet some ten times a layer, and all wait for any that the system holds up.
WORTHWHILE = 8_000_000


def team_size(config: GPTConfig, documents: int, threads: int | None) -> int:
    """How many threads share a step of so many documents: `threads`, or, for None, as many as there
    are processors if the step is large enough for that to pay."""
    if threads is None:
        work = n_params(config) * documents * config.block_size
        return processors() if work >= WORTHWHILE else 1
    return threads


def decoding_team(config: GPTConfig, threads: int | None) -> int:
    """How many threads generate a text together: `threads`, or for None as many as there are processors if
    the model is so large that reading its weights takes most of the time."""
    if threads is None:
        return processors() if n_params(config) >= WORTHWHILE // 2 else 1
    return threads


def by_documents(documents: int, threads: int) -> bool:
    """Whether each thread gets whole documents: if that shares the work evenly. Or else each gets as many
    tokens, and attention, which needs whole documents, is shared by heads."""
    return documents % threads == 0 or documents >= 4 * threads


def check_threads(engine: str, threads: int | None) -> int | None:
    """`threads` if it can be a number of threads. Raises `ConfigError` if not."""
    if threads is None:
        return None
    threads = whole("threads", threads, 1, MAX_THREADS)
    if engine == "reference" and threads > 1:
        raise ConfigError(f"threads must be 1, not {threads}: the reference engine has one thread.")
    return threads


def shares(documents: int, threads: int) -> list[tuple[int, int]]:
    """Where each thread's documents begin and end: evenly, so none has more than ⌈documents/threads⌉."""
    return list(pairwise(k * documents // threads for k in range(threads + 1)))


def parts(size: int, threads: int) -> list[tuple[int, int]]:
    """Each thread's part of a flat buffer of float32, in whole cache lines, so that no two write to one."""
    line = ALIGN // 4
    return [(min(line * a, size), min(line * b, size)) for a, b in shares(-(-size // line), threads)]


def run_together(tasks: Sequence[Callable[[], object]]) -> None:
    """Run all tasks at the same time, each on a thread of its own, and wait for them all.

    Either all begin or, if the system refuses a thread, none. They wait for each other, and use the
    caller's buffers, so nothing may come between: workers, who get no signals, start each other, and the
    caller puts off what a signal raises (Ctrl-C, a timeout) until they are done. Raises what a task raised.
    """
    workers = _take_workers(len(tasks))
    done = _Done()

    def begin() -> None:
        for worker, task in zip(workers[1:], tasks[1:], strict=True):
            worker.tasks.put((task, done))
        tasks[0]()

    failure: BaseException | None = None
    try:
        workers[0].tasks.put((begin, done))
    except BaseException as caught:  # a signal's comes after a call, not in place of it: they have begun
        failure = caught
    # A second signal's exception may come where a loop jumps back, outside of the inner try.
    while len(done.finished) < len(tasks):
        try:
            while len(done.finished) < len(tasks):
                try:
                    done.news.get()
                except BaseException as caught:
                    failure = caught
        except BaseException as caught:
            failure = caught
    _idle.extend(workers)
    failure = failure or done.failure
    if failure is not None:
        raise failure


class _Done:
    """Who has finished; each also brings news of it. (An interrupt may lose the news, not the fact.)"""

    def __init__(self) -> None:
        self.finished: list[threading.Thread] = []
        self.failure: BaseException | None = None
        self.news: SimpleQueue[None] = SimpleQueue()


class _Worker(threading.Thread):
    """A thread that runs one task after the other, and ends with the process."""

    def __init__(self) -> None:
        super().__init__(name="tapeless", daemon=True)
        self.tasks: SimpleQueue[tuple[Callable[[], object], _Done]] = SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            task, done = self.tasks.get()
            try:
                task()
            except BaseException as failure:
                done.failure = failure
            done.finished.append(self)
            done.news.put(None)


_idle: list[_Worker] = []  # workers of all engines that have nothing to do
if hasattr(os, "register_at_fork"):  # a child process has its parent's list, but not its threads
    os.register_at_fork(after_in_child=_idle.clear)


def _take_workers(count: int) -> list[_Worker]:
    taken: list[_Worker] = []
    try:
        while len(taken) < count:
            try:
                taken.append(_idle.pop())
            except IndexError:
                taken.append(_Worker())
    except BaseException:
        _idle.extend(taken)
        raise
    return taken
