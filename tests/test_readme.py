"""The README's examples run as they stand, in a fresh clone."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from commands import succeeds
from tapeless.bench.cases import CASES
from tapeless.cli import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `tapeless` command of a page, as they are typed."""
    text = page.read_text(encoding="utf-8")
    typed = re.findall(r"^\$ (?:\.venv/bin/)?tapeless (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in typed]


def test_the_example(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    mean, shape, texts, right = done.stdout.splitlines()
    assert float(mean.split()[0]) < 2.4
    assert shape.endswith("(1, 16, 48)")
    assert texts.count("'jo") + texts.count('"jo') == 3
    assert right == "True"
    assert not list(tmp_path.iterdir())


def test_the_commands_work_one_after_the_other(tmp_path):
    """With what lies in a fresh clone, after `make demo`; with fewer steps, on the reference engine."""
    quick = ["--engine", "reference", "--samples", "1"]
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    succeeds("train", *quick, "--steps", "2", cwd=tmp_path)  # make demo
    done = []
    for name, *arguments in commands(README):
        more: list[str] = []
        if name == "train":
            small = [] if "--resume" in arguments else ["--set", "n_layer=1"]
            steps = "4" if "--resume" in arguments else "3"
            more = [*quick, *small, "--steps", steps, "--set", "eval_batches=1", "--set", "max_tokens=5"]
        elif name == "check":
            more = ["--engine", "reference", "--entries", "1"]
        elif name in ("eval", "sample"):
            more = ["--engine", "reference"]
        elif name == "bench":  # measures for seconds; its tests are elsewhere
            assert set(arguments) - {"--profile"} <= CASES.keys()
            continue
        succeeds(name, *arguments, *more, cwd=tmp_path)
        done.append(name)
    assert {"train", "sample", "eval", "check", "budget", "export", "settings"} <= set(done)
    assert done.count("train") == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_documents_have_the_options_there_are(page):
    group = typer.main.get_command(app)
    for name, *arguments in commands(page):
        command = group.commands[name]
        # Parses and converts arguments, and raises what a user would be told.
        command.make_context(name, list(arguments), resilient_parsing=False)
