"""Coordinates of outer searches: shrinkage for log penalties, where the outer loss is close to a quadratic in a box.

A log penalty u_j of weights whose data Hessian has the mean diagonal s_j shrinks them by about

    t_j = s_j / (s_j + exp(u_j)) = sigmoid(c_j - u_j),     c_j = log s_j,     t in (0, 1)

so t = 0 is a dead weight and t = 1 a free one. In u the outer loss is flat at both ends, its slope like that of
exp(-|u - c|); in t both ends are finite slopes at the sides of a box, whose signs say whether a dead weight should
live. For an orthogonal design and a squared loss, the outer loss is exactly quadratic in t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bilevel.outer.trust_region import Vector


def sigmoid(x: Vector) -> Vector:
    """Return ``1 / (1 + exp(-x))`` without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


@dataclass(frozen=True)
class Coordinates:
    """Hyperparameters as they are, (k,), within limits; v = u. `centre` are log scales of log penalties, or zeros."""

    centre: Vector
    lower: Vector
    upper: Vector

    radius: ClassVar[float] = 2.0
    """A first step of one variable that is neither timid nor wild."""
    widest: ClassVar[float] = 6.0
    """The largest one."""
    of_penalties: ClassVar[bool] = False
    """Whether these are log penalties, whose limits mean weights of zero and weights without a penalty."""

    def clipped(self, u: Vector) -> Vector:
        """Return u within its limits."""
        return np.minimum(np.maximum(u, self.lower), self.upper)

    def of(self, u: Vector) -> Vector:
        """Return v, (k,)."""
        return u

    def back(self, v: Vector) -> Vector:
        """Return u, within its limits."""
        return self.clipped(v)

    def slope(self, u: Vector) -> Vector:
        """Return dv/du, (k,)."""
        return np.ones_like(u)

    def bend(self, u: Vector) -> Vector:
        """Return ``d2u/dv2``, (k,)."""
        return np.zeros_like(u)

    def models(self, u: Vector, gradient: Vector, second: tuple[Vector, ...]) -> tuple[Vector, tuple[Vector, ...]]:
        """Return slopes and second derivatives by v, (k,) and each (k, k), from those by u: Gauss-Newton's, and exact.

        With ``D = diag(du/dv)``: ``D B D``, and of the exact ones ``diag(g d2u/dv2)`` besides.
        """
        slope = self.slope(u)
        squares = slope * slope[:, None]
        gauss_newton, exact = (each / squares for each in second)
        return gradient / slope, (gauss_newton, exact + np.diag(gradient * self.bend(u)))

    def room(self, u: Vector, reach: float = np.inf) -> tuple[Vector, Vector]:
        """Return the least and the largest step in v; towards small u at most one by which u falls by `reach`."""
        ends = self.of(self.upper), self.of(np.maximum(self.lower, u - reach))
        v = self.of(u)
        return np.minimum(np.minimum(*ends) - v, 0.0), np.maximum(np.maximum(*ends) - v, 0.0)


@dataclass(frozen=True)
class Shrinkage(Coordinates):
    """The coordinates ``t = sigmoid(c - u)`` of log penalties u.

    ``dt/du = -t (1 - t)``, ``d2u/dt2 = (1 - 2 t) / (t (1 - t))^2``.

    >>> shrinkage = Shrinkage(np.zeros(1), np.full(1, -28.0), np.full(1, 10.0))
    >>> shrinkage.of(np.array([0.0])), shrinkage.back(np.array([0.5]))
    (array([0.5]), array([0.]))
    """

    radius = 0.3
    widest = 1.0
    of_penalties = True

    def of(self, u: Vector) -> Vector:
        return sigmoid(self.centre - u)

    def back(self, v: Vector) -> Vector:
        t = np.clip(v, 1e-300, 1.0 - 1e-15)
        return self.clipped(self.centre - (np.log(t) - np.log1p(-t)))

    def slope(self, u: Vector) -> Vector:
        t = self.of(u)
        return -t * (1.0 - t)

    def bend(self, u: Vector) -> Vector:
        t = self.of(u)
        return (1.0 - 2.0 * t) / (t * (1.0 - t)) ** 2


@dataclass(frozen=True)
class Softplus(Coordinates):
    """The coordinates ``v = log(1 + exp(c - u))``: like the shrinkage for strong penalties, like c - u for weak ones.

    They are for problems whose best penalties lie at the weak end, where the shrinkage has no resolution: of a logistic
    or softmax loss on separable rows the outer loss falls for ever weaker penalties.
    ``dv/du = -t`` and ``d2u/dv2 = (1 - t) / t^2`` with the shrinkage t.
    """

    radius = 4.0
    widest = 30.0
    of_penalties = True

    def of(self, u: Vector) -> Vector:
        return np.logaddexp(0.0, self.centre - u)

    def back(self, v: Vector) -> Vector:
        v = np.maximum(v, 1e-300)
        # log(exp(v) - 1) without overflow.
        return self.clipped(self.centre - (v + np.log(-np.expm1(-v))))

    def slope(self, u: Vector) -> Vector:
        return -sigmoid(self.centre - u)

    def bend(self, u: Vector) -> Vector:
        t = sigmoid(self.centre - u)
        return (1.0 - t) / t**2
