"""Exporting programs by the command line, and compiling and running them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from commands import succeeds

STRICT = (
    *("-std=c99", "-O2", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"),
    *("-fno-math-errno", "-ffp-contract=fast"),
)


def needs(*programs: str) -> None:
    """Skip, saying why, where a program is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: what needs it is left out")


def export(*arguments: Any, out: Path) -> Path:
    """The folder that `tapeless export` writes."""
    succeeds("export", *arguments, "--out", out, cwd=out.parent)
    return out


def run(*command: Any, cwd: Path) -> str:
    """What a program prints, to either stream, that ends well."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout[-2000:]}{result.stderr[-4000:]}"
    return result.stdout + result.stderr
