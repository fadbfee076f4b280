"""Emulated chips: how a program is compiled for each, and run. docs/microcontrollers.md has the packages."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OPTIMISED = ("-O2", "-fno-math-errno", "-ffp-contract=fast")  # as the Makefile and the projects have it


@dataclass(frozen=True)
class Chip:
    """An instruction set. `ram` and `flash` are where QEMU's machine has memory: address and size."""

    name: str
    stands_for: str
    tools: str  # what the names of its compiler and its size begin with
    flags: tuple[str, ...]
    emulator: tuple[str, ...]
    flash: tuple[str, str]
    ram: tuple[str, str]

    @property
    def compiler(self) -> str:
        return f"{self.tools}gcc"

    def compile(self, program: Path, sources: Sequence[Path], *flags: str) -> str:
        """Compile and link; what the compiler says."""
        places = ("__flash", self.flash[0]), ("__flash_size", self.flash[1])
        places = (*places, ("__ram", self.ram[0]), ("__ram_size", self.ram[1]))
        command = [
            *(self.compiler, *self.flags, *OPTIMISED, *flags),
            *("--specs=picolibc.specs", "--oslib=semihost", "--crt0=hosted"),
            *(f"-Wl,--defsym={name}={value}" for name, value in places),
            *map(str, sources),
            *("-o", str(program), "-lm"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=program.parent)
        if result.returncode:
            raise RuntimeError(result.stderr)
        return result.stderr

    def run(self, program: Path, *options: str) -> str:
        """What the program prints."""
        command = [*self.emulator, *options, "-kernel", str(program)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        return result.stdout + result.stderr

    def size(self, program: Path) -> tuple[int, int]:
        """Bytes of static RAM and of flash."""
        table = subprocess.check_output([f"{self.tools}size", str(program)], text=True)
        text, data, bss = map(int, table.splitlines()[1].split()[:3])
        return data + bss, text + data


_SEMIHOSTED = ("-semihosting-config", "enable=on,target=native", "-nographic")
_RISCV = ("qemu-system-riscv32", "-M", "virt", *_SEMIHOSTED, "-bios", "none")
_ARM = ("qemu-system-arm", "-M", "mps2-an386", *_SEMIHOSTED, "-monitor", "none", "-serial", "none")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "riscv-soft", "ESP32-C3", "riscv64-unknown-elf-", ("-march=rv32imc", "-mabi=ilp32"), _RISCV,
            ("0x80000000", "0x00200000"), ("0x80200000", "0x00100000"),
        ),
        Chip(
            "riscv-hard", "ESP32-P4", "riscv64-unknown-elf-", ("-march=rv32imafc", "-mabi=ilp32f"), _RISCV,
            ("0x80000000", "0x00200000"), ("0x80200000", "0x00100000"),
        ),
        Chip(
            "cortex-m4f", "STM32F4, nRF52", "arm-none-eabi-",
            ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), _ARM,
            ("0x00000000", "0x00400000"), ("0x20000000", "0x00080000"),
        ),
    )
}  # fmt: skip
