"""The path of tuned penalties from one for all, under a weaker and weaker hyperprior."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.criteria.criterion import Array, Criterion, Evaluation
from bilevel.selection.descend import Hyperprior, Tuned, box, tune
from bilevel.selection.scalar import best_penalty

TAUS = (1.0, 0.3, 0.1, 0.03, 0.01)
MANY_ROWS = (0.003, 0.001)
"""Weaker hyperpriors, for more than ten rows for each penalty."""
ROOM, FLAT = (8.0, 6.0), 0.01
"""A path begins at most this far below and above `LinearData.level`, where that costs at most this part of the
criterion. A single penalty at its least interpolates the rows, as larger ones do, but no penalty could fall from there;
one at its largest has no slope."""
STEPS, TOL = 3, 3e-3
"""How far each descent of tuned penalties goes: those that go further fit the rows more, and do not predict better."""


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
        scanned: of the first point, the criterion at every candidate: see `Tuned`.
    """

    tau: float
    u: Array
    evaluation: Evaluation
    evaluations: int
    prior: Hyperprior | None = None
    converged: bool = True
    scanned: tuple[Evaluation, ...] = ()


def default_taus(rows: int, penalties: int) -> tuple[float, ...]:
    """Return the weights of the hyperprior that a path goes through."""
    return TAUS + (MANY_ROWS if rows > 10 * penalties else ())


def follow(
    criterion: Criterion,
    taus: Sequence[float],
    *,
    anchored: bool,
    tol: float = 1e-6,
    steps: int = 25,
    converge: bool = False,
    candidates: Array | None = None,
    start: float | None = None,
) -> Iterator[PathPoint]:
    """Yield the points of `path`, each when it is asked for."""
    penalties = criterion.penalties
    single = best_penalty(criterion, candidates=candidates, start=start, tol=tol, steps=steps)
    u, warm = np.full(penalties.size, single.u[0]), single.evaluation.warm
    yield PathPoint(
        math.inf, u, single.evaluation, single.evaluations, converged=single.converged, scanned=single.scanned
    )
    if penalties.size == 1:
        return
    unit = criterion.unit(single.evaluation.value)
    tol, steps = (tol, steps) if converge else (TOL, STEPS)
    begin = _begin(criterion, single)
    u = np.full(penalties.size, begin)
    known = None  # of one penalty, there are no derivatives by many
    low = min(begin, box(criterion.data)[0])
    for tau in taus:
        prior = Hyperprior(tau * unit, penalties.weights, begin if anchored else None)
        tuned = tune(criterion, u, prior, tol=tol, steps=steps, warm=warm, known=known, low=low)
        u, known = tuned.u, tuned.evaluation
        yield PathPoint(tau, u, tuned.evaluation, tuned.evaluations, prior, tuned.converged or not converge)


def _begin(criterion: Criterion, single: Tuned) -> float:
    """Return the log penalty that a path begins at, given the best single one: from there all must be able to move."""
    best, centre = float(single.u[0]), criterion.data.level
    begin = float(np.clip(best, centre - ROOM[0], centre + ROOM[1]))
    if begin == best:
        return best
    there = criterion.evaluate(np.full(criterion.penalties.size, begin), single.evaluation.warm, second=False)
    return begin if there.value <= (1 + FLAT) * single.evaluation.value else best


def path(
    criterion: Criterion, taus: Sequence[float] | None = None, *, anchored: bool | None = None, **options: Any
) -> list[PathPoint]:
    """Return the tuned penalties for one penalty, and then for every tau, each from the one before it.

    ``F(u) = criterion(u) + tau unit sum_j c_j (u_j - m)^2``, with `Criterion.unit` and c_j the share of the
    coefficients of a penalty. m is the mean of u. With as many features as rows, where that would let all penalties
    sink until the rows are interpolated, it is the best single penalty.

    Args:
        criterion: of the penalties.
        taus: decreasing; None for `default_taus`.
        anchored: whether m is the best single penalty; None: see above.
        options: `tol`, relative gain at which the descent of the single penalty ends, and `steps`, its most steps;
            `converge`, whether tuned penalties are descended as far, and not only by the few steps after which they
            begin to fit the rows; `candidates`, log penalties of which the single one is the best; `start`, a log
            penalty that its search begins at in place of a scan.
    """
    taus = default_taus(criterion.data.counted, criterion.penalties.size) if taus is None else taus
    return list(follow(criterion, taus, anchored=is_wide(criterion) if anchored is None else anchored, **options))


def is_wide(criterion: Criterion) -> bool:
    """Return whether there are as many features as rows."""
    return criterion.data.features >= criterion.data.counted
