"""The threads of a command: what it runs with, and what they cost on this machine."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace

import torch

from bilevel.config import ConfigError
from bilevel.core.threads import Threads, choose, short_operations

SIZE, REPEATS = 64, 31


def chosen_threads(arguments: Namespace) -> Threads:
    """Return the threads and workers of a command, from --threads, the environment or the machine."""
    try:
        return choose(arguments.threads)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def measured_threads(chosen: Threads) -> list[str]:
    """Return what commands use, what a short operation costs with one thread and with all, and how to change it."""
    every = torch.get_num_threads()
    times = [f"{1e3 * _seconds(1):.2g} ms with 1 thread"]
    if every > 1:
        times.append(f"{1e3 * _seconds(every):.2g} ms with {every}")
    threads, workers = str(chosen).split(" and ")
    return [
        f"commands use {threads} of torch, and {workers}, which share sweeps over the rows of large data",
        f"a short operation of torch, a {SIZE} x {SIZE} Cholesky solve, takes {', '.join(times)}",
        "--threads N, or OMP_NUM_THREADS, sets threads and at most as many workers; BILEVEL_WORKERS sets workers",
    ]


def _seconds(threads: int) -> float:
    """Return the median time of one short operation."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator)
    A, b = A @ A.t() + SIZE * torch.eye(SIZE, dtype=torch.float64), A[:, :1].clone()
    times = []
    with short_operations(Threads(threads, 1)):
        for _ in range(REPEATS):
            start = time.perf_counter()
            torch.cholesky_solve(b, torch.linalg.cholesky(A))
            times.append(time.perf_counter() - start)
    return statistics.median(times)
