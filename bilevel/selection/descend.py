"""`tune`: descend a criterion plus a hyperprior by its Gauss-Newton model, in a box of log penalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bilevel.criteria.criterion import Array, Criterion, Evaluation
from bilevel.criteria.data import LinearData

BELOW, ABOVE = 14.0, 9.0
"""The box of log penalties around `LinearData.level`, which shrinks a lone coefficient by half."""
LONGEST = 3.0
"""The largest change of a log penalty in one step."""
DAMPING = 1e-3
"""The first damping of a step, as a part of the largest second derivative."""
TRIALS = 12
"""Damped steps that are tried where none lowers the objective."""


@dataclass(frozen=True, eq=False)
class Hyperprior:
    """What holds log penalties together: ``R(u) = tau sum_j c_j (u_j - m)^2``.

    Attributes:
        tau: its weight, in units of the criterion.
        shares: c, (k,), with sum one: the share of the coefficients that each penalty has.
        anchor: m; None for the mean ``c'u``, which leaves the level of the penalties free.
    """

    tau: float
    shares: Array
    anchor: float | None = None

    def value(self, u: Array) -> float:
        """Return R."""
        return self.tau * float(self.shares @ np.square(self._off(u)))

    def gradient(self, u: Array) -> Array:
        """Return R's derivatives, (k,)."""
        return 2.0 * self.tau * self.shares * self._off(u)

    @property
    def hessian(self) -> Array:
        """R's second derivatives, (k, k)."""
        mean = 0.0 if self.anchor is not None else np.multiply.outer(self.shares, self.shares)
        return 2.0 * self.tau * (np.diag(self.shares) - mean)

    def _off(self, u: Array) -> Array:
        return u - (self.shares @ u if self.anchor is None else self.anchor)


class Tuned(NamedTuple):
    """Where a descent ended.

    Attributes:
        u: log penalties, (k,).
        evaluation: the criterion there.
        evaluations: how many were made.
        converged: whether it ended before its steps were used up.
    """

    u: Array
    evaluation: Evaluation
    evaluations: int
    converged: bool = True


def box(data: LinearData) -> tuple[float, float]:
    """Return the least and the largest log penalty for the columns of data."""
    return data.level - BELOW, data.level + ABOVE


class _Point(NamedTuple):
    """The objective at log penalties, with its gradient and its model's second derivatives."""

    u: Array
    value: float
    gradient: Array
    hessian: Array
    evaluation: Evaluation


def tune(
    criterion: Criterion,
    u: Array,
    prior: Hyperprior | None = None,
    *,
    tol: float = 1e-4,
    steps: int = 25,
    warm: Any = None,
    known: Evaluation | None = None,
) -> Tuned:
    """Return log penalties that minimise the criterion plus a hyperprior, by projected Levenberg-Marquardt steps.

    A step solves ``(H + mu max(diag H) I) s = -g`` for the coordinates that are free to move, with H the Gauss-Newton
    model of the criterion plus the hyperprior's; mu falls where the model foresaw the gain, and rises where not.
    Penalties of features without effect have no optimum, so the end is a small relative gain, never a small gradient.

    Args:
        criterion: what to descend.
        u: where to start, (k,).
        prior: None for none.
        tol: relative gain of the objective at which it ends.
        steps: the most steps.
        warm: the `warm` of an evaluation near by.
        known: the criterion at u, with second derivatives, where that has been evaluated.
    """
    low, high = box(criterion.data)

    def at(u: Array, warm: Any, known: Evaluation | None = None) -> _Point:
        found = criterion.evaluate(u, warm) if known is None else known
        assert found.gauss_newton is not None
        if prior is None:
            return _Point(u, found.value, found.gradient, found.gauss_newton, found)
        gradient, hessian = found.gradient + prior.gradient(u), found.gauss_newton + prior.hessian
        return _Point(u, found.value + prior.value(u), gradient, hessian, found)

    here, damping, small, count = at(np.clip(u, low, high), warm, known), DAMPING, 0, int(known is None)
    for _ in range(steps):
        g, H = here.gradient, here.hessian
        free = ~(((here.u <= low) & (g > 0)) | ((here.u >= high) & (g < 0)))
        if not free.any() or np.abs(g[free]).max() <= 1e-9 * abs(here.value):
            break
        for _ in range(TRIALS):
            new = np.clip(here.u + _step(g, H, free, damping), low, high)
            move = new - here.u
            foreseen = -float(g @ move + 0.5 * (move @ (H @ move)))
            there = at(new, here.evaluation.warm)
            count += 1
            if there.value < here.value or foreseen < 0.01 * tol * abs(here.value):
                break
            damping = 10.0 * max(damping, 1e-6)
        if not there.value < here.value:
            break
        gain = here.value - there.value
        damping *= 0.2 if gain > 0.7 * foreseen else 3.0 if gain < 0.2 * foreseen else 1.0
        little = gain < tol * abs(here.value)
        here, small = there, small + 1 if little else 0
        if small >= 2 or (little and gain > 0.5 * foreseen):
            break
    else:
        return Tuned(here.u, here.evaluation, count, converged=False)
    return Tuned(here.u, here.evaluation, count)


def _step(g: Array, H: Array, free: NDArray[np.bool_], damping: float) -> Array:
    """Return a damped Newton step of the free coordinates, at most `LONGEST` in each."""
    every = bool(free.all())
    A = (H if every else H[np.ix_(free, free)]).copy()
    A.flat[:: len(A) + 1] += damping * max(float(A.diagonal().max()), 1e-300) + 1e-14
    matrix, slopes = torch.from_numpy(A), torch.from_numpy(g[free])[:, None]
    L, broken = torch.linalg.cholesky_ex(matrix)
    solved = torch.linalg.solve(matrix, slopes) if bool(broken) else torch.cholesky_solve(slopes, L)
    step = np.zeros_like(g)
    step[free] = -solved[:, 0].numpy()
    longest = float(np.abs(step).max())
    return step * min(1.0, LONGEST / longest) if longest > 0 else step
