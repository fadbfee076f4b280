"""The web page that `--to wasm` writes, compiled."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

NEEDED = "clang, lld, wasi-libc and libclang-rt-14-dev-wasm32 (packages of Debian)"


def build(folder: Path, say: Callable[[str], object]) -> None:
    """Compile the program in `folder` if there is a compiler for it, or say how to."""
    if shutil.which("clang") is None or shutil.which("make") is None:
        say(f"It is to be compiled with make, which needs {NEEDED}.")
        return
    result = subprocess.run(["make", "-s"], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip() or "make failed").splitlines()[0]
        say(f"It could not be compiled ({reason}): make needs {NEEDED}.")
        return
    say(f"Open {folder / 'index.html'} in a browser.")
