"""Workers and parents that end in the middle: nothing computes on, and the same command continues."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from joblib.externals.loky.backend.context import set_start_method

from .folders import Result, command_line, other_numbers, undisturbed, unworded
from .runs import Child, run, without_figures


def _workers(group: int) -> list[int]:
    """Return the worker processes of a command."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry)
            command = Path(f"/proc/{pid}/cmdline").read_bytes() if os.getpgid(pid) == group != pid else b""
            if command and b"resource_tracker" not in command:
                found.append(pid)
    return found


def _within(seconds: float, found: Callable[[], bool]) -> bool:
    """Wait until something is the case; return whether it came to be."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found():
            return True
        time.sleep(0.02)
    return False


def _saved(place: Path) -> dict[str, int]:
    """Return when each checkpoint of a run was written."""
    return {path.name: path.stat().st_mtime_ns for path in (place / "out" / "checkpoints").glob("*.pt")}


def _fork_workers() -> None:
    """Let the workers of this process start at once."""
    without_figures()
    warnings.simplefilter("ignore")
    set_start_method("fork", force=True)


def _worker_killed(parent: int) -> None:
    os.kill(_workers(parent)[0], signal.SIGKILL)


def _ctrl_c_twice(parent: int) -> None:
    os.killpg(parent, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(parent, signal.SIGINT)


ENDS: Sequence[tuple[str, Callable[[int], None], int]] = (
    ("a worker killed", _worker_killed, 1),
    ("the parent terminated", lambda parent: os.kill(parent, signal.SIGTERM), -signal.SIGTERM),
    ("the parent killed", lambda parent: os.kill(parent, signal.SIGKILL), -signal.SIGKILL),
    ("the parent interrupted", lambda parent: os.kill(parent, signal.SIGINT), 130),
    ("Ctrl-C", lambda parent: os.killpg(parent, signal.SIGINT), 130),
    ("Ctrl-C twice", _ctrl_c_twice, 130),
)
"""What ends a run in several processes, given the parent, and the exit code that follows."""


def killed_workers(count: int, seed: int, folder: Path) -> Iterator[Result]:
    """End a worker or the parent while workers start, and while they compute.

    The parent ends at once with its exit code and no traceback, no worker computes on, and the same command continues.

    Args:
        count: how many commands.
        seed: of the moments.
        folder: an empty folder to work in.

    Yields:
        For each: its name, whether all that held, and else what did not.
    """
    rng = random.Random(seed)
    changes: dict[str, object] = {"outer": {"lr": 0.2, "steps": 60}}
    whole = undisturbed(folder, changes)
    for index in range(count):
        place = folder / str(index)
        place.mkdir()
        line = command_line(place, "--jobs", "2", changes=changes)
        what, end, code = ENDS[index % len(ENDS)]
        computing = index // len(ENDS) % 2 == 0
        moment = rng.uniform(0.0, 0.5 if computing else 2.0)
        with Child(line, _fork_workers if computing else without_figures) as child:

            def begun(parent: int = child.pid, place: Path = place, computing: bool = computing) -> bool:
                return bool(_saved(place) if computing else _workers(parent))

            reason = "" if _within(60, begun) else "nothing has begun"
            time.sleep(moment)
            with contextlib.suppress(ProcessLookupError, IndexError):
                end(child.pid)
            outcome = child.within(30, group=False)
            # Workers look at whether their parent lives five times a second.
            time.sleep(0.5)
            saved = _saved(place)
            _within(60, lambda parent=child.pid: not _workers(parent))  # type: ignore[misc]
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        if outcome is None:
            reason = reason or "no end within 30 s"
        elif outcome.code:
            # A run that has ended before is none.
            reason = reason or unworded(outcome, code)
        reason = reason or ("workers compute on" if _saved(place) != saved else "")
        reason = reason or unworded(run(line, _fork_workers), 0) or other_numbers(place / "out", whole)
        yield f"{what} {moment:.2f} s after workers {'compute' if computing else 'start'}", not reason, reason
