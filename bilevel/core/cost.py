"""Counted cost: oracle calls by kind, gradient-equivalents, seconds, peak memory.

One gradient-equivalent is one gradient of the inner loss. The weights below are the usual operation counts of
reverse-mode differentiation (a gradient is about three forward passes; a Hessian-vector product about two gradients;
the joint product ``v -> (H v, C' v)`` adds the cross part), and this is the only place that holds them.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

WEIGHTS: Mapping[str, float] = {
    "value": 1 / 3,  # inner loss alone
    "gradient": 1.0,  # gradient of the inner loss
    "hvp": 2.0,  # H v
    "cross": 1.0,  # C' v
    "vjp": 3.0,  # (H v, C' v)
    "jvp": 3.0,  # H v + C du
    "hvp_vjp": 4.0,  # VJP of (params, hparams) -> H v: third derivatives
    "curvature": 20.0,  # a dense Hessian by one matrix product, to be kept (10 to 50 gradients, by size)
    "outer": 1.0,  # outer loss with its gradients
}


@dataclass(frozen=True)
class Cost:
    """What a result took.

    Attributes:
        counts: oracle calls by kind; the kinds are the keys of `WEIGHTS`.
        seconds: wall-clock time.
        peak_memory: bytes above the level at the start, or None where the system does not tell, or takes long to.
        memory_kind: where the figure comes from.

    >>> Cost({"gradient": 10, "hvp": 5}).gradient_equivalents
    20.0
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: int | None = None
    memory_kind: str = "none"

    @property
    def gradient_equivalents(self) -> float:
        """The counts, weighted: 1 is one gradient of the inner loss."""
        return float(sum(WEIGHTS[kind] * count for kind, count in self.counts.items()))


MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)
"""The fields of glibc's ``struct mallinfo2``, in their order."""


@cache
def _mallinfo() -> Any:
    """Return glibc's allocation counters, or None on other systems."""

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]

    try:
        function = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    function.restype = Info
    return function


def allocated_bytes() -> int | None:
    """Return the bytes that live allocations of this process hold on the CPU (glibc), or None elsewhere."""
    if (function := _mallinfo()) is None:
        return None
    info = function()
    return int(info.uordblks + info.hblkhd)


class _Looks:
    """Looks at the allocations of the process, which take at most a share of its time.

    glibc walks all free pieces of the heap: 10 us in a young process, 10 ms where many small pieces lie about.
    """

    SHARE = 0.02
    CHEAP = 1e-4  # seconds; such looks are always taken

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._last = self._spent = 0.0

    def take(self, due: bool = False) -> int | None:
        """Return `allocated_bytes`, or None where looks take too long by now; one that is `due` is always taken."""
        now = time.perf_counter()
        if not due and self._last > self.CHEAP and self._spent > self.SHARE * (now - self._since):
            return None
        found = allocated_bytes()
        self._last = time.perf_counter() - now
        self._spent += self._last
        return found


_LOOKS = _Looks()


class Meter:
    """Measures seconds and peak memory on a device between its creation and `read`.

    On CUDA the allocator's own peak counter is read. On the CPU the live allocations of the process are sampled where
    `sample` is called: estimators do so where they hold most. Where such looks would take more than a fiftieth of the
    process's time, a meter goes without (`Cost.peak_memory` is None); `memory=False` always leaves them out.
    """

    def __init__(self, device: torch.device, memory: bool = True) -> None:
        self._device = device
        self.counts: Counter[str] = Counter()
        self._base: int | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if memory and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._base = torch.cuda.memory_allocated(device)
        elif memory and device.type == "cpu":
            self._base = _LOOKS.take()
        self._peak = self._base
        self._sampled = False
        self._start = time.perf_counter()

    def sample(self) -> None:
        """Look at the memory now."""
        if self._device.type == "cpu" and self._peak is not None:
            self._peak = max(self._peak, _LOOKS.take(due=not self._sampled) or 0)
            self._sampled = True

    def read(self) -> Cost:
        """Return the cost so far."""
        # Estimators look where they hold most; another look would only take its time.
        if not self._sampled:
            self.sample()
        kind = "none"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._base is not None and self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self._device)
            kind = "CUDA allocator peak"
        elif self._base is not None:
            kind = "live CPU allocations, sampled"
        peak = None if self._base is None or self._peak is None else self._peak - self._base
        return Cost(dict(self.counts), time.perf_counter() - self._start, peak, kind)
