"""`certify_range`: a proof that no single ridge penalty of a range is better than the one that was found."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria.criterion import Array, Criterion, given
from bilevel.criteria.data import LinearData
from bilevel.criteria.leave_one_out import RidgeLeaveOneOut
from bilevel.criteria.penalties import Penalties
from bilevel.criteria.splits import FoldCriterion
from bilevel.selection.honest import predictions
from bilevel.selection.scalar import best_penalty

FIRST = 16
"""Intervals that the range is cut into at first."""
MOST = 2000
"""Evaluations after which it gives up."""
NULL = 1e-13
"""Eigenvalues below this part of the largest are zero: they move no prediction."""


@dataclass(frozen=True)
class RangeCertificate:
    """What is proved of the criterion of one penalty on a range.

    Attributes:
        penalty: the best one that was found.
        value: the criterion there.
        lower: no penalty of the range has a smaller criterion, up to rounding errors.
        low: least penalty of the range.
        high: the largest.
        eps: ``lower >= (1 - eps) value`` was asked for.
        evaluations: how many it took, the search included.
    """

    penalty: float
    value: float
    lower: float
    low: float
    high: float
    eps: float
    evaluations: int

    @property
    def holds(self) -> bool:
        """Whether no penalty of the range is better than the one found by more than the share eps."""
        return self.lower >= (1.0 - self.eps) * self.value


def certify_range(criterion: Criterion, low: float = 1e-8, high: float = 1e8, eps: float = 1e-3) -> RangeCertificate:
    """Prove that no single penalty of a range is better than the best one found by more than the share eps.

    With the eigenvalues g of ``X'SX`` and ``phi_k(u) = g_k / (g_k + exp(u))``, a residual is
    ``N_i(u) = y_i - sum_k B_ik phi_k(u)``; that of leave-one-out is divided by
    ``q_i(u) = 1 - 1/n - sum_k C_ik phi_k(u)``.
    All derivatives of phi are at most ``phi (1 - phi)``, so with ``S = |B| max phi (1 - phi)`` and
    ``rho = C max phi (1 - phi) / min q`` over the interval, the third derivative of ``e = N / q`` is at most

        1/min q (S (1 + 6 rho + 6 rho^2) + max |N| (rho + 6 rho^2 + 6 rho^3))

    and ``R = r^3 / 6`` times that bounds what the second-order expansion p of e leaves out on ``|u - c| <= r``:

        criterion(u) >= 1/2 min_t mean p(t)^2 - mean (|e| + |e'| r + |e''| r^2 / 2) R

    Intervals whose bound is too low are halved, from 16 on.

    Args:
        criterion: exact leave-one-out, or K-fold, of ridge regression with one target.
        low: least penalty, of standardised columns and sums of losses.
        high: the largest.
        eps: share of the criterion.

    Returns:
        What is proved: it holds unless 2,000 evaluations were too few.

    Raises:
        ValueError: for another criterion, and a range that is none.

    >>> import numpy as np
    >>> from bilevel.criteria import LinearData
    >>> rng = np.random.default_rng(0)
    >>> X = rng.standard_normal((30, 4))
    >>> data = LinearData.of(X, X[:, 0] + rng.standard_normal(30))
    >>> certify_range(RidgeLeaveOneOut(data, Penalties.scalar(4))).holds
    True
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"the range of penalties must be 0 < low < high, got {low:g} and {high:g}.")
    ridge = isinstance(criterion, RidgeLeaveOneOut | FoldCriterion) and criterion.loss.quadratic
    if not ridge or criterion.data.y.dim() > 1:
        raise ValueError("certify_range takes leave-one-out or K-fold of ridge regression with one target.")
    rows = _folds(criterion) if isinstance(criterion, FoldCriterion) else _leave_one_out(criterion.data)
    left, right = math.log(low), math.log(high)
    radius = (right - left) / (2 * FIRST)
    waiting: list[tuple[float, float, float]] = []
    best, evaluations = (math.inf, left), 0

    def look(centre: float, radius: float) -> None:
        nonlocal best, evaluations
        value, bound = _bound(rows, centre, radius)
        evaluations += 1
        best = min(best, (value, centre))
        heapq.heappush(waiting, (bound, centre, radius))

    for index in range(FIRST):
        look(left + (2 * index + 1) * radius, radius)
    found = best_penalty(criterion, start=best[1])
    one = criterion.with_penalties(Penalties.scalar(criterion.data.features))
    end = np.clip(found.u, left, right)
    best = min(best, (float(one.evaluate(end, second=False).value), float(end[0])))
    evaluations += found.evaluations + 1
    while waiting[0][0] < (1.0 - eps) * best[0] and evaluations < MOST:
        _, centre, radius = heapq.heappop(waiting)
        for side in (-0.5, 0.5):
            look(centre + side * radius, 0.5 * radius)
    return RangeCertificate(math.exp(best[1]), best[0], min(waiting[0][0], best[0]), low, high, eps, evaluations)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Held-out rows of one spectrum.

    Attributes:
        spectrum: g, (r,).
        parts: B, (rows, r).
        target: y without the mean of the training rows, (rows,).
        share: weights of the rows in the criterion, (rows,), of all rows with sum one.
        leverages: C, (rows, r); None for folds.
        base: 1 minus the leverage of the intercept, (rows,).
    """

    spectrum: Array
    parts: Array
    target: Array
    share: Array
    leverages: Array | None = None
    base: Array | None = None


def _spectral(data: LinearData, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return eigenvalues g (r,), directions Q' (r, features), ``c = Q'X'S y`` (r,) and the mean target.

    The coefficients at the penalty a are ``Q (c / (g + a))``.

    Args:
        data: training rows.
        s: their weights.
    """
    mean = (data.y * s).sum() / s.sum() if data.intercept else data.y.new_zeros(())
    y, root = data.y - mean, s.sqrt()
    if data.features <= data.rows:
        values, Q = torch.linalg.eigh(data.gram(s))
        directions = Q.T
    else:
        values, U = torch.linalg.eigh(data.row_gram() * root[:, None] * root)
        directions = data.collect((U * root[:, None]).T) / values.clamp_min(1e-300).sqrt()[:, None]
    kept = values > NULL * values[-1]
    values, directions = values[kept], directions[kept]
    return values, directions, data.product(directions) @ (s * y), mean


def _leave_one_out(data: LinearData) -> list[_Rows]:
    g, directions, c, mean = _spectral(data, data.weights)
    B, s = data.product(directions).T, data.weights
    own = s / data.rows if data.intercept else torch.zeros_like(s)
    tensors = (g, B * (c / g), data.y - mean, s / data.rows, s[:, None] * B.square() / g, 1.0 - own)
    return [_Rows(*(each.double().cpu().numpy() for each in tensors))]


def _folds(criterion: FoldCriterion) -> list[_Rows]:
    data, found = criterion.data, []
    total = data.weights[criterion.held_out].sum()
    for train, held in criterion.folds:
        part = data.take(train)
        g, directions, c, mean = _spectral(part, data.weights[train])
        B = predictions(data, given(part, directions, 0.0))[:, held].T
        tensors = (g, B * (c / g), data.y[held] - mean, data.weights[held] / total)
        found.append(_Rows(*(each.double().cpu().numpy() for each in tensors)))
    return found


def _bound(parts: Sequence[_Rows], u: float, r: float) -> tuple[float, float]:
    """Return the criterion at u, and what it is at least on ``[u - r, u + r]``."""
    quartic, left_out = np.zeros(5), 0.0
    for rows in parts:
        phi, weak, strong = (rows.spectrum / (rows.spectrum + math.exp(at)) for at in (u, u - r, u + r))
        slope = phi * (1.0 - phi)
        bend = slope * (1.0 - 2.0 * phi)
        most = np.where((strong < 0.5) & (weak > 0.5), 0.25, np.maximum(weak * (1 - weak), strong * (1 - strong)))
        e, e1, e2 = rows.target - rows.parts @ phi, rows.parts @ slope, -(rows.parts @ bend)
        third = np.abs(rows.parts) @ most
        if rows.leverages is not None and rows.base is not None:
            q, q1, q2 = rows.base - rows.leverages @ phi, rows.leverages @ slope, -(rows.leverages @ bend)
            least = rows.base - rows.leverages @ weak
            rho = (rows.leverages @ most) / least
            largest = np.abs(e) + r * third
            third = (third * (1 + 6 * rho + 6 * rho**2) + largest * (rho + 6 * rho**2 + 6 * rho**3)) / least
            e = e / q
            e1 = (e1 - e * q1) / q
            e2 = (e2 - 2 * e1 * q1 - e * q2) / q
        s = rows.share
        quartic += [s @ (e2 * e2) / 4, s @ (e1 * e2), s @ (e1 * e1 + e * e2), 2 * (s @ (e * e1)), s @ (e * e)]
        left_out += 2 * float(s @ ((np.abs(e) + np.abs(e1) * r + np.abs(e2) * r * r / 2) * third)) * r**3 / 6
    roots = np.roots(np.polyder(quartic))
    inside = roots[(np.abs(roots.imag) < 1e-9) & (np.abs(roots.real) < r)].real
    least_value = np.polyval(quartic, np.concatenate([inside, [-r, r]])).min()
    return 0.5 * float(quartic[-1]), 0.5 * (float(least_value) - left_out)
