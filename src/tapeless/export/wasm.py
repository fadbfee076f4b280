"""The web page that `--to wasm` writes, compiled."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("make", "clang", "wasm-ld")
NEEDED = "clang, lld, wasi-libc and libclang-rt-dev-wasm32 (packages of Debian)"


def build(folder: Path, say: Callable[[str], object]) -> None:
    """Compile the program in `folder` if there is a compiler for it, or say how to."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        say(f"Not compiled, for want of {' and '.join(missing)}: {_later(folder)}")
        return
    result = subprocess.run(["make", "-s"], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        say(f"Not compiled ({_reason(result.stderr)}): {_later(folder)}")
        return
    say(f"Open {folder / 'index.html'} in a browser.")


def _later(folder: Path) -> str:
    return f"make in {folder} makes index.html, and needs {NEEDED}."


def _reason(messages: str) -> str:
    """The first error among a compiler's messages."""
    lines = messages.strip().splitlines() or ["make failed"]
    return next((line for line in lines if "error:" in line), lines[0])
