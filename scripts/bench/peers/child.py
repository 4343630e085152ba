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
import resource
import sys
import time
import traceback
from collections.abc import Callable
from itertools import accumulate
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


def processor_seconds() -> float:
    """Return the processor seconds of this process, over all threads, and of processes that it has waited for."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime


def timed(call: Callable[[], Any], repeats: int = 1) -> tuple[dict[str, float], Any]:
    """Return processor seconds and wall seconds of one call, averaged over `repeats`, and its result."""
    wall, cpu = time.perf_counter(), processor_seconds()
    for _ in range(repeats):
        result = call()
    spent = {"cpu": (processor_seconds() - cpu) / repeats, "wall": (time.perf_counter() - wall) / repeats}
    return spent, result


def live_peak(call: Callable[[], Any]) -> int | None:
    """Return the largest total size of torch's live tensors that a call makes, in bytes; None where nothing is torch's.

    Resident memory hides what grows into pages that an earlier call has freed.
    """
    if "torch" not in sys.modules:
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    sizes = [(e.start_ns(), e.nbytes()) for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((size for _, size in sorted(sizes)), initial=0))


def flat(answer: Any) -> list[float]:
    """Return an answer's numbers in row-major order; of an estimate, those of its hypergradient."""
    import numpy as np

    if isinstance(answer, list):
        return [number for each in answer for number in flat(each)]
    return np.asarray(getattr(answer, "hypergradient", answer), dtype=np.float64).reshape(-1).tolist()


def form_of(answer: Any) -> str:
    """Return how an estimate of this library says that it was made; empty for others."""
    if isinstance(answer, list):
        return form_of(answer[-1]) if answer else ""
    certificates = getattr(answer, "certificates", None) or [getattr(answer, "certificate", None)]
    return getattr(certificates[0], "form", "")


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
        numbers, grade = flat(answer), self.problem.grade
        numbers = flat(grade(self.data, task, numbers)) if grade else numbers
        sizes = {"memory": after - before, "peak": max(self.peak, after)}
        return seconds | sizes | {"answer": numbers, "form": form_of(answer)}

    def warm(self, task: str) -> dict[str, Any]:
        """Make a warm call, measure what it takes above the level before, and choose the repeats of a timing."""
        forget_peak()
        before = resident()["now"]
        seconds, answer = timed(self.calls[task])
        after = resident()["peak"]
        self.repeats[task] = max(1, round(SHORTEST / max(seconds["cpu"], seconds["wall"], 1e-6)))
        live = live_peak(self.calls[task]) if self.problem.tasks[task].live else None
        return seconds | {"memory": after - before, "form": form_of(answer), "live": live}

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
