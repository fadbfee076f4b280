"""The command settings: what --set and --config can change."""

from __future__ import annotations

from typing import Annotated

import typer


def settings(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY", help="A setting, e.g. n_embd. [dim]\\[default: all of them][/]", show_default=False
        ),
    ] = None,
) -> None:
    """List the settings that --set and --config can change.

    With KEY: its type, its values, its default, and the presets that change it.
    """
    from rich.console import Console
    from rich.table import Table

    from tapeless.presets import changed_by
    from tapeless.settings import describe, names

    console = Console(highlight=False)
    if key is not None:
        one = describe(key)
        table = Table(box=None, show_header=False)
        table.add_row("table", f"[{one.table}]".replace("[", r"\["))
        table.add_row("type", one.type)
        table.add_row("values", one.values)
        table.add_row("default", one.default)
        for value, presets in changed_by(key).items():
            table.add_row("presets", f"{value}: {', '.join(presets)}")
        console.print(f"{key}: {one.about}", soft_wrap=True)
        console.print(table)
        return
    for part in ("model", "training"):
        table = Table(part, "default", "", box=None)
        for one in map(describe, names()):
            if one.table == part:
                table.add_row(one.name, one.default, one.about)
        console.print(table, "")
    console.print("More about one: tapeless settings KEY")
