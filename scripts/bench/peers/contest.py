"""The words of a contest: problems, their tasks, who takes part, and the ratio that is asked.

A file of problems defines ``PROBLEMS``. Nothing here or at the top of such a file imports torch, jax or a peer: the
parent process reads these definitions and must stay small, and each contestant imports only what it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MEMORY_FLOOR = 2**18
"""Bytes below which what a call takes cannot be told from the allocator's slack."""

Call = Callable[[], Any]
"""One timed call; returns the answer that is compared with the reference: an array of any shape, an estimate of this
library, whose certificate says which form ran, or a list of such."""


@dataclass(frozen=True)
class Task:
    """One thing that is timed.

    Args:
        words: what is timed, for the table.
        tolerance: relative error of the answer from which a contestant counts as wrong.
        per: how many results one call makes; times are divided by it.
        rounds: most rounds; slow contestants get fewer.
        unit: what one of the `per` results is called.
        timeout: seconds that one call may take, where the limit of the run is shorter.
        live: whether the peak of torch's live tensors in a warm call is measured, too.
    """

    words: str
    tolerance: float = 1e-4
    per: int = 1
    rounds: int = 9
    unit: str = ""
    timeout: float = 0.0
    live: bool = False


@dataclass(frozen=True)
class Contestant:
    """Somebody who takes part.

    Args:
        name: name in the tables.
        prepare: data -> {task: call}. Imports, compilation-free set-up and conversion of the data happen here, outside
            the clocks; a task that is missing is not run.
        package: distribution whose version is reported; empty for what is no peer and stands beside.
        note: a remark for the table.
        compiles: key of the task whose first call compiles, or "*": however long, it never stands for a warm call.
    """

    name: str
    prepare: Callable[[Any], Mapping[str, Call]]
    package: str = ""
    note: str = ""
    compiles: str = ""

    @property
    def ours(self) -> bool:
        """Whether this is an entry of this library."""
        return self.package == "bilevel"


@dataclass(frozen=True)
class Asked:
    """A ratio to reach: time (or memory) of the best of `rivals` over that of the best of `entries`; or a time.

    Args:
        task: key of the task.
        entries: names of our entries, of which the best counts.
        rivals: names of the peers, with * as in file names, of which the best that is right counts.
        at_least: the ratio to reach, or None where it is only shown.
        aim: the ratio to aim at, or None.
        measure: "cpu" or "wall" (time), "first_cpu" (time of the first call), "memory" (what a warm call takes), "live"
            (peak of live tensors), or "memory of TASK": the entry's own memory for another task over that for this
            one, no rival taking part.
        words: how the rivals are called in the table.
        at_most: seconds that the entry may take, in place of a ratio; those of the best rival, if there is one, are
            taken off.
    """

    task: str
    entries: Sequence[str]
    rivals: Sequence[str]
    at_least: float | None = None
    aim: float | None = None
    measure: str = "cpu"
    words: str = ""
    at_most: float | None = None


@dataclass(frozen=True)
class Problem:
    """A problem with its contestants.

    Args:
        key: short name, as in ``--only``.
        title: one line.
        words: the set-up, in sentences.
        sizes: {"full": {...}, "quick": {...}}, arguments of `data`.
        data: makes the data, deterministically, from a seed and a size.
        reference: data -> {task: answer}, independent of the library, in higher precision or to a tighter tolerance.
        tasks: what is timed, by key.
        contestants: who takes part.
        asked: the ratios to reach.
        absent: {name: why it does not take part}.
        grade: (data, task, answer as a flat list) -> what is compared with the reference, outside the clocks.
    """

    key: str
    title: str
    words: str
    sizes: Mapping[str, Mapping[str, Any]]
    data: Callable[..., Any]
    reference: Callable[[Any], Mapping[str, Any]]
    tasks: Mapping[str, Task]
    contestants: Sequence[Contestant]
    asked: Sequence[Asked] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    grade: Callable[[Any, str, list[float]], Any] | None = None
