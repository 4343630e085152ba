"""`Design`: the training inputs of a linear model, swept in blocks of rows by a few threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from bilevel.core import threads

ROWS = 2500
"""Rows of a block: long enough that calls do not matter, short enough that every worker gets some."""
LARGE = 2_000_000
"""Entries from which a sweep is split: one pass then takes about a millisecond, many times what handing it out does."""

Part = TypeVar("Part")


class Design:
    """Feature-major inputs, of shape ([batch,] features, rows), as blocks of columns that are views of them.

    Large inputs in main memory are split, and `threads.workers` threads sweep the blocks at once. The blocks depend on
    the shape alone and their results are joined in their order: the number of workers changes no bit of a result.

    >>> design = Design(torch.eye(2))
    >>> design.total(lambda block, X, rows: X.sum(1))
    tensor([1., 1.])
    """

    def __init__(self, X: Tensor) -> None:
        rows = X.shape[-1]
        length = ROWS if X.device.type == "cpu" and X.numel() >= LARGE else rows
        self.rows = [slice(start, min(start + length, rows)) for start in range(0, rows, length)]
        self.blocks = [X] if len(self.rows) == 1 else [X[..., part] for part in self.rows]

    def sweep(self, visit: Callable[[int, Tensor, slice], Part]) -> list[Part]:
        """Return what `visit` makes of every block, in their order; autograd does not record it.

        Args:
            visit: (index of the block, its inputs, its rows) -> anything; called in any order, in other threads.
        """
        if len(self.blocks) == 1:
            with torch.no_grad():
                return [visit(0, self.blocks[0], self.rows[0])]

        def share(first: int, step: int) -> list[Part]:
            # Whether autograd records is each thread's own.
            with torch.no_grad():
                every = range(first, len(self.blocks), step)
                return [visit(block, self.blocks[block], self.rows[block]) for block in every]

        count = min(threads.workers(), len(self.blocks))
        if count == 1:
            return share(0, 1)
        shares = list(threads.pool(count).map(lambda first: share(first, count), range(count)))
        return [shares[block % count][block // count] for block in range(len(self.blocks))]

    def total(self, visit: Callable[[int, Tensor, slice], Tensor]) -> Tensor:
        """Return the sum over the blocks of what `visit` makes of each."""
        first, *others = self.sweep(visit)
        for part in others:
            first = first + part
        return first
