"""llm.c's tokenizer file, `gpt2_tokenizer.bin`: the bytes of each token, and the merges that made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tapeless.data.bpe import END, BPETokenizer, from_bytes
from tapeless.errors import DataError
from tapeless.tokenizer import Tokenizer

MAGIC = 20240328
HEADER = 1024  # bytes: 256 uint32, of which magic, version, vocabulary and, in version 2, the end are used
LONGEST = 255  # bytes of a token, whose number of them is one byte
GPT2_TOKENS, GPT2_END = 50257, 50256  # version 1 does not name the end


@dataclass(frozen=True)
class TableTokenizer(Tokenizer):
    """The bytes of each token, and `bos`, the token that stands between documents.

    Where the tokens are of GPT-2's kind they tell how to encode, too: see `find_merges`.
    """

    tokens: tuple[bytes, ...]
    bos: int | None

    def __post_init__(self) -> None:
        if self.bos is not None and not 0 <= self.bos < len(self.tokens):
            raise DataError(f"bos must be between 0 and {len(self.tokens) - 1}, not {self.bos}.")

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def start(self) -> int:
        """The token to generate from when there is no prompt."""
        return 0 if self.bos is None else self.bos

    def encode(self, text: str) -> list[int]:
        """GPT-2's tokens of `text`. Raises `DataError` for any but the empty one where the merges are not
        known, or the library is not there."""
        return self.bpe.encode(text) if text else []

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]] | None:
        """What the tokens were merged from; None where they do not tell."""
        return find_merges(self.tokens, self.bos)

    @cached_property
    def bpe(self) -> BPETokenizer:
        """The same as a BPE. Raises `DataError` where the merges are not known."""
        if self.merges is None:
            raise DataError(
                "this tokenizer only turns tokens into text, since its own are not merged from two others "
                "each, as GPT-2's are: for the other way put tokenizer.json, or vocab.json and merges.txt, "
                "in its place, or give tokens as numbers."
            )
        return from_bytes(self.tokens, self.merges)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; bytes that are no UTF-8 become U+FFFD, and ids without a token nothing."""
        known = [self.tokens[t] for t in tokens if 0 <= t < len(self.tokens)]
        return b"".join(known).decode("utf-8", errors="replace")

    def token_bytes(self) -> list[bytes]:
        return list(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Bytes as Latin-1."""
        return {"type": "table", "tokens": [t.decode("latin-1") for t in self.tokens], "bos": self.bos}

    @classmethod
    def from_dict(cls, data: Any) -> TableTokenizer:
        """Raises KeyError, TypeError or UnicodeError if `to_dict` did not make it."""
        bos = data["bos"]
        if not (isinstance(bos, int | None) and all(isinstance(t, str) for t in data["tokens"])):
            raise TypeError
        if any(len(t) > LONGEST for t in data["tokens"]):
            raise TypeError
        return cls(tuple(t.encode("latin-1") for t in data["tokens"]), bos)


def find_merges(tokens: Sequence[bytes], end: int | None) -> list[tuple[bytes, bytes]] | None:
    """The merges of the byte-level BPE that has these tokens, in order; `end` is `<|endoftext|>`.

    A BPE makes each token of two parts, and numbers it when it does. Merging a token's bytes with the
    merges before its own must therefore leave these two. None where that is not so, or the first 256
    tokens are not the bytes.
    """
    ordinary = [token for i, token in enumerate(tokens) if i != end]
    if end is not None and tokens[end] != END.encode():
        return None
    if len({*tokens}) < len(tokens) or [len(token) for token in ordinary[:256]] != [1] * 256:
        return None
    ranks: dict[tuple[bytes, bytes], int] = {}
    last = len(ordinary)
    for rank, token in enumerate(ordinary[256:]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min([(ranks.get(pair, last), i) for i, pair in enumerate(pairwise(parts))])
            if best == last:
                return None
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) < 2:
            return None
        ranks[parts[0], parts[1]] = rank
    return list(ranks)


def read_table(path: Path) -> TableTokenizer:
    """Raises `DataError` if the file cannot be read, is truncated or too long, or of another version."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from None
    if len(content) < HEADER:
        raise DataError(f"{path} is truncated: it has {len(content)} bytes, its header alone has {HEADER}.")
    magic, version, count, end = (int(word) for word in np.frombuffer(content, "<u4", 4))
    if magic != MAGIC:
        raise DataError(f"{path} begins with {magic}; an llm.c tokenizer begins with {MAGIC}.")
    if version not in (1, 2):
        raise DataError(f"{path} has version {version} of llm.c's tokenizer format; expected 1 or 2.")
    if version == 1:
        if count != GPT2_TOKENS:
            raise DataError(f"{path} has {count:,} tokens; in version 1 it must have {GPT2_TOKENS:,}.")
        end = GPT2_END
    tokens: list[bytes] = []
    at = HEADER
    while at < len(content) and len(tokens) < count:
        stop = at + 1 + content[at]
        if stop > len(content):
            break
        tokens.append(content[at + 1 : stop])
        at = stop
    if len(tokens) < count:
        raise DataError(
            f"{path} is truncated: it has {len(tokens):,} whole tokens, its header says {count:,}."
        )
    if at < len(content):
        raise DataError(f"{path} is too long: {len(content) - at:,} bytes follow its {count:,} tokens.")
    if not 0 <= end < count:
        raise DataError(f"{path} says that token {end} stands between documents, but has {count:,} tokens.")
    return TableTokenizer(tuple(tokens), end)
