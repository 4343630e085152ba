"""Newton's method with factored Hessians for the models of several weightings, of several outputs, few coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.criteria.newton_cg import STEPS, System, dots, searched
from bilevel.numerics.small import factor, weighted_gram

MOST = 150
"""Coefficients of all outputs up to which Hessians are factored."""
ENTRIES = 1_000_000
"""Entries of X up to which they are."""


def factors(system: System, X1: Tensor, z: Tensor, a: Tensor) -> Tensor:
    """Return the Cholesky factors of the Hessians, (K, outputs p1, outputs p1).

    Args:
        system: the models.
        X1: dense rows, with a last column of ones for the intercept, if there is one.
        z: predictions, (K, outputs, rows).
        a: penalties, (K, outputs, p1).
    """
    count, outputs, p1 = a.shape
    curvature = system.loss.curvature(z, system.data.y)
    unit = torch.eye(outputs).to(z)[:, None, :, None].expand(outputs, *z.shape)
    blocks = system.loss.hessian_product(curvature, unit) * system.weights[:, None]  # (outputs, K, outputs, rows)
    grams = weighted_gram(X1, blocks.flatten(0, 2)).reshape(outputs, count, outputs, p1, p1)
    hessians = grams.permute(1, 0, 3, 2, 4).reshape(count, outputs * p1, outputs * p1)
    if system.data.intercept:
        # Of softmax, intercepts that all change alike change nothing: this holds their mean where it is.
        last = torch.arange(p1 - 1, outputs * p1, p1, device=z.device)
        hessians[:, last[:, None], last] += hessians[:, last, last].mean(1)[:, None, None]
    return factor(hessians, a.flatten(1))


def inverse_product(L: Tensor, r: Tensor) -> Tensor:
    """Return the products of the inverse Hessians with right-hand sides (K, outputs, p1)."""
    return torch.cholesky_solve(r.flatten(1)[..., None], L).reshape(r.shape)


def solve(system: System, X1: Tensor, a: Tensor, start: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """Return the models at penalties a, (K, outputs, p1), and their predictions of all rows.

    A step whose expected decrease is below tol times the objective is taken and ends the iteration: what is left is of
    the order of its square.
    """
    w, z = start, system.product(start)
    value = system.objective(w, z, a)
    for _ in range(STEPS):
        gradient = system.gradient(w, z, a)
        step = inverse_product(factors(system, X1, z, a), gradient)
        decrease = dots(gradient, step)
        w, z, new = searched(system, a, w, z, value, step, decrease)
        # A step that rounding leaves without a decrease ends it, too.
        if bool(((decrease <= tol * (value + 1e-12 * z.shape[-1])) | (new >= value)).all()):
            break
        value = new
    return w, z
