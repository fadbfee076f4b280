"""Finds races between the threads of a step: accesses to the same number without a barrier between them.

The CPU's ops are run as the Python functions that they are before Numba compiles them, on vectors and
products written here in NumPy. Every number that a thread reads or writes is recorded. Threads take turns
from one barrier to the next; two of them conflict if, between the same two barriers, one writes a number that
the other reads or writes. (All may write the same value where each has written it before it reads: what costs
little is computed by every thread for itself.) So a race is found whatever the timing would have been.

Import this module before `tapeless.ops.cpu`, in a process of its own: it replaces parts of that.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tapeless.engine import Engine
from tapeless.ops.cpu import native, routines
from tapeless.programs import PROGRAMS

LANES = 4


class Race(Exception):
    """Two threads use the same number at the same time, one of them writing."""


# ---------------------------------------------------------------- memory


class Memory:
    """Who has read and written each number since the last barrier, as bits by thread."""

    def __init__(self) -> None:
        self.me = 0
        self._starts: list[int] = []
        self._roots: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def forget(self) -> None:
        """Forget all arrays there were."""
        self._starts.clear()
        self._roots.clear()

    def array(self, array: np.ndarray) -> Array:
        """The array, watched."""
        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        start = root.__array_interface__["data"][0]
        if root.nbytes and start not in self._starts:
            at = bisect_right(self._starts, start)
            self._starts.insert(at, start)
            readers, writers = (np.zeros(root.nbytes // 2 + 1, np.uint8) for _ in range(2))
            self._roots.insert(at, (root, readers, writers))
        watched = array.view(Array)
        watched.memory = self
        return watched

    def view(self, array: np.ndarray, offset: int, shape: Any, strides: Any) -> Array:
        """Numbers of the memory in which `array` lies, from its number `offset` on; strides in numbers."""
        size, address = array.itemsize, array.__array_interface__["data"][0]
        start, (root, _, _) = self._find(address)
        view = np.ndarray(
            tuple(map(int, shape)),
            array.dtype,
            root.reshape(-1).view(np.uint8),
            address - start + int(offset) * size,
            tuple(int(s) * size for s in strides),
        ).view(Array)
        view.memory = self
        return view

    def _find(self, address: int) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        at = bisect_right(self._starts, address) - 1
        return self._starts[at], self._roots[at]

    def _places(self, view: np.ndarray) -> tuple[Any, Any, Any]:
        """Where in the records of its readers and writers the numbers stand."""
        address = view.__array_interface__["data"][0]
        start, (_, readers, writers) = self._find(address)
        if view.ndim == 1 and view.strides[0] == view.itemsize:  # most of all: a slice is faster
            first, step = (address - start) // 2, view.itemsize // 2
            return slice(first, first + step * view.size, step), readers, writers
        places = np.full(view.shape, (address - start) // 2)
        for axis, (size, stride) in enumerate(zip(view.shape, view.strides, strict=True)):
            steps = np.arange(size) * (stride // 2)
            places += steps.reshape([-1 if a == axis else 1 for a in range(view.ndim)])
        return places, readers, writers

    def read(self, view: np.ndarray) -> np.ndarray:
        """The numbers, read by the present thread."""
        plain = view.view(np.ndarray)
        if view.size:
            places, readers, writers = self._places(plain)
            mine, written = np.uint8(1 << self.me), writers[places]
            if written.any() and ((written & ~mine != 0) & (written & mine == 0)).any():
                raise Race("a number is read that another thread writes")
            readers[places] |= mine
        return plain

    def write(self, view: np.ndarray, values: Any) -> None:
        """Let the numbers be these, written by the present thread."""
        plain = view.view(np.ndarray)
        if not view.size:
            return
        places, readers, writers = self._places(plain)
        mine = np.uint8(1 << self.me)
        others = writers[places] & ~mine
        before = plain.copy()
        plain[...] = values
        if others.any():
            same = np.frombuffer(before.tobytes(), np.uint8) == np.frombuffer(plain.tobytes(), np.uint8)
            if ((others != 0) & ~same.reshape(*plain.shape, -1).all(-1)).any():
                raise Race("a number is written that another thread writes")
        if (readers[places] & ~mine & ~others).any():
            raise Race("a number is written that another thread reads")
        writers[places] |= mine

    def barrier(self) -> None:
        """All have come to a barrier: what was read and written before is no matter any more."""
        for _, readers, writers in self._roots:
            readers[:] = writers[:] = 0


class Array(np.ndarray):
    """An array whose numbers are watched when they are read or written, and not when it is sliced."""

    memory: Memory

    def __array_finalize__(self, parent: Any) -> None:
        self.memory = getattr(parent, "memory", None)  # type: ignore[assignment]

    def _part(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        # An index of one number as a slice of it: a view of an address.
        whole = tuple(i if isinstance(i, slice) else slice(int(i), int(i) + 1) for i in index)
        part = np.ndarray.__getitem__(self, whole)
        assert part.size or not self.size, f"{index} lies outside of {self.shape}"
        return part.reshape(-1) if part.size == 1 else part

    def __getitem__(self, index: Any) -> Any:
        whole = index if isinstance(index, tuple) else (index,)
        if len(whole) == self.ndim and not any(isinstance(i, slice) for i in whole):
            self.memory.read(self._part(index))
        return np.ndarray.__getitem__(self, index)

    def __setitem__(self, index: Any, values: Any) -> None:
        self.memory.write(self._part(index), values)


# ---------------------------------------------------------------- threads


class Team:
    """Runs tasks as threads that take turns from barrier to barrier. `without` is a barrier that is left out,
    by place; `places` are those that were come to."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.without: str | None = None
        self.places: set[str] = set()
        self._turn = threading.Condition()
        self._running: int | None = None
        self._at: list[str | None] = []
        self._failure: BaseException | None = None

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        self._at, self._failure = [""] * len(tasks), None

        def work(k: int, task: Callable[[], None]) -> None:
            self._await(k)
            try:
                if self._failure is None:
                    task()
            except BaseException as failure:
                self._failure = self._failure or failure
            self._at[k] = None
            self._pass_on()

        threads = [threading.Thread(target=work, args=each) for each in enumerate(tasks)]
        for thread in threads:
            thread.start()
        while any(at is not None for at in self._at):
            self.memory.barrier()
            for k in [k for k, at in enumerate(self._at) if at is not None]:
                with self._turn:
                    self.memory.me, self._running = k, k
                    self._turn.notify_all()
                    self._turn.wait_for(lambda: self._running is None)
            if self._failure is None and len(set(self._at)) > 1:
                self._failure = Race(f"threads wait at different barriers: {self._at}")
        for thread in threads:
            thread.join()
        self.memory.barrier()
        if self._failure is not None:
            raise self._failure

    def wait(self, arrivals: Any, me: int, threads: int) -> None:
        """The op: come to a barrier."""
        frame: Any = sys._getframe(1)
        while frame.f_code.co_name.startswith("meet"):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        self.places.add(place)
        if place != self.without:
            self._at[me] = place
            self._pass_on()
            self._await(me)
            if self._failure is not None:
                raise SystemExit

    def _pass_on(self) -> None:
        with self._turn:
            self._running = None
            self._turn.notify_all()

    def _await(self, k: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._running == k)


memory = Memory()
team = Team(memory)


class WatchedEngine(Engine):
    """The CPU engine with watched ops, in Python."""

    def program(self, name: str) -> Any:
        if name not in self._programs:
            function = self._build(name, PROGRAMS[name][0])

            def program(*groups: Any) -> None:
                with np.errstate(all="ignore"):
                    function([type(group)(*map(memory.array, group)) for group in groups])

            def together(calls: Any) -> None:
                team.run([lambda call=call: program(*call) for call in calls])

            program.together = together  # type: ignore[attr-defined]
            self._programs[name] = program
        return self._programs[name]


# ---------------------------------------------------------------- vectors


def _vector(value: Any) -> np.ndarray:
    return np.full(LANES, value, np.float32) if np.ndim(value) == 0 else value


def _row(array: Any, index: Any) -> Any:
    *rows, column = map(int, index)
    row = np.ndarray.__getitem__(array, tuple(rows)) if rows else array
    return np.ndarray.__getitem__(row, slice(column, column + LANES))


def load(array: Any, *index: Any) -> np.ndarray:
    values = memory.read(_row(array, index))
    return np.pad(values, (0, LANES - len(values)))


def store(value: Any, array: Any, *index: Any) -> None:
    row = _row(array, index)
    memory.write(row, _vector(value)[: len(row)])


def matrix(array: Any, offset: int, rows: int, columns: int, stride: int) -> Any:
    return memory.view(array, offset, (max(rows, 0), columns), (stride, 1))


def transpose_rows(y: Any, row: int, column: int, x: Any, first: int, last: int, at: int) -> None:
    block = np.array([load(x, min(first + r, last), at) for r in range(LANES)])
    for c in range(LANES):
        store(block[:, c], y, row + c, column)


def _groups(a: np.ndarray, size: int) -> np.ndarray:
    return np.arange(LANES) // size


def _product(y, ldy, start, ld_start, x, row, term, w, w_term, column, m, n, k):
    values = memory.read(memory.view(x, 0, (m, k), (row, term))) @ memory.read(
        memory.view(w, 0, (k, n), (w_term, column))
    )
    if isinstance(start, np.ndarray):
        values = values + memory.read(memory.view(start, 0, (m, n), (ld_start, 1)))
    memory.write(memory.view(y, 0, (m, n), (ldy, 1)), values)


def _widened(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.uint16:
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def _sweep(tall: int) -> Callable:
    def sweep(y, x, w, first, step, O):
        total = memory.read(memory.view(y, 0, (O,), (1,))).copy()
        for r in range(tall):
            i = first + r * step
            weights = memory.read(memory.view(w, i * O, (O,), (1,)))
            total += memory.read(memory.view(x, i, (1,), (1,))) * _widened(weights)
        memory.write(memory.view(y, 0, (O,), (1,)), total)

    return sweep


def _dots(tall: int) -> Callable:
    def dots(y, x, w, first, step, O):
        for r in range(tall):
            i = first + r * step
            weights = _widened(memory.read(memory.view(w, i * O, (O,), (1,))))
            total = memory.read(memory.view(x, 0, (O,), (1,))) @ weights
            memory.write(memory.view(y, i, (1,), (1,)), total)

    return dots


def _load_stored(w: Any, row: int, column: int) -> np.ndarray:
    return _widened(memory.read(_row(w, (row, column))))


def install() -> None:
    """Put all this in the place of compiled code."""
    simd: Any = ModuleType("tapeless.ops.cpu.simd")
    f = np.float32
    vars(simd).update(
        LANES=LANES, load=load, store=store, matrix=matrix, transpose_rows=transpose_rows,
        splat=_vector, fma=lambda a, b, c: np.asarray(a * b + c, f),
        maximum=lambda a, b: np.maximum(a, f(b) if np.ndim(b) == 0 else b),
        where=lambda c, a, b: np.where(c, a, b).astype(f),
        first=lambda n, a, b: np.where(np.arange(LANES) < n, a, b).astype(f),
        hsum=lambda a: f(a.sum()), hmax=lambda a: f(a.max()),
        group_sum=lambda a, size: np.array([a[_groups(a, size) == g].sum() for g in _groups(a, size)], f),
        spread=lambda a, size: a[_groups(a, size)],
        collect=lambda a, size: a[np.minimum(np.arange(LANES) * size, LANES - size)],
        exp=np.exp, log=np.log, tanh=np.tanh,
        # What files need whose intrinsics are replaced below:
        intrinsic=lambda function: function, fold=None, multiply_add=None, broadcast=None, constant=None,
        vector=None, I16=None, VEC=None, WORDS=None, ZERO=None,
    )  # fmt: skip
    barrier: Any = ModuleType("tapeless.ops.cpu.barrier")
    barrier.make_wait = lambda: team.wait
    bfloat: Any = ModuleType("tapeless.ops.cpu.bfloat")
    bfloat.nearest = lambda x: x  # which numbers are read matters here, not their rounding
    for module in (simd, barrier, bfloat):
        sys.modules[module.__name__] = module
    from tapeless.ops import cpu

    native.jit = cpu.jit = lambda function, **_: function  # type: ignore[assignment]
    routines.make_call = lambda name: _product  # type: ignore[assignment]
    from tapeless.ops.cpu import embed, streams

    streams._sweep, streams._sweep_one = _sweep(streams.STREAMS), _sweep(1)
    streams._dots, streams._dots_one = _dots(streams.STREAMS), _dots(1)
    streams.load_stored = embed.load_stored = _load_stored
