"""The best single penalty of a model."""

from __future__ import annotations

import numpy as np

from bilevel.criteria.criterion import Criterion
from bilevel.criteria.penalties import Penalties
from bilevel.selection.descend import Tuned, box, tune

POINTS = 9
"""Penalties that are looked at first, from strong to weak."""
INSIDE = (3.0, 4.0)
"""How far the strongest and the weakest of them are inside the box."""


def best_penalty(criterion: Criterion, *, tol: float = 1e-6, steps: int = 15) -> Tuned:
    """Return the single penalty of all coefficients with the least criterion: a coarse scan, then a descent.

    Args:
        criterion: with any penalties; the result is of its form with one.
        tol: relative gain at which the descent ends.
        steps: its most steps.
    """
    one = criterion.with_penalties(Penalties.scalar(criterion.data.features, criterion.penalties.outputs))
    low, high = box(criterion.data.rows)
    grid = np.linspace(high - INSIDE[0], low + INSIDE[1], POINTS)[:, None]
    scanned = one.scan(grid)
    best = int(np.nanargmin([each.value for each in scanned]))
    tuned = tune(one, grid[best], tol=tol, steps=steps, warm=scanned[best].warm)
    return tuned._replace(evaluations=tuned.evaluations + len(grid))
