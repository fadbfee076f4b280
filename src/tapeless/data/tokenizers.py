"""Tokenizers: what they all offer, those of single characters, and how each kind is found and read."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tapeless.data.added import completed
from tapeless.data.bpe import BPETokenizer, fetch_gpt2, read_pair
from tapeless.data.shards import magic_number
from tapeless.data.table import MAGIC, TableTokenizer, read_table
from tapeless.errors import DataError, did_you_mean

MADE = ("chars", "letters", "text")  # the kinds that are made of the data, and can be made again
# In a folder, the first of these that is there is its tokenizer.
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
FILES = ("tokenizer.json", *(vocab for vocab, _ in PAIRS), "gpt2_tokenizer.bin")
REMEDY = "put the model's tokenizer (tokenizer.json, or llm.c's gpt2_tokenizer.bin) beside it"


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def bos(self) -> int | None:
        """The token that stands between documents, if there is one: generating stops there."""

    @property
    def vocab_size(self) -> int:
        """V: ids are 0 … V−1."""

    @property
    def start(self) -> int:
        """The token to generate from when there is no prompt."""

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without BOS. Raises `DataError` for text that has none."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of any ids."""

    def token_bytes(self) -> list[bytes]:
        """The bytes of each token's text [V]."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer_from_dict` makes the same tokenizer of."""


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
        ids: dict[str, int] = self._ids  # type: ignore[attr-defined]
        return ids.get("\n", ids[self.chars[0]]) if self.bos is None else self.bos

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

    def token_bytes(self) -> list[bytes]:
        return [self.decode([t]).encode(errors="surrogatepass") for t in range(self.vocab_size)]

    def to_dict(self) -> dict[str, Any]:
        return {"type": "char", "chars": self.chars, "bos": self.bos, "fold": self.fold}


@dataclass(frozen=True)
class Numbers:
    """For a model without a tokenizer: a text is its tokens as numbers, "464 3290 318"."""

    vocab_size: int
    bos: None = None

    @property
    def start(self) -> int:
        """The last token: where BOS stands in microgpt's vocabulary and in GPT-2's."""
        return self.vocab_size - 1

    def encode(self, text: str) -> list[int]:
        words = text.split()
        if not all(word.isdecimal() and len(word) < 20 and int(word) < self.vocab_size for word in words):
            raise DataError(
                f"without a tokenizer, the prompt must be tokens from 0 to {self.vocab_size - 1}, "
                f"such as '1 2 3', not {text!r:.60}; or {REMEDY}."
            )
        return [int(word) for word in words]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))


def make_tokenizer(kind: str, documents: Iterable[str]) -> Tokenizer:
    """A preset's tokenizer: "chars" (from the documents), "letters" (fixed), "text" (from one text),
    "gpt2" (fetched), or what is in a file or folder of this name.

    Raises `DataError` for another kind, or one that cannot be had.
    """
    if kind == "letters":
        return CharTokenizer.letters()
    if kind == "chars":
        return CharTokenizer.from_documents(documents)
    if kind == "text":
        return CharTokenizer.from_text(documents)
    if kind == "gpt2":
        return read_tokenizer(fetch_gpt2())
    if Path(kind).exists():
        return read_tokenizer(Path(kind))
    known = ("chars", "letters", "text", "gpt2")
    raise DataError(f"no tokenizer, file or folder is called {kind!r}.{did_you_mean(kind, known)}")


def tokenizer_from_dict(data: Any) -> Tokenizer:
    """The tokenizer that `to_dict` described. Raises `DataError` if it is something else."""
    if isinstance(data, dict) and "model" in data:
        return BPETokenizer(data)
    try:
        if data["type"] == "table":
            return TableTokenizer.from_dict(data)
        if data["type"] != "char":
            raise DataError(f"unknown tokenizer type {data['type']!r}; expected 'char'.")
        chars, bos, fold = data["chars"], data["bos"], data["fold"]
        if not (isinstance(chars, str) and isinstance(bos, int | None) and isinstance(fold, bool)):
            raise TypeError
    except (KeyError, TypeError, UnicodeError):
        raise DataError(
            "not a tokenizer: expected the JSON of Hugging Face's tokenizers, or type, chars, bos and fold."
        ) from None
    return CharTokenizer(chars, bos, fold)


def is_padded(rows: int, tokens: int) -> bool:
    """Whether a model of so many rows may be one for this many tokens, with rows added to make their number
    a multiple of a power of two up to 1,024."""
    return any(rows == -(-tokens // 2**n) * 2**n for n in range(11))


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a folder: of `FILES`, the first that is there."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, known by its content, or of a folder: tokenizer.json (Hugging Face's, or
    of a run), vocab.json or encoder.json with merges.txt or vocab.bpe beside it, llm.c's
    gpt2_tokenizer.bin.

    Raises `DataError` if there is none, or it is damaged.
    """
    if path.is_dir():
        if (found := find_tokenizer(path)) is None:
            raise DataError(f"{path} has no tokenizer; expected one of {', '.join(FILES)}.")
        path = found
    _regular(path)
    if magic_number(path) == MAGIC:
        return read_table(path)
    for vocab, merges in PAIRS:
        if path.name == merges:
            _regular(path.with_name(vocab))
            return read_pair(path.with_name(vocab), path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        raise DataError(
            f"{path} is no tokenizer: expected JSON, as in {', '.join(FILES[:-1])}, "
            "or llm.c's tokenizer file."
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    if isinstance(content, dict) and content and all(isinstance(v, int) for v in content.values()):
        own_first = sorted(PAIRS, key=lambda pair: pair[0] != path.name)
        merged = [path.with_name(m) for _, m in own_first if path.with_name(m).is_file()]
        if not merged:
            raise DataError(f"{path} is one half of a tokenizer: put its merges.txt or vocab.bpe beside it.")
        return read_pair(path, merged[0])
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = completed(content, path.parent)
    try:
        return tokenizer_from_dict(content)
    except DataError as error:
        raise DataError(f"{path} cannot be used: {error}") from None


def _regular(path: Path) -> None:
    """Refuse what would be waited for, such as a pipe. What is not there is left to be read in vain."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no regular file; expected a tokenizer's file or folder.")
