"""From a preset or a trained model to a folder with a C program: what `tapeless export` does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tapeless.data.documents import BUILT_IN, read_documents
from tapeless.errors import ConfigError, argument, did_you_mean
from tapeless.evaluate import evaluate
from tapeless.export import budget, files, wasm
from tapeless.export.firmware import Firmware, data_of, prepare, training_of
from tapeless.export.int8 import Quantised, quantised
from tapeless.export.program import context
from tapeless.model import load

TARGETS = {"esp-idf": "esp32", "arduino": "esp32"}  # where nothing else is said
SKETCH = re.compile(r"\w([\w.-]{0,61}[\w-])?", re.ASCII)  # Arduino's specification of sketches


def export(
    source: str,
    to: str,
    out: Path,
    *,
    mode: str | None = None,
    data: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    seed: int | None = None,
    weights: str = "float32",
    target: str | None = None,
    overwrite: bool = False,
    command: str = "tapeless export",
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Write the model `source`, a preset or a trained one, as a program into the folder `out`.

    `to` is "c", "esp-idf", "arduino" or "wasm"; `mode` "train", "generate" or "both"; `weights` "float32" or
    "int8". The program must fit the chip `target`: "esp32" for ESP-IDF and Arduino where none is given.

    Raises `ConfigError` for a model or settings that cannot be exported, or do not fit; `DataError` or
    `RunError` for what cannot be read or written. Nothing is written then.
    """
    if to not in files.KINDS:
        raise ConfigError(f"to cannot be {to!r}.{did_you_mean(to, files.KINDS)}")
    target = TARGETS.get(to) if target is None else target
    chip = budget.get_chip(target or "esp32")
    if to == "esp-idf" and not chip.idf:
        raise ConfigError(
            f"{target} is not a chip of ESP-IDF's: choose {argument('to', 'arduino')}, "
            f"{argument('to', 'c')} or another target."
        )
    files.refuse(out, overwrite)
    if to == "arduino" and not SKETCH.fullmatch(_sketch(out)):
        raise ConfigError(
            f"a sketch has the name of its folder, which cannot be {_sketch(out)!r}: choose one of English "
            "letters, digits, '_', '-' and '.', at most 63, neither '-' nor '.' first, and no '.' last."
        )
    int8 = weights == "int8"
    firmware = prepare(
        source, mode or ("generate" if int8 else None), None if int8 else data, settings or {}, seed
    )
    small = quantised(firmware, weights)
    rows = budget.budget(firmware, small, chip)
    if target is not None:
        budget.check(rows, target)
    about = context(firmware, command, small)
    texts = files.files(
        files.KINDS[to], about | {"sketch": _sketch(out), "target": target, "chip": chip, "rows": rows}
    )
    if small is not None:
        _tell_cost(firmware, small, source, data, say)
    files.write(out, files.KINDS[to], texts)
    say(_told(firmware, rows, target))
    say(f"Saved in {out}: {files.KINDS[to].name}. Its README.md says how to go on.")
    if to == "wasm":
        wasm.build(out, say)


def _sketch(out: Path) -> str:
    """A folder's name, which the sketch in it must have."""
    return out.resolve().name


def _told(firmware: Firmware, rows: list[budget.Row], target: str | None) -> str:
    does = [f"trains {firmware.training.steps:,} steps"] if firmware.trains else []
    does += ["generates"] if firmware.generates else []
    ram, flash = budget.totals(rows)
    fits = f", fits {target}" if target else ""
    return (
        f"{firmware.title}: {firmware.size:,} parameters, {' and '.join(does)}: "
        f"{ram:,} bytes of RAM, {flash:,} of flash{fits}"
    )


def _tell_cost(
    firmware: Firmware, small: Quantised, source: str, data: str | Path | None, say: Callable[[str], object]
) -> None:
    """Measure what int8 weights cost on `data`, or on what the model was trained on."""
    assert firmware.weights is not None
    # The run's own data are read as they were when it was trained.
    token_dtype = training_of(source).token_dtype if data is None else None
    data = data_of(source) if data is None else data
    say(f"Measuring the loss with int8 weights on {data}.")
    own = data if token_dtype is None or data not in BUILT_IN else read_documents(data)  # whatever lies here
    model = load(source, "reference", dtype="float32")
    losses = []
    for weights in (firmware.weights, small.rounded):
        model.engine.params[:] = weights
        losses.append(evaluate(model, own, token_dtype=token_dtype).loss)
    say(
        f"int8 weights: {small.nbytes:,} bytes in place of {firmware.weights.nbytes:,}; "
        f"loss on {data} {losses[1]:.4f} in place of {losses[0]:.4f}"
    )
