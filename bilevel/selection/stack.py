"""A convex combination of candidates, by their predictions for held-out rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria.criterion import Array
from bilevel.problems.losses import GLMLoss

STEPS = 200
"""Steps at most."""


def stack(predictions: Tensor, y: Tensor, loss: GLMLoss, weights: Tensor | None = None, *, tol: float = 1e-9) -> Array:
    """Return the weights of a convex combination of candidates with the least loss on held-out rows.

    ``min over omega >= 0, sum omega = 1 of mean_i s_i loss(sum_k omega_k z_ki, y_i)``: convex, with a solution at which
    few candidates have a weight (Breiman 1996). It is found by pairwise Frank-Wolfe steps: weight goes from the worst
    candidate that has some to the best one, by Newton's length (Lacoste-Julien and Jaggi 2015).

    Args:
        predictions: z of each candidate for rows that its fit has not seen, (candidates, rows), or of several outputs
            (candidates, outputs, rows).
        y: targets as the loss takes them, (rows,).
        loss: of a prediction.
        weights: s, (rows,); None for equal ones.
        tol: how much smaller, as a part of the loss, the least one may be at the end.

    Returns:
        omega, (candidates,).

    >>> from bilevel.problems import Squared
    >>> z = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    >>> stack(z, torch.tensor([1.0, 0.5]), Squared()).round(6)
    array([0.625, 0.375])
    """
    z = predictions.double()
    s = torch.ones(y.shape[-1], dtype=z.dtype, device=z.device) if weights is None else weights.double()
    share = s / s.sum()

    def value(at: Tensor) -> float:
        return float((loss.value(at, y) * share).sum())

    values = [value(each) for each in z]
    omega = np.eye(len(z))[int(np.argmin(values))]
    at, least = z[int(np.argmin(values))], min(values)
    for _ in range(STEPS):
        slopes = loss.slope(at, y) * share
        gradient = (z * slopes).flatten(1).sum(1).cpu().numpy()
        best, used = int(np.argmin(gradient)), np.flatnonzero(omega > 0)
        worst = int(used[np.argmax(gradient[used])])
        gap = float(omega @ gradient - gradient[best])
        if gap <= tol * abs(least):
            break
        # Weight goes from the worst candidate to the best, as much as there is, or as Newton's model says.
        direction = z[best] - z[worst]
        bend = float((direction * loss.hessian_product(loss.curvature(at, y), direction) * share).sum())
        fall = float(gradient[worst] - gradient[best])
        length = min(float(omega[worst]), fall / bend if bend > 0 else np.inf)
        while value(at + length * direction) > least - 1e-4 * length * fall and length > 1e-12:
            length *= 0.5
        omega[best] += length
        omega[worst] -= length
        at = at + length * direction
        least = value(at)
    return omega / omega.sum()
