"""The command line. Each command is a thin face of a function of the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run GPTs whose every gradient is written by hand.",
    epilog="Begin with:  tapeless train",
)


def _version(value: bool) -> None:
    if value:
        from tapeless import __version__

        print(f"tapeless {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change any model or training setting, e.g. n_embd=32. Repeatable."
    ),
]


def _parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    from tapeless.errors import ConfigError
    from tapeless.presets import parse_setting

    settings = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set needs key=value, not {pair!r}.")
        settings[name.strip()] = parse_setting(name.strip(), value.strip())
    return settings


@app.command()
def train(
    data: Annotated[
        str | None,
        typer.Argument(
            help="A text file, one document a line, or a built-in set: names.", show_default="names"
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The model: see `tapeless presets`.", show_default="microgpt")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.", show_default="preset's")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Documents a step.", show_default="preset's")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="preset's")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", show_default="42")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder to write.", show_default="runs/PRESET-N, the next free N"),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="cpu (compiled) or reference (NumPy).", show_default="cpu")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or float64 (reference only).", show_default="the engine's"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Texts to generate at the end.")] = 20,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of those texts.", show_default="preset's")
    ] = None,
    set_: Settings = None,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out (or the preset's latest).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Train a model and let it generate.

    Without arguments: microgpt on the built-in names.
    """
    from tapeless.errors import RunError
    from tapeless.io import runs
    from tapeless.presets import get_preset
    from tapeless.train import Interrupted
    from tapeless.train import train as train_model

    settings = _parse_settings(set_)
    if out is None:
        name = preset or "microgpt"
        get_preset(name)
        existing = runs.numbered_runs(name)
        if resume and not existing:
            raise RunError(f"there is no run runs/{name}-N to resume: name its folder with --out.")
        out = existing[max(existing)] if resume else runs.next_run(name)
    try:
        run = train_model(
            data, preset, steps=steps, batch_size=batch_size, lr=lr, seed=seed, engine=engine, dtype=dtype,
            out=out, samples=samples, temperature=temperature, set=settings, log_every=log_every,
            resume=resume, overwrite=overwrite,
        )  # fmt: skip
    except Interrupted as stopped:
        _say(
            f"Stopped after step {stopped.run.steps:,}; saved. Go on with: tapeless train --resume --out {out}"
        )
        raise typer.Exit(130) from None
    for sample in run.samples:
        print(sample)
    _say(f"Saved in {out}. More with: tapeless sample {out}")


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    n: Annotated[int, typer.Option("-n", "--n", help="How many texts.")] = 20,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.5,
    top_k: Annotated[int, typer.Option(help="Keep only the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 42,
    max_tokens: Annotated[
        int | None, typer.Option(help="New tokens at most.", show_default="fill the block")
    ] = None,
    engine: Annotated[str, typer.Option(help="cpu (compiled) or reference (NumPy).")] = "cpu",
) -> None:
    """Generate texts with a trained model."""
    from tapeless.model import load

    model = load(run, engine)
    for text in model.generate(prompt, n, temperature, seed, top_k=top_k, top_p=top_p, max_tokens=max_tokens):
        print(text)


@app.command()
def presets() -> None:
    """List the presets: models with everything needed to train them."""
    from rich.console import Console
    from rich.table import Table

    from tapeless.layout import n_params
    from tapeless.presets import presets as all_presets

    table = Table("preset", "what it is", "parameters", "layers", "heads", "width", "context", box=None)
    for name, preset in all_presets.items():
        c = preset.model
        # Before there is data, count with the 26 letters and BOS that the names have.
        count = n_params(c.replace(vocab_size=c.vocab_size or 27))
        table.add_row(
            name, preset.summary, f"{count:,}", *map(str, (c.n_layer, c.n_head, c.n_embd, c.block_size))
        )
    Console().print(table)


def _say(line: str) -> None:
    typer.echo(line, err=True)
