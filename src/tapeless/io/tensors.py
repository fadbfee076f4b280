"""Tensors in files, and a model made of them: `Checkpoint`. A model of any size passes through little
memory, since its tensors are read a few megabytes at a time."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from tapeless.config import GPTConfig
from tapeless.data.tokenizers import Tokenizer
from tapeless.ends import Ends
from tapeless.errors import RunError

BLOCK = 4 << 20  # bytes read at a time
FLOAT = np.dtype(np.float32)
COLUMNS = 32 << 20  # bytes of a block of columns


def file_size(path: Path) -> int:
    """Bytes of a file that is to be read. Raises `OSError` if there is none, or it is no regular file:
    a pipe would be waited for."""
    about = path.stat()
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):  # to open a folder is refused
        raise OSError(None, "it is no regular file")
    return about.st_size


class OpenFile:
    """A file that stays what it was when it was opened, whatever comes to lie at its path."""

    def __init__(self, path: Path):
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def again(self) -> FileIO:
        return open(os.dup(self._handle), "rb", buffering=0)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            os.close(self._handle)


class Part(Protocol):
    """A tensor, or some rows of one: consecutive blocks of its rows (places along its first axis)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def blocks(self) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, row by row from byte `offset`. `turned`: `blocks` exchanges its last two axes,
    so that `[out, in]` becomes our `[in, out]`. `file`: read by `blocks` in place of what lies at `path`."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    turned: bool = False
    file: OpenFile | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """All of it, as it is stored."""
        if not self.nbytes:  # nothing cannot be mapped
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def blocks(self) -> Iterator[np.ndarray]:
        """Raises `RunError` for a file that has become shorter, or cannot be read any more."""
        row = self.nbytes // self.shape[0]
        step = max(1, BLOCK // row)
        # Read, not mapped: pages of a mapping that are no longer in the file would end the process.
        try:
            with self.file.again() if self.file else open(self.path, "rb", buffering=0) as file:
                for first in range(0, self.shape[0], step):
                    block = np.empty((min(step, self.shape[0] - first), *self.shape[1:]), self.dtype)
                    file.seek(self.offset + first * row)  # every time: others may read the same file
                    if file.readinto(block.reshape(-1).view(np.uint8).data) < block.nbytes:
                        raise OSError(None, "it is shorter")
                    yield block.swapaxes(1, 2) if self.turned else block
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{self.path} has changed since it was opened: {reason}.") from None


@dataclass(frozen=True)
class Held:
    """A tensor in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        yield self.array


@dataclass(frozen=True)
class Zeros:
    """A tensor of zeros."""

    shape: tuple[int, ...]
    dtype: np.dtype = FLOAT

    def blocks(self) -> Iterator[np.ndarray]:
        yield np.zeros(self.shape, self.dtype)


@dataclass(frozen=True)
class Transposed:
    """A matrix `[R, C]` as `[C, R]`. Each block reads the whole matrix, so that none is large."""

    part: Part

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape[::-1]

    @property
    def dtype(self) -> np.dtype:
        return self.part.dtype

    def blocks(self) -> Iterator[np.ndarray]:
        columns, rows = self.shape
        step = max(1, COLUMNS // (4 * rows))
        for first in range(0, columns, step):
            yield np.concatenate([block[:, first : first + step] for block in self.part.blocks()]).T


def transpose(part: Part) -> Part:
    return part.part if isinstance(part, Transposed) else Transposed(part)


def check_fit(array: np.ndarray, result: np.ndarray, path: Path, name: str) -> None:
    """Raise `RunError` if a number of `array` became infinite, or another integer, in `result`."""
    if result.dtype.kind in "iu":
        lost = array[result != array]
    else:
        lost = array[np.isinf(result) & np.isfinite(array)]
    if lost.size:
        raise RunError(
            f"{path}: {name} holds {lost.flat[0]}, which does not fit in {result.dtype}. "
            "Save it with smaller numbers."
        )


@dataclass(frozen=True)
class Checkpoint:
    """A model in files, whose sizes have been compared with its config.

    `tensors` has every parameter by our name, in parts along its first axis; `folder` is where files
    of its tokenizer may lie, `tokenizer` what was read of them; `ends` the tokens that begin and end a
    text, where the model's files name them. `others` are entries of a Hugging Face config.json that
    change nothing here, such as dropout.
    """

    path: Path
    format: str  # for people: "llm.c, version 3"
    config: GPTConfig
    tensors: Mapping[str, Sequence[Part]]
    folder: Path
    tokenizer: Tokenizer | None = None
    ends: Ends = field(default_factory=Ends)
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtypes(self) -> list[str]:
        """The kinds of numbers that its tensors hold, by NumPy's names."""
        return sorted({part.dtype.name for parts in self.tensors.values() for part in parts})

    @property
    def own_folder(self) -> bool:
        """Whether `folder` is the model's own: what lies beside a file need not belong to it."""
        return self.path == self.folder

    def blocks(self, name: str, dtype: Any = None, *, transposed: bool = False) -> Iterator[np.ndarray]:
        """Yield consecutive rows of a parameter as `dtype`, by default as it is stored: in our orientation,
        or with its matrices `transposed`, which are then `[out, in]`.

        Raises `RunError` for numbers that are not finite or do not fit in `dtype`, or a file that cannot
        be read any more.
        """
        for part in self.tensors[name]:
            for block in (transpose(part) if transposed and len(part.shape) == 2 else part).blocks():
                if not np.isfinite(block).all():
                    kind = "NaN" if np.isnan(block).any() else "an infinite number"
                    raise RunError(
                        f"{self.path}: {name} holds {kind}; expected finite weights. "
                        "Take a checkpoint from before that."
                    )
                with np.errstate(over="ignore"):
                    result = block.astype(block.dtype if dtype is None else dtype, copy=False)
                if result is not block:
                    check_fit(block, result, self.path, name)
                yield result.swapaxes(1, 2) if transposed and result.ndim == 3 else result

    def read_into(self, views: Mapping[str, np.ndarray]) -> None:
        """Copy every parameter into the view of its name, once, converting its numbers. Raises
        `RunError` as `blocks` does."""
        for name, view in views.items():
            first = 0
            for block in self.blocks(name, view.dtype):
                view[first : first + len(block)] = block
                first += len(block)


def write_array(file: BinaryIO, array: np.ndarray, dtype: Any = None) -> None:
    """Append the numbers of an array, row by row, as `dtype`."""
    file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
