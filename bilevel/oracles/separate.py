"""Tasks that share nothing but the hyperparameters: how many of them are solved at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.core.declared import given_after
from bilevel.core.tree import Tree

MOST = 3_000_000
"""Bytes that a step of the tasks that are solved at once may hold on a CPU: about what one core keeps at hand."""
FEWEST = 4
"""Below so many at once, one after the other is quicker there."""
TOGETHER = ("inner_loss", "outer_loss", "outer_value_and_grads", "gradient_graph", "inner_problem", "bind", "start")
"""What `separate` speaks of: a class that gives one of these anew may mix the tasks."""
SHARE = 4
"""On a GPU the steps of the tasks that are solved at once may hold one part in so many of its free memory."""


@dataclass(frozen=True)
class Separate:
    """A problem whose inner loss is the sum, and whose outer loss is the mean, of those of tasks.

    Every leaf of params has a row for each task, and no task sees another's.

    Attributes:
        count: number of tasks.
        some: (low, high) -> the problem of the tasks low, ..., high - 1.
        nbytes: what a step of one task holds: its params, and what autograd keeps for the way back.
        alike: whether they can be solved side by side.
        moving: index -> the problem of one task whose start moves with the hyperparameters, and whose params differ
            from those of `some` by that start alone; None where there is none.
    """

    count: int
    some: Callable[[int, int], Any]
    nbytes: int
    alike: bool = True
    moving: Callable[[int], Any] | None = None

    def at_once(self, steps: int, device: torch.device) -> int:
        """Return how many tasks are solved at once, each by so many steps; 1 for one after the other.

        >>> each = Separate(count=64, some=lambda low, high: None, nbytes=55_000)
        >>> each.at_once(5, torch.device("cpu"))
        54
        """
        if not self.alike:
            return 1
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return max(1, min(self.count, int(free / (SHARE * self.nbytes * max(steps, 1)))))
        fit = MOST // max(self.nbytes, 1)
        return min(self.count, fit) if fit >= FEWEST else 1


def in_words(count: int, at_once: int) -> str:
    """Return how so many tasks are solved.

    >>> in_words(64, 54), in_words(8, 1)
    ('64, 54 at a time', '8, one after the other')
    """
    how = "side by side" if at_once >= count else "one after the other" if at_once == 1 else f"{at_once} at a time"
    return f"{count}, {how}" if count > 1 else "1"


class Separable:
    """What a problem may say of tasks that it is made of; by default, nothing."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if given_after(cls, TOGETHER, "separate"):
            cls.separate = Separable.separate  # type: ignore[method-assign]

    def separate(self) -> Separate | None:
        """Return the tasks that it is made of, where these share nothing but the hyperparameters; None by default."""
        return None

    def moving_start(self, hparams: Tree) -> Tree | None:
        """Return a start that moves with the hyperparameters, with its graph; None by default: starts are constants.

        ``FullUnroll`` by autograd's graph alone knows of it.
        """
        return None
