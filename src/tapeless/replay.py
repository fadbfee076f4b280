"""A bad step, done again by the reference engine to find where its numbers went wrong, and told in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tapeless.config import GPTConfig
from tapeless.data.sources import Data
from tapeless.engine import Engine
from tapeless.errors import ConfigError
from tapeless.memory import check_memory
from tapeless.settings import Training

SHOWN, LETTERS = 3, 40  # documents that are named, and how much of each


class _Found(Exception):
    """An op has left a number that is not finite: its name, and where."""


class _Watched:
    """The reference's ops, each looked at when it is done: the first that leaves a number that is not finite
    raises `_Found`."""

    def __init__(self, ops: Any, name_of: Callable[[np.ndarray], str]):
        self._ops, self._name_of = ops, name_of

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._ops, name)
        names = tuple(inspect.signature(op).parameters)

        def watched(*args: Any) -> Any:
            result = op(*args)
            for argument, value in zip(names, args, strict=True):
                if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise _Found(f"{name}, in {self._name_of(value) or argument}")
            if isinstance(result, (float, np.floating)) and not np.isfinite(result):
                raise _Found(f"{name}, what it returns")
            return result

        return watched


class _Replay(Engine):
    """The reference engine with `_Watched` ops."""

    def make_ops(self, decoding: bool) -> Any:
        return _Watched(super().make_ops(decoding), self._name_of)

    def _name_of(self, array: np.ndarray) -> str:
        """Which tensor the first number that is not finite lies in, "a.qkv[2]"; "" if in none."""
        at = np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape)
        address = _address(array) + sum(i * s for i, s in zip(at, array.strides, strict=True))
        for group in (self.p, self.g, self.a, self.d):
            for name, tensor in zip(group._fields, group, strict=True):
                if tensor.size and _address(tensor) <= address < _address(tensor) + tensor.nbytes:
                    layer = (address - _address(tensor)) // tensor.strides[0]
                    own = f"{type(group).__name__}.{name}"
                    return f"{own}[{layer}]" if tensor.shape[0] > 1 and tensor.ndim > array.ndim else own
        return ""


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def first_not_finite(
    config: GPTConfig,
    state: Mapping[str, np.ndarray],
    constants: np.ndarray,
    step: tuple[np.ndarray, np.ndarray, float],
    optimiser: str,
    longest: int,
) -> str:
    """Do one step from `state`, an engine's, on `step`, a stream, spans [A, B, 2] and a learning rate; in
    words, which op is the first to leave a number that is not finite, and where."""
    stream, spans, lr = step
    dtype = str(state["params"].dtype)
    try:
        check_memory(config, "reference", dtype, Training(batch_size=spans.shape[1]), None, longest)
    except ConfigError:
        return "There is not enough memory to look for the op by doing the step again."
    engine = _Replay(config, "reference", dtype)
    engine.reserve_moments([name for name in ("m", "v") if name in state])
    for name, array in engine.state.items():
        array[:] = state[name]
    engine.optimiser.constants[:] = constants
    for name, tensor in zip(engine.p._fields, engine.p, strict=True):
        if not np.isfinite(tensor).all():
            return f"The parameters {name} were not finite before it."
    try:
        with np.errstate(all="ignore"):
            engine.train(stream, spans[None], np.array([lr]), optimiser)
    except _Found as found:
        return f"First not finite: {found}."
    return "The reference engine does this step without such a number."


def described(data: Data, source: str, spans: np.ndarray) -> str:
    """What a step was done on: documents, by number and text, or positions in the data `source`."""
    tokens = data.train
    spans = spans.reshape(-1, 2)
    shown = []
    for start, length in spans[:SHOWN].tolist():
        if data.lines and tokens.spans is not None:
            number = int(np.searchsorted(tokens.spans[:, 0], start, side="right"))
            stream, [[begin, _]] = tokens.take(np.array([[start, length]]))
            ids = stream[begin + 1 : begin + length].tolist()
            text = "" if data.tokenizer is None else f" {_short(data.tokenizer.decode(ids))}"
            shown.append(f"document {number:,}{text}")
        else:
            piece = int(np.searchsorted(tokens.pieces, start, side="right")) - 1
            first = start - int(tokens.pieces[piece])
            name = source if len(tokens.pieces) == 2 else Path(tokens.names[piece]).name
            shown.append(f"tokens {first:,} to {first + length:,} of {name}")
    return _listed(shown, len(spans))


def _short(text: str) -> str:
    return repr(text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…")


def _listed(shown: Iterable[str], count: int) -> str:
    shown = list(shown)
    more = f" and {count - len(shown):,} more" if count > len(shown) else ""
    return ", ".join(shown) + more
