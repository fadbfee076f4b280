"""What an exported program takes of a chip's RAM and flash, before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from tapeless.errors import ConfigError, did_you_mean
from tapeless.export.firmware import Firmware
from tapeless.export.int8 import Quantised
from tapeless.export.lifetimes import Value
from tapeless.export.program import (
    data_bytes,
    longest_text,
    memory,
    token_bytes,
    token_width,
    weight_bytes,
)

KB = 1024
# Measured with gcc 12 at -O2 for RISC-V and Cortex-M (docs/microcontrollers.md), rounded up: code that
# generates, with what it takes of the C library, by whether there is hard float; and the deepest stack,
# printf's included.
CODE, TRAINING_CODE = {True: 23 * KB, False: 32 * KB}, 11 * KB
STACK = 2 * KB
RANDOM = {"python": 2500, "xorshift32": 4, "numpy": 16}  # the state of each generator
GAUSS, ADAM, FIRST = 8, 8, 4  # the spare normal number; 1 − βᵗ; the first document


@dataclass(frozen=True)
class Chip:
    """A kind of microcontroller. `ram` and `flash` are what a program may have of it in bytes, what its own
    software and the C library need left aside."""

    what: str
    ram: int
    flash: int
    hard_float: bool  # in single precision
    fqbn: str  # how the Arduino command line calls a board with it
    idf: str = ""  # and ESP-IDF the chip


# Where these figures come from stands in docs/microcontrollers.md.
CHIPS = {
    "esp32": Chip("ESP32: Xtensa LX6", 144 * KB, 3584 * KB, True, "esp32:esp32:esp32", "esp32"),
    "esp32-s3": Chip("ESP32-S3: Xtensa LX7", 240 * KB, 3584 * KB, True, "esp32:esp32:esp32s3", "esp32s3"),
    "esp32-c3": Chip(
        "ESP32-C3: RISC-V without floating point",
        220 * KB,
        3584 * KB,
        False,
        "esp32:esp32:esp32c3",
        "esp32c3",
    ),
    "rp2040": Chip(
        "RP2040: Cortex-M0+ without floating point", 240 * KB, 1920 * KB, False, "rp2040:rp2040:rpipico"
    ),
    "stm32f4": Chip("STM32F407: Cortex-M4F", 120 * KB, 960 * KB, True, "STMicroelectronics:stm32:Disco"),
}


class Row(NamedTuple):
    what: str
    ram: int
    flash: int
    remark: str = ""


def get_chip(name: str) -> Chip:
    """The chip of this name. Raises `ConfigError`, suggesting the nearest, if there is none."""
    if name not in CHIPS:
        raise ConfigError(f"no target is called {name!r}.{did_you_mean(name, CHIPS)}")
    return CHIPS[name]


def budget(firmware: Firmware, quantised: Quantised | None, chip: Chip) -> list[Row]:
    """What the program takes, by what it is for."""
    layout, P = memory(firmware), 4 * firmware.size
    rows = []
    if firmware.trains:
        moments = layout.kept * 4 // P - 2
        name = "Adam's moments" if moments == 2 else "momentum"
        rows += [Row("parameters", P, 0), Row("gradients", P, 0), Row(name, moments * P, 0)]
    values: list[Value] = []
    for arena in (layout.step, layout.decode):
        values += arena.values if arena else []
    kinds = [("activations", "a"), ("activation gradients", "d"), ("generating a text", "c")]
    sizes = {what: _total(v for v in values if v.name[0] == kind) for what, kind in kinds}
    apart = ", ".join(f"{what} {size:,}" for what, size in sizes.items() if size)
    rows.append(Row("working memory", 4 * layout.shared, 0, f"of {sum(sizes.values()):,}: {apart}"))
    other = RANDOM[firmware.random]
    if firmware.generates:  # a text, its end, and the tokens that the next one is drawn from
        other += longest_text(firmware) + 1 + token_width(firmware) * firmware.config.block_size
    if firmware.trains:
        other += FIRST + 4 * firmware.training.batch_size
        other += GAUSS if firmware.weights is None else 0
        other += ADAM if firmware.training.optimiser != "sgd" else 0
    rows.append(Row("random numbers, a batch, a text", other, 0))
    rows.append(Row("stack, at most", STACK, 0))
    rows.append(Row("code", 0, CODE[chip.hard_float] + (TRAINING_CODE if firmware.trains else 0)))
    if size := weight_bytes(firmware, quantised):
        rows.append(Row("weights", 0, size, "int8" if quantised else "float32"))
    if size := data_bytes(firmware):
        rows.append(Row("documents", 0, size))
    if firmware.generates:
        rows.append(Row("tokenizer", 0, token_bytes(firmware)))
    return rows


def _total(values: Iterable[Value]) -> int:
    return 4 * sum(v.size for v in values)


def totals(rows: list[Row]) -> tuple[int, int]:
    """RAM and flash."""
    return sum(row.ram for row in rows), sum(row.flash for row in rows)


def check(rows: list[Row], name: str) -> None:
    """Raise `ConfigError` if the program does not fit this chip, naming what is largest."""
    chip = get_chip(name)
    for kind, needed, most in zip(("RAM", "flash"), totals(rows), (chip.ram, chip.flash), strict=True):
        if needed > most:
            field = kind.lower()
            largest = max(rows, key=lambda row: getattr(row, field))
            raise ConfigError(
                f"this needs {needed:,} bytes of {kind}, and a program may have {most:,} on {name}: most are "
                f"{largest.what} ({getattr(largest, field):,}). {REMEDIES[largest.what]}"
            )


REMEDIES = {
    "parameters": "Train a smaller model, or export a trained one to generate only.",
    "gradients": "Train a smaller model, or export a trained one to generate only.",
    "Adam's moments": "Train a smaller model, or export a trained one to generate only.",
    "momentum": "Train a smaller model, or export a trained one to generate only.",
    "working memory": "Set a smaller block_size, or recompute=true.",
    "random numbers, a batch, a text": "Set a smaller batch_size or smaller max_tokens.",
    "weights": "Try int8 weights, or a smaller model.",
    "documents": "Train on fewer of them.",
    "tokenizer": "Use a model with fewer tokens.",
    "code": "Choose another target.",
    "stack, at most": "Choose another target.",
}
