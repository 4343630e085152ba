"""Samplers: which batch of the data an inner step sees, as a pure function of the index of the step.

Nothing is drawn from a state that moves: a reverse sweep, the recomputation between two checkpoints and a run that
resumes all ask for the batch of step k again and get the same numbers.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bilevel import tree
from bilevel.options import is_int
from bilevel.tree import Tree


@runtime_checkable
class Sampler(Protocol):
    """What `BilevelProblem(sampler=...)` takes."""

    def __call__(self, step: int) -> Tree:
        """Return the batch of an inner step, the same one whenever it is asked for."""

    def full(self) -> Tree:
        """Return the batch on which everything that is not a step is evaluated: residuals, curvature, linear solves."""


class MiniBatches:
    """Shuffled mini-batches: each epoch goes once through the rows, in an order that follows from (seed, epoch).

    With n rows and batches of b, step k takes batch ``k mod floor(n / b)`` of epoch ``floor(k / floor(n / b))``. The
    n mod b rows that are left over in an epoch wait for another one, so that all batches have the same shape.

    Args:
        data: a tree of tensors with the same number of rows, such as ``(X, y)``.
        batch_size: rows in a batch.
        seed: an int that is not negative; the order is the same on every device.

    Raises:
        ValueError: for data without rows or with different numbers of them, and for a batch larger than the data.

    >>> batches = MiniBatches(torch.arange(5), batch_size=2, seed=0)
    >>> torch.equal(batches(7), batches(7)), batches(7).shape
    (True, torch.Size([2]))
    >>> sorted(torch.cat([batches(0), batches(1)]).tolist())
    [0, 1, 2, 3]
    """

    def __init__(self, data: Tree, batch_size: int, seed: int = 0) -> None:
        leaves = tree.leaves(data)
        rows = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else 0 for leaf in leaves}
        if len(rows) != 1 or 0 in rows:
            raise ValueError("`MiniBatches.data` must hold tensors with the same number of rows, such as (X, y).")
        (self._rows,) = rows
        if not is_int(batch_size) or batch_size > self._rows:
            raise ValueError(
                f"`MiniBatches.batch_size` must be an int from 1 to the {self._rows} rows of the data, "
                f"got {batch_size!r}."
            )
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"`MiniBatches.seed` must be an int that is not negative, got {seed!r}.")
        self._data, self._size, self._seed = data, batch_size, seed
        self._device = leaves[0].device
        self._shuffled: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> Tree:
        """Return the batch of a step."""
        epoch, position = divmod(step, self._rows // self._size)
        rows = self._order(epoch)[position * self._size : (position + 1) * self._size]
        return tree.tree_map(lambda leaf: leaf.index_select(0, rows), self._data)

    def full(self) -> Tree:
        """Return all rows."""
        return self._data

    def _order(self, epoch: int) -> Tensor:
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = torch.randperm(self._rows, generator=keyed_generator(self._seed, epoch))
            self._shuffled = (epoch, order.to(self._device))
        return self._shuffled[1]


def keyed_generator(*key: int) -> torch.Generator:
    """Return a generator whose numbers follow from a few ints that are not negative, such as (seed, index)."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)
