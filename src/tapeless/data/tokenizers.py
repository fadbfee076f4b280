"""Tokenizers of single characters, with a BOS that begins and ends every document, or without."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tapeless.errors import DataError, did_you_mean


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character.

    `bos` is the id of the begin-of-sequence token, or None; the characters take the other ids in
    order.
    With `fold`, text is lower-cased and characters without a token are dropped; otherwise they
    are an error.
    """

    chars: str
    bos: int | None
    fold: bool = False

    @classmethod
    def from_documents(cls, documents: Iterable[str]) -> CharTokenizer:
        """microgpt's: the sorted characters of the text, BOS last."""
        chars = "".join(sorted(set().union(*documents)))
        return cls(chars, bos=len(chars))

    @classmethod
    def from_text(cls, documents: Iterable[str]) -> CharTokenizer:
        """For one long text: its sorted characters, line ends among them, and no BOS."""
        return cls("".join(sorted(set().union(*documents))), bos=None)

    @classmethod
    def letters(cls) -> CharTokenizer:
        """esp32gpt's: BOS = 0, a = 1 … z = 26."""
        return cls(string.ascii_lowercase, bos=0, fold=True)

    def __post_init__(self) -> None:
        if len(set(self.chars)) != len(self.chars):
            raise DataError("a character tokenizer needs distinct characters.")
        if not self.chars:
            raise DataError("a character tokenizer needs characters.")
        if self.bos is not None and not 0 <= self.bos <= len(self.chars):
            raise DataError(f"bos must be between 0 and {len(self.chars)}, not {self.bos}.")
        ids = [i for i in range(self.vocab_size) if i != self.bos]
        object.__setattr__(self, "_ids", dict(zip(self.chars, ids, strict=True)))
        object.__setattr__(self, "_chars", dict(zip(ids, self.chars, strict=True)))

    @property
    def vocab_size(self) -> int:
        """V: the characters, and BOS where there is one."""
        return len(self.chars) + (self.bos is not None)

    @property
    def start(self) -> int:
        """The token to generate from when there is no prompt: BOS, or else a line end."""
        return self.encode("\n" if "\n" in self.chars else self.chars[0])[0] if self.bos is None else self.bos

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without BOS. Raises `DataError` for an unknown character."""
        ids: dict[str, int] = self._ids  # type: ignore[attr-defined]
        if self.fold:
            return [ids[c] for c in text.lower() if c in ids]
        try:
            return [ids[c] for c in text]
        except KeyError as error:
            raise DataError(
                f"the tokenizer does not know the character {error.args[0]!r}. "
                f"It knows: {self.chars if len(self.chars) <= 80 else self.chars[:77] + '…'}"
            ) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; BOS has none."""
        chars: dict[int, str] = self._chars  # type: ignore[attr-defined]
        return "".join([chars.get(t, "") for t in tokens])

    def to_dict(self) -> dict[str, Any]:
        return {"type": "char", "chars": self.chars, "bos": self.bos, "fold": self.fold}


def make_tokenizer(kind: str, documents: Iterable[str]) -> CharTokenizer:
    """A preset's tokenizer: "chars" (from the documents), "letters" (fixed), "text" (from one text).

    Raises `DataError` for another kind.
    """
    if kind == "letters":
        return CharTokenizer.letters()
    if kind == "chars":
        return CharTokenizer.from_documents(documents)
    if kind == "text":
        return CharTokenizer.from_text(documents)
    if kind == "gpt2":
        raise DataError("this preset needs GPT-2's tokens, which cannot be made from text yet.")
    raise DataError(f"no tokenizer is called {kind!r}.{did_you_mean(kind, ('chars', 'letters', 'text'))}")


def tokenizer_from_dict(data: Any) -> CharTokenizer:
    """The tokenizer that `to_dict` described. Raises `DataError` if it is something else."""
    try:
        if data["type"] != "char":
            raise DataError(f"unknown tokenizer type {data['type']!r}; expected 'char'.")
        chars, bos, fold = data["chars"], data["bos"], data["fold"]
        if not (isinstance(chars, str) and isinstance(bos, int | None) and isinstance(fold, bool)):
            raise TypeError
    except (KeyError, TypeError):
        raise DataError("not a tokenizer: expected type, chars, bos and fold.") from None
    return CharTokenizer(chars, bos, fold)
