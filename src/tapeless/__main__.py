"""`python -m tapeless` and the `tapeless` command: run the command line, print errors on one line."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from tapeless import streams
from tapeless.signals import STOPPING, handled

CLOSED = 128 + 13  # nobody reads the output any more: what a shell reports of a process ended by SIGPIPE


def main() -> NoReturn:
    streams.open_closed()
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure:  # a text that the terminal cannot show is no reason to stop
            reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = streams.Output(sys.stdout), streams.Display(sys.stderr)  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.showwarning = _tell
        code = run(sys.argv[1:])
    try:
        streams.settle(sys.stdout)
    except streams.OutputClosed:
        code = code or CLOSED
    except OSError as error:
        code = code or _failed(error)
    with suppress(*streams.FAILURES):
        streams.settle(sys.__stderr__)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 2 after bad input, with one line on standard error."""
    import typer

    from tapeless.cli import app
    from tapeless.errors import TapelessError, on_the_command_line, spelled

    # Typer's own errors, by way of the one it names: newer versions carry their own copy of Click.
    usage_error: Any = typer.BadParameter.__base__
    command = typer.main.get_command(app)
    try:
        with (
            spelled(on_the_command_line),
            handled(STOPPING, _interrupt),
            command.make_context("tapeless", list(arguments)) as context,
        ):
            command.invoke(context)
    except typer.Exit as exit:
        return exit.exit_code
    except usage_error as error:
        path = error.ctx.command_path if error.ctx else "tapeless"
        message = error.format_message()
        stop = "" if message.endswith((".", "?")) else "."
        return _error(f"{message}{stop} See: {path} --help")
    except TapelessError as error:
        return _error(str(error))
    except MemoryError as error:
        notes = getattr(error, "__notes__", [])
        return _error(" ".join(["there is not enough memory for this: choose smaller sizes.", *notes]))
    except streams.OutputClosed:
        return CLOSED
    except OSError as error:
        return _failed(error)
    except KeyboardInterrupt as stop:
        print("Interrupted.", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return 0


def _interrupt(number: int, _: object) -> None:
    """What is half done is tidied up, whichever signal asks to stop."""
    raise KeyboardInterrupt(number)


_usual = warnings.showwarning


def _tell(message: Warning | str, *where: Any, **more: Any) -> None:
    from tapeless.errors import Notice

    if isinstance(message, Notice):
        print(f"note: {' '.join(str(message).split())}", file=sys.stderr)
    else:
        _usual(message, *where, **more)


def _error(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _failed(error: OSError) -> int:
    return _error(f"{error.filename or 'output'}: {error.strerror or error}.")


if __name__ == "__main__":
    main()
