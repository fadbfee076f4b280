"""Commands about models before they are trained: presets, check, budget, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tapeless.cli.convert import check_state
from tapeless.cli.options import EngineName, Recompute, Settings, Threads, option, parse_settings, say
from tapeless.errors import ConfigError

PresetName = Annotated[
    str, typer.Argument(metavar="PRESET", help="The model: see [bold]tapeless presets[/].")
]


def _model_config(preset: str, pairs: list[str] | None) -> Any:
    """A preset's architecture with settings changed. Before there is data, the vocabulary is that of
    the names: 26 letters and BOS."""
    from tapeless.presets import get_preset

    config = get_preset(preset).with_settings(parse_settings(pairs)).model
    return config.replace(vocab_size=config.vocab_size or 27)


def check(
    preset: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A preset; with --state, a model as for [bold]convert[/]."),
    ] = "microgpt",
    set_: Settings = None,
    engine: EngineName = None,
    entries: Annotated[
        int, typer.Option(metavar="N", help="Entries checked of a tensor; all of them where it has fewer.")
    ] = 5000,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of weights, tokens and entries.")] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result down as .html or .json.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A debug state of llm.c to compare a model with.")
    ] = None,
) -> None:
    """Check every hand-written gradient, and print a table.

    Against finite differences in float64 on the reference engine; then the CPU engine against the
    reference. With --state, a saved model against the logits, loss and gradients that another program
    wrote down. Exit code 1 if anything disagrees.
    """
    engine = "cpu" if engine is None else engine
    if state is not None:
        if set_ or report is not None:
            raise ConfigError("--state checks a saved model as it is: leave --set and --report out.")
        if not check_state(preset, state, engine):
            raise typer.Exit(1)
        return
    from tapeless import certificate
    from tapeless.gradcheck import example, gradcheck
    from tapeless.progress import COMPILING

    if report is not None:
        certificate.check_path(report)
    config = _model_config(preset, set_)
    model, *batch = example(config, engine, seed)
    model.engine.notice = lambda: say(COMPILING)
    result = gradcheck(model, *batch, entries=entries, seed=seed)
    certificate.show(preset, config, result, report)
    if not result.ok:
        raise typer.Exit(1)


def budget(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A preset, see [bold]tapeless presets[/]; for a chip a trained model, too."
        ),
    ] = "microgpt",
    set_: Settings = None,
    batch_size: Annotated[int | None, option("Documents a step.", "B", "the preset's")] = None,
    block_size: Annotated[int | None, option("Tokens of a document.", "T", "the preset's")] = None,
    threads: Threads = None,
    recompute: Recompute = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="What it runs on: cpu, or esp32, esp32-c3, esp32-s3, rp2040, stm32f4."
        ),
    ] = "cpu",
    mode: Annotated[
        str | None, option("On a chip: train, generate or both.", "NAME", "both, a run generates")
    ] = None,
    data: Annotated[str | None, option("On a chip: what it trains on.", "DATA", "names")] = None,
    weights: Annotated[str | None, option("On a chip: float32, or int8.", "NAME", "float32")] = None,
) -> None:
    """Show the memory that training takes, before anything is allocated.

    Each document counts as a full block of tokens. Buffers are exact; what a call works with besides is the
    most it may take. The data and Python itself come on top. On a chip it is what tapeless export
    writes, static RAM to the byte. Exit code 1 if it does not fit.
    """
    chosen = {"block_size": block_size, "recompute": recompute}
    sizes = {name: value for name, value in chosen.items() if value is not None}
    batch = {} if batch_size is None else {"batch_size": batch_size}
    if target != "cpu":
        if threads is not None:
            raise ConfigError("a chip has no threads: leave --threads out.")
        _chip_budget(preset, target, mode, data, weights, parse_settings(set_) | sizes | batch)
        return
    if any(given is not None for given in (mode, data, weights)):
        raise ConfigError(
            "mode, data and weights are of programs for chips: give --target, or leave them out."
        )
    _cpu_budget(preset, parse_settings(set_) | sizes | batch, threads)


def _cpu_budget(preset: str, settings: dict[str, Any], threads: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from tapeless.layout import n_params
    from tapeless.machine import free_memory
    from tapeless.memory import training_memory
    from tapeless.presets import get_preset

    chosen = get_preset(preset).with_settings(settings)
    config, documents = chosen.model, chosen.training.batch_size
    config = config.replace(vocab_size=config.vocab_size or 27)  # without data: 26 letters and BOS
    tokens = documents * config.block_size
    plans, team = training_memory(config, chosen.training, "cpu", "float32", threads, config.block_size)
    table = Table("buffer", box=None)
    table.add_column("bytes", justify="right")
    table.add_column("largest tensors")
    for name, plan in plans.items():
        largest = sorted(plan.sizes().items(), key=lambda item: -item[1])[:3]
        table.add_row(name, f"{plan.nbytes:,}", ", ".join(f"{t} {size:,}" for t, size in largest if size))
    needed, free = sum(plan.nbytes for plan in plans.values()), free_memory()
    table.add_section()
    table.add_row("total", f"{needed:,}", "")
    console = Console(highlight=False)
    console.print(
        f"{preset}: {n_params(config):,} parameters, vocabulary {config.vocab:,}; "
        f"{documents:,} × {config.block_size:,} = {tokens:,} tokens a step, "
        f"{team} thread{'s' if team > 1 else ''}, float32"
    )
    console.print(table)
    console.print(
        "On top of it come the tokens of a text (4 bytes each; token files stay on disk) and its documents "
        "(32 bytes each), which a run counts as well, and Python itself (some 100 MB)."
    )
    fits = needed <= free
    console.print(f"{'Fits' if fits else 'Does not fit'} in the {free / 1e9:,.1f} GB that are free.")
    if not fits:
        raise typer.Exit(1)


def _chip_budget(
    source: str,
    target: str,
    mode: str | None,
    data: str | None,
    weights: str | None,
    settings: dict[str, Any],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from tapeless.errors import did_you_mean
    from tapeless.export import budget as chips
    from tapeless.export.firmware import prepare
    from tapeless.export.int8 import quantised

    if target not in chips.CHIPS:
        raise ConfigError(f"no target is called {target!r}.{did_you_mean(target, ['cpu', *chips.CHIPS])}")
    chip = chips.CHIPS[target]
    firmware = prepare(source, mode, data, settings, None)
    rows = chips.budget(firmware, quantised(firmware, weights or "float32"), chip)
    table = Table("what", box=None)
    table.add_column("RAM", justify="right")
    table.add_column("flash", justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(row.what, *(f"{n:,}" if n else "" for n in (row.ram, row.flash)), row.remark)
    table.add_section()
    ram, flash = chips.totals(rows)
    table.add_row("total", f"{ram:,}", f"{flash:,}", "")
    table.add_row(f"there is on {target}", f"{chip.ram:,}", f"{chip.flash:,}", chip.what)
    does = " and ".join(["trains"] * firmware.trains + ["generates"] * firmware.generates)
    fits = ram <= chip.ram and flash <= chip.flash
    console = Console(highlight=False)
    console.print(f"{firmware.title}: {firmware.size:,} parameters, {does}; bytes:")
    console.print(table)
    console.print(f"{'Fits' if fits else 'Does not fit'}.")
    if not fits:
        raise typer.Exit(1)


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

    report = measure(cases or (), profile=profile, say=say)
    if json:
        from json import dumps

        print(dumps(report, indent=1, ensure_ascii=False))
    else:
        tables.show(report)
    if any("refused" in case for case in report["cases"]):
        raise typer.Exit(1)


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
