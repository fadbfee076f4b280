"""`Tokenizer`: text to tokens and back, whatever the kind.

The kinds are in `tapeless.data`: single characters, byte-level BPE, llm.c's table.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapeless.config import MAX_SIZE, as_path, whole
from tapeless.errors import DataError, RunError

FILE = "tokenizer.json"


class Tokenizer(ABC):
    """Text to tokens and back. Make one by `characters`, `train` or `load`:

        tokenizer = tl.Tokenizer.train(texts, vocab_size=512)
        tokenizer.decode(tokenizer.encode("Hello"))
        run = tl.train(texts, preset="transformerlm", tokenizer=tokenizer)

    `bos` is the token that stands between documents, or None.
    """

    if TYPE_CHECKING:  # a field of some kinds, which a property here would be the default of

        @property
        def bos(self) -> int | None: ...

    @staticmethod
    def characters(texts: str | Iterable[str]) -> Tokenizer:
        """Return a tokenizer of the characters of `texts`, sorted.

        Several texts are documents: it then has a BOS, the last token, to stand between them. One `str` is
        one long text, and there is none.

        Raises `DataError` for texts without characters.
        """
        from tapeless.data.tokenizers import CharTokenizer

        if isinstance(texts, str):
            return CharTokenizer.from_text([texts])
        return CharTokenizer.from_documents(_strings(texts))

    @staticmethod
    def train(texts: str | Iterable[str], vocab_size: int) -> Tokenizer:
        """Return a byte-level BPE of at most `vocab_size` tokens: the 256 bytes, what is most often found
        together in `texts`, and `<|endoftext|>`, which is the last.

        Raises `DataError` without the `tokenizers` library, `ConfigError` for a `vocab_size` below 257.
        """
        from tapeless.data.bpe import LEAST, train_bpe

        size = whole("vocab_size", vocab_size, LEAST, MAX_SIZE)
        return train_bpe([texts] if isinstance(texts, str) else _strings(texts), size)

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Return the tokenizer of a file or folder: a run's or Hugging Face's tokenizer.json, vocab.json and
        merges.txt, or llm.c's gpt2_tokenizer.bin. "gpt2" is fetched where nothing here has that name.

        Raises `DataError` if there is none, or it is damaged.
        """
        from tapeless.data.bpe import fetch_gpt2
        from tapeless.data.tokenizers import read_tokenizer

        place = as_path("path", path)
        if not place.exists():
            if str(path) != "gpt2":
                raise DataError(f"no tokenizer {str(path)!r}: give a file, a folder or gpt2.")
            place = fetch_gpt2()
        return read_tokenizer(place)

    def save(self, path: str | Path) -> None:
        """Write it to a file, or as tokenizer.json into a folder that exists.

        Raises `RunError` if it cannot be written.
        """
        target = as_path("path", path)
        target = target / FILE if target.is_dir() else target
        aside = target.with_name(f".{target.name}.part")
        try:
            with open(aside, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                file.write(json.dumps(self.to_dict(), ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise RunError(f"cannot write {target}: {error.strerror or error}.") from None

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V: ids are 0 … V−1."""

    @property
    @abstractmethod
    def start(self) -> int:
        """The token to generate from when there is no prompt."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, without BOS. Raises `DataError` for text that has none."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of any ids."""

    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each token's text [V]."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return what `save` writes, and `tokenizer_from_dict` makes the same tokenizer of."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.vocab_size:,} tokens)"


def _strings(texts: Any) -> list[str]:
    texts = list(texts) if hasattr(texts, "__iter__") else [texts]
    if not all(isinstance(text, str) for text in texts):
        raise DataError("expected a text or a list of texts.")
    return texts
