"""Ctrl-C while the command ``bilevel`` loads torch: one line in place of a traceback.

The package calls `quiet_interrupt` before it imports anything else; in any process but the command's it does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType

INTERRUPTED = 130


def quiet_interrupt() -> None:
    """Let Ctrl-C end the process with one line, if the process is the command and nobody handles Ctrl-C yet."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual and _is_command(sys.argv[:1], getattr(sys, "orig_argv", [])):
        signal.signal(signal.SIGINT, _leave)


def loaded() -> None:
    """Take `quiet_interrupt` back: the command line runs and handles Ctrl-C itself."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command(name: list[str], words: list[str]) -> bool:
    as_script = bool(name) and Path(name[0]).name in ("bilevel", "bilevel.exe")
    return as_script or words[1:3] == ["-m", "bilevel"]


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: an exception in the middle of an import may come out as another one."""
    os.write(2, b"\nbilevel: interrupted while it was starting; nothing has been written.\n")
    os._exit(INTERRUPTED)
