"""Commands in real processes that stop at chosen points of the package, say so and wait.

    with pauses.start("train", ..., at=["tapeless.job:Job.advance"], cwd=tmp_path) as process:
        process.reached("Job.advance")        # it is about to call Job.advance, and does not go on
        process.send_signal(signal.SIGINT)
        process.let_go()                      # it goes on and stops nowhere any more

So a test can bring a command to a certain state and act exactly then, however fast the machine is. The
package does not know of this: `hooks/sitecustomize.py` wraps the functions as Python starts, also in the
processes that the command starts. At each call the process connects to a socket of the test, says which point
it has reached, and waits until the test closes that connection. It handles signals while it waits.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import COMMAND, LISTENING, environment

HOOKS = Path(__file__).parent / "hooks"  # sitecustomize.py


class Stop:
    """A process at a point, and a connection to it."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        name, pid = connection.makefile().readline().split()
        self.name, self.pid = name, int(pid)

    def go_on(self) -> None:
        self._connection.close()


class Process:
    """A command, or a program in Python, that stops at the points it was started with."""

    def __init__(self, popen: subprocess.Popen[str], listener: socket.socket, alive: int):
        self._popen, self._listener, self._alive = popen, listener, alive
        self._stops: list[Stop] = []
        self.pid, self.stdout, self.stderr = popen.pid, popen.stdout, popen.stderr

    def reached(self, name: str, times: int = 1) -> Stop:
        """Wait until a process stands before a call of `name`: with `times`, before so many, of which it is
        let through all but the last. Where it stood before, it is told to go on."""
        for _ in range(times):
            stop = self.next()
            assert stop.name == name, f"stopped at {stop.name}, not at {name}"
        return stop

    def next(self) -> Stop:
        """Let all that stand at a point go on, and wait for the next that is reached."""
        self.go_on()
        return self.another()

    def another(self) -> Stop:
        """Wait for one more process, or thread, that stops; those that stand at a point stay there."""
        ready, _, _ = select.select([self._listener, self._alive], [], [])
        assert self._listener in ready, f"it has ended: {self.result()}"
        self._stops.append(Stop(self._listener.accept()[0]))
        return self._stops[-1]

    def go_on(self) -> None:
        """Let all that stand at a point go on to the next."""
        while self._stops:
            self._stops.pop().go_on()

    def let_go(self) -> None:
        """Let all go on, and stop at no point any more."""
        self._listener.close()
        self.go_on()

    def send_signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def send_signal_to_all(self, number: int) -> None:
        """As a terminal does: to the process and those that it has started."""
        os.killpg(self.pid, number)

    def result(self) -> tuple[int, str, str]:
        """Wait for its end: the exit code, and what it printed to either stream after what was read of it."""
        out, errors = self._popen.communicate()
        return self._popen.returncode, out, errors

    def end(self) -> tuple[int, str, str]:
        """Let it go on to its end, which `result` gives."""
        self.let_go()
        return self.result()

    def kill(self) -> None:
        """End it as it stands, by SIGKILL."""
        self._popen.kill()
        self._popen.wait()


@contextmanager
def start(
    *arguments: Any, at: Sequence[str], cwd: Path, code: str | None = None, stdout: Any = subprocess.PIPE
) -> Iterator[Process]:
    """Start `tapeless` with these arguments, or Python with this code, in a process group of its own. Points
    are functions by module and name: "tapeless.job:Job.advance" is reached as "Job.advance"."""
    command = [*COMMAND, *map(str, arguments)] if code is None else [sys.executable, "-c", code]
    # A path short enough for a socket.
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        paths = os.pathsep.join(filter(None, (str(HOOKS), os.environ.get("PYTHONPATH"))))
        env = environment(PYTHONPATH=paths, PAUSES="\n".join((f"{folder}/socket", *at)))
        alive, held = os.pipe()  # the other end is closed when the process ends
        popen = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=stdout, stderr=subprocess.PIPE, encoding="utf-8",
            pass_fds=(held,), start_new_session=True, **LISTENING,
        )  # fmt: skip
        os.close(held)
        process = Process(popen, listener, alive)
        try:
            yield process
        finally:
            process.let_go()
            if popen.poll() is None:
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            for pipe in (popen.stdout, popen.stderr):
                if pipe is not None:
                    pipe.close()
            os.close(alive)
