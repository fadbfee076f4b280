"""The safetensors format: eight bytes of length, a header in JSON, then the tensors without gaps.

By hand, since the library has no bfloat16 in NumPy, and wants a file's tensors in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tapeless.errors import RunError
from tapeless.io.tensors import OpenFile, Stored, file_size, write_array

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_file(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name, to be read. Raises `RunError` if it is not whole."""
    try:
        size = file_size(path)
        opened = OpenFile(path)
        with opened.again() as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, opened, 8 + length, about) for name, about in header.items()}
        end = 8 + length
        for stored in sorted(tensors.values(), key=lambda stored: (stored.offset, stored.nbytes)):
            if stored.offset != end:
                raise ValueError
            end += stored.nbytes
        if end != size:
            raise ValueError
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RunError(f"{path} is damaged or truncated: it is not a whole safetensors file.") from None
    return tensors


def _entry(path: Path, file: OpenFile, begin: int, about: dict[str, Any]) -> Stored:
    if about["dtype"] not in DTYPES:
        raise RunError(f"{path} holds {about['dtype']} numbers; expected one of {', '.join(DTYPES)}.")
    first, end = about["data_offsets"]
    shape = tuple(about["shape"])
    if not all(type(n) is int and n >= 0 for n in (first, end, *shape)):
        raise ValueError
    stored = Stored(path, begin + first, DTYPES[about["dtype"]], shape, file=file)
    if end - first != stored.nbytes:
        raise ValueError
    return stored


def write(
    file: BinaryIO,
    entries: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
    blocks: Iterable[np.ndarray],
    metadata: dict[str, str],
) -> None:
    """Write the tensors `entries` (name, dtype, shape); `blocks` has all their numbers in that order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in entries:
        first, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for block in blocks:
        write_array(file, block)
