"""Conduct a contest: a process for each contestant, calls in turn, medians, and what went wrong as a row.

This module runs in the small parent process: standard library alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import math
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import Contestant, Problem

CHILD = Path(__file__).with_name("child.py")
PREPARATION = 60.0
"""Seconds that imports and conversions may take at least: they are outside the clocks."""


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Args:
        size: "full" or "quick": key of `Problem.sizes`.
        seed: of the data.
        threads: cores and threads of each contestant.
        rounds: most rounds of a task.
        seconds: of timing for one task of one contestant, beyond which no further round starts.
        once: a first call of so many processor seconds is not repeated.
        timeout: seconds that one call may take.
        logs: folder for what the contestants print, or None.
        tasks: patterns of the keys of the tasks that are run.
        who: patterns of the names of the contestants that run.
    """

    size: str = "full"
    seed: int = 0
    threads: int = 1
    rounds: int = 9
    seconds: float = 20.0
    once: float = 20.0
    timeout: float = 240.0
    logs: Path | None = None
    tasks: Sequence[str] = ("*",)
    who: Sequence[str] = ("*",)

    @property
    def partial(self) -> bool:
        """Whether some rows are left out."""
        return (*self.tasks, *self.who) != ("*", "*")


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name is like one of the patterns, with * as in file names."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class Player:
    """A contestant's process; after an error or a timeout it is gone and `failure` says why."""

    def __init__(self, module: str, problem: str, name: str, limits: Limits) -> None:
        self.name, self.timeout, self.failure, self._buffer = name, limits.timeout, "", b""
        arguments = [module, problem, name, limits.size, str(limits.seed), str(limits.threads)]
        log = subprocess.DEVNULL
        if limits.logs is not None:
            limits.logs.mkdir(parents=True, exist_ok=True)
            plain = "".join(c if c.isalnum() else "_" for c in f"{problem} {name}")
            log = (limits.logs / f"{plain}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        if limits.logs is not None:
            log.close()

    def ask(self, *command: str, timeout: float = 0.0) -> dict[str, Any] | None:
        """Return the answer to a command, or None where the contestant is out."""
        if self.failure:
            return None
        timeout = max(timeout, self.timeout)
        try:
            self.process.stdin.write((" ".join(command) + "\n").encode())
            self.process.stdin.flush()
            line = self._line(timeout)
        except (BrokenPipeError, EOFError):
            return self._out(f"the process ended with exit status {self.process.wait()} in `{command[0]}`")
        except TimeoutError:
            return self._out(f"no answer to `{command[0]}` within {timeout:g} s")
        answer = json.loads(line)
        return self._out(answer["error"]) if "error" in answer else answer

    def _line(self, timeout: float) -> bytes:
        """Read one line with a deadline.

        Raises:
            TimeoutError: after so many seconds.
            EOFError: where the process has ended.
        """
        deadline = time.monotonic() + timeout
        pipe = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = self.process.stdout.read1(1 << 20)
            if not part:
                raise EOFError
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _out(self, reason: str) -> None:
        self.failure = reason
        self.close()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def relative_error(answer: Sequence[float], truth: Sequence[float]) -> float:
    """Return ``|answer - truth| / |truth|``; NaN for another length or a NaN.

    >>> relative_error([1.0, 2.0], [1.0, 2.0])
    0.0
    """
    if len(answer) != len(truth):
        return math.nan
    difference = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(answer, truth, strict=True)))
    return difference / math.sqrt(math.fsum(b * b for b in truth))


def reference(module: str, problem: Problem, limits: Limits, folder: Path) -> dict[str, list[float]]:
    """Return the answers to compare with; they are computed once for each size and seed, and kept in `folder`.

    Raises:
        RuntimeError: where the reference cannot be computed: nothing could be judged then.
    """
    kept = folder / f"{problem.key}-{limits.size}-{limits.seed}.json"
    made_by = hash_of(module)
    if kept.exists():
        content = json.loads(kept.read_text())
        if content["made_by"] == made_by:
            return content["answers"]
    player = Player(module, problem.key, "reference", Limits(**(vars(limits) | {"timeout": 1800.0})))
    answer = player.ask("prepare")
    player.close()
    if answer is None:
        raise RuntimeError(f"no reference for {problem.key}: {player.failure}")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"made_by": made_by, "answers": answer["answers"]}))
    return answer["answers"]


def hash_of(module: str) -> str:
    """Return a fingerprint of the file that defines a problem and of those that it may take formulas from."""
    folder = Path(__file__).parent
    files = {folder / f"{module}.py", folder / "shared.py", *folder.glob("p*.py"), *folder.glob("*_peers.py")}
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files) if file.exists())).hexdigest()[:16]


def conduct(module: str, problem: Problem, limits: Limits, folder: Path, say: Any = print) -> list[dict[str, Any]]:
    """Run one contest and return its rows, one for each contestant and task."""
    truth = reference(module, problem, limits, folder)
    chosen = [c for c in problem.contestants if fits(c.name, limits.who)]
    players = {c.name: Player(module, problem.key, c.name, limits) for c in chosen}
    rows = []
    try:
        prepared = {name: player.ask("prepare", timeout=PREPARATION) for name, player in players.items()}
        # A quick run has fewer points of a growth curve.
        for task in (task for task in problem.tasks if task in truth and fits(task, limits.tasks)):
            entrants = [c for c in chosen if task in ((prepared[c.name] or {}).get("tasks", [task]))]
            rows += run_task(problem, task, entrants, players, truth[task], limits)
            for row in rows[len(rows) - len(entrants) :]:
                say(line_of(problem, row))
    finally:
        for player in players.values():
            player.close()
    return rows


def run_task(
    problem: Problem,
    task: str,
    entrants: Sequence[Contestant],
    players: Mapping[str, Player],
    truth: Sequence[float],
    limits: Limits,
) -> list[dict[str, Any]]:
    """Time one task: first calls, a call for the memory, then rounds in which everybody takes a turn."""
    about = problem.tasks[task]
    first = {c.name: players[c.name].ask("first", task, timeout=about.timeout) for c in entrants}
    warm: dict[str, Any] = {}
    times: dict[str, list[Mapping[str, float]]] = {c.name: [] for c in entrants}
    for c in entrants:
        begun = first[c.name]
        # So long a call is not repeated; it stands for the warm one as well.
        slow = begun is not None and begun["cpu"] > limits.once and c.compiles not in (task, "*")
        warm[c.name] = begun if slow else players[c.name].ask("warm", task, timeout=about.timeout)
        if slow:
            times[c.name] = [begun]
    for count in range(min(limits.rounds, about.rounds)):
        for c in entrants:
            known = warm[c.name]
            if known is None or sum(t["wall"] for t in times[c.name]) + (count > 0) * known["wall"] > limits.seconds:
                continue
            answer = players[c.name].ask("round", task, timeout=about.timeout)
            if answer is not None:
                times[c.name].append(answer)
    return [
        row_of(c, task, about, players[c.name].failure, first[c.name], warm[c.name], times[c.name], truth)
        for c in entrants
    ]


def row_of(
    contestant: Contestant,
    task: str,
    about: Any,
    failure: str,
    first: Mapping[str, Any] | None,
    warm: Mapping[str, Any] | None,
    times: Sequence[Mapping[str, float]],
    truth: Sequence[float],
) -> dict[str, Any]:
    """Return one row; ``status`` is "ok", "wrong" or "does not run"."""
    row: dict[str, Any] = {
        "task": task,
        "name": contestant.name,
        "package": contestant.package,
        "ours": contestant.ours,
        "note": contestant.note,
    }
    if failure or not times:
        return row | {"status": "does not run", "reason": failure or "was not timed"}
    error = relative_error(first["answer"], truth)
    row |= {
        "status": "ok" if error <= about.tolerance else "wrong",
        "error": None if math.isnan(error) else error,
        "first_cpu": first["cpu"],
        "first_wall": first["wall"],
        "first_memory": first["memory"],
        "memory": warm["memory"],
        "live": warm.get("live"),
        "form": warm["form"],
        "peak": first["peak"],
        "rounds": len(times),
    }
    for clock in ("cpu", "wall"):
        values = [t[clock] / about.per for t in times]
        row |= {clock: statistics.median(values), f"{clock}_all": values}
    return row


def line_of(problem: Problem, row: Mapping[str, Any]) -> str:
    """Return one line for the terminal."""
    head = f"{problem.key:9} {row['task']:9} {row['name'][:44]:44}"
    if row["status"] == "does not run":
        return f"{head} does not run: {row['reason']}"
    error = "nan" if row["error"] is None else f"{row['error']:.1e}"
    return f"{head} cpu {1e3 * row['cpu']:10.3f} ms  wall {1e3 * row['wall']:10.3f} ms  error {error}  {row['status']}"
