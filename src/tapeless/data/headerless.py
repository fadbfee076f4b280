"""Token files without a header: which integers they hold, as far as their content tells beyond doubt.

nanoGPT's `train.bin` is such a file, of uint16; `np.array(ids).tofile(…)` writes int64. Every file can be
read as every kind of integer, but only the right one gives ids of the vocabulary all the way:

- uint16 read as int32 makes one number of two tokens, beyond any vocabulary;
- int32 read as uint16, or int64 as int32, has 0 as every second id.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tapeless.errors import ConfigError, DataError, argument, did_you_mean

AUTO = "auto"
TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")
SAMPLE = 2**18  # bytes looked at
PROOF = 1e-9  # how likely at most another kind of file would be taken for uint16
DIFFERENT = 16  # ids that must occur before 0 as every second one tells int64


def check_dtype(token_dtype: str | None) -> str:
    """`token_dtype`, "auto" for None. Raises `ConfigError` if it is none of `TOKEN_DTYPES`."""
    if token_dtype not in (None, AUTO, *TOKEN_DTYPES):
        raise ConfigError(f"token_dtype cannot be {token_dtype!r}.{did_you_mean(token_dtype, TOKEN_DTYPES)}")
    return token_dtype or AUTO


def find_dtype(path: Path, size: int, start: bytes, vocab_size: int, token_dtype: str) -> np.dtype:
    """Return the kind of integers in a file of `size` bytes that begins with `start`: `token_dtype`, or where
    that is "auto" the one its content tells.

    Raises `DataError` where the file does not hold ids below `vocab_size`, or more than one kind is possible.
    """
    if not size:
        raise DataError(f"{path} is empty; expected token ids.")
    if token_dtype != AUTO:
        dtype = np.dtype(token_dtype).newbyteorder("<")
        if size % dtype.itemsize:
            raise DataError(
                f"{path} has {size:,} bytes, not a multiple of {dtype.itemsize}: its tokens are not "
                f"{token_dtype}."
            )
        if found := _first_invalid(start, dtype, vocab_size):
            raise DataError(f"{path} read as {token_dtype} has {_told(found)}; {_below(vocab_size)}.")
        return dtype
    if _is_text(start):
        raise DataError(
            f"{path} looks like text; expected token ids. Name it .txt to train on the text, or turn it into "
            "tokens by tapeless tokenize."
        )
    possible, reasons = [], []
    for name in ("uint16", "int32", "int64"):
        dtype = np.dtype(name).newbyteorder("<")
        if size % dtype.itemsize:
            continue
        if found := _first_invalid(start, dtype, vocab_size):
            reasons.append(f"{_told(found)} as {name}")
        else:
            possible.append(dtype)
    if not possible:
        what = (
            f"it has {', '.join(reasons)}" if reasons else f"{size:,} bytes are not a whole number of tokens"
        )
        raise DataError(
            f"{path} does not hold token ids: it has no header of llm.c or NumPy, and {what}; "
            f"{_below(vocab_size)}."
        )
    widest = possible[-1]
    if widest.name == "int32" or _beyond_doubt(start, widest, vocab_size):
        return widest
    likely = f"probably {widest.name}, as nanoGPT's are" if widest.name == "uint16" else "int64 or int32"
    raise DataError(
        f"{path} has no header, and its first bytes do not settle which integers it holds: {likely}. "
        f"Say which: {argument('token_dtype', widest.name)}."
    )


def _first_invalid(start: bytes, dtype: np.dtype, vocab_size: int) -> tuple[int, int] | None:
    """The first id that is not in the vocabulary, and its position."""
    ids = np.frombuffer(start, dtype, len(start) // dtype.itemsize)
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    return (int(ids[wrong[0]]), int(wrong[0])) if len(wrong) else None


def _told(found: tuple[int, int]) -> str:
    return f"{found[0]} at position {found[1]:,}"


def _below(vocab_size: int) -> str:
    return f"expected ids below {vocab_size:,}"


def _beyond_doubt(start: bytes, dtype: np.dtype, vocab_size: int) -> bool:
    """Whether a file that can be read as `dtype`, uint16 or int64, can hardly be anything else.

    That random bytes are valid uint16 has the probability V/2¹⁶ for each. In int32 ids of which every second
    one is 0, the others hardly differ.
    """
    ids = np.frombuffer(start, dtype, len(start) // dtype.itemsize)
    if dtype.name == "uint16":
        return (min(vocab_size, 2**16) / 2**16) ** len(ids) < PROOF
    return len(np.unique(ids)) >= DIFFERENT


def _is_text(start: bytes) -> bool:
    """Whether a file begins as UTF-8 text does, whose bytes would be valid uint16, too."""
    if len(start) < 16 or any(byte < 32 and byte not in b"\t\n\f\r" for byte in start):
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.end >= len(start) - 3  # in the middle of the last character
    return True
