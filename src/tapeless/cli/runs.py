"""Commands that make and use runs: train, sample, eval."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from tapeless.cli.options import (
    A_MODEL,
    MODEL,
    Command,
    EngineName,
    Precision,
    Recompute,
    Settings,
    Threads,
    TokenDtype,
    option,
    parse_settings,
    quoted,
    say,
)

PRESETS_OWN = "-"  # the value of --pretrained without one


class Train(Command):
    """`--pretrained` without a value means the preset's own name: it is fetched."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        full = []
        for word, following in pairwise([*args, "-"]):
            full += [word, PRESETS_OWN] if word == "--pretrained" and following.startswith("-") else [word]
        return super().parse_args(context, full)


def train(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="A text file, one document a line; a file, folder or glob of token shards; or a built-in "
            "data set. [dim]\\[default: names][/]",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None, option("The model: see [bold]tapeless presets[/].", "NAME", "microgpt")
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"Fine-tune a model: {A_MODEL} Without MODEL: the preset's name on the hub.",
            show_default=False,
        ),
    ] = None,
    val: Annotated[
        str | None, option("Validation data.", "DATA", "NAME_val.bin, or the part held out")
    ] = None,
    token_dtype: TokenDtype = None,
    steps: Annotated[int | None, option("Optimiser steps.", "N", "the preset's")] = None,
    batch_size: Annotated[int | None, option("Documents or windows per batch.", "B", "the preset's")] = None,
    block_size: Annotated[
        int | None,
        option("Context length: maximum tokens of a document or window.", "T", "the preset's or model's"),
    ] = None,
    total_batch_tokens: Annotated[
        int | None, option("Tokens per step (gradient accumulation).", "N", "one batch")
    ] = None,
    order: Annotated[
        str | None,
        option(
            "Order of documents: shuffle or draw; of a text: windows, sequence or llmc.",
            "NAME",
            "the preset's",
        ),
    ] = None,
    lr: Annotated[float | None, option("Peak learning rate.", "X", "the preset's")] = None,
    eval_every: Annotated[
        int | None, option("Steps between validations; 0: only at the end.", "N", "the preset's")
    ] = None,
    sample_every: Annotated[
        int | None, option("Steps between samples while training; 0: none.", "N", "the preset's")
    ] = None,
    samples: Annotated[int | None, option("Texts to generate at the end.", "N", "the preset's")] = None,
    temperature: Annotated[float | None, option("Sampling temperature.", "X", "the preset's")] = None,
    set_: Settings = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A TOML file of settings; --set overrides it.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, option("Random seed.", "S", "42")] = None,
    engine: EngineName = None,
    dtype: Annotated[
        str | None, option("float32, or float64 (reference engine only).", "NAME", "the engine's")
    ] = None,
    threads: Threads = None,
    precision: Precision = None,
    recompute: Recompute = None,
    out: Annotated[
        Path | None, option("Run folder to write.", "DIR", "runs/PRESET-N, the next free N")
    ] = None,
    log_every: Annotated[int, typer.Option(metavar="N", help="Steps between lines of metrics.jsonl.")] = 1,
    keep: Annotated[int | None, option("Newest checkpoints to keep.", "N", "2, one to fall back to")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            help="Resume the run in --out, or the preset's latest. With DATA, --preset or --pretrained, "
            "start it if there is none.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the run in --out.")
    ] = False,
) -> None:
    """Train a model, then generate samples.

    Without arguments: microgpt on the built-in names.
    Ctrl-C stops and saves; --resume goes on.
    """
    from tapeless.errors import ConfigError, RunError
    from tapeless.generate import listed
    from tapeless.io import folders, runs
    from tapeless.presets import get_preset
    from tapeless.settings import read_toml
    from tapeless.train import Interrupted
    from tapeless.train import train as train_model

    options = {
        "steps": steps, "batch_size": batch_size, "block_size": block_size, "lr": lr, "samples": samples,
        "total_batch_tokens": total_batch_tokens, "order": order, "temperature": temperature,
        "eval_every": eval_every, "sample_every": sample_every,
        "precision": precision, "recompute": recompute, "seed": seed, "token_dtype": token_dtype,
    }  # fmt: skip
    settings = parse_settings(set_) | {name: value for name, value in options.items() if value is not None}
    of_file = {} if config is None else read_toml(config)
    of_file = {name: value for name, value in of_file.items() if name not in settings}
    settings |= of_file
    seed = settings.pop("seed", None)
    name = preset or ("microgpt" if pretrained is None else "gpt2")
    if pretrained == PRESETS_OWN:
        pretrained = name
    if out is None:
        get_preset(name)
        existing = folders.numbered_runs(name)
        if resume and not existing and data is None and preset is None and pretrained is None:
            raise RunError(f"there is no run runs/{name}-N to resume: name its folder with --out.")
        out = existing[max(existing)] if resume and existing else folders.next_run(name)
    try:
        run = train_model(
            data, preset, seed=seed, engine=engine, dtype=dtype, threads=threads, out=out, set=settings,
            val=val, pretrained=pretrained, log_every=log_every, resume=resume, overwrite=overwrite,
            keep=keep,
        )  # fmt: skip
    except ConfigError as error:
        # A message about a setting begins with its name.
        named = re.match(r"\w*", str(error))
        if named and named[0] in of_file:
            raise ConfigError(f"{config}: {error}") from None
        raise
    except Interrupted as stopped:
        say(
            f"Stopped after step {stopped.run.steps:,}; saved. "
            f"Go on with: tapeless train --resume --out {quoted(out)}"
        )
        raise typer.Exit(128 + stopped.signal) from None
    print(*listed(run.samples), sep="", end="")
    if run.best is not None and run.best < run.steps:
        say(f"The best model, of step {run.best:,}, is in {out / runs.BEST}.")
    say(f"Saved in {out}. More with: tapeless sample {quoted(out)}")


def sample(
    run: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")] = "",
    n: Annotated[int, typer.Option("-n", "--n", metavar="N", help="Number of texts.")] = 20,
    temperature: Annotated[float, typer.Option(metavar="X", help="Sampling temperature; 0 is greedy.")] = 0.5,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Sample from the K likeliest tokens; 0: from all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P", help="Sample from the likeliest tokens that together reach probability P (nucleus)."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Sampling seed.")] = 42,
    max_tokens: Annotated[int | None, option("Maximum new tokens.", "M", "up to the context length")] = None,
    engine: EngineName = None,
    threads: Threads = None,
    precision: Precision = None,
) -> None:
    """Generate texts with a model."""
    from tapeless.data.tokenizers import REMEDY
    from tapeless.generate import generate, listed
    from tapeless.init import generator
    from tapeless.model import load
    from tapeless.progress import COMPILING

    model = load(run, "cpu" if engine is None else engine, threads=threads, precision=precision)
    if model.tokenizer is None:
        say(f"{run} has no tokenizer: these are tokens as numbers. To have text, {REMEDY}.")
    model.engine.notice = lambda: say(COMPILING)
    rng = generator(model.config, seed)
    for text in listed(generate(model, prompt, n, temperature, rng, top_k, top_p, max_tokens)):
        print(text, end="", flush=True)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="A text file, token shards, or a built-in data set. [dim]\\[default: the run's validation "
            "data][/]",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None, option("Tokens from one window to the next.", "N", "the window's length: no overlap")
    ] = None,
    block_size: Annotated[int | None, option("Window length.", "T", "the model's context")] = None,
    batch_size: Annotated[int | None, option("Windows per batch.", "B", "about 1,024 tokens")] = None,
    lines: Annotated[
        bool | None,
        typer.Option(
            "--lines/--text",
            help="Each line of the text is a document, or all of it is one. [dim]\\[default: as the "
            "tokenizer has it][/]",
            show_default=False,
        ),
    ] = None,
    token_dtype: TokenDtype = None,
    engine: EngineName = None,
    threads: Threads = None,
    precision: Precision = None,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate a model on a text: loss, perplexity, bits per byte.

    Every token is scored once. With --stride, windows overlap, and each
    scores only its new tokens, which then have more context.
    """
    from tapeless.evaluate import evaluate as score
    from tapeless.model import load
    from tapeless.plan import held_out
    from tapeless.progress import COMPILING, Counting

    what: Any = data
    if data is None:
        own = held_out(Path(model))
        what, lines = own.val, own.lines
    loaded = load(model, "cpu" if engine is None else engine, threads=threads, precision=precision)
    with Counting("tokens") as told:
        loaded.engine.notice = lambda: told.say(COMPILING)
        result = score(
            loaded, what, stride, block_size=block_size, lines=lines, batch_size=batch_size,
            token_dtype=token_dtype, told=told,
        )  # fmt: skip
    rows = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "bits_per_character": result.bits_per_character,
        "tokens": result.tokens,
        "window": result.window,
        "stride": result.stride,
    }
    if json:
        from json import dumps

        print(dumps(rows))
        return
    for name, value in rows.items():
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
            print(f"{name.replace('_', ' '):<20}{shown}")
