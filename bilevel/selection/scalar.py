"""The best single penalty of a model."""

from __future__ import annotations

import numpy as np

from bilevel.criteria.criterion import Array, Criterion, Evaluation
from bilevel.criteria.penalties import Penalties
from bilevel.selection.descend import Tuned, box, tune

POINTS = 9
"""Penalties that are looked at first, from strong to weak."""
INSIDE = (3.0, 4.0)
"""How far the strongest and the weakest of them are inside the box."""
DEEPER = (3.0, 6.0, 9.0, 12.0)
"""How far below the box penalties are looked at where the least of it is the best, and squared losses still fall."""


FEW = 5
"""Evaluations of a line search after a rough scan."""


def best_penalty(
    criterion: Criterion,
    *,
    candidates: Array | None = None,
    start: float | None = None,
    tol: float = 1e-6,
    steps: int = 25,
) -> Tuned:
    """Return the single penalty of all coefficients with the least criterion: a coarse scan, then a line search.

    Args:
        criterion: with any penalties; the result is of its form with one.
        candidates: log penalties, of which the best is taken, without a descent; None for any.
        start: a log penalty that the descent begins at, in place of the scan.
        tol: relative gain at which the search ends.
        steps: its most steps.
    """
    one = criterion
    if criterion.penalties.size > 1:
        one = criterion.with_penalties(Penalties.scalar(criterion.data.features, criterion.penalties.outputs))
    low, high = box(criterion.data)
    if candidates is None and start is not None:
        return tune(one, np.array([start]), tol=tol, steps=steps)
    grid = np.linspace(high - INSIDE[0], low + INSIDE[1], POINTS) if candidates is None else np.sort(candidates)[::-1]
    grid = grid[:, None]
    first = one.rough() if candidates is None else one
    scanned = first.scan(grid)
    best = int(np.nanargmin([each.value for each in scanned]))
    if candidates is not None:
        known = tuple(scanned)
        return Tuned(grid[best], one.evaluate(grid[best], known[best].warm), len(grid) + 1, scanned=known)
    tuned = _between(one, grid, scanned, best, tol, steps, rough=first is not one)
    if tuned is None:
        tuned = tune(one, grid[best], tol=tol, steps=steps, warm=scanned[best].warm)
    tuned = tuned._replace(evaluations=tuned.evaluations + len(grid))
    # Of targets without noise; with fewer rows than columns, weaker penalties would change rounding errors alone.
    falls = tuned.u[0] <= low and one.loss.quadratic and one.data.features + 1 < one.data.counted
    return _below(one, tuned, low, tol, steps) if falls else tuned


def _between(
    one: Criterion, grid: Array, scanned: list[Evaluation], best: int, tol: float, steps: int, rough: bool
) -> Tuned | None:
    """Return the minimum between the best of a scan and its neighbour, by cubics through values and slopes.

    It ends where the slope, over the secant's curvature, leaves less than a hundredth of tol to be gained: flat
    directions have no better end. None where the slopes of the two do not hold a minimum between them. Of a rough scan,
    whose slopes may be wrong by more than that, a descent follows where a few evaluations do not end it.
    """
    here = scanned[best]
    side = best + 1 if here.gradient[0] > 0 else best - 1  # penalties fall along the grid
    if not 0 <= side < len(grid):
        return None
    u, v, there = float(grid[best, 0]), float(grid[side, 0]), scanned[side]
    if not here.gradient[0] * there.gradient[0] < 0:
        return None
    least, at = here, u
    for count in range(1, (min(steps, FEW) if rough else steps) + 1):
        new = _cubic(u, here, v, there)
        found = one.evaluate(np.array([new]), least.warm, second=False)
        slope = float(found.gradient[0])
        if not slope * here.gradient[0] < 0:
            u, here = v, there
        v, there = new, found  # the latest, and the last whose slope has the other sign
        if found.value <= least.value or (rough and count == 1):
            least, at = found, new
        curvature = (slope - here.gradient[0]) / (v - u)
        if slope**2 <= 0.02 * tol * abs(found.value) * curvature:
            return Tuned(np.array([at]), least, count)
    if rough:
        tuned = tune(one, np.array([at]), tol=tol, steps=steps, warm=least.warm)
        return tuned._replace(evaluations=tuned.evaluations + count)
    return Tuned(np.array([at]), least, steps, converged=False)


def _cubic(u: float, here: Evaluation, v: float, there: Evaluation) -> float:
    """Return the minimum between u and v, whose slopes have opposite signs, of the cubic with their values and slopes.

    Nocedal and Wright 2006, equation 3.59.
    """
    g, h = float(here.gradient[0]), float(there.gradient[0])
    middle = g + h - 3.0 * (here.value - there.value) / (u - v)
    root = float(np.copysign(np.sqrt(middle**2 - g * h), v - u))
    return v - (v - u) * (h + root - middle) / (h - g + 2.0 * root)


def _below(one: Criterion, least: Tuned, low: float, tol: float, steps: int) -> Tuned:
    """Return the best penalty from the least of the box down to the last of `DEEPER`."""
    grid = low - np.array(DEEPER)[:, None]
    scanned = one.scan(grid)
    best = int(np.nanargmin([each.value for each in scanned]))
    if not scanned[best].value < (1.0 - tol) * least.evaluation.value:
        return least._replace(evaluations=least.evaluations + len(grid))
    tuned = tune(one, grid[best], tol=tol, steps=steps, warm=scanned[best].warm, low=low - DEEPER[-1])
    return tuned._replace(evaluations=tuned.evaluations + least.evaluations + len(grid))
