"""Commands that make and use runs: train, sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tapeless.cli.options import EngineName, Settings, Threads, option, parse_settings, quoted, say


def train(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="A text file, one document a line, or a built-in data set. [dim]\\[default: names][/]",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None, option("The model: see [bold]tapeless presets[/].", "NAME", "microgpt")
    ] = None,
    steps: Annotated[int | None, option("Optimiser steps.", "N", "the preset's")] = None,
    batch_size: Annotated[int | None, option("Documents a step.", "B", "the preset's")] = None,
    lr: Annotated[float | None, option("Learning rate at the first step.", "X", "the preset's")] = None,
    seed: Annotated[int | None, option("Seed of everything random.", "S", "42")] = None,
    out: Annotated[
        Path | None, option("Folder to write the run into.", "DIR", "runs/PRESET-N, the next free N")
    ] = None,
    engine: EngineName = None,
    dtype: Annotated[
        str | None, option("float32, or float64 on the reference engine.", "NAME", "the engine's")
    ] = None,
    threads: Threads = None,
    samples: Annotated[int | None, option("Texts to generate at the end.", "N", "the preset's")] = None,
    temperature: Annotated[float | None, option("Temperature of those texts.", "X", "the preset's")] = None,
    set_: Settings = None,
    log_every: Annotated[int, typer.Option(metavar="N", help="Steps between lines of metrics.jsonl.")] = 1,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", metavar="", help="Go on with the run in --out, or with the preset's latest."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the run in --out.")
    ] = False,
) -> None:
    """Train a model and let it generate.

    Without arguments: microgpt on the built-in names.
    """
    from tapeless.errors import RunError
    from tapeless.generate import listed
    from tapeless.io import runs
    from tapeless.presets import get_preset
    from tapeless.train import Interrupted
    from tapeless.train import train as train_model

    settings = parse_settings(set_)
    if out is None:
        name = "microgpt" if preset is None else preset
        get_preset(name)
        existing = runs.numbered_runs(name)
        if resume and not existing:
            raise RunError(f"there is no run runs/{name}-N to resume: name its folder with --out.")
        out = existing[max(existing)] if resume else runs.next_run(name)
    try:
        run = train_model(
            data, preset, steps=steps, batch_size=batch_size, lr=lr, seed=seed, engine=engine, dtype=dtype,
            threads=threads, out=out, samples=samples, temperature=temperature, set=settings,
            log_every=log_every, resume=resume, overwrite=overwrite,
        )  # fmt: skip
    except Interrupted as stopped:
        say(
            f"Stopped after step {stopped.run.steps:,}; saved. "
            f"Go on with: tapeless train --resume --out {quoted(out)}"
        )
        raise typer.Exit(130) from None
    print(listed(run.samples), end="")
    say(f"Saved in {out}. More with: tapeless sample {quoted(out)}")


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.")] = "",
    n: Annotated[int, typer.Option("-n", "--n", metavar="N", help="How many texts.")] = 20,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="0 takes the likeliest token each time.")
    ] = 0.5,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Keep only the K likeliest tokens; 0 keeps all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Keep the likeliest tokens that together reach P.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of the draws.")] = 42,
    max_tokens: Annotated[int | None, option("New tokens at most.", "M", "fill the block")] = None,
    engine: EngineName = None,
) -> None:
    """Generate texts with a trained model."""
    from tapeless.generate import listed
    from tapeless.io import runs
    from tapeless.model import load
    from tapeless.progress import COMPILING

    model = load(run, "cpu" if engine is None else engine)
    if model.tokenizer is None:
        say(f"{run} has no tokenizer: these are tokens as numbers.")
    model.engine.notice = lambda: say(COMPILING)
    texts = model.generate(prompt, n, temperature, seed, top_k=top_k, top_p=top_p, max_tokens=max_tokens)
    print(listed(texts), end="")
