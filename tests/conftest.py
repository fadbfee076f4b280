"""Shared by all tests: where the names are, and how hypothesis behaves."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

import tapeless
from commands import LISTENING
from originals import original

ROOT = Path(__file__).parents[1]

# `make test` draws the same examples on every machine, so that a failure anywhere can be repeated everywhere.
# `make test-oracles` draws new ones each time. What fails there is kept in the folder .hypothesis and tried
# first the next time; a CI job has to keep that folder. Hypothesis also prints a line for @reproduce_failure:
# once understood, a failure belongs into its test as an @example, where everybody runs it.
#
# No example has a time limit: the first of an engine test compiles, and a busy machine is no failure.
untimed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("tapeless", derandomize=True, print_blob=False, **untimed)
kept = DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "examples")
settings.register_profile("oracles", derandomize=False, print_blob=True, database=kept, **untimed)
settings.load_profile("tapeless")


@pytest.fixture(scope="session")
def names() -> Path:
    """The 32,033 names that microgpt's and esp32gpt's figures were measured on."""
    return original("names.txt")


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
            **LISTENING,
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return result.stdout.strip()

    return run
