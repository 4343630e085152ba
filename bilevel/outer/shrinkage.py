"""Shrinkage coordinates for log penalties: where the outer loss is close to a quadratic, and bounded by a box.

A log penalty u_j of weights whose data Hessian has the mean diagonal s_j shrinks them by about

    t_j = s_j / (s_j + exp(u_j)) = sigmoid(c_j - u_j),     c_j = log s_j,     t in (0, 1)

so t = 0 is a dead weight and t = 1 a free one. In u the outer loss is flat at both ends, with a slope like exp(-|u - c|);
in t both ends are finite slopes at the sides of a box, whose signs say whether a dead weight should live. For an
orthogonal design and a squared loss, the outer loss is exactly quadratic in t.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bilevel.outer.trust_region import Vector


def sigmoid(x: Vector) -> Vector:
    """Return ``1 / (1 + exp(-x))`` without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


@dataclass(frozen=True)
class Shrinkage:
    """The coordinates t of hyperparameters u, both of shape (k,).

    Args:
        centre: c, the logarithms of the scales, (k,).
        low: least u - c.
        high: largest u - c.

    >>> shrinkage = Shrinkage(np.zeros(1), -28.0, 10.0)
    >>> shrinkage.t(np.array([0.0])), shrinkage.u(np.array([0.5]))
    (array([0.5]), array([0.]))
    """

    centre: Vector
    low: float
    high: float

    def clipped(self, u: Vector) -> Vector:
        """Return u within its limits."""
        return np.clip(u, self.centre + self.low, self.centre + self.high)

    def t(self, u: Vector) -> Vector:
        """Return the shrinkage."""
        return sigmoid(self.centre - u)

    def u(self, t: Vector) -> Vector:
        """Return the hyperparameters of a shrinkage, within their limits."""
        t = np.clip(t, 1e-300, 1.0 - 1e-15)
        return self.clipped(self.centre - (np.log(t) - np.log1p(-t)))

    def slopes(self, u: Vector, gradient: Vector) -> Vector:
        """Return the gradient by t: ``-g_u / (t (1 - t))``."""
        t = self.t(u)
        return -gradient / (t * (1.0 - t))

    def model(self, u: Vector, gradient: Vector, second: Vector, exact: bool) -> Vector:
        """Return second derivatives by t, (k, k), from those by u.

        With ``D = diag(1 / (t (1 - t)))``: ``D B D``, and of the exact ones also the curvature of the coordinates,
        ``-diag(g_t (1 - 2 t) / (t (1 - t)))``.

        Args:
            u: where they were taken.
            gradient: by u.
            second: Gauss-Newton or exact second derivatives by u.
            exact: whether they are the exact ones.
        """
        t = self.t(u)
        width = t * (1.0 - t)
        model = second / np.outer(width, width)
        return model + np.diag(gradient * (1.0 - 2.0 * t) / width**2) if exact else model

    def room(self, u: Vector, reach: float) -> tuple[Vector, Vector]:
        """Return the least and the largest step in t; towards weak penalties u may fall by `reach` at most."""
        t = self.t(u)
        top = np.minimum(sigmoid(np.full_like(u, -self.low)), sigmoid(self.centre - u + reach))
        return np.minimum(sigmoid(np.full_like(u, -self.high)) - t, 0.0), np.maximum(top - t, 0.0)
