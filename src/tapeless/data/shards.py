"""Token shards: files of token ids, of which only what a step needs is read; and what writes them.

A shard begins with a header of 256 int32, of which three are used: magic, version, number of tokens.
The tokens follow, little-endian. This is llm.c's format; `FORMATS` has its two kinds. A `.npy` file holds
a one-dimensional array of integers. Files without a header, as nanoGPT writes them, hold nothing but
token ids: see `tapeless.data.headerless`.
"""

from __future__ import annotations

import hashlib
import mmap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from tapeless import files
from tapeless.data import headerless
from tapeless.errors import DataError, Notice, argument
from tapeless.regular import open_regular

HEADER = 1024  # bytes
NPY = b"\x93NUMPY"  # what an array saved by NumPy begins with
MOST = 2**31 - 1  # tokens of a shard: its header counts them in an int32


class Format(NamedTuple):
    versions: tuple[int, ...]  # the first is the one written
    dtype: np.dtype


FORMATS = {
    20240520: Format((1,), np.dtype("<u2")),
    20240801: Format((7, 1), np.dtype("<u4")),
}
OTHERS = {
    20240326: "an llm.c model",
    20240327: "an llm.c debug state",
    20240328: "an llm.c tokenizer",
    20240522: "an llm.c multiple-choice evaluation",
    int.from_bytes(b"PK\3\4", "little"): "a zip archive, such as .npz or PyTorch's; save the ids by np.save",
}


class Shard(NamedTuple):
    """Where the tokens of a file are."""

    path: Path
    dtype: np.dtype
    begin: int  # bytes before them
    size: int  # how many

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
        """The tokens from begin to end of each range, mapped into memory until they are let go.

        Raises `DataError` if they are there no more.
        """
        ranges, width = list(ranges), self.dtype.itemsize
        try:
            with open(self.path, "rb") as file:
                memory = mmap.mmap(file.fileno(), self.begin + self.size * width, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}.") from None
        except ValueError:
            raise DataError(f"{self.path} has become shorter since it was opened.") from None
        if hasattr(mmap, "MADV_WILLNEED"):
            # All at once, and these alone: left to itself the system reads megabytes around each.
            for begin, end in ranges:
                first = (self.begin + begin * width) // mmap.PAGESIZE * mmap.PAGESIZE
                memory.madvise(mmap.MADV_WILLNEED, first, self.begin + end * width - first)
        tokens = np.frombuffer(memory, self.dtype, self.size, self.begin)
        for begin, end in ranges:
            yield tokens[begin:end]


def magic_number(path: Path) -> int | None:
    """The int32 that a file begins with; None if it has no 4 bytes, or cannot be read."""
    try:
        with open_regular(path) as file:
            start = file.read(4)
    except OSError:
        return None
    return int.from_bytes(start, "little", signed=True) if len(start) == 4 else None


def is_npy(path: Path) -> bool:
    """Whether a file begins as an array saved by NumPy does."""
    try:
        with open_regular(path) as file:
            return file.read(len(NPY)) == NPY
    except OSError:
        return False


def open_shard(path: Path, vocab_size: int, token_dtype: str = headerless.AUTO) -> Shard:
    """Return where the tokens of a file are. A header says so; without one `token_dtype`, or the content.

    Raises `DataError` if it cannot be read, does not hold token ids, its size is not what it should be, or
    its header says something else than `token_dtype`.
    """
    try:
        if path.is_dir() or not path.is_file():
            raise DataError(f"{path} is {'a folder' if path.is_dir() else 'no file'}; expected token ids.")
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(max(HEADER, headerless.SAMPLE))
            shape, dtype, begin = _array(path, file) if start.startswith(NPY) else ((), None, 0)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    if dtype is not None:
        shard = _npy_shard(path, size, shape, dtype, begin)
    else:
        magic = int.from_bytes(start[:4], "little", signed=True) if len(start) >= 4 else 0
        if magic in OTHERS:
            raise DataError(f"{path} is {OTHERS[magic]}; expected token ids.")
        if magic not in FORMATS:
            dtype = headerless.find_dtype(path, size, start, vocab_size, token_dtype)
            return Shard(path, dtype, 0, size // dtype.itemsize)
        shard = _llmc_shard(path, size, start, magic)
    if token_dtype not in (headerless.AUTO, shard.dtype.name):
        raise DataError(
            f"the header of {path} says that its tokens are {shard.dtype.name}, not {token_dtype}: "
            "leave token_dtype out."
        )
    return shard


def _llmc_shard(path: Path, size: int, start: bytes, magic: int) -> Shard:
    versions, dtype = FORMATS[magic]
    if size < HEADER:
        raise DataError(f"{path} is truncated: it has {size} bytes, its header alone has {HEADER}.")
    version, count = (int(word) for word in np.frombuffer(start, "<i4", 2, offset=4))
    if version not in versions:
        known = " or ".join(map(str, versions))
        raise DataError(f"{path} has version {version} of the token format {magic}; expected {known}.")
    if count < 1:
        raise DataError(f"{path} holds no tokens: its header counts {count}.")
    _check_size(path, size, HEADER + count * dtype.itemsize, count)
    return Shard(path, dtype, HEADER, count)


def _array(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype, int]:
    """The shape and dtype of an array that `np.save` wrote, and where its numbers begin."""
    npy = np.lib.format
    file.seek(0)
    version = file.read(8)[6:]
    read = {b"\1\0": npy.read_array_header_1_0, b"\2\0": npy.read_array_header_2_0}.get(version)
    if read is None:
        found = ".".join(map(str, version)) or "nothing"
        raise DataError(f"{path} has version {found} of NumPy's format; expected 1.0 or 2.0.")
    try:
        shape, _, dtype = read(file)
    except Exception:  # NumPy reads the header as Python's own parser does, and raises what that raises
        raise DataError(f"{path} is damaged: it begins as NumPy's .npy, but its header is invalid.") from None
    return shape, dtype, file.tell()


def _npy_shard(path: Path, size: int, shape: tuple[int, ...], dtype: np.dtype, begin: int) -> Shard:
    if len(shape) != 1 or dtype.kind not in "iu":
        raise DataError(
            f"{path} holds an array of {dtype} of shape {list(shape)}; expected integer token ids in one "
            "dimension."
        )
    count = shape[0]
    if count < 1:
        raise DataError(f"{path} holds no tokens: its header counts {count}.")
    _check_size(path, size, begin + count * dtype.itemsize, count)
    return Shard(path, dtype, begin, count)


def _check_size(path: Path, size: int, expected: int, count: int) -> None:
    if size != expected:
        wrong = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path} is {wrong}: it has {size:,} bytes, but its header counts {count:,} tokens, "
            f"which makes {expected:,}."
        )


class Shards:
    """Shards as one stream of tokens, a piece each; see `tapeless.data.orders.Tokens`.

    A file is mapped into memory only while something is taken from it, so data of any size needs
    no more memory than what is taken.

    Raises `DataError` for a file that cannot be read, or is no token file.
    """

    spans = None

    def __init__(self, paths: Sequence[Path], vocab_size: int, token_dtype: str = headerless.AUTO):
        self.files = [open_shard(path, vocab_size, token_dtype) for path in paths]
        if token_dtype == headerless.AUTO:
            self._tell_guesses()
        self.names = [str(path) for path in paths]
        self.pieces = np.cumsum([0, *(shard.size for shard in self.files)], dtype=np.int64)
        self.vocab_size = vocab_size

    def _tell_guesses(self) -> None:
        """Say how files without a header were read. int32 is what the documentation says of them."""
        guessed = [shard for shard in self.files if not shard.begin and shard.dtype.name != "int32"]
        if guessed:
            first, more = guessed[0], f" and {len(guessed) - 1} more" if len(guessed) > 1 else ""
            warnings.warn(
                Notice(
                    f"{first.path}{more} has no header: its tokens are read as {first.dtype.name}. "
                    f"If they are something else, give {argument('token_dtype')}."
                ),
                stacklevel=4,
            )

    @cached_property
    def digest(self) -> str:
        """Of names, sizes, and tokens at the beginning, in the middle and at the end of each file."""
        digest = hashlib.sha256()
        for shard in self.files:
            digest.update(repr((shard.path.name, str(shard.dtype), shard.begin, shard.size)).encode())
            places = (0, shard.size // 2, max(0, shard.size - 4096))
            for tokens in shard.read((at, min(at + 4096, shard.size)) for at in places):
                digest.update(tokens.tobytes())
        return digest.hexdigest()

    def take(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of `spans` [..., 2] and the target that follows each, as a stream int32 [M], and
        the spans into it. A span lies within one piece.

        Raises `DataError` for a token that is not in the vocabulary, or a file that was taken away.
        """
        flat = spans.reshape(-1, 2).astype(np.int64)
        starts = flat[:, 0]
        stops = starts + flat[:, 1] + 1
        # Spans end to end are read as one: the last target of one is the first token of the next.
        first = np.append(True, starts[1:] != stops[:-1] - 1)
        begins, ends = starts[first], stops[np.append(first[1:], True)]
        sizes = ends - begins
        places = np.cumsum(sizes) - sizes
        stream = np.empty(sizes.sum(), np.int32)
        piece = np.searchsorted(self.pieces, begins, side="right") - 1
        for k in np.unique(piece):
            runs = np.flatnonzero(piece == k)
            ranges = np.stack([begins[runs], ends[runs]], axis=1) - self.pieces[k]
            for run, tokens in zip(runs, self.files[k].read(ranges.tolist()), strict=True):
                part = stream[places[run] : places[run] + sizes[run]]
                part[:] = tokens
                if tokens.dtype.itemsize > 4:  # cut to 32 bits, an invalid id could become a valid one
                    part[(tokens < 0) | (tokens >= self.vocab_size)] = -1
        if stream.view(np.uint32).max(initial=0) >= self.vocab_size:
            at = int(np.argmax(stream.view(np.uint32) >= self.vocab_size))
            run = np.searchsorted(places, at, side="right") - 1
            k = piece[run]
            position = int(begins[run] - self.pieces[k] + at - places[run])
            [[token]] = self.files[k].read([(position, position + 1)])
            raise DataError(
                f"{self.names[k]} has the token {token} at position {position:,}; "
                f"the vocabulary has {self.vocab_size:,} tokens, numbered from 0."
            )
        flat[:, 0] += (places - begins)[np.cumsum(first) - 1]
        return stream, flat.reshape(spans.shape)


class ShardWriter:
    """Writes a shard as its tokens come: of uint16 where the vocabulary fits into that, of uint32
    where not. Only `close` makes it one, by writing its header."""

    def __init__(self, path: Path, vocab_size: int):
        self.path = path
        self.count = 0
        self._magic = next(m for m, f in FORMATS.items() if vocab_size <= 2 ** (8 * f.dtype.itemsize))
        self._file = open(path, "wb")  # noqa: SIM115
        self._file.write(bytes(HEADER))

    def write(self, tokens: np.ndarray) -> None:
        self._file.write(tokens.astype(FORMATS[self._magic].dtype).tobytes())
        self.count += len(tokens)

    def close(self) -> None:
        if self._file.closed:
            return
        header = np.zeros(HEADER // 4, "<i4")
        header[:3] = self._magic, FORMATS[self._magic].versions[0], self.count
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        files.flush(self._file.fileno())
        self._file.close()

    def taken_back(self) -> np.ndarray:
        """The tokens written, and the file removed."""
        self._file.close()
        tokens = np.fromfile(self.path, FORMATS[self._magic].dtype, offset=HEADER)
        self.path.unlink()
        return tokens

    def abandon(self) -> None:
        """Close the file as it is: no shard, unless `close` made it one."""
        with suppress(OSError):
            self._file.close()
