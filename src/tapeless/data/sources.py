"""The data of a run: what to train on, what to validate on, and their tokenizer, wherever they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tapeless.data.documents import BUILT_IN, Corpus, read_documents
from tapeless.data.files import find_tokens, is_tokens
from tapeless.data.orders import Tokens
from tapeless.data.shards import Shards
from tapeless.data.tokenizers import Tokenizer, find_tokenizer, is_padded, make_tokenizer, read_tokenizer
from tapeless.errors import ConfigError, DataError


class Data(NamedTuple):
    """What a run reads. `tokenizer` is None where nobody knows it: texts are then tokens as numbers."""

    train: Tokens
    val: Tokens | None
    tokenizer: Tokenizer | None
    vocab_size: int
    lines: bool  # documents, not one long text

    def sizes(self) -> str:
        """For people: "4,647 documents and 516 to validate on"."""
        text = f"{self._size(self.train):,} {'documents' if self.lines else 'tokens'}"
        return text if self.val is None else f"{text} and {self._size(self.val):,} to validate on"

    def _size(self, data: Tokens) -> int:
        return len(data.spans) if self.lines and data.spans is not None else int(data.pieces[-1])


def are_tokens(source: str | Path) -> bool:
    """Whether the data at `source` are token files: what is built in is a text, whatever lies here."""
    path = isinstance(source, (str, os.PathLike)) and str(source)
    return bool(path) and path not in BUILT_IN and is_tokens(source)


def open_data(
    source: str | Path,
    val: str | Path | None,
    tokenizer: str | Tokenizer | None,
    vocab_size: int | None,
    longest: int,
    *,
    lines: bool,
    val_fraction: float,
    usual_vocab: int | None = None,
    owner: str | Path = "the model",
) -> Data:
    """Open the data at `source`, and at `val` what to validate on. Without that it is NAME_val.bin for
    NAME_train.bin, or `val_fraction` of a text.

    `tokenizer` is one, `owner`'s, or the kind of one (see `make_tokenizer`), or None if it is not known;
    token files may have theirs beside them, which must be the same. `vocab_size` may be larger than the
    tokenizer's, which is its default; where nobody knows the tokenizer it is `usual_vocab`. `lines`: each
    line of a text is a document; what of it is longer than `longest` tokens is cut off.

    Raises `DataError` for what cannot be read, `ConfigError` for vocabularies that differ.
    """
    if are_tokens(source):
        found = find_tokens(source, paired=val is None)
        if val is not None:
            found = found._replace(val=[])
        if tokenizer is None or isinstance(tokenizer, str):
            path = find_tokenizer(found.train[0].parent)
            tokenizer, owner = (read_tokenizer(path), path) if path else (None, owner)
        vocab_size = _vocabulary(source, tokenizer, vocab_size) or usual_vocab
        if vocab_size is None:
            raise ConfigError(
                f"{found.train[0].parent} has no tokenizer, so the vocabulary is not known: set its size, "
                "e.g. vocab_size=50257 for GPT-2's tokens."
            )
        check_tokenizer(found.train + found.val, tokenizer, vocab_size, owner)
        train: Tokens = Shards(found.train, vocab_size)
        held: Tokens | None = Shards(found.val, vocab_size) if found.val else None
        if val is None and held is None and val_fraction:
            raise DataError(
                f"{source} has no NAME_val.bin, and of token files no part is held out: give what to "
                "validate on, or set val_fraction=0."
            )
        lines = False
    else:
        documents = read_documents(source, whole=not lines)
        if isinstance(tokenizer, str):
            tokenizer = make_tokenizer(tokenizer, documents)
        if tokenizer is None:
            raise DataError(f"no tokenizer is known to read {source} with: give token files.")
        vocab_size = _vocabulary(source, tokenizer, vocab_size) or tokenizer.vocab_size
        rest: list[str] = []
        if val is None and val_fraction:
            documents, rest = hold_out(documents, val_fraction)
            if not documents or not rest:
                raise DataError(
                    f"{source} is too short to hold out {val_fraction:g} of it: set another val_fraction, "
                    "or 0."
                )
        train = Corpus.from_documents(documents, tokenizer, longest)
        held = Corpus.from_documents(rest, tokenizer, longest) if rest else None
    if val is not None:
        held = _open_val(val, tokenizer, vocab_size, longest, lines, owner)
    return Data(train, held, tokenizer, vocab_size, lines)


def _vocabulary(source: str | Path, tokenizer: Tokenizer | None, vocab_size: int | None) -> int | None:
    if tokenizer is None:
        return vocab_size
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size is {vocab_size:,}, but the tokenizer of {source} has {tokenizer.vocab_size:,} "
            "tokens; expected at least as many."
        )
    return vocab_size or tokenizer.vocab_size


def check_tokenizer(
    files: Iterable[Path], tokenizer: Tokenizer | None, vocab_size: int, owner: str | Path
) -> None:
    """Raise `ConfigError` if token files lie beside another tokenizer than `owner`'s. What counts is what
    each token stands for: the same tokenizer may lie in files of another kind."""
    for folder in dict.fromkeys(file.parent for file in files):
        if (path := find_tokenizer(folder)) is None:
            continue
        theirs = read_tokenizer(path)
        if tokenizer is None:
            same = is_padded(vocab_size, theirs.vocab_size)
        else:
            same = theirs.token_bytes() == tokenizer.token_bytes()
        if not same:
            raise ConfigError(
                f"{path}, beside the tokens, is another tokenizer ({theirs.vocab_size:,} tokens) than that "
                f"of {owner} ({vocab_size:,} tokens): tokenize the text with that one."
            )


def held_files(source: str | Path) -> list[Path]:
    """Of token files at `source` those to validate on: of a pair its second, else all."""
    found = find_tokens(source)
    return [Path(source)] if Path(source).is_file() else found.val or found.train


def _open_val(
    source: str | Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    longest: int,
    lines: bool,
    owner: str | Path,
) -> Tokens:
    if are_tokens(source):
        check_tokenizer(files := held_files(source), tokenizer, vocab_size, owner)
        return Shards(files, vocab_size)
    if tokenizer is None:
        raise DataError(f"no tokenizer is known to read {source} with: give token files.")
    documents = read_documents(source, whole=not lines)
    try:
        return Corpus.from_documents(documents, tokenizer, longest)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None


def hold_out(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The documents without, and those that are, this fraction of them, evenly spread; of a single text,
    its end."""
    if len(documents) == 1:
        [text] = documents
        cut = int(len(text) * (1 - fraction))
        return ([text[:cut]] if cut else []), [text[cut:]]
    share = np.arange(len(documents) + 1) * fraction
    held = np.floor(share[1:]) > np.floor(share[:-1])
    return (
        [d for d, out in zip(documents, held, strict=True) if not out],
        [d for d, out in zip(documents, held, strict=True) if out],
    )
