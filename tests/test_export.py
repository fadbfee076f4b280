"""`tapeless export`: programs in C that train and generate as this machine does, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tapeless as tl
from commands import contents, refused, succeeds, tapeless
from firmware import STRICT, export, needs, run
from tapeless.data.tokenizers import CharTokenizer
from tapeless.errors import ConfigError
from tapeless.export import budget
from tapeless.export.int8 import quantise
from tapeless.settings import parse_setting

EACH = "-DTL_LOG_EVERY=1"


def build(folder: Path, *flags: str, compiler: str = "gcc") -> str:
    """Compile the program for this machine, and give what it prints."""
    needs(compiler)
    sources = sorted(folder.glob("*.c"))
    program = folder / "program"
    run(compiler, *STRICT, *flags, *sources, "-lm", "-o", program, cwd=folder)
    return run(program, cwd=folder)


def told(output: str) -> tuple[np.ndarray, list[str]]:
    """The losses and texts that a program printed."""
    found = re.findall(r"^step (\d+)/(\d+): loss = (\S+)$", output, re.MULTILINE)
    assert [int(step) for step, _, _ in found] == list(range(1, len(found) + 1))
    lines = [line for line in output.splitlines() if not re.match(r"step \d+/", line)]
    return np.array([float(loss) for _, _, loss in found]), lines


def trained(preset: str, steps: int, pairs: tuple[str, ...] = (), data: Any = "names") -> Any:
    """The same by the reference engine in float32."""
    values = {k: parse_setting(k, v) for k, v in (pair.split("=") for pair in pairs)}
    return tl.train(
        data, preset=preset, steps=steps, set=values, engine="reference", dtype="float32", progress=False
    )


# One of each choice at least that C knows, alone and together.
VARIANTS = {
    "microgpt": ("microgpt",),
    "esp32gpt": ("esp32gpt",),
    "esp32gpt-rms": ("esp32gpt-rms",),
    "flashmicrogpt": ("flashmicrogpt",),
    "transformerlm": ("transformerlm", "n_embd=16", "batch_size=3", "warmup_steps=5"),
    "layers, gains, final norm, biases": (
        "microgpt", "n_layer=3", "norm_gain=true", "norm_final=true", "bias=true", "n_embd=12", "n_head=3",
    ),
    "mhc and an embedding norm": ("flashmicrogpt", "norm_embed=true", "n_layer=2", "attention=full"),
    "tied, gelu, flash": ("microgpt", "tied=true", "activation=gelu", "attention=flash", "attention_tile=3"),
    "recompute": ("microgpt", "recompute=true", "n_layer=2"),
    "sgd": ("esp32gpt", "optimiser=sgd", "momentum=0.9", "lr=0.05"),
    "sgd without momentum": ("esp32gpt", "optimiser=sgd", "lr=0.5", "grad_clip=1"),
    "adamw, clipping, cosine, batches": (
        "microgpt", "optimiser=adamw", "weight_decay=0.1", "grad_clip=0.5", "schedule=cosine", "min_lr=0.001",
        "warmup_steps=3", "batch_size=4", "bias=true", "norm_gain=true",
    ),
    "constant rate, drawn, long documents cut": (
        "microgpt", "schedule=constant", "order=draw", "block_size=6",
    ),
    "shuffled by xorshift": ("esp32gpt", "order=shuffle", "block_size=5"),
    "the likeliest letters": ("microgpt", "temperature=0"),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_program_trains_and_generates_as_the_reference_does(variant, tmp_path):
    preset, *pairs = VARIANTS[variant]
    steps = 25
    sets = [word for pair in pairs for word in ("--set", pair)]
    folder = export(preset, "--steps", steps, *sets, out=tmp_path / "program")
    losses, texts = told(build(folder, EACH))
    expected = trained(preset, steps, tuple(pairs))
    np.testing.assert_allclose(losses, expected.losses, atol=1e-4)
    assert texts == expected.samples


def test_other_compilers_flags_and_sanitizers_find_nothing(tmp_path):
    folder = export("flashmicrogpt", "--steps", 15, out=tmp_path / "program")
    expected = told(build(folder, EACH))
    needs("clang")
    for compiler, *flags in (
        ("clang", EACH, "-O1"),
        (
            "clang",
            EACH,
            "-g",
            "-fsanitize=address,undefined,float-divide-by-zero",
            "-fno-sanitize-recover=all",
        ),
        ("gcc", EACH, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    ):
        losses, texts = told(build(folder, *flags, compiler=compiler))
        np.testing.assert_allclose(losses, expected[0], atol=1e-4)
        assert texts == expected[1]


def test_the_exported_makefile_builds_and_runs(tmp_path):
    needs("make", "cc")
    folder = export("microgpt", "--steps", 200, out=tmp_path / "program")
    output = run("make", "--no-print-directory", "run", cwd=folder)
    losses = re.findall(r"^step (\d+)/200: loss = (\d\.\d{6})$", output, re.MULTILINE)
    assert [int(step) for step, _ in losses] == [1, 100, 200]
    assert "warning" not in output
    expected = trained("microgpt", 200)
    assert float(losses[-1][1]) == pytest.approx(expected.losses[-1], abs=1e-4)
    assert output.splitlines()[-20:] == expected.samples


# ---------------------------------------------------------------- trained models


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "letters"
    succeeds("train", "--engine", "reference", "--steps", 60, "--out", folder, cwd=folder.parent)
    return folder


def test_a_run_generates_what_sample_does(trained_run, tmp_path):
    _, texts = told(build(export(trained_run, out=tmp_path / "program")))
    sampled = succeeds("sample", trained_run, "--engine", "reference", cwd=tmp_path).stdout
    assert texts == sampled.splitlines()


def test_settings_and_seed_of_texts_can_be_changed(trained_run, tmp_path):
    arguments = ("--set", "temperature=1.1", "--set", "max_tokens=5", "--seed", 7)
    _, texts = told(build(export(trained_run, *arguments, out=tmp_path / "program")))
    arguments = ("--temperature", 1.1, "--max-tokens", 5, "--seed", 7, "--engine", "reference")
    assert texts == succeeds("sample", trained_run, *arguments, cwd=tmp_path).stdout.splitlines()


def test_a_run_can_be_trained_further(trained_run, tmp_path):
    folder = export(trained_run, "--mode", "both", "--steps", 12, out=tmp_path / "program")
    losses, texts = told(build(folder, EACH))
    expected = tl.train(
        "names",
        pretrained=trained_run,
        steps=12,
        engine="reference",
        dtype="float32",
        set={"val_fraction": 0},  # a chip does not validate
        progress=False,
    )
    np.testing.assert_allclose(losses, expected.losses, atol=1e-4)
    assert texts == expected.samples


def test_a_program_may_only_train(tmp_path):
    folder = export("microgpt", "--mode", "train", "--steps", 5, out=tmp_path / "program")
    losses, texts = told(build(folder, EACH))
    assert (len(losses), texts) == (5, [])
    assert "tl_decode" not in (folder / "tapeless_model.c").read_text()


def test_int8_weights_are_a_quarter_and_their_cost_is_told(trained_run, tmp_path):
    folder = tmp_path / "program"
    result = succeeds("export", trained_run, "--weights", "int8", "--out", folder, cwd=tmp_path)
    [told_] = [line for line in result.stderr.splitlines() if line.startswith("int8 weights: ")]
    small, large, after, before = re.fullmatch(
        r"int8 weights: ([\d,]+) bytes in place of ([\d,]+); loss on names (\S+) in place of (\S+)", told_
    ).groups()
    assert int(large.replace(",", "")) == 4 * 4192
    assert int(small.replace(",", "")) < 0.3 * 4 * 4192  # a quarter, and a scale for each row of 16
    evaluated = succeeds("eval", trained_run, "names", "--engine", "reference", cwd=tmp_path).stdout
    assert float(before) == pytest.approx(float(re.search(r"loss +(\S+)", evaluated)[1]), abs=1e-4)
    assert 0 < abs(float(after) - float(before)) < 0.01
    assert "static const float tl_weights[" not in (folder / "tapeless_model.c").read_text()
    _, texts = told(build(folder))
    assert texts == _of_rounded(trained_run)


def _of_rounded(folder: Path) -> list[str]:
    """Texts of the run's model with each row of its matrices rounded to 255 steps, here and by other code."""
    model = tl.load(folder, "reference", dtype="float32")
    for name in {"wte", "wpe", "wqkv", "wo", "w1", "w2", "head"} & model.params.keys():
        w = model.params[name]
        scale = np.abs(w).max(axis=-1, keepdims=True) / 127
        w[...] = np.rint(w / scale) * scale
    return model.generate(n=20, temperature=0.5, seed=42)


@pytest.mark.parametrize(
    ("preset", "pairs"),
    [
        ("microgpt", ("tied=true", "bias=true", "norm_gain=true", "n_layer=2")),
        ("flashmicrogpt", ("bias=true", "activation=gelu", "norm_final=true")),
    ],
)
def test_other_models_generate_in_int8(preset, pairs, tmp_path):
    folder, sets = tmp_path / "run", [word for pair in pairs for word in ("--set", pair)]
    arguments = ("--preset", preset, "--engine", "reference", "--steps", 40)
    succeeds("train", *arguments, *sets, "--out", folder, cwd=tmp_path)
    program = export(folder, "--weights", "int8", out=tmp_path / "program")
    _, texts = told(build(program))
    assert texts == _of_rounded(folder)
    head = "tl_tied_head_int8(" if "tied=true" in pairs else "tl_linear_int8(c_logits"
    assert head in (program / "tapeless_model.c").read_text()


def test_int8_of_zeros_and_of_the_smallest_numbers():
    """A scale without digits, times 127, may be less than its weight, which keeps its sign all the same."""
    config = tl.presets["microgpt"].model.replace(vocab_size=27)
    smallest = np.float32(2.0**-149)
    for largest in (0, 1, 60, 130, 180, 1000):
        weights = np.full(4192, -largest * smallest, np.float32)
        off = np.abs(quantise(config, weights).rounded - weights).max()
        assert off <= largest * smallest, largest


# ---------------------------------------------------------------- what is refused


def test_ops_without_a_c_version_are_named(tmp_path):
    line = refused("export", "shakespeare-char", "--out", "p", cwd=tmp_path)
    assert "layernorm_backward, layernorm_forward: no C version yet" in line
    line = refused("export", "flashmicrogpt", "--set", "n_streams=3", "--out", "p", cwd=tmp_path)
    assert "sinkhorn_backward, sinkhorn_forward: no C version yet" in line
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("microgpt",), "--out DIR is required"),
        (("microgp", "--out", "p"), "no run folder or model 'microgp'"),
        (("microgpt", "--to", "idf", "--out", "p"), "Expected one of: c, esp-idf, arduino, wasm."),
        (("microgpt", "--mode", "generate", "--out", "p"), "needs a trained model"),
        (("microgpt", "--mode", "sample", "--out", "p"), "mode cannot be 'sample'"),
        (("microgpt", "--weights", "int8", "--mode", "train", "--out", "p"), "weights are inference-only"),
        (("microgpt", "--weights", "int4", "--out", "p"), "weights cannot be 'int4'"),
        (("microgpt", "--target", "esp8266", "--out", "p"), "no target is called 'esp8266'"),
        (("microgpt", "--set", "order=windows", "--out", "p"), "documents, not on order=windows"),
        (("microgpt", "--seed", "4294967296", "--out", "p"), "seed must be"),
        (("microgpt", "--data", "none.txt", "--out", "p"), "no data file"),
        (("transformerlm", "--set", "order=draw", "--out", "p"), "order=draw needs another random generator"),
        (("transformerlm", "--to", "esp-idf", "--out", "p"), "bytes of RAM, and a program may have"),
        (("microgpt", "--draw", "m.png"), "a drawing is an .svg file, not m.png"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_in_one_line(arguments, message, tmp_path):
    assert message in refused("export", *arguments, cwd=tmp_path)
    assert contents(tmp_path) == {}


def test_settings_that_change_nothing_are_refused(trained_run, tmp_path):
    line = refused("export", trained_run, "--steps", 10, "--out", "p", cwd=tmp_path)
    assert "steps cannot be changed in a trained model" in line
    line = refused("export", trained_run, "--data", "names", "--out", "p", cwd=tmp_path)
    assert "mode=generate reads no data" in line


def test_a_folder_that_is_there_is_kept(tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert "already exists" in refused("export", "microgpt", "--out", folder, cwd=tmp_path)
    succeeds("export", "microgpt", "--out", folder, "--overwrite", cwd=tmp_path)
    assert (folder / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("export", "microgpt", "--out", "file", cwd=tmp_path)


# ---------------------------------------------------------------- budget, trace, drawing


def test_the_budget_of_a_chip_is_that_of_the_program(tmp_path):
    result = succeeds("budget", "microgpt", "--target", "esp32", cwd=tmp_path)
    rows = {line[:24].strip(): line.split() for line in result.stdout.splitlines()}
    assert rows["parameters"][1] == rows["gradients"][1] == "16,768"
    folder = export("microgpt", out=tmp_path / "program")
    static = int(re.search(r"static float ram\[(\d+)\]", (folder / "tapeless_model.c").read_text())[1])
    parts = ("parameters", "gradients", "Adam's moments", "working memory")
    numbers = [
        int(re.search(r"\d+,\d+", result.stdout[result.stdout.index(part) :])[0].replace(",", ""))
        for part in parts
    ]
    assert sum(numbers) == 4 * static
    assert "Fits." in result.stdout


def test_a_budget_that_is_too_small_is_told(tmp_path):
    result = tapeless("budget", "transformerlm", "--target", "stm32f4", cwd=tmp_path)
    assert result.returncode == 1
    assert "Does not fit." in result.stdout
    assert "no target is called 'esp'. Did you mean 'esp32'?" in refused(
        "budget", "microgpt", "--target", "esp", cwd=tmp_path
    )
    assert "give --target" in refused("budget", "microgpt", "--mode", "train", cwd=tmp_path)


def test_the_trace_is_shown_and_drawn(tmp_path):
    shown = succeeds("export", "microgpt", "--show", cwd=tmp_path).stdout
    assert len(re.findall(r"^  linear_backward\(", shown, re.MULTILINE)) == 5
    assert contents(tmp_path) == {}
    succeeds("export", "microgpt", "--draw", "memory.svg", cwd=tmp_path)
    svg = (tmp_path / "memory.svg").read_text()
    assert svg.startswith("<svg ")
    assert "a.qkv[0]: 3,072 bytes" in svg


# ---------------------------------------------------------------- what was found by trying


def test_a_beta_near_one_keeps_its_digits(tmp_path):
    """1 − 0.9999 has few digits in float32: kept as it is, not as β."""
    pairs = ("beta2=0.9999", "beta1=0.95")
    sets = [word for pair in pairs for word in ("--set", pair)]
    folder = export("microgpt", "--steps", 150, "--mode", "train", *sets, out=tmp_path / "program")
    losses, _ = told(build(folder, EACH))
    np.testing.assert_allclose(losses, trained("microgpt", 150, pairs).losses, atol=1e-5)


def test_a_tiny_epsilon_divides_nothing_by_zero(tmp_path):
    folder = export("microgpt", "--steps", 10, "--set", "eps=1e-30", out=tmp_path / "program")
    losses, _ = told(build(folder, EACH))
    assert np.isfinite(losses).all()


def test_a_loss_that_is_no_number_ends_the_program(tmp_path):
    folder = export("esp32gpt", "--set", "lr=999999", out=tmp_path / "program")
    program = folder / "program"
    needs("gcc")
    run("gcc", *STRICT, *sorted(folder.glob("*.c")), "-lm", "-o", program, cwd=folder)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith("loss is NaN or infinite at step ")


def test_texts_of_several_lines_have_a_line_between(tmp_path):
    config = tl.presets["microgpt"].model.replace(vocab_size=3)
    tl.GPT(config, seed=1, tokenizer=CharTokenizer("\nab", None, False)).save(tmp_path / "run")
    output = build(
        export(tmp_path / "run", "--set", "samples=5", "--set", "max_tokens=30", out=tmp_path / "program")
    )
    arguments = ("-n", 5, "--temperature", 0.8, "--max-tokens", 30, "--engine", "reference")
    assert output == succeeds("sample", tmp_path / "run", *arguments, cwd=tmp_path).stdout
    assert output.count("---\n") == 4


@pytest.mark.parametrize(
    "sets",
    [("max_tokens=3000",), ("batch_size=300",), ("optimiser=sgd", "momentum=0.9"), ("optimiser=sgd",)],
)
def test_the_budget_is_static_ram_to_the_byte(sets, tmp_path):
    needs("gcc", "size")
    words = [word for pair in sets for word in ("--set", pair)]
    folder = export("microgpt", *words, out=tmp_path / "program")
    objects = []
    for source in sorted(folder.glob("tapeless_*.c")):
        objects.append(tmp_path / f"{source.stem}.o")
        run("gcc", "-std=c99", "-O2", "-c", source, "-o", objects[-1], cwd=tmp_path)
    table = run("size", "-A", *objects, cwd=tmp_path)
    static = sum(int(n) for n in re.findall(r"^\.(?:data|bss)\s+(\d+)", table, re.MULTILINE))
    output = tapeless("budget", "microgpt", "--target", "esp32", *words, cwd=tmp_path).stdout
    ram, stack = (
        int(re.search(rf"{what} +([\d,]+)", output)[1].replace(",", ""))
        for what in ("total", "stack, at most")
    )
    assert abs(ram - stack - static) <= 64  # the gaps between variables are the linker's
    if sets == ("optimiser=sgd",):
        assert ram == 60_853  # with the stack: in 64 KB


def test_another_project_in_its_place_leaves_nothing_of_the_first(trained_run, tmp_path):
    folder = export("microgpt", "--to", "esp-idf", out=tmp_path / "project")
    (folder / "main" / "mine.c").write_text("")
    succeeds("export", trained_run, "--to", "arduino", "--out", folder, "--overwrite", cwd=tmp_path)
    alone = contents(export(trained_run, "--to", "arduino", out=tmp_path / "alone"))
    assert contents(folder).keys() - {"main/mine.c"} == {n.replace("alone.ino", "project.ino") for n in alone}


def test_a_damaged_list_of_files_takes_nothing_else_away(tmp_path):
    folder = export("microgpt", "--steps", 5, out=tmp_path / "program")
    (tmp_path / "mine.txt").write_text("mine")
    (folder / ".tapeless-export").write_text(f"../mine.txt\n{tmp_path / 'mine.txt'}\n\n.\n")
    succeeds("export", "microgpt", "--steps", 5, "--out", folder, "--overwrite", cwd=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("training", ['{"foo": 1}', "null", "[]", '{"steps": -1}'])
def test_a_damaged_run_is_refused(trained_run, training, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    about = json.loads((folder / "config.json").read_text())
    about["training"] = json.loads(training)
    (folder / "config.json").write_text(json.dumps(about))
    line = refused("export", folder, "--out", "p", cwd=tmp_path)
    assert "does not describe a training run" in line


def test_counts_that_a_chip_cannot_hold_are_refused(tmp_path):
    line = refused("export", "microgpt", "--steps", 3_000_000_000, "--out", "p", cwd=tmp_path)
    assert "steps × batch_size must be below 2,147,483,647 on a chip" in line


@pytest.mark.parametrize("name", budget.CHIPS)
@pytest.mark.parametrize("kind", ["ram", "flash"])
def test_a_chip_may_be_filled_to_its_last_byte(name, kind):
    most = getattr(budget.CHIPS[name], kind)
    rows = [budget.Row("parameters", 0, 0)._replace(**{kind: most - 8}), budget.Row("documents", 4, 8)]
    if kind == "ram":
        rows.append(budget.Row("documents", 4, 0))
    budget.check(rows, name)
    with pytest.raises(ConfigError, match=f"needs {most + 1:,} bytes .*most are parameters"):
        budget.check([*rows, budget.Row("tokenizer", 0, 0)._replace(**{kind: 1})], name)


def test_options_that_would_do_nothing_are_refused(trained_run, tmp_path):
    options = (("--out", "p"), ("--to", "c"), ("--mode", "train"), ("--target", "esp32"), ("--seed", 1))
    for option in (*options, ("--weights", "int8"), ("--overwrite",)):
        assert "leave --" in refused("export", "microgpt", "--show", *option, cwd=tmp_path)
    assert "n_embd" in refused("export", trained_run, "--show", "--set", "n_embd=32", cwd=tmp_path)
    assert "no threads" in refused("budget", "microgpt", "--target", "esp32", "--threads", 2, cwd=tmp_path)
    line = refused("export", "microgpt", "--to", "esp-idf", "--target", "stm32f4", "--out", "p", cwd=tmp_path)
    assert "stm32f4 is not a chip of ESP-IDF's: choose --to arduino, --to c or" in line


def test_a_run_is_called_by_its_folder_from_inside_too(trained_run, tmp_path):
    succeeds("export", ".", "--out", tmp_path / "program", cwd=trained_run)
    assert '#define TL_NAME "letters"' in (tmp_path / "program" / "tapeless_model.h").read_text()


def test_a_budget_may_be_of_int8_weights(trained_run, tmp_path):
    output = succeeds("budget", trained_run, "--target", "esp32", "--weights", "int8", cwd=tmp_path).stdout
    assert re.search(r"weights +4,876 +int8", output)
