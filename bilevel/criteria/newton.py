"""Newton's method for the models of several weightings of the same rows at once, of one output and dense inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from bilevel.numerics.factored import factored
from bilevel.numerics.small import factor, weighted_gram
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
    value, dual, steps = _objective(loss, weights, y, a, w, z), X1.shape[1] > X1.shape[0] + 1, 0
    floor = 1e-12 * len(X1)
    while steps < STEPS:
        steps += 1
        gradient = (weights * loss.slope(z, y)) @ X1 + a * w
        d = weights * loss.curvature(z, y)
        if dual:
            parts = zip(d, a, gradient, strict=True)
            move = torch.stack([factored(X1, dk, ak, intercept).solve(g) for dk, ak, g in parts])
        else:
            move = torch.cholesky_solve(gradient[..., None], factor(weighted_gram(X1, d), a))[..., 0]
        decrease = vecdot(gradient, move).tolist()
        w, z, new = _searched(loss, weights, y, a, w, z, move, move @ X1.T, value, decrease)
        # A step that rounding leaves without a decrease ends it, too.
        ends = [by <= tol * (old + floor) or now >= old for by, old, now in zip(decrease, value, new, strict=True)]
        if all(ends):
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
    value: list[float],
    decrease: list[float],
) -> tuple[Tensor, Tensor, list[float]]:
    """Return the ends of Newton steps, halved until the objective falls, and their objectives."""
    there, predicted = w - move, z - dz
    lengths = [1.0] * len(value)
    while True:
        new = _objective(loss, weights, y, a, there, predicted)
        # Written so that NaN counts as a rise.
        fell = [
            now <= old - 1e-4 * length * by + 1e-12 * abs(old)
            for now, old, length, by in zip(new, value, lengths, decrease, strict=True)
        ]
        if all(ok or length <= SHORTEST for ok, length in zip(fell, lengths, strict=True)):
            return there, predicted, new
        lengths = [length if ok else 0.5 * length for ok, length in zip(fell, lengths, strict=True)]
        length = torch.tensor(lengths).to(w)[:, None]
        there, predicted = w - length * move, z - length * dz


def _objective(loss: GLMLoss, weights: Tensor, y: Tensor, a: Tensor, w: Tensor, z: Tensor) -> list[float]:
    return torch.add(vecdot(weights, loss.value(z, y)), vecdot(a * w, w), alpha=0.5).tolist()
