"""Commands about models before they are trained: presets, check, budget, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tapeless.cli.convert import check_state
from tapeless.cli.options import (
    MODEL,
    EngineName,
    Recompute,
    Settings,
    Threads,
    option,
    parse_settings,
    say,
)
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
        typer.Argument(
            metavar="PRESET", help=f"The model: see [bold]tapeless presets[/]. With --state: {MODEL}"
        ),
    ] = "microgpt",
    set_: Settings = None,
    engine: EngineName = None,
    entries: Annotated[
        int | None,
        option(
            "Entries of each tensor to check one by one.", "N", "all of up to 1,024, 128 of larger tensors"
        ),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", metavar="", help="Check every entry of every tensor: minutes to hours.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="S", help="Seed of weights, tokens and samples.")] = 0,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Save the result as .html or .json: a certificate.", show_default=False
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with a debug state of llm.c instead.", show_default=False),
    ] = None,
) -> None:
    """Check every hand-written gradient (gradcheck).

    Compares each tensor's gradient with finite differences in float64 on the reference
    engine, then the CPU engine with the reference. Of large tensors a random sample of entries
    is checked, and directional derivatives, in which every entry counts. Large presets are
    checked with the same structure in smaller sizes.

    With --state, compares a saved model with the logits, loss and gradients that llm.c computed.

    Exit code 1 if anything disagrees.
    """
    engine = "cpu" if engine is None else engine
    if all_ and entries is not None:
        raise ConfigError("--all checks every entry: leave --entries out.")
    if state is not None:
        if set_ or report is not None or all_ or entries is not None:
            raise ConfigError(
                "--state checks a saved model as it is: leave --set, --report, --entries and --all out."
            )
        if not check_state(preset, state, engine):
            raise typer.Exit(1)
        return
    from tapeless import certificate
    from tapeless.gradcheck import example, gradcheck, smaller
    from tapeless.progress import COMPILING, Counting

    if report is not None:
        certificate.check_path(report)
    config = _model_config(preset, set_)
    checked = smaller(config, parse_settings(set_))
    if checked != config:
        was = config.to_dict()
        sizes = [f"{name}={value}" for name, value in checked.to_dict().items() if value != was[name]]
        say(f"Checking the structure of {preset} in smaller sizes: {', '.join(sizes)}. --set overrides them.")
    model, *batch = example(checked, engine, seed)
    with Counting("checks") as counting:
        model.engine.notice = lambda: counting.say(COMPILING)
        result = gradcheck(model, *batch, entries="all" if all_ else entries, seed=seed, progress=counting)
    certificate.show(preset, checked, result, report)
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
    """Show the memory that training takes, to the byte, before anything is allocated.

    Each document counts as a full block of tokens. On a chip it is what tapeless export
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
    _cpu_budget(preset, _model_config(preset, set_).replace(**sizes), batch, threads)


def _cpu_budget(preset: str, config: Any, batch: dict[str, int], threads: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from tapeless.layout import n_params
    from tapeless.memory import free_memory, training_memory
    from tapeless.presets import get_preset

    documents = get_preset(preset).with_settings(batch).training.batch_size
    tokens = documents * config.block_size
    plans, team = training_memory(config, "cpu", "float32", documents, threads, config.block_size)
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
