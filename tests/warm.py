"""Processes for `commands.tapeless` that need not import NumPy and Typer first.

A short command spends half of its time on such imports. So one process makes them and then forks for each
command; the fork runs `python -m tapeless` to its end, and imports all of tapeless itself.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARIES = (
    "dataclasses", "glob", "hashlib", "importlib.metadata", "llvmlite.binding", "ml_dtypes", "numpy",
    "numpy.random", "queue", "rich.console", "rich.progress", "rich.table", "shlex", "tempfile", "tomllib",
)  # fmt: skip


class Warm:
    """The process that forks; it starts when it is needed first, and ends with this one."""

    def __init__(self, environ: Mapping[str, str]):
        self._environ = environ
        self._busy = threading.Lock()
        self._connection: socket.socket | None = None

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        process = subprocess.Popen(command, env=self._environ, pass_fds=[theirs.fileno()])
        theirs.close()

        def end() -> None:
            ours.close()
            process.wait()

        atexit.register(end)
        return ours

    def run(
        self, arguments: Sequence[str], cwd: Path, environ: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str] | None:
        """As `subprocess.run`; None for another environment, or while another command runs."""
        if not hasattr(os, "fork") or environ != self._environ or not self._busy.acquire(blocking=False):
            return None
        try:
            ours = self._connection = self._connection or self._start()
            with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
                request = json.dumps([str(Path(cwd).absolute()), *arguments]).encode()
                header = len(request).to_bytes(8, "little")
                socket.send_fds(ours, [header], [out.fileno(), errors.fileno()])
                ours.sendall(request)
                code = int.from_bytes(_receive(ours, 8), "little", signed=True)
                texts = []
                for file in (out, errors):
                    file.seek(0)
                    texts.append(file.read().decode("utf-8").replace("\r\n", "\n"))
        finally:
            self._busy.release()
        return subprocess.CompletedProcess(arguments, code, *texts)


def _receive(connection: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        some = connection.recv(count - len(content))
        assert some, "the process that forks has ended"
        content += some
    return content


def serve(connection: socket.socket) -> list[str]:
    """Fork for each request. Returns, in the forks, the arguments."""
    while True:
        header, handles, _, _ = socket.recv_fds(connection, 8, 2)
        if not header:
            os._exit(0)
        header += _receive(connection, 8 - len(header)) if len(header) < 8 else b""
        cwd, *arguments = json.loads(_receive(connection, int.from_bytes(header, "little")))
        child = os.fork()
        if not child:
            connection.close()
            for place, handle in zip((1, 2), handles, strict=True):
                os.dup2(handle, place)
                os.close(handle)
            os.chdir(cwd)
            return arguments
        for handle in handles:
            os.close(handle)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(code.to_bytes(8, "little", signed=True))


def prepare() -> None:
    """Import the libraries; Typer imports some of what it needs when it runs a command."""
    for name in LIBRARIES:
        __import__(name)
    import typer

    app = typer.Typer()
    app.command()(lambda: None)
    typer.main.get_command(app).main([], standalone_mode=False)


if __name__ == "__main__":
    prepare()
    sys.argv[1:] = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.getcwd()  # as `-m` has it
    runpy.run_module("tapeless", run_name="__main__", alter_sys=True)
