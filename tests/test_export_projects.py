"""Projects for boards, as `tapeless export` writes them: compiled against stand-ins of the boards' headers
(tests/stand_ins), and run. All else in them is the very files that go onto a board."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commands import contents, refused, succeeds
from firmware import STRICT, export, needs, run
from tapeless.errors import ConfigError
from tapeless.export.export import export as export_model

STAND_INS = Path(__file__).parent / "stand_ins"
C_FILES = [f"tapeless_{name}.c" for name in ("run", "model", "data", "ops")]
MB = 2**20

# What a comment, a string, a format or a trigraph of C would be hurt by, and what is no ASCII
NASTY = ['a"b', "it's", "back\\slash\\", "c*/d", "what??/", "/*x", "//y", "%s%d", "🙂ok", "שלום", "é\t!"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of few steps, in a folder whose name no C compiler and no shell should meet unguarded."""
    folder = tmp_path_factory.mktemp("models") / "odd */ folder" / 'it\'s a "model" *\\??'
    arguments = ("--engine", "reference", "--steps", 20)
    succeeds("train", *arguments, "--out", folder, cwd=folder.parents[2])
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ESP-IDF project that trains and generates."""
    out = tmp_path_factory.mktemp("esp_idf") / "project"
    return export("microgpt", "--to", "esp-idf", "--steps", 700, out=out)


@pytest.fixture(scope="module")
def sketch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Arduino sketch that trains and generates."""
    out = tmp_path_factory.mktemp("arduino") / "names_2.0-a"
    return export("microgpt", "--to", "arduino", "--steps", 700, out=out)


def on_the_host(project: Path) -> list[str]:
    """The lines that a project's own program for this machine prints."""
    run("make", "-s", cwd=project / "host")
    return run("./tapeless", cwd=project / "host").splitlines()


def on_a_chip(project: Path, compiler: str = "gcc") -> list[str]:
    """What the ESP-IDF project logs."""
    needs(compiler)
    idf = STAND_INS / "esp_idf"
    sources = [*(f"main/{name}" for name in ("main.c", *C_FILES)), idf / "chip.c"]
    run(compiler, *STRICT, "-I", idf, "-I", "main", *sources, "-o", "chip", "-lm", cwd=project)
    lines = run("./chip", cwd=project).splitlines()
    assert all(re.match(r"I \(\d+\) tapeless: ", line) for line in lines)
    return [line.partition(" tapeless: ")[2] for line in lines]


def on_a_board(sketch: Path, board: str = "ESP32", compiler: tuple[str, str] = ("gcc", "g++")) -> list[str]:
    """What the Arduino sketch prints."""
    needs(*compiler)
    include = ("-I", STAND_INS / "arduino", "-I", STAND_INS / "esp_idf", "-I", ".")
    run(compiler[0], *STRICT, *include, "-c", *C_FILES, cwd=sketch)
    run(compiler[1], *("-std=c++17" if word == "-std=c99" else word for word in STRICT), *include,
        f"-DARDUINO_ARCH_{board}", "-x", "c++", f"{sketch.name}.ino", STAND_INS / "arduino" / "board.cpp",
        "-x", "none", *(name.replace(".c", ".o") for name in C_FILES), "-o", "board", "-lm",
        cwd=sketch)  # fmt: skip
    return run("./board", cwd=sketch).splitlines()


# ------------------------------------------------------------ what they do


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_chip_does_what_the_host_program_does(compiler: str, project: Path) -> None:
    first, *lines = on_a_chip(project, compiler)
    host = on_the_host(project)
    assert first == "microgpt: 4192 parameters, seed 42"
    assert [line for line in lines if line.startswith("step ")] == host[:8]
    assert host[0].startswith("step 1/700: loss = 3.3961")
    assert host[7].startswith("step 700/700: loss = ")
    assert lines[8] == "trained 700 steps"
    assert lines[9:] == host[8:]
    assert len(lines[9:]) == 20


@pytest.mark.parametrize(
    ("board", "c", "cpp"), [("ESP32", "gcc", "g++"), ("RP2040", "clang", "clang++")], ids=["gcc", "clang"]
)
def test_a_sketch_does_what_the_host_program_does(board: str, c: str, cpp: str, sketch: Path) -> None:
    first, *lines = on_a_board(sketch, board, (c, cpp))
    host = on_the_host(sketch)
    assert first == "microgpt: 4192 parameters, seed 42"
    assert lines[:8] == host[:8]
    assert lines[8] == "trained 700 steps"
    assert lines[9:] == host[8:]
    assert len(lines[9:]) == 20


def test_a_board_without_a_random_generator_takes_noise(sketch: Path) -> None:
    first, *lines = on_a_board(sketch, "STM32")
    seed = int(first.removeprefix("microgpt: 4192 parameters, seed "))
    assert seed not in (0, 42)
    host = on_the_host(sketch)
    parts = [line.partition(" = ") for line in lines[:8]]
    assert [part[0] for part in parts] == [line.partition(" = ")[0] for line in host[:8]]
    assert all(0.5 < float(part[2]) < 5 for part in parts)
    assert lines[0] != host[0]
    assert len(lines) == 9 + 20


@pytest.mark.parametrize("mode", ["train", "generate", "both"])
def test_modes_of_a_model_with_a_nasty_name(mode: str, trained: Path, tmp_path: Path) -> None:
    more = () if mode == "generate" else ("--steps", 30, "--set", "samples=20")
    losses, texts = (0 if mode == "generate" else 1), (0 if mode == "train" else 20)
    for to, there in (("esp-idf", on_a_chip), ("arduino", on_a_board)):
        project = export(trained, "--to", to, "--mode", mode, *more, out=tmp_path / to)
        first, *lines = there(project)
        host = on_the_host(project)
        assert re.fullmatch(r"it_s a _model_ ____: 4192 parameters, seed 42", first)
        assert len(host) == losses + texts
        assert lines[:losses] == host[:losses]
        if losses:
            assert lines[losses] == "trained 30 steps"
        assert lines[len(lines) - texts :] == host[losses:]
        assert len(lines) == 2 * losses + texts


def test_a_nasty_name_in_plain_c(trained: Path, tmp_path: Path) -> None:
    project = export(trained, out=tmp_path / "c")
    texts = run("make", "-s", "run", "CFLAGS=-O2 -Werror", cwd=project).splitlines()
    sampled = succeeds("sample", trained, "-n", 20, "--engine", "reference", cwd=tmp_path)
    assert texts == sampled.stdout.splitlines()


@pytest.mark.parametrize("mode", ["both", "generate"])
def test_texts_of_nasty_characters(mode: str, tmp_path: Path) -> None:
    data, out = tmp_path / "nasty.txt", tmp_path / "run"
    data.write_text("\n".join(NASTY), encoding="utf-8")
    arguments = ("--engine", "reference", "--dtype", "float32", "--steps", 60, "--out", out)
    trained = succeeds("train", data, *arguments, cwd=tmp_path)
    if mode == "both":
        program = export("microgpt", "--data", data, "--steps", 60, out=tmp_path / "c")
        expected = (out / "samples.txt").read_text(encoding="utf-8").splitlines()
        assert trained.stdout.splitlines() == expected
    else:
        program = export(out, out=tmp_path / "c")
        sampled = succeeds("sample", out, "-n", 20, "--engine", "reference", cwd=tmp_path)
        expected = sampled.stdout.splitlines()
    printed = run("make", "-s", "run", "CFLAGS=-O2 -Werror", cwd=program).splitlines()
    assert printed[1 if mode == "both" else 0 :] == expected
    assert len(expected) == 20
    assert set("".join(expected)) > set("*/ש")


def test_a_chip_s_numbers_are_of_other_types(project: Path, tmp_path: Path) -> None:
    """On 32 bits uint32_t is a long: a format for int would be wrong there, and the host would not see it."""
    needs("arm-none-eabi-gcc")
    specs = ("--specs=picolibc.specs", "-mcpu=cortex-m4", "-mthumb", "-fsyntax-only")
    command = ("arm-none-eabi-gcc", *specs, *STRICT, "-I", STAND_INS / "esp_idf", "-I", "main")
    run(*command, "main/main.c", cwd=project)
    # The stand-in does see a wrong one.
    wrong = (project / "main" / "main.c").read_text().replace("PRIu32", '"d"')
    (tmp_path / "wrong.c").write_text(wrong)
    with pytest.raises(AssertionError, match="-Werror=format"):
        run(*command, tmp_path / "wrong.c", cwd=project)


@pytest.mark.parametrize("source", ["microgpt", "esp32gpt", "transformerlm"])
def test_nothing_is_left_unused_by_a_model_that_only_trains(source: str, tmp_path: Path) -> None:
    """Of each generator of random numbers."""
    project = export(source, "--mode", "train", "--steps", 2, out=tmp_path / "c")
    assert len(run("make", "-s", "run", "CFLAGS=-O1 -Werror", cwd=project).splitlines()) == 1


# ------------------------------------------------------------ what ESP-IDF reads


def settings(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    rows = [line.partition("=") for line in lines if line and not line.startswith("#")]
    assert all(key.startswith("CONFIG_") and value for key, _, value in rows)
    return {key.removeprefix("CONFIG_"): value for key, _, value in rows}


def test_settings_of_esp_idf(project: Path) -> None:
    assert settings(project / "sdkconfig.defaults") == {
        "ESP_MAIN_TASK_AFFINITY_CPU1": "y",
        "ESP_TASK_WDT_CHECK_IDLE_TASK_CPU1": "n",
        "ESP_MAIN_TASK_STACK_SIZE": "32768",
        "COMPILER_OPTIMIZATION_PERF": "y",
        "LOG_DEFAULT_LEVEL_INFO": "y",
        "ESPTOOLPY_FLASHSIZE_4MB": "y",
        "PARTITION_TABLE_CUSTOM": "y",
        "PARTITION_TABLE_CUSTOM_FILENAME": '"partitions.csv"',
        "BT_ENABLED": "n",
    }
    assert settings(project / "sdkconfig.defaults.esp32c3") == {
        "ESP_MAIN_TASK_AFFINITY_CPU0": "y",
        "ESP_TASK_WDT_CHECK_IDLE_TASK_CPU0": "n",
    }
    for chip in ("esp32", "esp32s3"):
        assert settings(project / f"sdkconfig.defaults.{chip}") == {"ESP_DEFAULT_CPU_FREQ_MHZ_240": "y"}


def test_partitions(project: Path) -> None:
    lines = (project / "partitions.csv").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if not line.startswith("#")]
    assert [row[:3] for row in rows] == [
        ["nvs", "data", "nvs"], ["phy_init", "data", "phy"], ["factory", "app", "factory"]
    ]  # fmt: skip
    places = [(int(row[3], 16), int(row[4], 16)) for row in rows]
    end = 0x8000 + 0x1000  # the table's own place
    for (offset, size), row in zip(places, rows, strict=True):
        assert offset >= end
        assert offset % (0x10000 if row[1] == "app" else 0x1000) == 0
        assert size % 0x1000 == 0
        end = offset + size
    assert end == 4 * MB


def test_files_of_the_build(project: Path) -> None:
    build = (project / "main" / "CMakeLists.txt").read_text()
    assert set(re.findall(r'"(\w+\.c)"', build)) == {p.name for p in (project / "main").glob("*.c")}
    options = re.search(r"target_compile_options\(\$\{COMPONENT_LIB\} PRIVATE (.*)\)", build)
    assert options is not None
    makefile = (project / "host" / "Makefile").read_text()
    assert options[1].split() == ["-O2", "-fno-math-errno", "-ffp-contract=fast"]
    assert all(option in makefile for option in options[1].split())
    top = (project / "CMakeLists.txt").read_text()
    parts = ["include($ENV{IDF_PATH}/tools/cmake/project.cmake)", "set(COMPONENTS main)", "project(tapeless)"]
    assert sorted(parts, key=top.index) == parts


# ------------------------------------------------------------ names and READMEs


def test_a_sketch_whose_folder_has_no_sketch_s_name(tmp_path: Path) -> None:
    error = refused("export", "microgpt", "--to", "arduino", "--out", "my sketch", cwd=tmp_path)
    assert "cannot be 'my sketch'" in error
    for name in (".hidden", "-dash", "ends.", "naïve", "a'b", "two\nlines", "a" * 64):
        with pytest.raises(ConfigError, match=re.escape(f"cannot be {name!r}")):
            export_model("microgpt", "arduino", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_sketch_is_called_like_its_folder(sketch: Path, tmp_path: Path) -> None:
    assert [path.name for path in sketch.glob("*.ino")] == ["names_2.0-a.ino"]
    for name in ("_", "0", "a" * 63):
        export_model("microgpt", "arduino", tmp_path / name)
        assert [path.stem for path in (tmp_path / name).glob("*.ino")] == [name]
    export_model("microgpt", "c", tmp_path / "my program")


@pytest.mark.parametrize("mode", ["train", "both"])
@pytest.mark.parametrize("to", ["c", "esp-idf", "arduino"])
def test_readme(to: str, mode: str, tmp_path: Path) -> None:
    said: list[str] = []
    export_model("microgpt", to, tmp_path / "project", mode=mode, say=said.append)
    files = contents(tmp_path / "project")
    assert [name for name in files if name.endswith(".md")] == ["README.md"]
    text = files["README.md"].decode()
    assert not re.search(r"\n\n\n|[{}]{2}|{%|\|\n\n\|", text)
    sizes = re.search(r"([\d,]+) bytes of RAM, ([\d,]+) of flash", said[0])
    assert sizes is not None
    assert f"| **together** | {sizes[1]} | {sizes[2]} | |" in text
    for cell in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        for name in re.findall(r"`([^.`].*?)`", cell):
            assert any(file == name or file.startswith(name) for file in files), name
    assert ("tl_generate" in text or "text twice" in text) == (mode == "both")


def test_what_the_readme_of_a_c_program_says_to_do(tmp_path: Path) -> None:
    project = export("microgpt", out=tmp_path / "c")
    text = (project / "README.md").read_text()
    command = re.search(r"`(make clean run .*?)`", text)
    assert command is not None
    printed = run("sh", "-c", command[1], cwd=project)
    assert "step 200/200: loss = " in printed
    example = re.search(r"```c\n(.*?)```", text, re.DOTALL)
    assert example is not None
    includes, _, body = example[1].partition("\n\n")
    (project / "other.c").write_text(
        f"""
        #include <stdio.h>
        {includes}
        int main(void)
        {{
            unsigned seed = TL_SEED;
            float loss = 0;
            const char *text;
            {body}
            printf("%f %s\\n", (double)loss, text);
            return 0;
        }}
        """
    )
    run("gcc", *STRICT, "other.c", *C_FILES, "-o", "other", "-lm", cwd=project)
    loss, _, name = run("./other", cwd=project).rstrip("\n").partition(" ")
    host = run("make", "-s", "clean", "run", cwd=project).splitlines()
    assert host[10] == f"step 1000/1000: loss = {loss}"
    assert host[11] == name
