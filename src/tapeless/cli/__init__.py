"""The command line. Each command is a thin face of a function of the package."""

from __future__ import annotations

from typing import Annotated

import typer

from tapeless.cli import convert, data, export, models, runs, settings

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run GPTs with every gradient written by hand.",
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


app.command(cls=runs.Train)(runs.train)
app.command("eval")(runs.evaluate)
for _command in (
    runs.sample,
    data.tokenize,
    models.check,
    models.budget,
    models.bench,
    convert.convert,
    export.export,
    models.presets,
    settings.settings,
):
    app.command()(_command)
