"""The result of a gradient check for people: a table, and a certificate to keep."""

from __future__ import annotations

import datetime
import io
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError
from tapeless.gradcheck import (
    DIRECTION_TOLERANCE,
    ENGINE_TOLERANCE,
    HALF_LOSS_TOLERANCE,
    LOSS_TOLERANCE,
    TOLERANCE,
    GradCheck,
)
from tapeless.io import runs


def check_path(report: Path) -> None:
    """Raise `ConfigError` unless the report's name ends in .html or .json."""
    if report.suffix not in (".html", ".json"):
        raise ConfigError(f"the report must be a .html or .json file, not {str(report)!r}.")


def show(preset: str, config: GPTConfig, result: GradCheck, report: Path | None = None) -> None:
    """Print the result, and write it to `report` if there is one, whether or not it can be printed.

    Raises `RunError` if it cannot be written.
    """
    try:
        if report is not None:
            _write(preset, config, result, report)
    finally:
        Console(highlight=False).print(*_parts(preset, config, result), sep="\n")


def _write(preset: str, config: GPTConfig, result: GradCheck, report: Path) -> None:
    if report.suffix == ".json":
        runs.write_json(report, {"about": about(preset, config, result), "result": result.to_dict()})
        return
    console = Console(record=True, highlight=False, width=100, file=io.StringIO())
    console.print(*_parts(preset, config, result), "", _about_table(preset, config, result), sep="\n")
    runs.write_text(report, console.export_html())


def about(preset: str, config: GPTConfig, result: GradCheck) -> dict[str, Any]:
    """What was checked, with what: enough to do it again."""
    return {
        "preset": preset,
        "config": config.to_dict(),
        "engine": result.engine,
        "seed": result.seed,
        "tolerances": {
            "entry against finite differences, relative": TOLERANCE,
            "directional derivative against finite differences, relative": DIRECTION_TOLERANCE,
            "engine's tensor against the reference's, relative norm": ENGINE_TOLERANCE,
            "engine's loss": LOSS_TOLERANCE,
            "in bfloat16, engine's tensor": "and as far as rounding takes the reference's",
            "in bfloat16, engine's loss, relative": HALF_LOSS_TOLERANCE,
        },
        "versions": {name: version(name) for name in ("tapeless", "numpy", "numba", "llvmlite")}
        | {"python": platform.python_version(), "machine": platform.machine()},
        "date": datetime.date.today().isoformat(),
    }


def _parts(preset: str, config: GPTConfig, result: GradCheck) -> list[Any]:
    compared, sampled = result.engine_loss is not None, result.directions > 0
    table = Table("tensor", "shape", box=None)
    columns = ["checked", "worst error", *["directions"] * sampled, *[f"{result.engine} engine"] * compared]
    for column in (*columns, ""):
        table.add_column(column, justify="right")
    for row in result.rows:
        checked = "all" if row.checked == row.size else f"{row.checked:,} of {row.size:,}"
        cells = [row.name, " × ".join(map(str, row.shape)), checked, f"{row.worst:.1e}"]
        if sampled:
            cells.append("" if row.directional is None else f"{row.directional:.1e}")
        cells += [f"{row.engine:.1e}"] if row.engine is not None else []
        table.add_row(*cells, "[green]ok[/]" if row.ok else "[bold red]FAILED[/]")
    size = sum(row.size for row in result.rows)
    lines: list[Any] = [f"{preset}, {size:,} parameters: gradients against finite differences", table]
    if sampled:
        lines.append(
            f"Sampled tensors: also {result.directions} directional derivatives along random directions, "
            "in which every entry counts."
        )
    if compared and result.precision == "bf16":
        lines.append(
            f"The {result.engine} engine multiplies in bfloat16. It is compared with the reference in the "
            "same rounding, to within what that rounding changes."
        )
    if compared:
        verdict = "[green]ok[/]" if result.loss_ok else "[bold red]FAILED[/]"
        lines.append(f"loss {result.loss:.7f}, {result.engine} engine {result.engine_loss:.7f}  {verdict}")
    if result.ok:
        lines.append("All gradients agree.")
    else:
        lines.append(f"[bold red]FAILED:[/] {', '.join(result.failed) or 'the loss'}")
    return lines


def _about_table(preset: str, config: GPTConfig, result: GradCheck) -> Table:
    table = Table(box=None, show_header=False)
    for name, value in about(preset, config, result).items():
        pairs = value.items() if isinstance(value, dict) else ()
        table.add_row(name, ", ".join(f"{k} {v}" for k, v in pairs) or str(value))
    return table
