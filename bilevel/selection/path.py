"""The path of tuned penalties from one for all, under a weaker and weaker hyperprior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bilevel.criteria.criterion import Array, Criterion, Evaluation
from bilevel.selection.descend import Hyperprior, tune
from bilevel.selection.scalar import best_penalty

TAUS = (1.0, 0.3, 0.1, 0.03, 0.01)
MANY_ROWS = (0.003, 0.001)
"""Weaker hyperpriors, for more than ten rows for each penalty."""
STEPS, TOL = 3, 3e-3
"""How far each descent goes. Penalties that are descended further fit the rows more, and do not predict better."""


@dataclass(frozen=True, eq=False)
class PathPoint:
    """A point of the path.

    Attributes:
        tau: weight of the hyperprior, as a part of the criterion's unit; infinite for one penalty.
        u: log penalties, (k,).
        evaluation: the criterion there; of the first point, that by the one penalty.
        evaluations: how many it took.
        prior: None for the first point.
        converged: whether the descent to it ended before the steps that were asked for were used up.
    """

    tau: float
    u: Array
    evaluation: Evaluation
    evaluations: int
    prior: Hyperprior | None = None
    converged: bool = True


def default_taus(rows: int, penalties: int) -> tuple[float, ...]:
    """Return the weights of the hyperprior that a path goes through."""
    return TAUS + (MANY_ROWS if rows > 10 * penalties else ())


def path(
    criterion: Criterion,
    taus: Sequence[float] | None = None,
    *,
    tol: float = TOL,
    steps: int | None = None,
    anchored: bool | None = None,
    candidates: Array | None = None,
    start: float | None = None,
) -> list[PathPoint]:
    """Return the tuned penalties for one penalty, and then for every tau, each from the one before it.

    ``F(u) = criterion(u) + tau unit sum_j c_j (u_j - m)^2``, with c_j the share of the coefficients of a penalty. m is
    the mean of u. With as many features as rows, where that would let all penalties sink until the rows are
    interpolated, it is the best single penalty.

    Args:
        criterion: of the penalties.
        taus: decreasing; None for `default_taus`.
        tol: relative gain at which each descent ends.
        steps: the most steps of each; None for `STEPS`, after which a descent has done what it is to do.
        anchored: whether m is the best single penalty; None: see above.
        candidates: log penalties of which the single one is the best; None for any.
        start: a log penalty that the search of the single one begins at; None for a scan.
    """
    penalties, data = criterion.penalties, criterion.data
    single = best_penalty(criterion, candidates=candidates, start=start)
    u = np.full(penalties.size, single.u[0])
    points = [PathPoint(math.inf, u, single.evaluation, single.evaluations, converged=single.converged)]
    if penalties.size == 1:
        return points
    anchored = data.features >= data.rows if anchored is None else anchored
    warm, unit = single.evaluation.warm, criterion.unit
    for tau in default_taus(data.rows, penalties.size) if taus is None else taus:
        prior = Hyperprior(tau * unit, penalties.weights, float(single.u[0]) if anchored else None)
        tuned = tune(criterion, u, prior, tol=tol, steps=STEPS if steps is None else steps, warm=warm)
        u, warm = tuned.u, tuned.evaluation.warm
        points.append(PathPoint(tau, u, tuned.evaluation, tuned.evaluations, prior, tuned.converged or steps is None))
    return points
