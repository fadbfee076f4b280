"""`tapeless tokenize`: texts in, token shards and a tokenizer out; nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tapeless.config import number, whole
from tapeless.data.bpe import LEAST, fetch_gpt2, train_bpe
from tapeless.data.files import NAME, find_tokens
from tapeless.data.shards import MOST, OTHERS, ShardWriter, magic_number
from tapeless.data.texts import BLOCK, Texts
from tapeless.data.tokenizers import CharTokenizer, Tokenizer, find_tokenizer, read_tokenizer
from tapeless.data.workers import documents, encoded, trained
from tapeless.errors import DataError, argument
from tapeless.files import flush_folder, replace, write_text
from tapeless.machine import processors

TOKENIZER = "tokenizer.json"
MAX_VOCAB = 2**20
WORTHWHILE = 2**21  # bytes of text for which it pays to start a process


class Progress(Protocol):
    """Is told what is being done and how far it is."""

    def begin(self, what: str, total: int) -> None: ...
    def advance(self, n: int) -> None: ...
    def finish(self) -> None: ...


class Written(NamedTuple):
    """A shard, as it stands in the folder."""

    path: Path
    tokens: int
    held_out: bool


class Tokenized(NamedTuple):
    shards: list[Written]
    source: Path  # what means these shards, and no others: a folder, FOLDER/NAME, a shard or a glob
    tokenizer: Tokenizer
    bytes: int  # of text


def tokenize(
    texts: Sequence[Path],
    out: Path,
    *,
    tokenizer: str | None = None,
    train_bpe: int | None = None,
    val_fraction: float = 0.1,
    lines: bool = False,
    shard_tokens: int = 100_000_000,
    processes: int | None = None,
    overwrite: bool = False,
    progress: Progress,
) -> Tokenized:
    """Write texts as token shards NAME_train.bin, NAME_val.bin and their tokenizer into the folder `out`.

    NAME is the text's own, or the folder's where there are several texts; shards of more than
    `shard_tokens` are divided and numbered, NAME_train_000001.bin …. `tokenizer` is a file or
    folder, "gpt2", or "chars", the characters of the texts; `train_bpe` makes a new one of so many
    tokens. The last `val_fraction` of the text is held out. Where the tokenizer has a BOS it stands
    before each document: a text, or with `lines` each line that is not blank.

    All is written aside and takes its place when it is complete.
    Raises `DataError` or `ConfigError` for what cannot be read, used or written.
    """
    number("val_fraction", val_fraction, 0, 1, ends="low")
    whole("shard_tokens", shard_tokens, 1000, MOST // 10 * 9)
    if processes is not None:
        whole("processes", processes, 1, 1024)
    if (tokenizer is None) == (train_bpe is None):
        raise DataError(f"give either {argument('tokenizer')} or {argument('train_bpe')}.")
    if train_bpe is not None:
        whole("train_bpe", train_bpe, LEAST, MAX_VOCAB)
    source = Texts(texts, val_fraction, lines)
    name = texts[0].stem if len(texts) == 1 else out.resolve().name or "data"
    _refuse(out, name, overwrite)
    try:
        used = _tokenizer(tokenizer, train_bpe, source, lines, progress)
        _refuse_tokenizer(out, name, used, overwrite)
        likely = min(processors(), source.size // WORTHWHILE) if processes is None else processes
        processes = max(1, min(likely, source.size // BLOCK))
        with _aside(out, name) as part:
            splits = [_Split(part, name, split, used.vocab_size, shard_tokens) for split in ("train", "val")]
            try:
                progress.begin("tokenizing", source.size)
                for block, ids in encoded(source.blocks(progress.advance), used, lines, processes):
                    splits[block.held_out].write(ids)
                counts = [split.finish() for split in splits]
            finally:
                for split in splits:
                    split.abandon()
            if not counts[0]:
                raise DataError(f"there is no text left to train on: lower {argument('val_fraction')}.")
            write_text(part / TOKENIZER, json.dumps(used.to_dict(), ensure_ascii=False) + "\n")
            shards = _publish(part, out, name, counts)
    finally:
        progress.finish()
    return Tokenized(shards, _source(out, name, shards), used, source.size)


# ---------------------------------------------------------------- the tokenizer


def _tokenizer(
    kind: str | None, train: int | None, source: Texts, lines: bool, progress: Progress
) -> Tokenizer:
    if train is not None:
        progress.begin("reading", source.size)
        texts = (b.text for b in source.blocks(progress.advance) if not b.held_out)
        return (trained if source.size >= WORTHWHILE else train_bpe)(texts, train)
    if kind == "chars":
        progress.begin("reading", source.size)
        chars: set[str] = set()
        for block in source.blocks(progress.advance):
            chars |= set("".join(documents(block.text)) if lines else block.text)
        # As for training on a text itself: documents have a BOS between them, one text has none.
        several = lines or len(source.paths) > 1
        return (CharTokenizer.from_documents if several else CharTokenizer.from_text)(chars)
    if kind == "gpt2":
        return read_tokenizer(fetch_gpt2())
    path = Path(kind or "")
    if not kind or not path.exists():
        raise DataError(f"no tokenizer {kind!r}. Give a file, a folder, gpt2 or chars.")
    return read_tokenizer(path)


def _refuse_tokenizer(out: Path, name: str, tokenizer: Tokenizer, overwrite: bool) -> None:
    """Shards that stay in the folder depend on its tokenizer."""
    others = [p for p in sorted(out.glob("*.bin")) if magic_number(p) not in OTHERS]
    others = [p for p in others if p not in _existing(out, name)]
    there = find_tokenizer(out)
    if there is None or (overwrite and not others):
        return
    if read_tokenizer(there).token_bytes() != tokenizer.token_bytes():
        if others:
            raise DataError(f"{there} is another tokenizer, which {others[0]} needs: choose another folder.")
        raise DataError(
            f"{there} is another tokenizer: choose another folder, or {argument('overwrite', True)}."
        )


# ---------------------------------------------------------------- shards


class _Split:
    """The shards of one part of the text, of `most` tokens each. What is left over for the last, if
    it is less than a tenth of that, goes to the one before, so that no shard is too short to use."""

    def __init__(self, folder: Path, name: str, split: str, vocab_size: int, most: int):
        self._stem = folder / f"{name}_{split}"
        self._vocab_size, self._most = vocab_size, most
        self._writers: list[ShardWriter] = []

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            if not self._writers or self._writers[-1].count == self._most:
                self._begin()
            some = ids[: self._most - self._writers[-1].count]
            self._writers[-1].write(some)
            ids = ids[len(some) :]

    def _begin(self) -> None:
        if len(self._writers) > 1:
            self._writers[-2].close()
        path = self._stem.with_name(f"{self._stem.name}_{len(self._writers) + 1:06d}.bin")
        self._writers.append(ShardWriter(path, self._vocab_size))

    def finish(self) -> list[tuple[Path, int]]:
        """The files, complete, and how many tokens each has."""
        if len(self._writers) > 1 and self._writers[-1].count < self._most // 10:
            last = self._writers.pop()
            self._writers[-1].write(last.taken_back())
        for writer in self._writers[-2:]:
            writer.close()
        done = [(writer.path, writer.count) for writer in self._writers]
        if len(done) == 1:
            only = self._stem.with_name(f"{self._stem.name}.bin")
            replace(done[0][0], only)
            return [(only, done[0][1])]
        return done

    def abandon(self) -> None:
        for writer in self._writers:
            writer.abandon()


def _existing(out: Path, name: str) -> list[Path]:
    """The shards in the folder that an earlier `tokenize` wrote for this name."""
    ours = re.compile(re.escape(name) + r"_(train|val)(_\d+)?\.bin")
    return [path for path in out.glob("*.bin") if ours.fullmatch(path.name)]


def _refuse(out: Path, name: str, overwrite: bool) -> None:
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise DataError(f"{there} is a file; expected a folder for the shards.")
    existing = _existing(out, name)
    if existing and not overwrite:
        raise DataError(
            f"{existing[0]} already exists: choose another folder, or {argument('overwrite', True)}."
        )
    # Of the same data set, though tokenize never wrote it: both would be trained on.
    for path in sorted(out.glob("*")):
        if path not in existing and (match := NAME.fullmatch(path.name)) and match["name"] == name:
            raise DataError(f"{path} is of the same data set {name}: move it away, or choose another folder.")


@contextmanager
def _aside(out: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `out` to write into, which is gone afterwards, as is `out` if it was made for
    nothing. One name for all attempts: what a killed process left in it goes with the next one."""
    part, made = out / f".{name}.part", [p for p in (out, *out.parents) if not p.exists()]
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
    except OSError as error:
        raise DataError(f"cannot write into {out}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _publish(part: Path, out: Path, name: str, counts: list[Any]) -> list[Written]:
    """Put what is complete in its place, and remove the shards that it replaces."""
    old = _existing(out, name)
    replace(part / TOKENIZER, out / TOKENIZER)
    written = []
    for held_out, files in enumerate(counts):
        for path, tokens in files:
            replace(path, out / path.name)
            written.append(Written(out / path.name, tokens, bool(held_out)))
    new = {shard.path for shard in written}
    for path in old:
        if path not in new:
            path.unlink()
    flush_folder(out)
    return written


def _source(out: Path, name: str, shards: list[Written]) -> Path:
    train = [shard.path for shard in shards if not shard.held_out]
    for source in (out, out / name):
        with suppress(DataError):  # it means several sets, or nothing
            if find_tokens(source).train == train:
                return source
    return train[0] if len(train) == 1 else out / f"{name}_train_*.bin"
