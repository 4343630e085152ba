"""Squared loss with an elastic-net penalty on a Gram matrix: coordinate descent with active sets, and whole paths.

    minimise  1/2 w'G w - c'w + sum_j (l1_j |w_j| + l2_j / 2 w_j^2),      w >= 0 where asked for

No cost depends on the number of rows. At a solution with support S and signs s, ``(G + l2)_SS w_S = c_S - l1_S s``, and
``|c - G w| <= l1`` outside S. A sweep of coordinate descent over the coordinates that violate this (Friedman et al.
2010) takes them up; then w goes to the solution on its support, or to the first change of a sign on the way, where that
coordinate leaves the support, until no sign changes. The objective falls in each, so that no support comes twice.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

ROUNDS = 200
"""Sweeps at most."""
SLACK = 1e-11
"""Share of the largest moment by which a coordinate outside the support may violate its condition."""


def solve_gram(gram: Array, moment: Array, l1: Array, l2: Array, w: Array, positive: bool = False) -> Array:
    """Return the minimiser from a start w, such as that of a stronger penalty.

    Args:
        gram: G, of shape (p, p), symmetric positive semidefinite.
        moment: c, of shape (p,).
        l1: weights of ``|w|``, of shape (p,).
        l2: weights of ``w^2 / 2``, of shape (p,).
        w: the start.
        positive: whether w >= 0.

    >>> solve_gram(np.eye(2), np.array([3.0, 0.5]), np.ones(2), np.zeros(2), np.zeros(2))
    array([2., 0.])
    """
    w = np.maximum(w, 0.0) if positive else w.copy()
    diagonal = gram.diagonal() + l2
    tolerance = SLACK * float(np.abs(moment).max(initial=0.0))
    for _ in range(ROUNDS):
        w, support = _on_support(gram, moment, l1, l2, w)
        correlation = moment - gram[:, support] @ w[support]
        excess = (correlation if positive else np.abs(correlation)) - l1
        excess[support] = -np.inf
        violators = np.flatnonzero((excess > tolerance) & (diagonal > 0))
        if not len(violators):
            break
        for j in violators[np.argsort(-excess[violators])]:
            # Of a coordinate at zero; where others have come before it, it may stay there.
            size = (correlation[j] if positive else abs(correlation[j])) - l1[j]
            if size > 0:
                w[j] = np.copysign(size, correlation[j]) / diagonal[j]
                correlation -= w[j] * gram[:, j]
    return w


def _on_support(gram: Array, moment: Array, l1: Array, l2: Array, w: Array) -> tuple[Array, NDArray[np.intp]]:
    """Go to the solution on the support of w, without the coordinates whose signs change on the way."""
    support = np.flatnonzero(w)
    while len(support):
        here = w[support]
        signs = np.sign(here)
        matrix = gram[support[:, None], support]
        matrix.flat[:: len(support) + 1] += l2[support]
        right = moment[support] - l1[support] * signs
        try:
            target = np.linalg.solve(matrix, right)
        except np.linalg.LinAlgError:
            target = np.linalg.lstsq(matrix, right, rcond=None)[0]
        wrong = target * signs <= 0
        if not wrong.any():
            w[support] = target
            break
        steps = here[wrong] / (here[wrong] - target[wrong])
        first = steps.min()
        moved = here + first * (target - here)
        moved[np.flatnonzero(wrong)[steps <= first]] = 0.0
        w[support] = moved
        support = support[moved != 0]
    return w, support


def elastic_path(
    gram: Array, moment: Array, alphas: Array, l1_ratio: float = 1.0, weights: Array | None = None
) -> Array:
    """Return the coefficients for every alpha, of shape (alphas, p), from strong to weak penalties.

    It minimises ``1/2 w'G w - c'w + alpha sum_j weights_j (r |w_j| + (1 - r)/2 w_j^2)``: with ``G = X'X / n`` and
    ``c = X'y / n`` of centred data, alpha and r are those of scikit-learn.

    Args:
        gram: G, of shape (p, p).
        moment: c, of shape (p,).
        alphas: penalties, in any order; decreasing ones are solved soonest.
        l1_ratio: r, in [0, 1].
        weights: factors of the penalties, of shape (p,); ones by default.

    >>> elastic_path(np.eye(2), np.array([3.0, 0.5]), np.array([1.0, 0.25]))
    array([[2.  , 0.  ],
           [2.75, 0.25]])
    """
    weights = np.ones_like(moment) if weights is None else np.asarray(weights, dtype=np.float64)
    path, w = np.empty((len(alphas), len(moment))), np.zeros_like(moment)
    for index in np.argsort(-np.asarray(alphas), kind="stable"):
        penalty = alphas[index] * weights
        w = solve_gram(gram, moment, l1_ratio * penalty, (1.0 - l1_ratio) * penalty, w)
        path[index] = w
    return path


def minimise_quadratic(
    hessian: Tensor, moment: Tensor, l1: Tensor, l2: Tensor, start: Tensor, positive: bool = False
) -> Tensor:
    """Return `solve_gram` of tensors of shapes (p, p) and (p,), with the dtype and on the device of `start`."""
    gram, c, first, second, w = [each.detach().double().cpu().numpy() for each in (hessian, moment, l1, l2, start)]
    return torch.from_numpy(solve_gram(gram, c, first, second, w, positive)).to(start)
