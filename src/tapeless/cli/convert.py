"""Commands about checkpoints: convert, and the part of check that compares with a debug state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tapeless.cli.options import MODEL, option, say


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=MODEL),
    ],
    target: Annotated[
        str,
        typer.Argument(metavar="DST", help="A .bin (llm.c) or .gguf (llama.cpp) file, or a folder."),
    ],
    to: Annotated[str | None, option("Kind of folder: hf (Hugging Face) or run.", "NAME", "hf")] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Precision of the weights: f32 or bf16.")
    ] = "f32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace what is at DST.")
    ] = False,
    state: Annotated[
        bool,
        typer.Option(
            "--state", metavar="", help="Write an llm.c debug state instead: logits, loss, gradients."
        ),
    ] = False,
    data: Annotated[
        Path | None, option("With --state: a shard to take tokens from.", "FILE", "random tokens")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="B", help="With --state: texts in the batch.")] = 4,
    block_size: Annotated[
        int | None, option("With --state: tokens per text.", "T", "64, or the model's context")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="With --state: seed of the random tokens.")] = 42,
) -> None:
    """Convert a model to another program's format.

    The format of MODEL is detected; that of DST follows from its name.
    f32 is exact; bf16 rounds the weights and is half the size.
    """
    from tapeless.convert import convert as convert_model
    from tapeless.errors import ConfigError

    if not target:  # as a path, that would be the present folder
        raise ConfigError("DST is empty: name a file or a folder.")
    if not state:
        convert_model(source, Path(target), to, dtype, overwrite, say)
        return
    if to is not None or dtype != "f32":
        raise ConfigError("--state writes a debug state of llm.c, in float32: leave --to and --dtype out.")
    _write_state(source, Path(target), overwrite, data, batch_size, block_size, seed)


def _write_state(
    source: str,
    target: Path,
    overwrite: bool,
    data: Path | None,
    batch_size: int,
    block_size: int | None,
    seed: int,
) -> None:
    import numpy as np

    from tapeless import debugstate
    from tapeless.config import MAX_SIZE, whole
    from tapeless.convert import NO_FORMAT, refuse
    from tapeless.data.shards import Shards
    from tapeless.errors import ConfigError, DataError
    from tapeless.init import MAX_SEED
    from tapeless.progress import COMPILING

    if target.suffix.lower() in (".gguf", *NO_FORMAT):
        raise ConfigError(f"{target} cannot be a debug state of llm.c: give a .bin file.")
    refuse(target, False, overwrite)
    rng = np.random.default_rng(whole("seed", seed, 0, MAX_SEED))
    model = debugstate.load(source, "cpu")
    model.engine.notice = lambda: say(COMPILING)
    longest = model.config.block_size
    B = whole("batch_size", batch_size, 1, MAX_SIZE)
    T = whole("block_size", min(64, longest) if block_size is None else block_size, 1, longest)
    if data is None:
        tokens = rng.integers(0, model.config.vocab, B * T + 1, np.int32)
    else:
        shard = Shards([data], model.config.vocab)
        if shard.pieces[-1] <= B * T:
            raise DataError(f"{data} has {shard.pieces[-1]:,} tokens; expected {B * T + 1:,} at least.")
        tokens, _ = shard.take(np.array([[0, B * T]]))
    loss = debugstate.write(model, target, tokens, B, T)
    say(f"{B} × {T} tokens, loss {loss:.6f}. Saved in {target} (llm.c debug state).")


def check_state(source: str, state: Path, engine: str) -> bool:
    """Compare a model with a debug state, and print a table. Returns whether all agrees."""
    from rich.console import Console
    from rich.table import Table

    from tapeless import debugstate
    from tapeless.progress import COMPILING

    model = debugstate.load(source, engine)
    model.engine.notice = lambda: say(COMPILING)
    found, rows = debugstate.compare(model, state)
    table = Table("tensor", "in llm.c", "shape", box=None)
    for column in ("largest difference", "allowed", "relative", ""):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.theirs,
            " × ".join(f"{n:,}" for n in row.shape),
            f"{row.largest:.1e}",
            f"{row.allowed:.0e}",
            f"{row.relative:.1e}",
            "[green]ok[/]" if row.ok else "[bold red]FAILED[/]",
        )
    failed = ", ".join(row.name for row in rows if not row.ok)
    B, T = found.tokens.shape
    console = Console(highlight=False)
    title = f"{source} against {state}: {B} × {T} tokens, loss {found.loss:.6f}"
    console.print(title, soft_wrap=True)
    console.print(table)
    console.print(f"[bold red]FAILED:[/] {failed}" if failed else "All tensors agree.")
    return not failed
