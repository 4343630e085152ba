"""What the benchmarks share: alternatives timed in turn in one run, medians, one JSON line for each measurement."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleave(
    alternatives: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    at_least: float = 0.0,
) -> dict[str, list[float]]:
    """Return the seconds of each alternative, called in turn after one warm-up each.

    A busy machine slows neighbours in time alike, so ratios are taken within a round; ``time.process_time`` as the
    clock leaves out what other processes do. Alternatives that take less than `at_least` seconds are called until so
    many have gone by, and the mean of all but a first one counts: that finds the caches full of what others have left.
    """
    calls = {}
    for name, function in alternatives.items():
        function()
        start = clock()
        function()
        calls[name] = max(1, math.ceil(at_least / max(clock() - start, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, function in alternatives.items():
            if at_least:
                function()
            start = clock()
            for _ in range(calls[name]):
                function()
            seconds[name].append((clock() - start) / calls[name])
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Return the median over rounds of seconds[over] / seconds[under]."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median seconds of each alternative."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def emit(name: str, measured: float, asked: str, ok: bool, **details: Any) -> bool:
    """Print one measurement as a JSON line and return whether it is as asked."""
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"name": name, "measured": measured, "asked": asked, "ok": ok} | details | machine), flush=True)
    return ok


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ``|value - truth| / |truth|``."""
    return float(torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth))
