"""Exported programs on emulated chips: the reference's losses and names, sizes, stack."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chips import CHIPS, Chip

import tapeless as tl
from commands import succeeds
from firmware import STRICT, export, needs, run
from test_export import told

KB = 1024
PRESETS = ("microgpt", "esp32gpt", "esp32gpt-rms", "flashmicrogpt")
HARD_FLOAT = ("riscv-hard", "cortex-m4f")
# With most seeds float32 does not determine 1,000 steps of flashmicrogpt to 1e-4: a token's embedding comes
# near zero, its norm multiplies rounding errors by hundreds, and the two engines of this machine part as well
# (docs/microcontrollers.md). With this one they agree to 1e-6.
SEEDS = {"flashmicrogpt": 7}


@cache
def reference(preset: str, data: Any, seed: int) -> Any:
    return tl.train(data, preset=preset, seed=seed, engine="reference", dtype="float32", progress=False)


def compiled(chip: Chip, folder: Path, *flags: str) -> Path:
    """The program for a chip; the compiler must have nothing to say."""
    needs(chip.compiler)
    program = folder / f"{chip.name}.elf"
    strict = (flag for flag in STRICT if flag != "-Werror")  # of which the linker makes an error of its own
    assert chip.compile(program, sorted(folder.glob("*.c")), *strict, *flags) == ""
    return program


def on_chip(chip: Chip, folder: Path, *flags: str) -> tuple[np.ndarray, list[str]]:
    needs(chip.emulator[0])
    return told(chip.run(compiled(chip, folder, "-DTL_LOG_EVERY=1", *flags)))


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        # `make test` does each preset and each chip once, or twice.
        pytest.param(name, preset, marks=() if (i - k) % 3 == 0 else pytest.mark.oracle)
        for i, name in enumerate(CHIPS)
        for k, preset in enumerate(PRESETS)
    ],
)
def test_a_chip_trains_and_generates_as_the_reference_does(name, preset, tmp_path):
    seed = SEEDS.get(preset, 42)
    folder = export(preset, "--seed", seed, out=tmp_path / "program")
    # Without floating point 1,000 steps take ten seconds here: the first ones of the same run.
    steps = 1000 if name in HARD_FLOAT else 250
    stop = () if steps == 1000 else (f"-DTL_STOP={steps}",)
    losses, texts = on_chip(CHIPS[name], folder, *stop)
    expected = reference(preset, "names", seed)
    assert len(losses) == steps
    np.testing.assert_allclose(losses, expected.losses[:steps], atol=1e-4)
    if steps == 1000:
        assert texts == expected.samples


@pytest.mark.parametrize("preset", [PRESETS[0], pytest.param(PRESETS[1], marks=pytest.mark.oracle)])
def test_without_floating_point_names_are_the_same(preset, tmp_path):
    folder = export(preset, "--steps", 200, out=tmp_path / "program")
    losses, texts = on_chip(CHIPS["riscv-soft"], folder)
    expected = tl.train(
        "names", preset=preset, steps=200, engine="reference", dtype="float32", progress=False
    )
    np.testing.assert_allclose(losses, expected.losses, atol=1e-4)
    assert texts == expected.samples


@pytest.mark.oracle
@pytest.mark.parametrize("preset", PRESETS)
def test_without_floating_point_a_whole_run_is_the_same(preset, tmp_path):
    seed = SEEDS.get(preset, 42)
    folder = export(preset, "--seed", seed, out=tmp_path / "program")
    losses, texts = on_chip(CHIPS["riscv-soft"], folder)
    expected = reference(preset, "names", seed)
    # Towards its end microgpt's has a step where another rounding makes 1.1e-4.
    np.testing.assert_allclose(losses[:900], expected.losses[:900], atol=1e-4)
    np.testing.assert_allclose(losses, expected.losses, atol=2e-4)
    assert texts == expected.samples


@pytest.mark.oracle
@pytest.mark.parametrize("preset", ["microgpt", "esp32gpt", "esp32gpt-rms"])
def test_this_machine_repeats_the_published_runs(preset, names, tmp_path):
    needs("make", "cc")
    folder = export(preset, "--data", names, out=tmp_path / "program")
    run("make", "CFLAGS=-O2 -DTL_LOG_EVERY=1", cwd=folder)
    losses, texts = told(run(folder / "tapeless", cwd=folder))
    np.testing.assert_allclose(losses, reference(preset, names, 42).losses, atol=1e-4)
    assert texts == reference(preset, names, 42).samples


@pytest.mark.parametrize("name", HARD_FLOAT)
def test_esp32gpt_ends_with_its_published_figures(name, names, tmp_path):
    folder = export("esp32gpt", "--data", names, out=tmp_path / "program")
    losses, texts = on_chip(CHIPS[name], folder)
    assert losses[[0, 100, 500, 999]] == pytest.approx([3.3071, 2.4193, 1.9888, 2.0980], abs=2e-4)
    assert {"arishel", "arona", "raeli", "cealin", "mosile", "malie", "sunaya"} <= set(texts)
    np.testing.assert_allclose(losses, reference("esp32gpt", names, 42).losses, atol=1e-4)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", CHIPS)
def test_microgpt_trains_in_96_kilobytes(name, tmp_path):
    folder = export("microgpt", out=tmp_path / "program")
    ram, flash = CHIPS[name].size(compiled(CHIPS[name], folder))
    assert ram <= 96 * KB
    _assert_near_the_budget("microgpt", name, ram, flash, tmp_path)


@pytest.mark.parametrize("name", CHIPS)
def test_microgpt_generates_in_12_kilobytes(name, tmp_path):
    model = tmp_path / "run"
    succeeds("train", "--engine", "reference", "--steps", 5, "--out", model, cwd=tmp_path)
    folder = export(model, out=tmp_path / "program")
    ram, flash = CHIPS[name].size(compiled(CHIPS[name], folder))
    assert ram <= 12 * KB
    _assert_near_the_budget(model, name, ram, flash, tmp_path)


def _assert_near_the_budget(model: Any, name: str, ram: int, flash: int, folder: Path) -> None:
    """What was told before compiling is enough, and no more than it must be."""
    target = "esp32-c3" if name == "riscv-soft" else "stm32f4"
    output = succeeds("budget", model, "--target", target, cwd=folder).stdout
    told_ram, told_flash = (
        int(n.replace(",", "")) for n in re.search(r"total +(\S+) +(\S+)", output).groups()
    )
    [stack] = re.findall(r"stack, at most +(\S+)", output)
    assert ram <= told_ram - int(stack.replace(",", "")) + 3 * KB  # printf's own in this C library
    assert told_ram <= ram + 8 * KB
    assert flash <= told_flash <= flash + 24 * KB


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("preset", ["microgpt", "flashmicrogpt", "transformerlm"])
def test_the_stack_is_bounded(name, preset, tmp_path):
    """By the compiler's account of frames and calls: of known size, in no circle, none to an allocator."""
    chip = CHIPS[name]
    needs(chip.compiler)
    folder = export(preset, out=tmp_path / "program")
    frames: dict[str, int] = {}
    calls: dict[str, set[str]] = {}
    for source in sorted(folder.glob("*.c")):
        chip.compile(tmp_path / f"{source.stem}.o", [source], "-std=c99", "-c", "-fcallgraph-info=su")
        text = (tmp_path / f"{source.stem}.ci").read_text()
        for title, size, kind in re.findall(r'title: "([^"]+)" label: "[^"]*?(\d+) bytes \((\w+)\)', text):
            frames[title] = int(size)
            assert kind == "static"
        for caller, callee in re.findall(r'sourcename: "([^"]+)" targetname: "([^"]+)"', text):
            calls.setdefault(caller, set()).add(callee)

    def deepest(function: str, path: tuple[str, ...] = ()) -> int:
        assert function not in path, f"{path} calls itself"
        path = (*path, function)
        return frames.get(function, 0) + max(
            (deepest(callee, path) for callee in calls.get(function, ())), default=0
        )

    assert {"main", "tl_train", "tl_step", "tl_linear_backward"} <= frames.keys()
    assert deepest("main") <= 512
    foreign = set.union(*calls.values()) - frames.keys()
    library = {
        name for name in foreign if not name.startswith("__")
    }  # what does without hardware is the compiler's
    compilers, mains = {"memset", "memcpy", "memmove"}, {"printf", "puts", "strchr"}
    assert library - compilers - mains <= {"expf", "logf", "sqrtf", "sinf", "cosf"}


@pytest.mark.parametrize("preset", PRESETS)
def test_xtensa_compiles_it(preset, tmp_path):
    """The instruction set of the ESP family, in the variant that Debian has a compiler for."""
    compiler = "xtensa-lx106-elf-gcc"
    needs(compiler)
    folder = export(preset, out=tmp_path / "program")
    headers = ("-isystem", "/usr/lib/xtensa-lx106-elf/include")
    sources = sorted(folder.glob("tapeless_*.c"))
    output = run(compiler, *STRICT, *headers, "-c", *sources, cwd=tmp_path)
    assert output == ""
    table = run("xtensa-lx106-elf-size", *(tmp_path / f"{s.stem}.o" for s in sources), cwd=tmp_path)
    sizes = [[int(n) for n in line.split()[:3]] for line in table.splitlines()[1:]]
    assert sum(data + bss for _, data, bss in sizes) <= 96 * KB


def test_the_benchmark_counts_instructions(tmp_path):
    needs("riscv64-unknown-elf-gcc", "qemu-system-riscv32")
    benchmark = Path(__file__).parents[1] / "benchmarks" / "firmware.py"
    output = run(sys.executable, benchmark, "microgpt", "--steps", 20, cwd=tmp_path)
    counts = {
        name: int(n.replace(",", "")) for name, n in re.findall(r"^  (\w+) +([\d,]+) ", output, re.MULTILINE)
    }
    whole = counts.pop("all")
    assert 0.95 * whole < sum(counts.values()) < 1.02 * whole
    assert max(counts, key=counts.get) == "tl_linear_backward"
