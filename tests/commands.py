"""Running `tapeless` as its users do: a real command in a real process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warm import Warm

# With this, each of a thousand commands would compile the package's source again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Users' output is buffered: what cannot be written may only show at the end.
os.environ.pop("PYTHONUNBUFFERED", None)

COMMAND = [sys.executable, "-m", "tapeless"]
SMALL = ("--engine", "reference", "--steps", "20", "--samples", "2")


def signals(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that sends signals or kills, or whose threads wait for each other. Nothing in it may depend
    on how long something takes: `pytest -m signals` runs these alone, as often as one likes."""
    return pytest.mark.signals(pytest.mark.skipif(os.name == "nt", reason="sends signals")(test))


def environment(**changes: str) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return environ | {"COLUMNS": "80", "PYTHONUTF8": "1"} | changes


WARM = Warm(environment())


def listen() -> None:
    """Let a new process hear the signals that these tests may have been started to ignore, by nohup or in the
    background of a shell."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


# Options for whatever starts a process that is sent signals.
LISTENING: dict[str, Any] = {} if os.name == "nt" else {"preexec_fn": listen}


def tapeless(*arguments: Any, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environ = environment()
    if not options and (done := WARM.run([*map(str, arguments)], cwd, environ)):
        return done
    options = {"env": environ} | options
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd, capture_output=True, encoding="utf-8", check=False, **options,
    )  # fmt: skip


def start(*arguments: Any, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """Start a command, to be interrupted or run beside others."""
    options = {"env": environment(), **LISTENING} | options
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **options,
    )  # fmt: skip


def on_a_terminal(*arguments: Any, cwd: Path) -> str:
    """What a command shows on a terminal of 120 columns, without colours and moves of the cursor."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    environ = environment(COLUMNS="120", TERM="xterm-256color")
    with subprocess.Popen([*COMMAND, *arguments], cwd=cwd, env=environ, stderr=slave, stdout=slave):
        os.close(slave)
        shown = b""
        while True:
            try:
                some = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not some:
                break
            shown += some
    os.close(master)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())


def succeeds(*arguments: Any, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    result = tapeless(*arguments, cwd=cwd, **options)
    assert result.returncode == 0, result.stderr
    return result


def refused(*arguments: Any, cwd: Path, **options: Any) -> str:
    """The one line of error of a command that must be refused with exit code 2."""
    result = tapeless(*arguments, cwd=cwd, **options)
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0]
    return errors[0]


def without_privileges() -> None:
    """Let root be bound by permissions as everybody is: to be called in a new process before its command."""
    import ctypes

    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


# For tests of permissions.
bound_by_permissions = pytest.mark.skipif(
    sys.platform != "linux" and (os.name == "nt" or os.geteuid() == 0), reason="may read and write everything"
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
