"""What is known of the chips that models are exported to, and whether a model fits."""

from __future__ import annotations

from dataclasses import dataclass

from tapeless.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Chip:
    """A kind of microcontroller. `ram`: bytes that static variables and the stack may take together, what
    the chip's own software needs left aside; `flash`: bytes that a program may have."""

    name: str
    what: str
    ram: int
    flash: int
    hard_float: bool  # in single precision
    mhz: int


# RAM for static variables: see docs/microcontrollers.md, which has the sources.
KB = 1024
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("esp32", "Xtensa LX6", 160 * KB, 3 * 1024 * KB, True, 240),
        Chip("esp32-s3", "Xtensa LX7", 300 * KB, 3 * 1024 * KB, True, 240),
        Chip("esp32-c3", "RISC-V, soft float", 300 * KB, 3 * 1024 * KB, False, 160),
        Chip("rp2040", "Cortex-M0+, soft float", 256 * KB, 2 * 1024 * KB, False, 133),
        Chip("stm32f4", "Cortex-M4F (STM32F407)", 128 * KB, 1024 * KB, True, 168),
    )
}


def get_chip(name: str) -> Chip:
    """The chip of this name. Raises `ConfigError`, suggesting the nearest, if there is none."""
    if name not in CHIPS:
        raise ConfigError(f"no target is called {name!r}.{did_you_mean(name, ['cpu', *CHIPS])}")
    return CHIPS[name]
