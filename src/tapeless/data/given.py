"""What `data=` may be: a path or the name of a built-in set, or from Python texts or tokens themselves."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tapeless.data.documents import BUILT_IN
from tapeless.errors import DataError, Notice

FROM_PYTHON = "data from Python"  # in place of a path, where a run says what it was trained on

Source = str | Path | list[str] | np.ndarray


def source_of(data: Any, name: str = "data") -> Source:
    """Return `data` as a path, a list of texts, or an array [N] of token ids.

    A file or folder here that is called as a built-in set is preferred to that, and a note says so.
    Raises `DataError` for anything else, and for what is empty.
    """
    if isinstance(data, (str, os.PathLike)):
        return _path(data, name)
    if isinstance(data, (bytes, bytearray, dict, set, frozenset)) or not hasattr(data, "__iter__"):
        raise _unknown(data, name)
    items = None if isinstance(data, np.ndarray) and data.dtype.kind in "iufb" else list(data)
    if items and all(isinstance(item, str) for item in items):
        return items
    try:
        tokens = np.asarray(data)
    except (ValueError, TypeError, RuntimeError):
        raise _unknown(data, name) from None
    if not tokens.size:
        raise DataError(f"{name} is empty: expected texts or tokens.")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise _unknown(data, name)
    return tokens


def _path(data: str | os.PathLike[str], name: str) -> str | Path:
    path = os.fspath(data)
    if not path or "\0" in path:
        wrong = "not a path" if path else "empty"
        raise DataError(f"{name} is {wrong}: give a file, a folder or the name of a built-in set.")
    if path in BUILT_IN and os.path.lexists(path):
        warnings.warn(
            Notice(f"{path} is the {_kind(path)} here, not the built-in set, since both have this name."),
            stacklevel=3,
        )
        return Path(path).absolute()
    return data if isinstance(data, (str, Path)) else Path(path)


def _kind(path: str) -> str:
    return "folder" if os.path.isdir(path) else "file"


def _unknown(data: Any, name: str) -> DataError:
    return DataError(
        f"{name} must be a path, a built-in set, a list of texts, or a list or array of token ids, "
        f"not {type(data).__name__}."
    )


def called(source: Source) -> str:
    """What messages call it."""
    if isinstance(source, list):
        return "the text given" if len(source) == 1 else f"the list of {len(source):,} texts"
    if isinstance(source, np.ndarray):
        return f"the array of {len(source):,} tokens"
    return str(source)
