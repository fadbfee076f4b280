"""Shared by all tests: where the names are, and how hypothesis behaves."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

import tapeless

ROOT = Path(__file__).parents[1]
NAMES = ROOT.parent / "shared" / "data" / "names.txt"

# The same examples on every machine, so that a failure anywhere can be repeated everywhere. The
# first example of an engine test compiles, which no deadline would allow for.
settings.register_profile("tapeless", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("tapeless")


@pytest.fixture(scope="session")
def names() -> Path:
    """The 32,033 names that microgpt's and esp32gpt's figures were measured on."""
    if not NAMES.is_file():
        pytest.skip(f"no {NAMES}: the published figures cannot be checked without those names")
    return NAMES


@pytest.fixture(scope="session")
def child() -> Callable[..., str]:
    """Run code in a fresh Python with these environment variables, and give what it printed."""

    def run(code: str, **environment: object) -> str:
        source = str(Path(tapeless.__file__).parents[1])
        variables = {name: str(value) for name, value in environment.items()}
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=os.environ | {"PYTHONPATH": source} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return result.stdout.strip()

    return run
