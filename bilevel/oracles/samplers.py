"""Samplers: which batch of the data a step sees, as a pure function of the index of the step.

Nothing is drawn from a state that moves: a reverse sweep, the recomputation between two checkpoints and a run that
resumes all ask for the batch of step k again and get the same numbers.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.options import is_int, require_value
from bilevel.core.tree import Tree


@runtime_checkable
class Sampler(Protocol):
    """What `BilevelProblem(sampler=...)` takes.

    A sampler may also have a method ``between_steps(outer_step)``, a batch in the place of `full` for each outer step.
    """

    def __call__(self, step: int) -> Tree:
        """Return the batch of a step, the same one whenever it is asked for."""

    def full(self) -> Tree:
        """Return the batch on which everything that is not a step is evaluated: residuals, curvature, linear solves."""


ORDER, EVALUATION, ALL, EXAMPLES = range(4)
"""What is drawn: the order of an epoch, an evaluation batch, augmentation of all examples, and of those of a step."""


def seed_of(what: int, seed: int, index: int = 0) -> int:
    """Return the seed under which something is drawn: that of an epoch, an outer step or a step, all independent."""
    return _number(seed, index, what)


def keyed_generator(*key: int) -> torch.Generator:
    """Return a generator whose numbers follow from a few ints that are not negative, such as (seed, index)."""
    return torch.Generator().manual_seed(_number(*key))


def _number(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


def check_options(owner: str, seed: Any, evaluation_size: Any, rows: int) -> None:
    """Refuse what is no seed, and an evaluation batch that the data cannot fill."""
    require_value(f"{owner}.seed", seed, "an int that is not negative", is_int(seed, 0))
    if evaluation_size is not None and not (is_int(evaluation_size) and evaluation_size <= rows):
        raise ValueError(
            f"`{owner}.evaluation_size` must be an int from 1 to the {rows} rows of the data or None, "
            f"got {evaluation_size!r}."
        )


class MiniBatches:
    """Shuffled mini-batches: each epoch goes once through the rows, in an order that follows from (seed, epoch).

    With n rows and batches of b, step k takes batch ``k mod floor(n / b)`` of epoch ``floor(k / floor(n / b))``. The
    n mod b rows that are left over in an epoch wait for another one, so that all batches have the same shape.

    Args:
        data: a tree of tensors with the same number of rows, such as ``(X, y)``.
        batch_size: rows in a batch.
        seed: an int that is not negative; the order is the same on every device.
        evaluation_size: rows of the batch on which everything that is no inner step is evaluated (residuals, measured
            step sizes, linear systems): drawn anew for each outer step, the same throughout it. Default: all rows.

    Raises:
        ValueError: for data without rows or with different numbers of them, and for a batch larger than the data.

    >>> batches = MiniBatches(torch.arange(5), batch_size=2, seed=0)
    >>> torch.equal(batches(7), batches(7)), batches(7).shape
    (True, torch.Size([2]))
    >>> sorted(torch.cat([batches(0), batches(1)]).tolist())
    [0, 1, 2, 3]
    """

    def __init__(self, data: Tree, batch_size: int, seed: int = 0, *, evaluation_size: int | None = None) -> None:
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
        check_options("MiniBatches", seed, evaluation_size, self._rows)
        self._data, self._size, self._seed, self._evaluation_size = data, batch_size, seed, evaluation_size
        self._device = leaves[0].device
        self._shuffled: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> Tree:
        epoch, position = divmod(step, self._rows // self._size)
        # Another thread may be in another epoch: the attribute is read once.
        shuffled = self._shuffled
        if shuffled is None or shuffled[0] != epoch:
            self._shuffled = shuffled = (epoch, self._order(seed_of(ORDER, self._seed, epoch)))
        return self._at(shuffled[1][position * self._size : (position + 1) * self._size])

    def full(self) -> Tree:
        """Return all rows."""
        return self._data

    def between_steps(self, outer_step: int) -> Tree:
        """Return the batch of everything that is not an inner step, in a given outer step."""
        if self._evaluation_size is None:
            return self._data
        return self._at(self._order(seed_of(EVALUATION, self._seed, outer_step))[: self._evaluation_size])

    def partition(self) -> list[Tree] | None:
        """Return all rows as batches that stay the same, in the order of the first epoch; None where rows are left."""
        if self._rows % self._size:
            return None
        shuffled = self._at(self._order(seed_of(ORDER, self._seed)))
        parts = [torch.split(leaf, self._size) for leaf in tree.leaves(shuffled)]
        return [tree.rebuild(shuffled, [part[i].contiguous() for part in parts]) for i in range(len(parts[0]))]

    def _at(self, rows: Tensor) -> Tree:
        return tree.tree_map(lambda leaf: leaf.index_select(0, rows), self._data)

    def _order(self, seed: int) -> Tensor:
        return torch.randperm(self._rows, generator=torch.Generator().manual_seed(seed)).to(self._device)
