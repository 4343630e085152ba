"""Newton's method with factored Hessians for the models of several weightings of the same rows at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.criteria.newton_cg import STALLED, searched
from bilevel.criteria.system import System, dots
from bilevel.numerics.factored import factored, fit_every_row
from bilevel.numerics.small import factor, weighted_gram

STEPS = 100
"""Steps at most; a start that is far takes about ten."""
MOST = 150
"""Coefficients of several outputs up to which Hessians are factored."""
ENTRIES = 1_000_000
"""Entries of X up to which they are."""


def inverses(system: System, z: Tensor, a: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the products of the inverse Hessians with right-hand sides shaped as the penalties.

    Args:
        system: the models, of dense rows.
        z: predictions, (K, [outputs,] rows).
        a: penalties, (K, [outputs,] p1), of an intercept zero.
    """
    X1, curvature, intercept = system.X1, system.loss.curvature(z, system.data.y), system.data.intercept
    assert X1 is not None
    if a.dim() == 2:
        d = system.weights * curvature
        if fit_every_row(X1, intercept):
            each = [factored(X1, dk, ak, intercept) for dk, ak in zip(d, a, strict=True)]
            return lambda r: torch.stack([one.solve(rk) for one, rk in zip(each, r, strict=True)])
        L = factor(weighted_gram(X1, d), a)
        return lambda r: torch.cholesky_solve(r[..., None], L)[..., 0]
    count, outputs, p1 = a.shape
    unit = torch.eye(outputs).to(z)[:, None, :, None].expand(outputs, *z.shape)
    blocks = system.loss.hessian_product(curvature, unit) * system.weights[:, None]  # (outputs, K, outputs, rows)
    grams = weighted_gram(X1, blocks.flatten(0, 2)).reshape(outputs, count, outputs, p1, p1)
    hessians = grams.permute(1, 0, 3, 2, 4).reshape(count, outputs * p1, outputs * p1)
    if intercept:
        # Of softmax, intercepts that all change alike change nothing: this holds their mean where it is.
        last = torch.arange(p1 - 1, outputs * p1, p1, device=z.device)
        hessians[:, last[:, None], last] += hessians[:, last, last].mean(1)[:, None, None]
    whole = factor(hessians, a.flatten(1))
    return lambda r: torch.cholesky_solve(r.flatten(1)[..., None], whole).reshape(r.shape)


def solve(system: System, a: Tensor, start: Tensor, tol: float) -> tuple[Tensor, Tensor, bool]:
    """Return the models at penalties a, shaped as the start, their predictions of all rows, and whether it converged.

    A step whose expected decrease is below tol times the objective is taken and ends the iteration: what is left is of
    the order of its square.
    """
    w, z, floor = start, system.product(start), 1e-12 * system.data.rows
    value = system.objective(w, z, a).tolist()
    for _ in range(STEPS):
        gradient = system.gradient(w, z, a)
        step = inverses(system, z, a)(gradient)
        # An inverse that is lost in rounding may be indefinite: a decrease below zero is not a small one.
        decrease = dots(gradient, step).abs().tolist()
        w, z, new = searched(system, a, w, z, value, step, decrease)
        # A step that rounding leaves without a decrease ends it, too.
        ends = [by <= tol * (old + floor) or now >= old for by, old, now in zip(decrease, value, new, strict=True)]
        if all(ends):
            break
        value = new
    right = all(by <= max(tol, STALLED) * (old + floor) for by, old in zip(decrease, value, strict=True))
    return w, z, right
