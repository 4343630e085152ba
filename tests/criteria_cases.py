"""Independent arithmetic for the criteria of linear models: explicit refits and central differences, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.criteria import Criterion, Penalties

Array = NDArray[np.float64]


def penalty_cases(features: int, outputs: int | None = None) -> list[Penalties]:
    """Every way to share penalties."""
    labels = np.arange(features) % 3
    cases = [make(features, outputs) for make in (Penalties.scalar, Penalties.feature)]
    cases.append(Penalties.groups(labels, outputs))
    if outputs is not None:
        cases += [Penalties.output(features, outputs), Penalties.output_feature(features, outputs)]
    return cases


def differences(criterion: Criterion, u: Array, step: float = 1e-5) -> tuple[Array, Tensor]:
    """Central differences of value and predictions by the log penalties."""
    ends = [(criterion.evaluate(u + step * e), criterion.evaluate(u - step * e)) for e in np.eye(len(u))]
    gradient = np.array([(up.value - down.value) / (2 * step) for up, down in ends])
    return gradient, torch.stack([(up.predictions - down.predictions) / (2 * step) for up, down in ends], -1)


def coarse_differences(criterion: Criterion, u: Array) -> tuple[Array, Tensor]:
    """The same of fourth order, with steps so long that the tolerance of an inner solve does not show."""
    (g1, j1), (g2, j2) = (differences(criterion, u, step) for step in (5e-3, 1e-2))
    return (4.0 * g1 - g2) / 3.0, (4.0 * j1 - j2) / 3.0


def refit(X: Array, y: Array, s: Array, a: Array, loss: Any, intercept: bool = True) -> tuple[Array, float]:
    """Coefficients and intercept of least ``sum s loss + 1/2 sum a w^2``, by Newton's method in numpy; one output."""
    ones = np.ones((len(X), int(intercept)))
    X, a = np.hstack([X, ones]), np.append(a, np.zeros(int(intercept)))
    w = np.zeros(X.shape[1])
    target = torch.from_numpy(y)

    def value(w: Array) -> float:
        return float(s @ loss.value(torch.from_numpy(X @ w), target).numpy() + 0.5 * a @ w**2)

    for _ in range(50):
        z = torch.from_numpy(X @ w)
        gradient = X.T @ (s * loss.slope(z, target).numpy()) + a * w
        hessian = (X.T * (s * loss.curvature(z, target).numpy())) @ X + np.diag(a)
        step = np.linalg.solve(hessian, gradient)
        scale = 1.0
        while value(w - scale * step) > value(w) and scale > 1e-6:
            scale /= 2.0
        w = w - scale * step
        if np.abs(step).max() < 1e-13 * (1.0 + np.abs(w).max()):
            break
    return (w[:-1], w[-1]) if intercept else (w, 0.0)


def standardised(X: Array, s: Array) -> tuple[Array, Array]:
    """Weighted means and deviations of columns."""
    mean = s @ X / s.sum()
    return mean, np.sqrt(s @ (X - mean) ** 2 / s.sum())
