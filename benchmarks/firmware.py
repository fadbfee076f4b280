"""Instructions that a training step takes on an emulated RISC-V chip, in all and in each op; sizes.

    python benchmarks/firmware.py [PRESET]... [--soft] [--data FILE] [--json]
    python benchmarks/firmware.py [PRESET]... --sizes

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

from chips import CHIPS, Chip

HERE = Path(__file__).parent
# Reading the counters: with _zicsr in -march, gcc 12 of Debian picks 64-bit libraries.
COUNTERS = ("-std=gnu99", "-misa-spec=2.2")
INNER = "add_product,dot,dots,begin_sum,softmax_row,score_backward,gelu_tanh"  # parts of ops


def count(folder: Path, chip: Chip, each: bool) -> list[list[str]]:
    """Build and run the counting program; with `each` the ops tell of themselves."""
    program, ops = folder / "count.elf", folder / "tapeless_ops.c"
    sources = [path for path in sorted(folder.glob("tapeless_*.c")) if path != ops]
    sources.append(HERE / "firmware" / "count.c")
    told = ("-finstrument-functions", f"-finstrument-functions-exclude-function-list={INNER}")
    chip.compile(folder / "ops.o", [ops], "-c", *COUNTERS, *(told if each else ()))
    chip.compile(program, [*sources, folder / "ops.o"], *COUNTERS, f"-I{folder}")
    names = {}
    for line in subprocess.check_output([f"{chip.tools}nm", program], text=True).splitlines():
        address, _, name = line.split()
        names[int(address, 16)] = name
    rows = [line.split() for line in chip.run(program, "-icount", "shift=0").splitlines()]
    return [[names[int(r[0], 16)] if r[0].startswith("0x") else r[0], *r[1:]] for r in rows]


def measure(preset: str, chip: Chip, data: str | None, steps: int) -> dict[str, float]:
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


def sizes(preset: str) -> None:
    """Static RAM and flash on every chip, as `size` reads them: of a program that trains and generates, and
    of one that generates with trained weights, in float32 and in int8."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tapeless = [sys.executable, "-m", "tapeless"]
        training = [
            "train",
            "--preset",
            preset,
            "--steps",
            "1",
            "--engine",
            "reference",
            "--out",
            folder / "run",
        ]
        subprocess.run([*tapeless, *training], check=True, capture_output=True)
        for what, *arguments in (
            ("trains and generates", preset),
            ("generates", folder / "run"),
            ("generates, int8", folder / "run", "--weights", "int8"),
        ):
            target = folder / what
            subprocess.run(
                [*tapeless, "export", *arguments, "--out", target], check=True, capture_output=True
            )
            for chip in CHIPS.values():
                chip.compile(target / "program.elf", sorted(target.glob("*.c")), "-std=c99")
                ram, flash = chip.size(target / "program.elf")
                print(f"{preset:<16}{what:<24}{chip.name:<14}{ram:10,} RAM{flash:10,} flash")


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
    parser.add_argument("--sizes", action="store_true", help="static RAM and flash in place of instructions")
    options = parser.parse_args()
    chip = CHIPS["riscv-soft" if options.soft else "riscv-hard"]
    for preset in options.presets:
        if options.sizes:
            sizes(preset)
            continue
        result = measure(preset, chip, options.data, options.steps)
        if options.json:
            print(json.dumps({preset: result}))
            continue
        print(f"{preset}, {chip.name}: instructions a step")
        for name, n in result.items():
            print(f"  {name:<32}{n:12,.0f}{n / result['all']:8.1%}")


if __name__ == "__main__":
    main()
