"""Whether the ranks of a process group have the same problem, compared in the store of the group, where nobody hangs.

A collective operation waits for ranks that may never come (one that failed before, or a call on rank 0 alone). Here
each rank writes what it found under a key of the store and waits for the others' keys for a limited time.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilevel.core.status import warn
from bilevel.oracles.losses import Losses

WAIT = 10.0
"""Seconds that a rank waits for the others; once they have not come, a tenth of it."""
PAUSE = 0.005
_met: Counter[str] = Counter()
"""How often all ranks have met at a problem of some losses."""
_alone = False


PARALLEL = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
"""Classes that split a module or its data over ranks, by name: importing some of them takes seconds."""


class RanksApartError(ValueError):
    """What one rank hears of the others."""


def active() -> bool:
    """Whether there is a process group of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def parallel_class(part: nn.Module) -> str | None:
    """Return the name of the class that splits a module over ranks, or None."""
    return next((cls.__name__ for cls in type(part).__mro__ if cls.__name__ in PARALLEL), None)


class Agreement:
    """What one rank says of a problem and hears from the others; without a process group, nothing."""

    def before_communication(self) -> None:
        """Wait until all ranks are about to communicate."""

    def compare(self, values: Sequence[Tensor | None]) -> None:
        """Refuse values that differ between ranks."""


@contextmanager
def agreement(problem: Losses) -> Iterator[Agreement]:
    """Yield what compares a problem between ranks; what fails inside the block is told to the others."""
    if problem.purity.known or not active():
        yield Agreement()
        return
    together = _StoreAgreement(problem)
    try:
        yield together
    except Exception as error:
        together.failed(error)
        raise


class _StoreAgreement(Agreement):
    def __init__(self, problem: Losses) -> None:
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        # Where a rank calls more often than others, their problems still meet by their losses.
        code = [getattr(each, "__code__", None) for each in (getattr(problem, "inner_loss", None), *problem.functions)]
        self._label = "/".join([type(problem).__qualname__, *(f"{c.co_name}:{c.co_firstlineno}" for c in code if c)])
        self._prefix, self._communications = f"bilevel/{self._label}/{_met[self._label]}", 0
        self._late: list[int] = []

    def before_communication(self) -> None:
        self._communications += 1
        self._exchange(f"at {self._communications}", "here")
        if self._late:
            raise RanksApartError(
                f"a loss communicates between ranks, for which rank {self._late[0]} did not come within {WAIT:g} s: "
                "every rank must make the same calls."
            )

    def failed(self, error: Exception) -> None:
        """Tell the others that this rank refuses the problem, unless they did not come."""
        if not self._late:
            _met[self._label] += 1
            self._store.set(self._key("end", self._rank), json.dumps({"error": str(error)[:500]}))

    def compare(self, values: Sequence[Tensor | None]) -> None:
        said = self._exchange("end", json.dumps({"numbers": _numbers(values)}))
        if self._late:
            warn(
                f"rank {self._late[0]} of the process group did not look at this problem within {WAIT:g} s, so its "
                "numbers were not compared with those of this rank.",
            )
            return
        numbers = [json.loads(said[rank])["numbers"] for rank in range(self._size)]
        apart = max(_apart(numbers[0], other) for other in numbers[1:])
        if apart > 0:
            raise RanksApartError(
                f"this problem gives other numbers on other ranks of the process group (relative difference "
                f"{apart:.1e}): give every rank the same data, start and hparams and losses that do not communicate, "
                "or solve problems that differ before torch.distributed.init_process_group."
            )
        _met[self._label] += 1

    def _key(self, stage: str, rank: int) -> str:
        return f"{self._prefix}/{stage}/{rank}"

    def _exchange(self, stage: str, said: str) -> dict[int, str]:
        """Return what each rank said at a stage; ValueError where one has failed; `_late` are those not heard."""
        global _alone
        self._store.set(self._key(stage, self._rank), said)
        heard: dict[int, str] = {self._rank: said}
        end = time.monotonic() + (WAIT / 10 if _alone else WAIT)
        while len(heard) < self._size and time.monotonic() < end:
            for rank in set(range(self._size)) - heard.keys():
                for each in (stage, "end"):
                    if rank not in heard and self._store.check([self._key(each, rank)]):
                        heard[rank] = self._store.get(self._key(each, rank)).decode()
                if heard.get(rank, "").startswith('{"error"'):
                    raise RanksApartError(f"rank {rank} refuses this problem: {json.loads(heard[rank])['error']}")
            time.sleep(PAUSE if len(heard) < self._size else 0.0)
        self._late = sorted(set(range(self._size)) - heard.keys())
        if self._late:
            # The next meeting is the same for those who did not come.
            _alone = True
            for each in {stage, *(f"at {index + 1}" for index in range(self._communications))}:
                self._store.delete_key(self._key(each, self._rank))
        return heard


def _numbers(values: Sequence[Tensor | None]) -> list[list[float] | None]:
    """Return two numbers of each tensor that any change of it changes, and its rounding."""
    result: list[list[float] | None] = []
    for value in values:
        if value is None:
            result.append(None)
            continue
        flat = value.detach().double().reshape(-1)
        mixed = torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device).cos() * flat
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        result.append([float(torch.linalg.vector_norm(flat)), float(mixed.sum()), eps])
    return result


def _apart(one: list[Any], other: list[Any]) -> float:
    if len(one) != len(other):
        return math.inf
    largest = 0.0
    for mine, its in zip(one, other, strict=True):
        if mine is None or its is None:
            largest = largest if mine is its else math.inf
            continue
        size = max(mine[0], its[0])
        gap = max(abs(a - b) for a, b in zip(mine[:2], its[:2], strict=True))
        if not math.isnan(size) and gap > mine[2] ** 0.5 * size:
            largest = max(largest, gap / size)
    return largest
