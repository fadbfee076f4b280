"""Instructions that a training step takes on an emulated RISC-V chip, in all and in each op.

    python benchmarks/firmware.py [PRESET]... [--soft] [--data FILE] [--json]

Needs Debian's gcc-riscv64-unknown-elf, picolibc-riscv64-unknown-elf and qemu-system-misc. QEMU's -icount
makes the chip's own counter, minstret, exact; in a second run the ops tell when they begin and end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MEMORY = {
    "__flash": "0x80000000",
    "__flash_size": "0x00200000",
    "__ram": "0x80200000",
    "__ram_size": "0x00100000",
}
CHIPS = {"hard": ["-march=rv32imafc", "-mabi=ilp32f"], "soft": ["-march=rv32imc", "-mabi=ilp32"]}
# Reading the counters: with _zicsr in -march, gcc 12 of Debian picks 64-bit libraries.
FLAGS = [
    *("-std=gnu99", "-O2", "-fno-math-errno", "-ffp-contract=fast", "-misa-spec=2.2", "-lm"),
    *("--specs=picolibc.specs", "--oslib=semihost", "--crt0=hosted"),
    *(f"-Wl,--defsym={name}={value}" for name, value in MEMORY.items()),
]
EMULATOR = [
    *("qemu-system-riscv32", "-M", "virt", "-semihosting-config", "enable=on,target=native", "-nographic"),
    *("-bios", "none", "-icount", "shift=0", "-kernel"),
]


def count(folder: Path, chip: str, each: bool) -> list[list[str]]:
    """Build and run the counting program; with `each` the ops tell of themselves."""
    sources = [*sorted(folder.glob("tapeless_*.c")), HERE / "firmware" / "count.c"]
    inner = "add_product,dot,dots,begin_sum,softmax_row,score_backward,gelu_tanh"
    objects = []
    for source in sources:
        told = ["-finstrument-functions", f"-finstrument-functions-exclude-function-list={inner}"]
        told = told if each and source.name == "tapeless_ops.c" else []
        objects.append(folder / f"{source.stem}.o")
        flags = [flag for flag in FLAGS if not flag.startswith(("-Wl", "-l"))]
        command = ["riscv64-unknown-elf-gcc", *CHIPS[chip], *flags, *told, f"-I{folder}", "-c", source]
        subprocess.run([*command, "-o", objects[-1]], check=True)
    program = folder / "count.elf"
    subprocess.run(["riscv64-unknown-elf-gcc", *CHIPS[chip], *objects, *FLAGS, "-o", program], check=True)
    result = subprocess.run(
        [*EMULATOR, program], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    names = {}
    for line in subprocess.check_output(["riscv64-unknown-elf-nm", program], text=True).splitlines():
        address, _, name = line.split()
        names[int(address, 16)] = name
    rows = [line.split() for line in (result.stdout + result.stderr).splitlines()]
    return [[names[int(r[0], 16)] if r[0].startswith("0x") else r[0], *r[1:]] for r in rows]


def measure(preset: str, chip: str, data: str | None, steps: int) -> dict[str, float]:
    """Instructions a step: "all", then each op, the most first."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "program"
        command = [sys.executable, "-m", "tapeless", "export", preset, "--out", target, "--mode", "train"]
        command += ["--steps", str(steps)] + (["--data", data] if data else [])
        subprocess.run(command, check=True, capture_output=True)
        [whole] = count(target, chip, each=False)
        rows = count(target, chip, each=True)[1:]
    ops = sorted(((name, int(n) / steps) for name, n, _ in rows), key=lambda item: -item[1])
    return {"all": int(whole[1]) / steps, **dict(ops)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=["microgpt"])
    parser.add_argument(
        "--soft", action="store_true", help="without floating point (ESP32-C3's instructions)"
    )
    parser.add_argument("--data", help="documents; the built-in names")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for preset in options.presets:
        result = measure(preset, "soft" if options.soft else "hard", options.data, options.steps)
        if options.json:
            print(json.dumps({preset: result}))
            continue
        print(f"{preset}: instructions a step")
        for name, n in result.items():
            print(f"  {name:<32}{n:12,.0f}{n / result['all']:8.1%}")


if __name__ == "__main__":
    main()
