"""How good a model is on data: loss, perplexity, bits per byte. Every token is scored once."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tapeless.config import MAX_SIZE, whole
from tapeless.data.documents import Corpus, read_documents
from tapeless.data.given import called, source_of
from tapeless.data.headerless import AUTO, check_dtype
from tapeless.data.orders import Tokens
from tapeless.data.shards import Shards
from tapeless.data.sources import are_tokens, check_tokenizer, check_tokens, held_files
from tapeless.data.tokenizers import REMEDY, CharTokenizer, Tokenizer
from tapeless.errors import ConfigError, DataError, Notice, NumericsError, argument

if TYPE_CHECKING:
    from tapeless.model import GPT

AT_ONCE = 1024  # tokens computed at once, roughly, where nobody says


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text."""

    loss: float  # mean cross-entropy in nats a token
    tokens: int  # that were scored
    bytes: int | None = None  # of their text in UTF-8; None where no tokenizer knows it
    characters: int | None = None
    window: int | None = None  # tokens of a window
    stride: int | None = None  # tokens from one window to the next

    @property
    def perplexity(self) -> float:
        """exp(loss)"""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """What coding the text with this model takes: loss·tokens / (ln 2 · bytes)."""
        return self._bits_per(self.bytes)

    @property
    def bits_per_character(self) -> float | None:
        return self._bits_per(self.characters)

    def _bits_per(self, count: int | None) -> float | None:
        return self.loss * self.tokens / math.log(2) / count if count else None


def evaluate(
    model: GPT,
    data: str | Path | Tokens | Sequence[str] | Sequence[int] | np.ndarray,
    stride: int | None = None,
    *,
    block_size: int | None = None,
    lines: bool | None = None,
    batch_size: int | None = None,
    token_dtype: str | None = None,
    told: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """Return the loss of `model` on `data`: a text file or built-in set, token shards (of a pair the part
    to validate on), a list of texts, or tokens.

    A text longer than `block_size` (None: the model's) is read in windows of that length, each `stride`
    tokens further than the one before (None: as long as a window, so that they do not overlap). A
    window scores the tokens that no window before it has, and sees at least block_size − stride tokens
    before these: a small stride takes longer and comes nearer to what the model can do. `lines`: each
    line is a document, read from its BOS; None is so for characters with a BOS. Of a list of texts, each is
    a document or a text of its own. `batch_size` windows are computed at once. `token_dtype` is as for
    `train`. `told` hears how many tokens are done, of how many.

    Bytes and characters are those of the tokens that are scored: of a text all but its first token, which
    nothing predicts. A line end is one byte, however the file stores it.

    A `Notice` warns where windows reach beyond the positions that the model was trained on.

    Raises `DataError` for data that cannot be read, or have not two tokens, `ConfigError` for an invalid
    stride, batch size or `token_dtype`, `NumericsError` where the loss is no number.
    """
    most = model.config.block_size
    size = most if block_size is None else whole("block_size", block_size, 1, most)
    stride = size if stride is None else whole("stride", stride, 1, size)
    batch_size = max(1, AT_ONCE // size) if batch_size is None else batch_size
    batch_size = whole("batch_size", batch_size, 1, MAX_SIZE)
    opened, of_lines = _open(model, data, lines, check_dtype(token_dtype))
    sizes = _sizes(model.tokenizer, model.config.vocab, b"\n" if of_lines else b"")
    _warn_of_positions(model, Sliding(opened, size, stride).longest)
    result = score(model, opened, size, stride, batch_size, sizes=sizes, told=told)
    if not math.isfinite(result.loss):
        raise NumericsError(f"the loss is {result.loss}: the model's weights are not finite, or too large.")
    return dataclasses.replace(result, window=size, stride=stride)


def _warn_of_positions(model: GPT, longest: int) -> None:
    trained = model.trained_positions
    if trained is not None and longest > trained:
        warnings.warn(
            Notice(
                f"windows of {longest:,} tokens reach beyond the {trained:,} positions that the run trained, "
                f"so expect a higher loss; {argument('block_size', trained)} stays within them."
            ),
            stacklevel=3,
        )


def _open(model: GPT, data: Any, lines: bool | None, token_dtype: str) -> tuple[Tokens, bool]:
    """The data, and whether the token between documents is a line's end in them."""
    tokenizer = model.tokenizer
    if lines is None:
        lines = isinstance(tokenizer, CharTokenizer) and tokenizer.bos is not None
    # Characters without "\n" can only be lines, also where they were written to shards.
    of_lines = isinstance(tokenizer, CharTokenizer) and "\n" not in tokenizer.chars
    if isinstance(data, (Corpus, Shards)):
        return data, of_lines or (lines and data.spans is not None)
    source = source_of(data)
    if token_dtype != AUTO and not are_tokens(source, token_dtype):
        raise ConfigError(f"token_dtype applies to token files only; {called(source)} is not one.")
    if isinstance(source, np.ndarray):
        return Corpus.of_pieces([_checked(source, model)]), of_lines
    if are_tokens(source, token_dtype):
        assert not isinstance(source, list)
        check_tokenizer(files := held_files(source), tokenizer, model.config.vocab, "the model")
        return Shards(files, model.config.vocab, token_dtype), of_lines
    if tokenizer is None:
        raise DataError(
            f"the model has no tokenizer to read {called(source)} with: give token shards, or {REMEDY}."
        )
    documents = source if isinstance(source, list) else read_documents(source, whole=not lines)
    try:
        if lines:
            return Corpus.from_documents(documents, tokenizer, model.config.block_size), True
        return Corpus.of_pieces([tokenizer.encode(text) for text in documents]), False
    except DataError as error:
        raise DataError(f"{called(source)}: {error}") from None


def _checked(tokens: np.ndarray, model: GPT) -> np.ndarray:
    """The tokens, before numbers of 64 bits become others of 32."""
    check_tokens(tokens, model.config.vocab)
    return tokens


def score(
    model: GPT,
    data: Tokens,
    size: int,
    stride: int,
    batch_size: int,
    *,
    batches: int = 0,
    sizes: np.ndarray | None = None,
    told: Callable[[int, int], object] = lambda done, total: None,
) -> Evaluation:
    """The loss on windows of `size`, `batch_size` at once: of all, or of the first `batches` batches.
    `sizes` [V, 2] are the bytes and characters of each token, if they shall be counted.

    Raises `DataError` if there is no token to predict, or one that the model does not know.
    """
    windows = Sliding(data, size, stride)
    if not len(windows):
        raise DataError("there is nothing to evaluate on: it takes two tokens, one to predict the other.")
    count = min(len(windows), batches * batch_size or len(windows))
    total, scored, text = 0.0, 0, np.zeros(2, np.int64)
    for first in range(0, count, batch_size):
        spans, fresh = windows.take(np.arange(first, min(first + batch_size, count)))
        stream, spans = data.take(spans)
        lengths = spans[:, 1]
        starts = np.append(0, np.cumsum(lengths))
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        places = within + np.repeat(spans[:, 0], lengths)
        counted = within >= np.repeat(lengths - fresh, lengths)
        targets = stream[places + 1]
        total += model.loss(stream[places], targets, starts, counted) * fresh.sum()
        scored += int(fresh.sum())
        if sizes is not None:
            text += sizes[targets[counted]].sum(axis=0)
        told(scored, windows.tokens)
    known = map(int, text) if sizes is not None else (None, None)
    return Evaluation(total / scored, scored, *known)


class Sliding:
    """Windows of up to `size` tokens over every document (or piece) of `data`, each `stride` further
    than the one before, until the document's end. The first one scores all its tokens, the others those
    that are new."""

    def __init__(self, data: Tokens, size: int, stride: int):
        first, end = data.pieces[:-1], data.pieces[1:] - 1
        if data.spans is not None:  # these may be cut to the block; here all of a document counts
            first, end = data.spans[:, 0], np.append(data.spans[1:, 0], data.pieces[-1] - 1)
        self._size, self._stride = size, stride
        self._first, self._lengths = first, np.maximum(end - first, 0)
        beyond = np.maximum(self._lengths - size, 0)
        self._ends = np.cumsum(np.where(self._lengths > 0, 1 + -(-beyond // stride), 0))
        self._begins = np.append(0, self._ends[:-1])
        self.tokens = int(self._lengths.sum())
        self.longest = min(size, int(self._lengths.max(initial=0)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spans [B, 2] of windows number `index` [B], and how many tokens at the end of each are new."""
        document = np.searchsorted(self._ends, index, side="right")
        turn = index - self._begins[document]
        offset = turn * self._stride
        length = np.minimum(self._lengths[document] - offset, self._size)
        fresh = np.where(turn == 0, length, length - (self._size - self._stride))
        return np.stack([self._first[document] + offset, length], axis=1), fresh


def _sizes(tokenizer: Tokenizer | None, vocab_size: int, end: bytes) -> np.ndarray | None:
    """Bytes and characters of each token [V, 2]; that between documents stands for `end`, and ids that the
    tokenizer does not have for nothing."""
    if tokenizer is None:
        return None
    texts = tokenizer.token_bytes()
    texts += [b""] * (vocab_size - len(texts))
    if tokenizer.bos is not None:
        texts[tokenizer.bos] = end
    # A character's bytes after the first are of the form 10xxxxxx.
    return np.array([(len(text), sum(byte & 0xC0 != 0x80 for byte in text)) for text in texts])
