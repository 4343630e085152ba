"""Ctrl-C while the command ``bilevel`` loads torch: one line in place of a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with one line, unless somebody handles Ctrl-C already."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once: an exception in the middle of an import may come out as another one."""
    os.write(2, b"\nbilevel: interrupted while it was starting; nothing has been written.\n")
    os._exit(INTERRUPTED)
