"""Newton's method for the models of several weightings of the same rows at once, of one output and dense inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.criteria.leverage import factor, factored, weighted_gram
from bilevel.problems.losses import GLMLoss

STEPS = 100
"""Steps at most; a start that is far takes about ten."""
SHORTEST = 1e-8
"""The shortest part of a Newton step that is tried."""


class Models(NamedTuple):
    """Solved models of K weightings.

    Attributes:
        w: coefficients, (K, p1), the intercept last.
        z: predictions of all rows, (K, rows).
        steps: Newton steps that were taken.
    """

    w: Tensor
    z: Tensor
    steps: int


def solve(
    X1: Tensor, y: Tensor, loss: GLMLoss, weights: Tensor, a: Tensor, start: Tensor, *, intercept: bool, tol: float
) -> Models:
    """Return the minima of ``sum_i s_ki loss(x_i'w_k, y_i) + 1/2 sum_j a_kj w_kj^2`` for every k.

    A step whose expected decrease is below tol times the objective is taken and ends the iteration: what is left is of
    the order of its square.

    Args:
        X1: rows with a last column of ones, or without, (rows, p1).
        y: targets, (rows,).
        loss: of a prediction.
        weights: s, (K, rows).
        a: penalties, (K, p1), of the intercept zero.
        start: (K, p1).
        intercept: whether there is one.
        tol: relative decrease below which a step is the last.

    Returns:
        The models.
    """
    w, z = start, start @ X1.T
    value = _objective(loss, weights, y, a, w, z)
    steps = 0
    while steps < STEPS:
        steps += 1
        gradient = (weights * loss.slope(z, y)) @ X1 + a * w
        d = weights * loss.curvature(z, y)
        if X1.shape[1] > X1.shape[0] + 1:
            parts = zip(d, a, gradient, strict=True)
            move = torch.stack([factored(X1, dk, ak, intercept).solve(g) for dk, ak, g in parts])
        else:
            move = torch.cholesky_solve(gradient[..., None], factor(weighted_gram(X1, d), a))[..., 0]
        decrease = (gradient * move).sum(1)
        w, z, new = _searched(loss, weights, y, a, w, z, move, move @ X1.T, value, decrease)
        small = decrease <= tol * (value + 1e-12 * weights.shape[1])
        # A step that rounding leaves without a decrease ends it, too.
        if bool((small | (new >= value)).all()):
            break
        value = new
    return Models(w, z, steps)


def _searched(
    loss: GLMLoss,
    weights: Tensor,
    y: Tensor,
    a: Tensor,
    w: Tensor,
    z: Tensor,
    move: Tensor,
    dz: Tensor,
    value: Tensor,
    decrease: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ends of Newton steps, halved until the objective falls, and their objectives."""
    there, predicted = w - move, z - dz
    new = _objective(loss, weights, y, a, there, predicted)
    length = torch.ones_like(value)
    while True:
        rose = ~(new <= value - 1e-4 * length * decrease + 1e-12 * value.abs()) & (length > SHORTEST)
        if not bool(rose.any()):
            return there, predicted, new
        length = torch.where(rose, 0.5 * length, length)
        there, predicted = w - length[:, None] * move, z - length[:, None] * dz
        new = _objective(loss, weights, y, a, there, predicted)


def _objective(loss: GLMLoss, weights: Tensor, y: Tensor, a: Tensor, w: Tensor, z: Tensor) -> Tensor:
    return (weights * loss.value(z, y)).sum(1) + 0.5 * (a * w * w).sum(1)
