"""`tune`: descend a criterion plus a hyperprior by its Gauss-Newton model, in a box of log penalties."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bilevel.criteria.criterion import Array, Criterion, Evaluation
from bilevel.criteria.data import LinearData
from bilevel.numerics.small import cholesky, solve, to_numpy

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

    @cached_property
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
        scanned: the criterion at every candidate, the strongest first, where there were candidates.
    """

    u: Array
    evaluation: Evaluation
    evaluations: int
    converged: bool = True
    scanned: tuple[Evaluation, ...] = ()


def box(data: LinearData) -> tuple[float, float]:
    """Return the least and the largest log penalty for the columns of data."""
    return data.level - BELOW, data.level + ABOVE


class _Curvature(Protocol):
    """The second derivatives H of the model of an objective."""

    diagonal: Array

    def product(self, move: Array) -> Array:
        """Return ``H move``."""

    def newton(self, g: Array, free: NDArray[np.bool_], more: float) -> Array:
        """Return ``(H + more I)^-1 g`` of the free coordinates; g and the result hold these alone."""


class _Matrix:
    """H as a matrix."""

    def __init__(self, H: Array) -> None:
        self.H, self.diagonal = H, H.diagonal()

    def product(self, move: Array) -> Array:
        return self.H @ move

    def newton(self, g: Array, free: NDArray[np.bool_], more: float) -> Array:
        return np.asarray(solve(cholesky(self.H if free.all() else self.H[np.ix_(free, free)], more), g))


class _FewRows:
    """``H = J'J + diag(d)`` with fewer rows of J than columns: systems are solved by Woodbury's identity."""

    def __init__(self, J: Array, d: Array) -> None:
        self.J, self.d = J, d
        self.diagonal = np.einsum("ij,ij->j", J, J) + d

    def product(self, move: Array) -> Array:
        return np.asarray((self.J @ move) @ self.J + self.d * move)

    def newton(self, g: Array, free: NDArray[np.bool_], more: float) -> Array:
        J, d = (self.J, self.d) if free.all() else (self.J[:, free], self.d[free])
        root = (d + more) ** 0.5
        scaled = J / root
        g = g / root
        return np.asarray((g - solve(cholesky(scaled @ scaled.T, 1.0), scaled @ g) @ scaled) / root)


def _curvature(found: Evaluation, prior: Hyperprior | None) -> _Curvature:
    """Return the Gauss-Newton model of a criterion plus a hyperprior."""
    J = found.jacobian
    diagonal = prior is not None and prior.anchor is not None
    if prior is not None and diagonal and found.model is None and J is not None and J.shape[0] < J.shape[-1]:
        weights = to_numpy(found.curvatures) / len(found.losses)
        if J.dim() == 2 and weights.min() >= 0:
            return _FewRows(to_numpy(J) * np.sqrt(weights)[:, None], prior.hessian.diagonal())
    assert found.gauss_newton is not None
    return _Matrix(found.gauss_newton if prior is None else found.gauss_newton + prior.hessian)


class _Point(NamedTuple):
    """The objective at log penalties, with its gradient."""

    u: Array
    value: float
    gradient: Array
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
    low: float | None = None,
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
        low: the least log penalty; None for that of `box`.
    """
    least, high = box(criterion.data)
    low = least if low is None else low

    def at(u: Array, warm: Any, known: Evaluation | None = None) -> _Point:
        found = criterion.evaluate(u, warm) if known is None else known
        if prior is None:
            return _Point(u, found.value, found.gradient, found)
        return _Point(u, found.value + prior.value(u), found.gradient + prior.gradient(u), found)

    here, damping, small, count = at(np.clip(u, low, high), warm, known), DAMPING, 0, int(known is None)
    for _ in range(steps):
        g = here.gradient
        free = ~(((here.u <= low) & (g > 0)) | ((here.u >= high) & (g < 0)))
        if not free.any() or np.abs(g[free]).max() <= 1e-9 * abs(here.value):
            break
        H = _curvature(here.evaluation, prior)
        for _ in range(TRIALS):
            new = np.clip(here.u + _step(g, H, free, damping), low, high)
            move = new - here.u
            foreseen = -float(g @ move + 0.5 * (move @ H.product(move)))
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


def _step(g: Array, H: _Curvature, free: NDArray[np.bool_], damping: float) -> Array:
    """Return a damped Newton step of the free coordinates, at most `LONGEST` in each."""
    step = np.zeros_like(g)
    step[free] = -H.newton(g[free], free, damping * max(float(H.diagonal[free].max()), 1e-300) + 1e-14)
    longest = float(np.abs(step).max())
    return step * min(1.0, LONGEST / longest) if longest > 0 else step
