"""The command ``bilevel``: here, since Ctrl-C has to be handled before the import of the package loads torch."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130


def main() -> int:
    """Load the package and run the command line; Ctrl-C while it loads ends the process with one line.

    Returns:
        The exit code.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        signal.signal(signal.SIGINT, _leave)
    from bilevel.cli import main as run

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: an exception in the middle of an import may come out as another one."""
    os.write(2, b"\nbilevel: interrupted while it was starting; nothing has been written.\n")
    os._exit(INTERRUPTED)
