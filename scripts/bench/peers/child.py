"""One contestant in its own process: prepares, then makes timed calls as the parent asks.

``python child.py MODULE PROBLEM CONTESTANT SIZE SEED THREADS``; a command is a line on stdin, an answer one JSON line.
The contestant "reference" answers with the reference of every task.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

SHORTEST = 0.05
"""A timing repeats its call until about this many seconds have passed."""


def restrict(threads: int) -> None:
    """Let this process use `threads` cores, whatever the library: it must happen before the libraries are imported."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cores[-threads:]))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ |= {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}


def resident() -> dict[str, int]:
    """Return the resident bytes of this process, now and at most since the last `forget_peak`.

    The kernel's own high-water mark of this address space: unlike ``ru_maxrss`` it is not inherited from the parent.
    """
    sizes = {}
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(("VmRSS", "VmHWM")):
                sizes[line[:5]] = int(line.split()[1]) * 1024
    return {"now": sizes["VmRSS"], "peak": sizes["VmHWM"]}


def forget_peak() -> None:
    """Give freed memory back to the system and start the high-water mark anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as switch:
        switch.write("5")


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[dict[str, float], Any]:
    """Return processor seconds (all threads) and wall seconds of one call, averaged over `repeats`, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        result = call()
    spent = {"cpu": (time.process_time() - cpu) / repeats, "wall": (time.perf_counter() - wall) / repeats}
    return spent, result


def flat(answer: Any) -> list[float]:
    """Return an answer's numbers in row-major order."""
    import numpy as np

    return np.asarray(answer, dtype=np.float64).reshape(-1).tolist()


class Contest:
    """A prepared contestant; each method is a command."""

    def __init__(self, module: str, problem: str, contestant: str, size: str, seed: str) -> None:
        (self.problem,) = (p for p in importlib.import_module(module).PROBLEMS if p.key == problem)
        self.name = contestant
        self.peak = 0
        self.data = self.problem.data(**self.problem.sizes[size], seed=int(seed))

    def prepare(self) -> dict[str, Any]:
        """Import, convert the data, and say which tasks there are."""
        if self.name == "reference":
            return {"answers": {task: flat(value) for task, value in self.problem.reference(self.data).items()}}
        (contestant,) = (c for c in self.problem.contestants if c.name == self.name)
        seconds, self.calls = timed(lambda: contestant.prepare(self.data))
        self.repeats = dict.fromkeys(self.calls, 1)
        return {"tasks": list(self.calls), "prepare": seconds, "resident": resident()["now"]}

    def first(self, task: str) -> dict[str, Any]:
        """Make the first call of a task: it compiles what has to be compiled."""
        self.peak = max(self.peak, resident()["peak"])
        forget_peak()
        before = resident()["now"]
        seconds, answer = timed(self.calls[task])
        after = resident()["peak"]
        # Answers do not change from call to call; this one is what the error is measured of.
        return seconds | {"answer": flat(answer), "memory": after - before, "peak": max(self.peak, after)}

    def warm(self, task: str) -> dict[str, Any]:
        """Make a warm call, measure what it takes above the level before, and choose the repeats of a timing."""
        forget_peak()
        before = resident()["now"]
        seconds, _ = timed(self.calls[task])
        after = resident()["peak"]
        self.repeats[task] = max(1, round(SHORTEST / max(seconds["cpu"], seconds["wall"], 1e-6)))
        return seconds | {"memory": after - before}

    def round(self, task: str) -> dict[str, Any]:
        """Time a warm call."""
        return timed(self.calls[task], self.repeats[task])[0]


def main() -> None:
    """Answer commands until the parent closes the pipe."""
    module, problem, contestant, size, seed, threads = sys.argv[1:]
    restrict(int(threads))
    # What libraries print goes to stderr; the answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contest: Contest | None = None
    for line in sys.stdin:
        command, *arguments = line.split()
        try:
            contest = contest or Contest(module, problem, contestant, size, seed)
            answer = getattr(contest, command)(*arguments)
        except Exception as error:
            traceback.print_exc()
            sentence = str(error).strip().splitlines()[0] if str(error).strip() else ""
            answer = {"error": f"{type(error).__name__}: {sentence}"[:300]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
