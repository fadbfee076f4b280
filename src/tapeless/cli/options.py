"""What several commands share: options, and how they speak."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


def option(help: str, metavar: str, default: str, *names: str) -> Any:
    """An option whose default is not known here: None stands for it, and `default` tells it."""
    return typer.Option(
        *names, help=f"{help} [dim]\\[default: {default}][/]", metavar=metavar, show_default=False
    )


# What a command that takes any model says of its argument MODEL.
MODEL = "A run folder, a Hugging Face folder, an llm.c file, or a name on the hub."
A_MODEL = f"a{MODEL[1:]}"  # within a sentence

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change any model or training setting, e.g. n_embd=32; repeatable. See tapeless settings.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, option("Number of threads.", "N", "the processors, or 1 for small steps")]
Recompute = Annotated[
    bool | None,
    typer.Option(
        "--recompute",
        metavar="",
        help="Keep only each layer's input and recompute the rest (gradient checkpointing): less memory, "
        "more time.",
        show_default=False,
    ),
]
Precision = Annotated[
    str | None,
    option("Precision of matmul inputs (mixed precision): float32 or bf16.", "NAME", "the model's"),
]
EngineName = Annotated[str | None, option("cpu (compiled) or reference (NumPy).", "NAME", "cpu")]


TokenDtype = Annotated[
    str | None,
    option(
        "What token files without a header hold: uint16, uint32, int32 or int64.", "NAME", "by their content"
    ),
]


class Command(TyperCommand):
    """A command that refuses empty values: as a path, each would mean the present folder."""

    may_be_empty = ("prompt",)

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        from tapeless.errors import ConfigError

        given, *_ = self.make_parser(context).parse_args(args=list(args))
        for parameter in self.get_params(context):
            value = given.get(parameter.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            if "" in values and parameter.name not in self.may_be_empty:
                what = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
                raise ConfigError(f"{what} is empty: give a value, or leave it out.")
        return super().parse_args(context, args)


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    from tapeless.errors import ConfigError
    from tapeless.settings import parse_setting

    settings = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"--set needs KEY=VALUE, not {pair!r}.")
        settings[name.strip()] = parse_setting(name.strip(), value.strip())
    return settings


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def say(line: str) -> None:
    typer.echo(line, err=True)
