"""Commands that need no trained model: presets, check, budget, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tapeless.cli.convert import check_state
from tapeless.cli.options import (
    A_MODEL,
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
            metavar="PRESET", help=f"The model: see [bold]tapeless presets[/]. With --state: {A_MODEL}"
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

    Compares each tensor's gradient with finite differences in float64 on
    the reference engine, then the CPU engine with the reference. Large
    tensors are checked at a random sample of entries and along random
    directions, in which every entry counts. Large presets are checked with
    the same structure in smaller sizes.

    With --state, compares a saved model with the logits, loss and
    gradients that llm.c computed.

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
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=f"A preset, see [bold]tapeless presets[/], or {A_MODEL}"),
    ] = "microgpt",
    set_: Settings = None,
    batch_size: Annotated[
        int | None, option("Documents or windows in a batch.", "B", "the preset's or run's")
    ] = None,
    block_size: Annotated[
        int | None, option("Tokens of a document or window.", "T", "the preset's or model's")
    ] = None,
    threads: Threads = None,
    recompute: Recompute = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Where it runs: cpu, or the chip esp32, esp32-c3, esp32-s3, rp2040, stm32f4."
        ),
    ] = "cpu",
    mode: Annotated[
        str | None,
        option("On a chip: train, generate or both.", "NAME", "both for a preset, generate for a model"),
    ] = None,
    data: Annotated[str | None, option("On a chip: training data.", "DATA", "names")] = None,
    weights: Annotated[
        str | None, option("On a chip: float32, or int8 (quantization).", "NAME", "float32")
    ] = None,
) -> None:
    """Show the memory that training takes, to the byte, and estimate the time per step.

    Nothing is allocated. Each document counts as a full block of tokens. A
    run counts as it was trained, another model as fine-tuned by tapeless
    train --pretrained.

    With a chip as --target: the memory of the program that tapeless export
    writes, static RAM to the byte.

    Exit code 1 if it does not fit.
    """
    chosen = {"block_size": block_size, "recompute": recompute, "batch_size": batch_size}
    settings = parse_settings(set_) | {name: value for name, value in chosen.items() if value is not None}
    if target != "cpu":
        if threads is not None:
            raise ConfigError("a chip has no threads: leave --threads out.")
        _chip_budget(model, target, mode, data, weights, settings)
        return
    if any(given is not None for given in (mode, data, weights)):
        raise ConfigError(
            "--mode, --data and --weights are of programs for chips: give --target, or leave them out."
        )
    _cpu_budget(model, *_training(model, settings), threads)


def _training(source: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The architecture and the training of a preset, or of a trained model that is trained further."""
    import dataclasses

    from tapeless import plan
    from tapeless.export.firmware import training_of
    from tapeless.presets import get_preset, presets
    from tapeless.settings import Training, home

    if source in presets:
        preset = get_preset(source).with_settings(settings)
        return preset.model.replace(vocab_size=preset.model.vocab_size or 27), preset.training
    further = plan.fresh(None, None, None, source, settings, None, None, None, None).preset
    given = {name for name in settings if home(name) is Training}
    if "block_size" in settings:
        given.add("window")
    changes = {name: getattr(further.training, name) for name in given}
    return further.model, dataclasses.replace(training_of(source), **changes)


def _cpu_budget(source: str, config: Any, training: Any, threads: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from tapeless.layout import n_params
    from tapeless.machine import free_memory
    from tapeless.memory import training_memory

    documents, longest = training.batch_size, training.window or config.block_size
    batches = training.batches(longest)
    plans, team = training_memory(config, "cpu", "float32", documents, threads, longest)
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
    times = f"{batches:,} × {documents:,}" if batches > 1 else f"{documents:,}"
    console.print(
        f"{source}: {n_params(config):,} parameters, vocabulary {config.vocab:,}; "
        f"{times} × {longest:,} = {batches * documents * longest:,} tokens a step, "
        f"{team} thread{'s' if team > 1 else ''}, float32"
    )
    console.print(table)
    fits = needed <= free
    console.print(f"{'Fits' if fits else 'Does not fit'} ({free / 1e9:,.1f} GB free).")
    console.print(_time(config, [longest] * documents, batches, team))
    if not fits:
        raise typer.Exit(1)


def _time(config: Any, lengths: list[int], batches: int, threads: int) -> str:
    """The estimate of the time per step, and where it comes from."""
    from tapeless.flops import ACCURACY, expected_seconds, expected_share, training_flops
    from tapeless.ops.cpu.peak import peak_gflops
    from tapeless.progress import duration

    peak = peak_gflops(threads)
    seconds = batches * expected_seconds(config, lengths, threads, peak)
    flops = batches * training_flops(config, lengths)
    share = expected_share(config, sum(lengths), threads)
    scale, unit = (1e9, "GFLOP") if flops >= 1e9 else (1e6, "MFLOP")
    bf16 = " in float32; bf16 may be faster" if config.precision == "bf16" else ""
    return (
        f"Time per step: about {duration(seconds)}{bf16}. That is {flops / scale:,.1f} {unit} at {share:.0%} "
        f"(estimated MFU) of the {peak:,.0f} GFLOP/s measured here now. Measured times were within a factor "
        f"of {ACCURACY:g} of such estimates. Documents shorter than the block take less."
    )


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
    table.add_row(f"available on {target}", f"{chip.ram:,}", f"{chip.flash:,}", chip.what)
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
        typer.Option("--profile", metavar="", help="Also show where the time of a training step goes."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.")] = False,
) -> None:
    """Measure the speed of training and generation, and its share of the machine's peak (MFU).

    A run that differs from the reference engine's gets no figure; the exit code is then 1.
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
    """List the presets: named models with everything needed to train them."""
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
