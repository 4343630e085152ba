"""Kill -9 at random moments: the same command continues, to the numbers of an undisturbed run."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from .runs import VARIANTS, Child, results, run, write_config

AT_ONCE = 5
"""Times that one run is killed before it may end."""
LINES = (["compare"], ["tune"], ["compare", "--jobs", "2"])


def kill_points(count: int, seed: int, folder: Path) -> Iterator[tuple[str, bool, str]]:
    """Kill commands at random moments, five times each before they may end.

    Of a run in several processes the parent alone is killed, as by ``kill -9 PID``: its workers outlive it for a while.

    Args:
        count: how often.
        seed: of the moments.
        folder: an empty folder to work in.

    Yields:
        For each kill: its name, whether the run that it hit came to the undisturbed numbers, and else why not.
    """
    rng = random.Random(seed)
    done = index = 0
    while done < count:
        words = LINES[index % len(LINES)]
        place = folder / f"run{index}"
        place.mkdir()
        line = [*words, str(write_config(place, VARIANTS[index % len(VARIANTS)])), "--device", "cpu", "--out"]
        start = time.monotonic()
        whole = run([*line, str(place / "whole")])
        took = time.monotonic() - start
        hits = []
        while len(hits) < min(AT_ONCE, count - done):
            moment = rng.uniform(0.0, took)
            with Child([*line, str(place / "killed")]) as child:
                if child.within(moment, group="--jobs" not in words) is not None:
                    break
            hits.append(moment)
        last = run([*line, str(place / "killed")])
        reason = _difference(place, whole.code, last.code, last.said)
        for moment in hits:
            yield f"{' '.join(words)}, run {index}, after {moment:.2f} s", not reason, reason
        done, index = done + len(hits), index + 1


def _difference(place: Path, whole: int, code: int, said: str) -> str:
    """Return what is wrong with a run that was killed, empty where it equals the undisturbed one."""
    if whole != 0 or code != 0:
        return f"exit codes {whole} undisturbed, {code} continued: {said.strip()}"
    if results(place / "whole") != results(place / "killed"):
        return "other numbers than the undisturbed run"
    left = [path.name for path in (place / "killed").rglob("*.tmp")]
    return f"left {left[0]} behind" if left else ""
