"""The command export: models as C programs."""

from __future__ import annotations

import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from tapeless.cli.options import A_MODEL, Settings, option, parse_settings, say


def export(
    source: Annotated[str, typer.Argument(metavar="MODEL", help=f"A preset, or {A_MODEL}")],
    to: Annotated[str | None, option("c, esp-idf, arduino, or wasm (a web page).", "KIND", "c")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write.", show_default=False)
    ] = None,
    mode: Annotated[
        str | None, option("train, generate, or both.", "NAME", "both for a preset, generate for a model")
    ] = None,
    data: Annotated[
        str | None,
        option("Training data; with int8, data to measure the loss on.", "DATA", "names, or the run's"),
    ] = None,
    steps: Annotated[int | None, option("Training steps.", "N", "the preset's")] = None,
    set_: Settings = None,
    seed: Annotated[int | None, option("Random seed, unless the chip provides one.", "S", "42")] = None,
    weights: Annotated[
        str | None, option("float32, or int8 (quantization; about a quarter of the size).", "NAME", "float32")
    ] = None,
    target: Annotated[
        str | None,
        option("Chip to fit: see tapeless budget --target.", "NAME", "esp32 for esp-idf and arduino"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the program in DIR.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", metavar="", help="Print the trace instead: every op and its buffers.")
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the trace's memory as an .svg file instead.", show_default=False
        ),
    ] = None,
) -> None:
    """Export a model as a C program for microcontrollers, desktops or the browser.

    From a preset, the program trains as tapeless train does, then
    generates. From a trained model, it generates.
    """
    from tapeless.errors import ConfigError
    from tapeless.export.export import export as export_model

    settings = parse_settings(set_) | ({} if steps is None else {"steps": steps})
    unused = {
        "to": to, "out": out, "mode": mode, "data": data, "seed": seed, "weights": weights, "target": target,
        "overwrite": overwrite or None,
    }  # fmt: skip
    if show or draw is not None:
        from tapeless.export.drawing import check_path, draw_memory
        from tapeless.export.firmware import trace_of

        for name, value in unused.items():
            if value is not None:
                raise ConfigError(f"--show and --draw are of the trace alone: leave --{name} out.")
        if draw is not None:
            check_path(draw)
        trace = trace_of(source, settings)
        if show:
            print(trace)
        if draw is not None:
            draw_memory(source, trace, draw)
            say(f"Saved in {draw}.")
        return
    if out is None or not out.name:  # of nothing, or the present folder
        raise ConfigError("--out DIR is required.")
    export_model(
        source, to or "c", out, mode=mode, data=data, settings=settings, seed=seed,
        weights=weights or "float32", target=target, overwrite=overwrite, command=_typed(sys.argv[1:]),
        say=say,
    )  # fmt: skip


def _typed(words: list[str]) -> str:
    """The command, but for where it wrote to."""
    kept = [
        word
        for before, word in pairwise(["tapeless", *words])
        if before != "--out" and word not in ("--out", "--overwrite") and not word.startswith("--out=")
    ]
    return shlex.join(["tapeless", *kept])
