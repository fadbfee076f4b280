"""The errors a user can cause or meet. Each message says what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 2000  # characters of a message


class TapelessError(Exception):
    """Base of every foreseeable error; the command line prints it on one line and exits with code 2.

    A message may quote what a file holds: it is made one line of printable text, and shortened.
    """

    def __init__(self, message: object):
        text = printable(" ".join(str(message).split()))
        super().__init__(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")


def printable(text: str) -> str:
    """`text` with control characters written out, so that it cannot write to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(TapelessError):
    """A model or training setting that cannot be used."""


class DataError(TapelessError):
    """Text or tokens that cannot be read or encoded."""


class RunError(TapelessError):
    """A run folder or model file that is missing, incomplete, damaged or in the way."""


class NumericsError(TapelessError):
    """Training produced a loss that is not a finite number."""


class Notice(UserWarning):
    """Something to know that is no error; the command line prints it on one line."""


def in_python(name: str, value: Any = None) -> str:
    """An argument as Python has it: `resume=True`."""
    return name if value is None else f"{name}={value!r}"


def on_the_command_line(name: str, value: Any = None) -> str:
    """The option for an argument: `--resume`, `--set lr=0.1`."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, dict):
        return " ".join(f"{option} {key}={each}" for key, each in value.items())
    return option if value is None or value is True else f"{option} {value}"


_spell: Callable[[str, Any], str] = in_python


def argument(name: str, value: Any = None) -> str:
    """An argument for a message, as the user writes it: `resume=True` in Python, `--resume` on the command
    line. So an error need not know where the call came from."""
    return _spell(name, value)


@contextmanager
def spelled(spell: Callable[[str, Any], str]) -> Iterator[None]:
    """Let messages spell arguments like this."""
    global _spell  # noqa: PLW0603
    before, _spell = _spell, spell
    try:
        yield
    finally:
        _spell = before


EXTRAS = {"bpe": "tokenizers", "hub": "huggingface_hub tokenizers", "gguf": "gguf tokenizers"}


def install(extra: str) -> str:
    """How to get what an extra of the package needs. It names the libraries, so that it is right however
    tapeless itself was installed."""
    return f"pip install {EXTRAS[extra]} (the extra {extra!r})"


LISTED = 12  # known words that are listed


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """What to say of an unknown word: the nearest known one, and all of them where they are few."""
    known = list(known)
    few = len(known) <= LISTED
    # Where all are listed, only a slip of the fingers is worth a guess.
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.65 if few else 0.5)
    said = f" Did you mean {near[0]!r}?" if near else ""
    return f"{said} Expected one of: {', '.join(known)}." if few or not near else said
