"""Documents: lines of text, made into one token stream and spans into it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from tapeless.data.texts import undecodable
from tapeless.data.tokenizers import CharTokenizer, Tokenizer
from tapeless.errors import DataError

BUILT_IN = {"names": "names.txt"}


def read_documents(source: str | Path, *, whole: bool = False) -> list[str]:
    """The non-empty stripped lines of a text file, or of a built-in data set ("names"); with `whole`
    the whole text as it is, as one document.

    Raises `DataError` if there is no such file, it cannot be read, is not UTF-8 text, or holds no
    documents.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"data must be the path of a text file or a built-in data set, not {source!r:.60}.")
    if str(source) in BUILT_IN:
        text = (resources.files("tapeless.data") / BUILT_IN[str(source)]).read_text(encoding="utf-8")
    else:
        path = Path(source)
        try:
            if path.exists() and not (path.is_file() or path.is_dir()):  # some never end
                raise DataError(f"{source} is no regular file; expected a text file, one document a line.")
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            built_in = ", ".join(BUILT_IN)
            raise DataError(
                f"no data file {str(source)!r}. Give a text file with one document a line, "
                f"or a built-in data set: {built_in}."
            ) from None
        except IsADirectoryError:
            raise DataError(
                f"{str(source)!r} is a folder; expected a text file, one document a line."
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source} is not UTF-8 text ({undecodable(error.object, error.start)}); "
                "expected one document a line."
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {source}: {reason}.") from None
    if "\0" in text:
        raise DataError(f"{source} is not text: it holds null bytes; expected one document a line.")
    documents = [line.strip() for line in ([text] if whole else text.split("\n"))]
    documents = [text] if whole and any(documents) else [d for d in documents if d]
    if not documents:
        raise DataError(f"{source} holds no documents: it is empty or has only blank lines.")
    return documents


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens: `stream` is BOS d₁ BOS d₂ BOS …; span (start, length) of a document
    covers its leading BOS and its text, cut to the block; its targets end with the next BOS.
    Where the tokenizer has no BOS, each text is a piece of the stream; several have no spans."""

    stream: np.ndarray  # [M] int32
    spans: np.ndarray | None  # [documents, 2] int64
    n_cut: int  # documents longer than the block
    digest: str  # of the stream: the same tokens, the same digest
    bounds: np.ndarray | None = None  # of the pieces, if there are several
    n_dropped: int = 0  # characters without a token, which a tokenizer that folds leaves out

    @property
    def pieces(self) -> np.ndarray:
        """Where each piece begins, and the last one ends."""
        return np.array([0, len(self.stream)]) if self.bounds is None else self.bounds

    @property
    def names(self) -> Sequence[str]:
        """What messages call the pieces."""
        count = len(self.pieces) - 1
        return ("the text",) if count == 1 else [f"text {i + 1:,}" for i in range(count)]

    def take(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The whole stream, and the spans as they are."""
        return self.stream, spans

    @classmethod
    def from_documents(cls, documents: list[str], tokenizer: Tokenizer, block_size: int) -> Corpus:
        """Raises `DataError` if no document has a character the tokenizer knows."""
        encoded = [ids for ids in map(tokenizer.encode, documents) if ids]
        if not encoded:
            raise DataError("no document holds a character that the tokenizer knows.")
        dropped = 0
        if isinstance(tokenizer, CharTokenizer) and tokenizer.fold:
            dropped = sum(len(text.lower()) for text in documents) - sum(map(len, encoded))
        if tokenizer.bos is None:
            return cls.of_pieces(encoded)
        lengths = np.array([len(ids) + 1 for ids in encoded])
        ends = np.cumsum(lengths)
        stream = np.empty(ends[-1] + 1, np.int32)
        stream[0] = tokenizer.bos
        stream[ends] = tokenizer.bos
        inside = np.ones(len(stream), bool)
        inside[0] = inside[ends] = False
        stream[inside] = np.concatenate([np.array(ids, np.int32) for ids in encoded])
        spans = np.stack([ends - lengths, np.minimum(lengths, block_size)], axis=1).astype(np.int64)
        n_cut = int(np.sum(lengths > block_size))
        return cls(stream, spans, n_cut, _digest(stream), n_dropped=dropped)

    @classmethod
    def of_pieces(cls, pieces: Sequence[Sequence[int] | np.ndarray]) -> Corpus:
        """Tokens that are no documents: each piece is read by itself."""
        stream = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
        if len(pieces) == 1:
            return cls(stream, np.array([[0, len(stream) - 1]]), 0, _digest(stream))
        return cls(stream, None, 0, _digest(stream), np.cumsum([0, *map(len, pieces)]))


def _digest(stream: np.ndarray) -> str:
    return hashlib.sha256(stream.tobytes()).hexdigest()
