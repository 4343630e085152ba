"""Folds of rows: shuffled, stratified by class, by whole groups, or contiguous blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.intp]


def make_folds(
    rows: int, folds: int = 5, *, labels: Any = None, groups: Any = None, ordered: bool = False, seed: int = 0
) -> list[tuple[Indices, Indices]]:
    """Return pairs of indices, (training rows, rows held out), that hold out every row once.

    Args:
        rows: how many there are.
        folds: how many pairs.
        labels: of classes, (rows,): every fold holds out its share of each.
        groups: (rows,): the rows of a group are held out together.
        ordered: hold out contiguous blocks, for rows in an order of time or place.
        seed: of the shuffle.

    Raises:
        ValueError: in one sentence, for more folds than rows or groups.

    >>> [held.tolist() for _, held in make_folds(5, 2, ordered=True)]
    [[0, 1, 2], [3, 4]]
    """
    names, owner = np.unique(np.arange(rows) if groups is None else np.asarray(groups), return_inverse=True)
    what = "rows" if groups is None else "groups of rows"
    if not 2 <= folds <= len(names):
        raise ValueError(f"`folds` must be from 2 to {len(names)}, the number of {what}, got {folds}.")
    if len(owner) != rows:
        raise ValueError(f"`groups` must name the group of each of the {rows} rows, got {len(owner)}.")
    rng = np.random.default_rng(seed)
    if groups is not None:
        assigned = _balanced(np.bincount(owner), folds, rng)[owner]
    elif ordered:
        assigned = np.repeat(np.arange(folds), [len(part) for part in np.array_split(np.arange(rows), folds)])
    else:
        # Shuffled rows, class by class, are dealt to the folds in turn.
        order = rng.permutation(rows)
        if labels is not None:
            order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
        assigned = np.empty(rows, dtype=np.intp)
        assigned[order] = np.arange(rows) % folds
    return [(np.flatnonzero(assigned != fold), np.flatnonzero(assigned == fold)) for fold in range(folds)]


def _balanced(sizes: Indices, folds: int, rng: np.random.Generator) -> Indices:
    """Return the fold of each group: from the largest on, each goes to the fold with the fewest rows."""
    filled, assigned = np.zeros(folds, dtype=np.intp), np.empty(len(sizes), dtype=np.intp)
    order = rng.permutation(len(sizes))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        assigned[group] = np.argmin(filled)
        filled[assigned[group]] += sizes[group]
    return assigned
