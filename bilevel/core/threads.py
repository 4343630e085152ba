"""How many threads torch and the sweeps over blocks of rows use.

Threads of torch split one operation, and on a short one, such as the factorization of a 30 x 30 matrix, mostly wait for
each other. Those of a sweep over the rows of a data set take whole blocks, with one torch thread each, and hardly wait.
So a run is quickest with one torch thread and as many workers as cores; the commands choose that. Called from Python,
nothing changes the number of torch's threads unasked:

    with bilevel.threads.short_operations():
        outer.run(100)

The torch threads and the workers of a number differ in the order in which sums are taken, so in rounding.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch

from bilevel.core.options import is_int, require, require_value

WORKERS = "BILEVEL_WORKERS"
"""The environment variable that sets the number of workers."""
TORCH = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""The environment variables that torch takes its number of threads from."""


@dataclass(frozen=True)
class Threads:
    """How cores are used: threads that split an operation of torch, and workers, which share a sweep over rows."""

    torch: int
    workers: int

    def __post_init__(self) -> None:
        require(self, "torch", "a positive int", is_int(self.torch))
        require(self, "workers", "a positive int", is_int(self.workers))

    def __str__(self) -> str:
        return f"{_counted(self.torch, 'thread')} and {_counted(self.workers, 'worker')}"

    def shared_by(self, processes: int) -> Threads:
        """Return the share of one of several processes.

        >>> print(Threads(torch=1, workers=8).shared_by(2))
        1 thread and 4 workers
        """
        return Threads(max(1, self.torch // processes), max(1, self.workers // processes))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


_in_force: ContextVar[Threads | None] = ContextVar("_in_force", default=None)
"""What `short_operations` has put in force, for each thread its own; None outside of it."""


PROCESS_STATE = threading.RLock()
"""Held while something that all threads share is changed and put back, such as the seeds of the global generators."""

_local = threading.local()

Value = TypeVar("Value")


@contextmanager
def set_within(variable: ContextVar[Value], value: Value) -> Iterator[Value]:
    """Give a variable of this thread a value inside the block, and yield it."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def workers() -> int:
    """Return how many Python threads a sweep over blocks of rows may use.

    That is what `short_operations` has put in force, else what the environment variable BILEVEL_WORKERS says, else the
    number of torch's threads, at most that of the usable cores; 1 inside a worker, which has no cores to give away.
    """
    if getattr(_local, "is_worker", False):
        return 1
    if (chosen := _in_force.get()) is not None:
        return chosen.workers
    return _asked_workers() or min(usable_cores(), torch.get_num_threads())


def _asked_workers() -> int | None:
    if not (text := os.environ.get(WORKERS, "").strip()):
        return None
    require_value(f"{WORKERS}", text, "a positive int", text.isdecimal() and int(text) > 0)
    return int(text)


@cache
def usable_cores() -> int:
    """Return the number of cores that this process may use: its affinity and the quota of its container count."""
    # Here, since this is wanted once and `import bilevel` is not to wait for it.
    from joblib import cpu_count

    return max(1, int(cpu_count()))


@cache
def pool(workers: int) -> ThreadPoolExecutor:
    """Return the threads that share a sweep, each with one thread of torch; made once for each number.

    A forked process makes its own. The threads are idle between sweeps and end with the interpreter. What raises in a
    worker raises where the result is taken, and the pool goes on.

    >>> list(pool(2).map(abs, [-1, 2, -3]))
    [1, 2, 3]
    """
    before = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        _local.is_worker = True
        # A thread takes over the last number at its first look, which must not come after the next line.
        torch.get_num_threads()
        torch.set_num_threads(1)
        with suppress(threading.BrokenBarrierError):
            started.wait()

    made = ThreadPoolExecutor(workers, thread_name_prefix=f"bilevel-{workers}", initializer=start)
    try:
        for _ in range(workers):
            made.submit(int)
        started.wait()
    finally:
        # After an interrupt nobody comes to the barrier any more.
        started.abort()
        # The number is each thread's own, but new threads take over the one set last: let that be the caller's.
        torch.set_num_threads(before)
    return made


# A thread does not survive a fork, so neither may the pools.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


def current() -> Threads:
    """Return the numbers in force for the calling thread."""
    return Threads(torch.get_num_threads(), workers())


def choose(threads: int | None = None) -> Threads:
    """Return the numbers that make a run quick: one thread of torch, and a worker for each core.

    They depend on the machine and its settings alone, never on a measurement, so that a run repeats bit for bit. Of
    threads that are given there are at most as many workers; the default is what OMP_NUM_THREADS or MKL_NUM_THREADS
    says, else 1. BILEVEL_WORKERS, where it is set, says the number of workers in any case.
    """
    if threads is not None:
        given = Threads(threads, 1)
        return Threads(given.torch, _asked_workers() or min(usable_cores(), given.torch))
    said = any(os.environ.get(name) for name in TORCH)
    return Threads(torch.get_num_threads() if said else 1, workers())


@contextmanager
def short_operations(threads: Threads | None = None) -> Iterator[Threads]:
    """Use the cores as suits many short operations, and restore torch's number of threads at the end.

    Args:
        threads: the numbers; default: those of `choose`.

    Yields:
        The numbers in force.

    >>> with short_operations(Threads(torch=1, workers=2)):
    ...     torch.get_num_threads(), workers()
    (1, 2)
    """
    chosen = threads or choose()
    before = torch.get_num_threads()
    torch.set_num_threads(chosen.torch)
    try:
        with set_within(_in_force, chosen):
            yield chosen
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let each operation of NumPy and SciPy run on one thread, and restore their numbers at the end."""
    found = _blas()
    if all(library.get_num_threads() == 1 for library in found.lib_controllers):
        yield
        return
    with found.limit(limits=1):
        yield


@cache
def _blas() -> Any:
    """Return the libraries of linear algebra that NumPy and SciPy have loaded; finding them takes a while."""
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
