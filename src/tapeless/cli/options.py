"""What several commands share: options, and how they speak."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


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
