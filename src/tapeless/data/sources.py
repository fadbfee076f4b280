"""The data of a run: what to train on, what to validate on, and their tokenizer, wherever they lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tapeless.data.documents import BUILT_IN, Corpus, read_documents
from tapeless.data.files import find_tokens, is_tokens
from tapeless.data.given import Source, called
from tapeless.data.headerless import AUTO
from tapeless.data.orders import Tokens
from tapeless.data.shards import Shards
from tapeless.data.tokenizers import Tokenizer, find_tokenizer, is_padded, make_tokenizer, read_tokenizer
from tapeless.errors import ConfigError, DataError, Notice


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


def are_tokens(source: Source, token_dtype: str = AUTO) -> bool:
    """Whether `source` is token files: what is built in is a text, whatever lies here. A file whose
    `token_dtype` somebody tells is one, whatever its name."""
    if not isinstance(source, (str, Path)) or str(source) in BUILT_IN:
        return False
    return is_tokens(source) or (token_dtype != AUTO and Path(source).is_file())


def open_data(
    source: Source,
    val: Source | None,
    tokenizer: str | Tokenizer | None,
    vocab_size: int | None,
    longest: int,
    *,
    lines: bool,
    val_fraction: float,
    token_dtype: str = AUTO,
    least: int | None = None,
    usual_vocab: int | None = None,
    owner: str | Path = "the model",
) -> Data:
    """Open the data at `source`, and at `val` what to validate on. Without that it is NAME_val.bin for
    NAME_train.bin, or `val_fraction` of a text or of tokens in memory.

    `tokenizer` is one, `owner`'s, or the kind of one (see `make_tokenizer`), or None if it is not known;
    token files may have theirs beside them, which must be the same. `vocab_size` may be larger than the
    tokenizer's, which is its default; where nobody knows the tokenizer it is `usual_vocab`. `lines`: each
    line of a text is a document; what of it is longer than `longest` tokens is cut off. `least`:
    hold nothing out where that would leave fewer tokens to train on; None makes that an error.

    Raises `DataError` for what cannot be read, `ConfigError` for vocabularies that differ.
    """
    if are_tokens(source, token_dtype):
        assert isinstance(source, (str, Path))
        found = find_tokens(source, paired=val is None)
        if val is not None:
            found = found._replace(val=[])
        if tokenizer is None and vocab_size is not None:
            check_tokenizer(found.train + found.val, None, vocab_size, owner)
        if tokenizer is None or isinstance(tokenizer, str):
            path = find_tokenizer(found.train[0].parent)
            tokenizer, owner = (read_tokenizer(path), path) if path else (None, owner)
        vocab_size = _known_vocabulary(source, tokenizer, vocab_size, usual_vocab, found.train[0].parent)
        check_tokenizer(found.train + found.val, tokenizer, vocab_size, owner)
        train: Tokens = Shards(found.train, vocab_size, token_dtype)
        held: Tokens | None = Shards(found.val, vocab_size, token_dtype) if found.val else None
        if val is None and held is None and val_fraction:
            raise DataError(
                f"{source} has no NAME_val.bin, and of token files no part is held out: give what to "
                "validate on, or set val_fraction=0."
            )
        lines = False
    elif isinstance(source, np.ndarray):
        tokenizer = None if isinstance(tokenizer, str) else tokenizer
        vocab_size = _known_vocabulary(source, tokenizer, vocab_size, usual_vocab, None)
        check_tokens(source, vocab_size)
        train, held = _held_out([source], val_fraction if val is None else 0, Corpus.of_pieces, source, least)
        lines = False
    else:
        documents = _documents(source, lines)
        if isinstance(tokenizer, str):
            # Several texts have a token between them, as in `tokenize`.
            kind = "chars" if tokenizer == "text" and len(documents) > 1 else tokenizer
            tokenizer = make_tokenizer(kind, documents)
        if tokenizer is None:
            raise DataError(f"no tokenizer is known to read {called(source)} with: give token files.")
        known = tokenizer
        vocab_size = _vocabulary(source, tokenizer, vocab_size) or tokenizer.vocab_size
        train, held = _held_out(
            documents,
            val_fraction if val is None else 0,
            lambda parts: Corpus.from_documents(parts, known, longest),
            source,
            least,
        )
    if val is not None:
        held = _open_val(val, tokenizer, vocab_size, longest, lines, owner, token_dtype)
    return Data(train, held, tokenizer, vocab_size, lines)


def _documents(source: Source, lines: bool) -> list[str]:
    if not isinstance(source, list):
        assert not isinstance(source, np.ndarray)
        return read_documents(source, whole=not lines)
    if not any(text.strip() for text in source):
        raise DataError(f"{called(source)} has no text in it.")
    return source


def _held_out(
    documents: list[Any],
    fraction: float,
    corpus: Callable[[list[Any]], Corpus],
    source: Source,
    least: int | None,
) -> tuple[Corpus, Corpus | None]:
    """What to train on, and this fraction of the documents to validate on."""
    if not fraction:
        return corpus(documents), None
    rest, out = hold_out(documents, fraction)
    if rest and out:
        train, held = corpus(rest), corpus(out)
        if len(held.stream) > 1 and len(train.stream) >= (least or 0):
            return train, held
    if least is None:
        raise DataError(
            f"{called(source)} is too short to hold out {fraction:g} of it: set another val_fraction, or 0."
        )
    return corpus(documents), None


def _known_vocabulary(
    source: Source,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    usual: int | None,
    folder: Path | None,
) -> int:
    """The vocabulary of tokens. Raises `ConfigError` if nobody knows it."""
    known = _vocabulary(source, tokenizer, vocab_size)
    if known is not None:
        return known
    pickled = folder is not None and (folder / "meta.pkl").exists()
    not_read = f"; {folder}/meta.pkl, a pickle, is not read" if pickled else ""
    if usual is None:
        raise ConfigError(
            f"{folder or called(source)} has no tokenizer, so the vocabulary is not known{not_read}: set its "
            "size, e.g. vocab_size=50257 for GPT-2's tokens."
        )
    if pickled:
        warnings.warn(
            Notice(f"the vocabulary is the preset's, {usual:,} tokens{not_read}: set vocab_size."),
            stacklevel=3,
        )
    return usual


def _vocabulary(source: Source, tokenizer: Tokenizer | None, vocab_size: int | None) -> int | None:
    if tokenizer is None:
        return vocab_size
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size is {vocab_size:,}, but the tokenizer of {called(source)} has "
            f"{tokenizer.vocab_size:,} tokens; expected at least as many."
        )
    return vocab_size or tokenizer.vocab_size


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raise `DataError` for an id that is not in the vocabulary."""
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        raise DataError(
            f"{called(tokens)} has {tokens[wrong[0]]} at position {wrong[0]:,}; the vocabulary has "
            f"{vocab_size:,} tokens, numbered from 0."
        )


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
    source: Source,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    longest: int,
    lines: bool,
    owner: str | Path,
    token_dtype: str,
) -> Tokens:
    if are_tokens(source, token_dtype):
        assert isinstance(source, (str, Path))
        check_tokenizer(files := held_files(source), tokenizer, vocab_size, owner)
        return Shards(files, vocab_size, token_dtype)
    if isinstance(source, np.ndarray):
        check_tokens(source, vocab_size)
        return Corpus.of_pieces([source])
    if tokenizer is None:
        raise DataError(f"no tokenizer is known to read {called(source)} with: give token files.")
    documents = _documents(source, lines)
    try:
        return Corpus.from_documents(documents, tokenizer, longest)
    except DataError as error:
        raise DataError(f"{called(source)}: {error}") from None


def hold_out(documents: list[Any], fraction: float) -> tuple[list[Any], list[Any]]:
    """The documents without, and those that are, this fraction of them, evenly spread; of a single text
    or array of tokens, its end."""
    if len(documents) == 1:
        [text] = documents
        cut = int(len(text) * (1 - fraction))
        return [part for part in (text[:cut],) if len(part)], [part for part in (text[cut:],) if len(part)]
    share = np.arange(len(documents) + 1) * fraction
    held = np.floor(share[1:]) > np.floor(share[:-1])
    return (
        [d for d, out in zip(documents, held, strict=True) if not out],
        [d for d, out in zip(documents, held, strict=True) if out],
    )
