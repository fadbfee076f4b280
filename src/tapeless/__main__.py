"""`python -m tapeless` and the `tapeless` command: run the command line, print errors on one line."""

from __future__ import annotations

import sys


def main() -> None:
    from tapeless.errors import TapelessError

    try:
        from tapeless.cli import app

        app()
    except TapelessError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
