"""The command line. Each command is a thin face of a function of the package."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run GPTs whose every gradient is written by hand.",
    epilog="Begin with:  tapeless train",
)


def _version(value: bool) -> None:
    if value:
        from tapeless import __version__

        print(f"tapeless {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _option(help: str, metavar: str, default: str, *names: str) -> Any:
    """An option whose default is not known here: None stands for it, and `default` tells it."""
    return typer.Option(
        *names, help=f"{help} [dim]\\[default: {default}][/]", metavar=metavar, show_default=False
    )


Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change any model or training setting, e.g. n_embd=32. May be given again and again.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None, _option("Threads that share a step.", "N", "the processors, or 1 where a step is small")
]
EngineName = Annotated[str | None, _option("cpu (compiled) or reference (NumPy).", "NAME", "cpu")]


def _parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    from tapeless.errors import ConfigError
    from tapeless.presets import parse_setting

    settings = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set needs KEY=VALUE, not {pair!r}.")
        settings[name.strip()] = parse_setting(name.strip(), value.strip())
    return settings


@app.command()
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
        str | None, _option("The model: see [bold]tapeless presets[/].", "NAME", "microgpt")
    ] = None,
    steps: Annotated[int | None, _option("Optimiser steps.", "N", "the preset's")] = None,
    batch_size: Annotated[int | None, _option("Documents a step.", "B", "the preset's")] = None,
    lr: Annotated[float | None, _option("Learning rate at the first step.", "X", "the preset's")] = None,
    seed: Annotated[int | None, _option("Seed of everything random.", "S", "42")] = None,
    out: Annotated[
        Path | None, _option("Folder to write the run into.", "DIR", "runs/PRESET-N, the next free N")
    ] = None,
    engine: EngineName = None,
    dtype: Annotated[
        str | None, _option("float32, or float64 on the reference engine.", "NAME", "the engine's")
    ] = None,
    threads: Threads = None,
    samples: Annotated[int | None, _option("Texts to generate at the end.", "N", "the preset's")] = None,
    temperature: Annotated[float | None, _option("Temperature of those texts.", "X", "the preset's")] = None,
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

    settings = _parse_settings(set_)
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
        _say(
            f"Stopped after step {stopped.run.steps:,}; saved. "
            f"Go on with: tapeless train --resume --out {_quoted(out)}"
        )
        raise typer.Exit(130) from None
    print(listed(run.samples), end="")
    _say(f"Saved in {out}. More with: tapeless sample {_quoted(out)}")


@app.command()
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
    max_tokens: Annotated[int | None, _option("New tokens at most.", "M", "fill the block")] = None,
    engine: EngineName = None,
) -> None:
    """Generate texts with a trained model."""
    import numpy as np

    from tapeless.errors import RunError
    from tapeless.generate import listed
    from tapeless.io import runs
    from tapeless.model import load
    from tapeless.progress import COMPILING

    model = load(run, "cpu" if engine is None else engine)
    if model.tokenizer is None:
        raise RunError(f"{run} has no {runs.TOKENIZER}: without its tokenizer the model cannot speak text.")
    if not np.isfinite(model.engine.params).all():
        _say(f"warning: {run / runs.MODEL} holds numbers that are not finite; its texts mean nothing.")
    model.engine.notice = lambda: _say(COMPILING)
    texts = model.generate(prompt, n, temperature, seed, top_k=top_k, top_p=top_p, max_tokens=max_tokens)
    print(listed(texts), end="")


PresetName = Annotated[
    str, typer.Argument(metavar="PRESET", help="The model: see [bold]tapeless presets[/].")
]


def _model_config(preset: str, pairs: list[str] | None) -> Any:
    """A preset's architecture with settings changed. Before there is data, the vocabulary is that of
    the names: 26 letters and BOS."""
    from tapeless.presets import get_preset

    config = get_preset(preset).with_settings(_parse_settings(pairs)).model
    return config.replace(vocab_size=config.vocab_size or 27)


@app.command()
def check(
    preset: PresetName = "microgpt",
    set_: Settings = None,
    engine: EngineName = None,
    entries: Annotated[
        int, typer.Option(metavar="N", help="Entries checked of a tensor; all of them where it has fewer.")
    ] = 5000,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of weights, tokens and entries.")] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result down as .html or .json.")
    ] = None,
) -> None:
    """Check every hand-written gradient, and print a table.

    Against finite differences in float64 on the reference engine; then the CPU engine against the
    reference. Exit code 1 if anything disagrees.
    """
    from tapeless import certificate
    from tapeless.gradcheck import example, gradcheck
    from tapeless.progress import COMPILING

    if report is not None:
        certificate.check_path(report)
    config = _model_config(preset, set_)
    model, *batch = example(config, "cpu" if engine is None else engine, seed)
    model.engine.notice = lambda: _say(COMPILING)
    result = gradcheck(model, *batch, entries=entries, seed=seed)
    certificate.show(preset, config, result, report)
    if not result.ok:
        raise typer.Exit(1)


@app.command()
def budget(
    preset: PresetName = "microgpt",
    set_: Settings = None,
    batch_size: Annotated[int | None, _option("Documents a step.", "B", "the preset's")] = None,
    threads: Threads = None,
) -> None:
    """Show the memory that training takes, to the byte, before anything is allocated.

    Each document counts as a full block of tokens. Exit code 1 if it does not fit this machine.
    """
    from rich.console import Console
    from rich.table import Table

    from tapeless.engine import machine_memory, training_memory
    from tapeless.layout import PER_THREAD, n_params, nbytes
    from tapeless.presets import get_preset

    config = _model_config(preset, set_)
    settings = {} if batch_size is None else {"batch_size": batch_size}
    documents = get_preset(preset).with_settings(settings).training.batch_size
    tokens = documents * config.block_size
    plans, team = training_memory(config, "cpu", "float32", documents, threads)
    table = Table("buffer", box=None)
    table.add_column("bytes", justify="right")
    table.add_column("largest tensors")
    for name, plan in plans.items():
        largest = sorted(plan.sizes().items(), key=lambda item: -item[1])[:3]
        times = team if name in PER_THREAD else 1
        table.add_row(
            f"{name} × {times}" if times > 1 else name,
            f"{plan.nbytes * times:,}",
            ", ".join(f"{t} {size:,}" for t, size in largest if size),
        )
    needed, total = nbytes(plans, team), machine_memory()
    table.add_section()
    table.add_row("total", f"{needed:,}", "")
    console = Console(highlight=False)
    console.print(
        f"{preset}: {n_params(config):,} parameters, vocabulary {config.vocab:,}; "
        f"{documents:,} × {config.block_size:,} = {tokens:,} tokens a step, "
        f"{team} thread{'s' if team > 1 else ''}, float32"
    )
    console.print(table)
    fits = needed <= total
    console.print(f"{'Fits' if fits else 'Does not fit'} in this machine's {total / 1e9:,.1f} GB.")
    if not fits:
        raise typer.Exit(1)


@app.command()
def bench(
    cases: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CASE",
            help="What to measure, e.g. microgpt or generate. [dim]\\[default: everything][/]",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", metavar="", help="Show where the time of a training step goes, too."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")] = False,
) -> None:
    """Measure how fast this machine trains and generates, and what share of its peak that is.

    A run that differs from the reference engine's gets no figure; exit code 1 then.
    """
    from tapeless.bench import bench as measure
    from tapeless.bench import tables

    report = measure(cases or (), profile=profile, say=_say)
    if json:
        from json import dumps

        print(dumps(report, indent=1, ensure_ascii=False))
    else:
        tables.show(report)
    if any("refused" in case for case in report["cases"]):
        raise typer.Exit(1)


@app.command()
def presets() -> None:
    """List the presets: models with everything needed to train them."""
    from rich.console import Console
    from rich.table import Table

    from tapeless.layout import n_params
    from tapeless.presets import presets as all_presets

    table = Table("preset", box=None)
    for column in ("parameters", "layers", "heads", "width", "context"):
        table.add_column(column, justify="right")
    for name, preset in all_presets.items():
        c = preset.model
        # Before there is data, count with the 26 letters and BOS that the names have.
        count = n_params(c.replace(vocab_size=c.vocab_size or 27))
        table.add_row(name, f"{count:,}", *map(str, (c.n_layer, c.n_head, c.n_embd, c.block_size)))
    summaries = Table(box=None, show_header=False)
    for name, preset in all_presets.items():
        summaries.add_row(name, preset.summary)
    console = Console()
    console.print(table, "", summaries, sep="\n")


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _say(line: str) -> None:
    typer.echo(line, err=True)
