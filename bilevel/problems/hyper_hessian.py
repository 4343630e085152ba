"""Second derivatives of the outer loss by the penalties of a linear model, at an inner solution.

With w(u) the inner solution, H the inner Hessian, ``Q = d(inner gradient)/du``, a = H^-1 f_w the adjoint vector:

    J  = dw/du = -H^-1 Q,        Q[j, k] = pen_j' w_j   for weight j of group k
    Gauss-Newton   J' f_ww J
    exact          J' f_ww J - A'J - J'A + diag(r) - T,   A[j, k] = pen_j' a_j,   r_k = -sum_j pen_j'' w_j a_j
                   T = c sum_i loss'''(z_i)[x_i a, (X J)_i, (X J)_i]

(pen' = pen'' = pen for log penalties; pen' = 1, pen'' = 0 for direct ones.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.oracles.hyper_hessian import MAX_PARAMS, MAX_TANGENTS, solved


def linear_hyper_hessians(
    problem: Any, hparams: Tensor, params: Tensor, adjoint: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return the Gauss-Newton and the exact matrix of second derivatives, each (k, k) for k hyperparameters.

    Args:
        problem: a single linear model.
        hparams: the hyperparameters.
        params: the inner solution at them.
        adjoint: ``H^-1 f_w`` there, shaped as params.

    Returns:
        The two matrices; None where H is not positive definite, and for more than 2,000 weights and 40 hyperparameters.
    """
    size, count = params.numel(), hparams.numel()
    if size > MAX_PARAMS and count > MAX_TANGENTS:
        return None
    point = problem.bind(hparams).linearize(params)
    tuned = problem.tuned(hparams)
    owner, slope = tuned.penalty_owner.reshape(-1), tuned.penalty_slope.reshape(-1)
    w, a = params.reshape(-1), adjoint.reshape(-1)

    def grouped(values: Tensor) -> Tensor:
        return values.new_zeros(size, count).index_put_((torch.arange(size, device=owner.device), owner), values)

    J = _solved(point, -grouped(slope * w))
    if J is None:
        return None
    columns = J.T.reshape(count, *params.shape)
    glm, outer = problem.glm, problem.val
    z, moved = problem.predict(outer.X, params), problem.predict(outer.X, columns)
    product = glm.hessian_product(glm.curvature(z, outer.y), moved)
    gauss_newton = moved.reshape(count, -1) @ product.reshape(count, -1).T / outer.rows
    mixed = grouped(slope * a).T @ J
    exact = gauss_newton - mixed - mixed.T
    if problem.parametrization == "log":
        exact = exact - torch.diag(torch.zeros_like(hparams.reshape(-1)).index_add_(0, owner, slope * w * a))
    if not glm.quadratic:
        exact = exact - problem.scale * _third(problem, params, adjoint, columns)
    return gauss_newton, 0.5 * (exact + exact.T)


def _solved(point: Any, columns: Tensor) -> Tensor | None:
    """Return ``H^-1 columns``; None where H is not positive definite."""
    if len(columns) > MAX_PARAMS:
        return solved(lambda v: point.hvp(v.reshape(point.params.shape)).reshape(-1), columns)
    factor, info = torch.linalg.cholesky_ex(point.dense_hessian())
    return None if bool(info) else torch.cholesky_solve(columns, factor)


def _third(problem: Any, params: Tensor, adjoint: Tensor, columns: Tensor) -> Tensor:
    """Return ``sum_i loss'''(z_i)[x_i a, (X J)_i, (X J)_i]``, (k, k); of several outputs by autograd."""
    X, y, glm = problem.train.X, problem.train.y, problem.glm
    along, moved = problem.predict(X, adjoint), problem.predict(X, columns)
    z = problem.predict(X, params)
    if problem.outputs is None:
        turned = glm.third(z, y) * along * moved
    else:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            product = glm.hessian_product(glm.curvature(z, y), along)
            (turned,) = torch.autograd.grad(product, z, moved, is_grads_batched=True)
    return turned.reshape(len(columns), -1) @ moved.reshape(len(columns), -1).T
