"""`python -m flowprefill` is the command `flowprefill`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command; while it is imported, Ctrl-C ends the process without a traceback."""
    python_handler = signal.getsignal(signal.SIGINT)
    if python_handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from flowprefill.cli import main as run

    if python_handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, python_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
