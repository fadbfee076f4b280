"""Commands about data: tokenize."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tapeless.cli.options import option, quoted, say


def tokenize(
    texts: Annotated[
        list[Path], typer.Argument(metavar="TEXT", help="UTF-8 text files.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write the shards into.", show_default=False)
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A tokenizer file or folder; gpt2; or chars, the characters of the texts.",
            show_default=False,
        ),
    ] = None,
    train_bpe: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Train a new BPE tokenizer of N tokens on the texts.", show_default=False
        ),
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(metavar="X", help="Fraction of the text held out for validation, from its end.")
    ] = 0.1,
    lines: Annotated[
        bool, typer.Option("--lines", metavar="", help="Each line is a document, instead of each file.")
    ] = False,
    shard_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum tokens per shard.")] = 100_000_000,
    processes: Annotated[
        int | None, option("Number of processes.", "N", "the processors, or fewer for a small text")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the shards and the tokenizer in --out.")
    ] = False,
) -> None:
    """Tokenize texts into token shards to train on, in llm.c's format.

    Writes NAME_train.bin, NAME_val.bin and tokenizer.json. NAME is that of
    the text, or of the folder if there are several texts.
    """
    from tapeless.data.tokenize import tokenize as tokenize_texts

    began = time.monotonic()
    done = tokenize_texts(
        texts, out, tokenizer=tokenizer, train_bpe=train_bpe, val_fraction=val_fraction, lines=lines,
        shard_tokens=shard_tokens, processes=processes, overwrite=overwrite, progress=_Progress(),
    )  # fmt: skip
    vocab, tokens = done.tokenizer.vocab_size, sum(shard.tokens for shard in done.shards)
    if train_bpe is not None and vocab < train_bpe:
        say(f"The text has no more than {vocab:,} tokens to give.")
    for held_out, what in enumerate(("train", "validate")):
        files = [shard for shard in done.shards if shard.held_out == bool(held_out)]
        if files:
            first, last = files[0].path, files[-1].path
            names = str(first) if first == last else f"{first} … {last.name}"
            print(f"{names}: {sum(shard.tokens for shard in files):,} tokens to {what} on")
    seconds = max(time.monotonic() - began, 1e-9)
    say(
        f"{done.bytes:,} bytes of text, {done.bytes / tokens:.2f} a token, vocabulary {vocab:,}; "
        f"{seconds:,.1f} s, {done.bytes / seconds / 1e6:,.1f} MB/s."
    )
    say(f"Train with: tapeless train {quoted(done.source)}")


class _Progress:
    """A bar on a terminal; elsewhere a line at each tenth of the way, but no more than one a second."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self._bar: Any = None

    def begin(self, what: str, total: int) -> None:
        self.finish()
        self._what, self._total, self._done, self._said = what, total, 0, time.monotonic()
        if self._console.is_terminal:
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                TimeRemainingColumn(), TextColumn("left"), console=self._console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=total)
            self._bar.start()

    def advance(self, n: int) -> None:
        before, self._done = self._done, self._done + n
        if self._bar is not None:
            self._bar.advance(self._task, n)
            return
        tenth = self._done * 10 // self._total > before * 10 // self._total
        if tenth and time.monotonic() - self._said > 1:
            self._said = time.monotonic()
            self._console.print(f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB")

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
