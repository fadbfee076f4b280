"""A drawing of the trace: each buffer's place in memory, from the call that writes it to the last that reads
it. Time goes down, memory to the right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tapeless.errors import ConfigError
from tapeless.export.files import environment
from tapeless.export.lifetimes import Arena, plans
from tapeless.export.trace import Trace
from tapeless.io import runs

WIDTH, ROW, LEFT = 720, 22, 210  # pixels
COLOURS = {"a": "#9ecae1", "d": "#fdae6b", "c": "#a1d99b"}


def check_path(path: Path) -> None:
    """Raise `ConfigError` unless a drawing can have this name."""
    if path.suffix.lower() != ".svg":
        raise ConfigError(f"a drawing is an .svg file, not {path}.")


def draw_memory(title: str, trace: Trace, path: Path) -> None:
    """Write the drawing of a training step and of a decoding step to `path`.

    Raises `RunError` if it cannot be written.
    """
    parts, top = [], 60
    names = "A training step of one document", "Generating one token"
    for name, arena in zip(names, plans(trace), strict=True):
        parts.append(_part(name, arena, top))
        top += ROW * len(arena.calls) + 70
    text = (
        environment(autoescape=True)
        .get_template("memory.svg.jinja")
        .render(
            title=title, parts=parts, width=LEFT + WIDTH + 20, height=top, left=LEFT, row=ROW, colours=COLOURS
        )
    )
    runs.write_text(path, text)


def _part(name: str, arena: Arena, top: int) -> dict[str, Any]:
    scale = WIDTH / arena.size
    boxes = [
        {
            "name": value.name,
            "bytes": 4 * value.size,
            "colour": COLOURS[value.name[0]],
            "x": LEFT + value.offset * scale,
            "y": top + ROW * value.first,
            "width": max(value.size * scale, 1),
            # What is kept for the next time has no end in here.
            "height": ROW * (min(value.last, len(arena.calls) - 1) - value.first + 1),
        }
        for value in arena.values
    ]
    lines = [(top + ROW * i, call.op) for i, (call, _) in enumerate(arena.calls)]
    return {"name": name, "bytes": 4 * arena.size, "top": top, "boxes": boxes, "lines": lines}
