"""The folder that an export writes: a C program, with what a toolchain needs around it.

The files beside this one are its parts: c/ in every export, host/ the program for this machine, and one
folder for each kind of project. What ends in `.jinja` is filled in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from tapeless.errors import RunError, argument
from tapeless.export.weights import number
from tapeless.files import replace
from tapeless.io import runs


class Kind(NamedTuple):
    """A kind of project: what it is called, and where its parts lie."""

    name: str
    own: str  # the folder of its own parts, beside this file
    sources: str  # where in the project the C files lie
    host: str | None  # and the program for this machine
    built: tuple[str, ...] = ()  # what its own make makes


KINDS = {
    "c": Kind("a C program", "plain", ".", "."),
    "esp-idf": Kind("an ESP-IDF project", "esp_idf", "main", "host"),
    "arduino": Kind("an Arduino sketch", "arduino", ".", "host"),
    "wasm": Kind("a web page", "wasm", ".", None, ("index.html", "tapeless.wasm")),
}


def environment(**options: Any) -> Environment:
    """The templates beside this file; `c` writes a number as C does."""
    env = Environment(
        loader=PackageLoader("tapeless.export", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    env.filters["c"] = number
    return env


def files(kind: Kind, about: dict[str, Any]) -> dict[str, str]:
    """The text of every file of a project, by its path."""
    env = environment()
    parts = [("c", kind.sources), (kind.own, ".")]
    parts += [("host", kind.host)] if kind.host else []
    written = {}
    for folder, target in parts:
        sources = os.path.relpath(kind.sources, target)
        for path, text in _texts(folder):
            if path.suffix == ".jinja":
                text = env.get_template(f"{folder}/{path}").render(about, sources=sources)  # noqa: PLW2901
                path = path.with_suffix("")  # noqa: PLW2901
            name = path.name.replace("SKETCH", about["sketch"])
            written[str(PurePosixPath(target) / path.with_name(name))] = text
    return written


def _texts(folder: str) -> Iterator[tuple[PurePosixPath, str]]:
    def walk(where: Any, path: PurePosixPath) -> Iterator[tuple[PurePosixPath, str]]:
        for item in sorted(where.iterdir(), key=lambda item: item.name):
            if item.is_dir():
                yield from walk(item, path / item.name)
            else:
                yield path / item.name, item.read_text(encoding="utf-8")

    yield from walk(resources.files("tapeless.export") / folder, PurePosixPath())


def refuse(out: Path, overwrite: bool) -> None:
    """Raise `RunError` if a project must not be written there."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; expected a folder for the program.")
    if out.is_dir() and not overwrite and any(out.iterdir()):
        raise RunError(
            f"{out} already exists: replace its files with {argument('overwrite', True)}, or choose another "
            "folder."
        )


LIST = ".tapeless-export"  # the names of all files of a project, for the next one in its place


def write(out: Path, kind: Kind, texts: dict[str, str]) -> None:
    """Write the files aside, then put each in its place, and take away those of an earlier project."""
    folder = out.resolve()
    texts = texts | {LIST: "".join(f"{name}\n" for name in [*texts, *kind.built])}
    old = [name for name in (*_listed(folder), *kind.built) if name not in texts]
    aside = folder.with_name(f".{folder.name}.part")
    with runs.writing(out):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            for name, text in texts.items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_text(text, encoding="utf-8", newline="\n")
            for name in texts:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                replace(aside / name, folder / name)
            runs.remove(folder / name for name in old)
            for part in {(folder / name).parent for name in old} - {folder}:
                with suppress(OSError):  # what else is in there stays
                    part.rmdir()
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _listed(folder: Path) -> list[str]:
    """The files of the project that is there: names in this folder, whatever a list may say."""
    try:
        names = (folder / LIST).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    inside = [name for name in names if (folder / name).resolve().is_relative_to(folder)]
    return [name for name in inside if (folder / name).is_file()]
