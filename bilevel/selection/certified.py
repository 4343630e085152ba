"""`certify_range`: a proof that no single ridge penalty of a range is better than the one that was found."""

from __future__ import annotations

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
from bilevel.selection.descend import box, tune
from bilevel.selection.honest import predictions
from bilevel.selection.scalar import best_penalty

WIDE = 2.3
"""The radius that is tried first, of log penalties."""
SAFE, LEAST, MOST = 0.9, 1e-3, 2.0
"""The next radius is the first part of what is thought to suffice, and between these parts of the last one."""
EVALUATIONS = 2000
"""Evaluations after which it gives up."""
NULL = 1e-13
"""Eigenvalues below this part of the largest are zero: they move no prediction."""
TINY = 1e-9
"""Log penalties that are this near are equal."""


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

    With the eigenvalues g of ``X'SX`` (or of ``XX'``), a residual is ``N_i(u) = sum_k b_ik h_k(u)`` with
    ``h_k = 1 / (1 + g_k exp(-u))``, and that of leave-one-out is divided by ``q_i(u) = sum_k c_ik h_k(u)``, c not
    negative. Multiplying all h_k by one function of u changes nothing, so take ``h_k = (m + exp(u)) / (g_k + exp(u))``
    with any m. With ``f = g_k / (g_k + exp(u))``, the first three derivatives of h_k are then at most
    ``|g_k - m| exp(u) / (g_k + exp(u))^2`` times 1, ``|1 - 2 f|`` and ``|1 - 6 f (1 - f)|``, which is small for the g_k
    near m and, at weak penalties, for all of them but zeros. At the centre c of an interval ``|u - c| <= r`` let
    ``B = b - e(c) c``, so that ``e - e(c) = sum_k B_k h_k / q``, zero at c. With H_jk the largest of the j-th of these
    bounds on the interval, ``S_j = sum_k |B_k| H_jk`` and ``p_j = sum_k c_k H_jk / min q``, its third derivative is at
    most

        M = (S_3 + 3 S_2 p_1 + 3 S_1 (p_2 + 2 p_1^2) + r S_1 (p_3 + 6 p_1 p_2 + 6 p_1^3)) / min q

    by the quotient rule, for ``|sum_k B_k h_k| <= r S_1``, and likewise on the halves below and above c. So with p the
    second-order expansion of e at c,

        criterion(c + t) >= 1/2 mean p(t)^2 - |t|^3 / 6 mean (|e| + |e'| |t| + |e''| t^2 / 2) M

    whose least value on the interval is that of one of two polynomials. K-fold: the same with ``q = 1`` and ``m = 0``.
    The first interval is centred at the best penalty, where the cubic term vanishes; then intervals follow on both
    sides, as long as the last one allows.

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
    exact = criterion.name == RidgeLeaveOneOut.name or criterion.folds
    if not exact or not criterion.loss.quadratic or criterion.data.y.dim() > 1:
        raise ValueError("certify_range takes leave-one-out or K-fold of ridge regression with one target.")
    rows = _folds(criterion) if criterion.folds else _leave_one_out(criterion.data)
    left, right = math.log(low), math.log(high)
    one = criterion.with_penalties(Penalties.scalar(criterion.data.features))
    found = best_penalty(criterion, tol=eps / 4)
    evaluations = found.evaluations
    end, (least, most) = float(found.u[0]), box(criterion.data)
    best = (found.evaluation.value if left <= end <= right else math.inf, end)
    # At an end of the box of the search, or outside of the range, an end of the range may be better.
    for at, tried in ((left, end <= max(left, least)), (right, end >= min(right, most))):
        if tried:
            best, evaluations = min(best, (one.evaluate(np.array([at]), second=False).value, at)), evaluations + 1
    lower = best[0]

    def fits(centre: float, radius: float) -> tuple[bool, float]:
        """Return whether the bound on an interval suffices, and the radius at which one there would."""
        nonlocal best, evaluations, lower
        value, bound = _bound(rows, centre, radius)
        evaluations += 1
        if value < (1.0 - eps) * best[0]:  # the search ended in another valley
            other = tune(one, np.array([centre]), tol=eps / 4)
            evaluations += other.evaluations
            if left <= other.u[0] <= right:
                best = min(best, (other.evaluation.value, float(other.u[0])))
        best = min(best, (value, centre))
        good = bound >= (1.0 - eps) * best[0]
        lower = min(lower, bound) if good else lower
        # What is left out grows with the third power of the radius.
        share = (value - (1.0 - eps) * best[0]) / max(value - bound, 1e-300)
        return good, radius * min(max(SAFE * share ** (1.0 / 3.0), LEAST), MOST)

    start, radius, good = best[1], min(WIDE, best[1] - left, right - best[1]), False
    while radius > TINY and not good and evaluations < EVALUATIONS:
        used, (good, radius) = radius, fits(start, radius)
    inside, radius = (used, radius) if good else (0.0, WIDE)
    for sign, length in ((-1.0, start - left), (1.0, right - start)):
        covered, last, step = inside, 0.0, radius
        while covered < length - TINY and evaluations < EVALUATIONS:
            used = min(step, 0.5 * (length - covered))
            good, enough = fits(start + sign * (covered + used), used)
            # The next one is farther out: it is thought to grow as the last two did.
            growth = min(max(enough / last, 1.0), MOST) if good and last else 1.0
            last, step = enough if good else 0.0, growth * enough
            covered += 2.0 * used if good else 0.0
        if covered < length - TINY:
            lower = 0.0
    return RangeCertificate(math.exp(best[1]), best[0], min(lower, best[0]), low, high, eps, evaluations)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Held-out rows of one spectrum.

    Attributes:
        spectrum: g, (r,), with a zero where predictions cannot fit all training targets.
        parts: b, (rows, r).
        share: weights of the rows in the criterion, (rows,), of all rows with sum one.
        leverages: c, (rows, r); None for folds.
    """

    spectrum: Array
    parts: Array
    share: Array
    leverages: Array | None = None


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
    """Return the rows with a weight: residuals of the others are not in the criterion."""
    g, directions, c, mean = _spectral(data, data.weights)
    counted, root = data.weights > 0, data.weights.sqrt()
    U = (root * data.product(directions) / g.sqrt()[:, None]).T[counted]  # orthonormal columns
    root, y = root[counted], (root * (data.y - mean))[counted]
    parts, leverages = U * (c / g.sqrt()), U.square()
    if len(g) < data.counted - int(data.intercept):
        # What no penalty fits; with as many directions as rows there is nothing left, not even rounding errors.
        own = root.square() / data.rows if data.intercept else torch.zeros_like(root)
        free = (1.0 - own - leverages.sum(1)).clamp_min(0.0)
        g = torch.cat([g, g.new_zeros(1)])
        parts = torch.cat([parts, (y - parts.sum(1))[:, None]], 1)
        leverages = torch.cat([leverages, free[:, None]], 1)
    tensors = (g, parts / root[:, None], root.square() / data.rows, leverages)
    return [_Rows(*(each.double().cpu().numpy() for each in tensors))]


def _folds(criterion: Criterion) -> list[_Rows]:
    data, found = criterion.data, []
    total = data.weights[criterion.held_out].sum()
    for train, held in criterion.folds:
        part = data.take(train)
        g, directions, c, mean = _spectral(part, data.weights[train])
        B = predictions(data, given(part, directions, 0.0))[:, held].T
        fitted = B * (c / g)
        parts = torch.cat([fitted, (data.y[held] - mean - fitted.sum(1))[:, None]], 1)
        tensors = (torch.cat([g, g.new_zeros(1)]), parts, data.weights[held] / total)
        found.append(_Rows(*(each.double().cpu().numpy() for each in tensors)))
    return found


def _bound(parts: Sequence[_Rows], u: float, r: float) -> tuple[float, float]:
    """Return the criterion at u, and what it is at least on ``[u - r, u + r]``."""
    quartic, left_out = np.zeros(5), np.zeros((2, 6))
    for rows in parts:
        e, e1, e2, thirds = _expansion(rows, u, r)
        s = rows.share
        quartic += [s @ (e2 * e2) / 4, s @ (e1 * e2), s @ (e1 * e1 + e * e2), 2 * (s @ (e * e1)), s @ (e * e)]
        left_out[:, :3] += (thirds * (s / 3.0)) @ np.abs(np.stack([e2 / 2, e1, e], 1))
    least = math.inf
    for sign, remainder in zip((-1.0, 1.0), left_out, strict=True):
        bound = np.append(0.0, quartic * sign ** np.arange(4, -1, -1)) - remainder
        # Only real roots matter; other points do no harm.
        points = np.append(np.roots(np.polyder(bound)).real.clip(0.0, r), [0.0, r])
        least = min(least, float(np.polyval(bound, points).min()))
    return 0.5 * float(quartic[-1]), 0.5 * least


def _expansion(rows: _Rows, u: float, r: float) -> tuple[Array, Array, Array, Array]:
    """Return residuals at u, their first two derivatives, and what the third is at most below and above u, (2, rows).

    Args:
        rows: of one spectrum.
        u: log penalty.
        r: how far below and above.
    """
    g, b, c = rows.spectrum, rows.parts, rows.leverages
    a = math.exp(u)
    psi, phi = a / (g + a), g / (g + a)
    sides = (math.exp(u - r), a), (a, math.exp(u + r))
    if c is None:
        thirds = [np.abs(b) @ (g * _largest(g, *side)[2]) for side in sides]
        return b @ psi, b @ (psi * phi), b @ (psi * phi * (phi - psi)), np.stack(thirds)
    q = c @ psi
    e = (b @ psi) / q
    middle = float(rows.share @ ((c @ (psi * phi)) / q))  # phi of m: near the mean of phi
    m = a * middle / (1.0 - middle)
    h, off = (m + a) / (g + a), phi - middle
    h1, h2 = h * off, h * (off * off + middle * (1.0 - middle) - phi * psi)
    q, q1, rest = c @ h, c @ h1, b - e[:, None] * c
    e1 = (rest @ h1) / q
    e2 = (rest @ h2 - 2.0 * e1 * q1) / q
    absolute, thirds = np.abs(rest), []
    for weak, strong in sides:
        least = c @ np.minimum((m + weak) / (g + weak), (m + strong) / (g + strong))
        orders = (np.abs(g - m) * _largest(g, weak, strong)).T
        S1, S2, S3 = (absolute @ orders).T
        p1, p2, p3 = (c @ orders).T / least
        thirds.append((S3 + 3 * S2 * p1 + S1 * (3 * p2 + 6 * p1**2 + r * (p3 + 6 * p1 * p2 + 6 * p1**3))) / least)
    return e, e1, e2, np.stack(thirds)


def _largest(g: Array, weak: float, strong: float) -> Array:
    """Return what the first three derivatives of ``h_k / |g_k - m|`` are at most between two penalties, (3, r)."""
    at = g.clip(weak, strong)  # where the penalty over its squared sum with g is largest
    most = at / (g + at) ** 2
    ends = np.stack([g / (g + weak), g / (g + strong)])
    x = np.stack([(ends * (1.0 - ends)).min(0), g * most])  # between these is f (1 - f)
    turns = [np.ones_like(g), np.abs(1.0 - 2.0 * ends).max(0), np.abs(1.0 - 6.0 * x).max(0)]
    return most * np.stack(turns)
