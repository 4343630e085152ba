"""Second derivatives of the outer loss by the penalties of a linear model, with a dense factor of the inner Hessian.

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

from bilevel.oracles.hyper_hessian import MAX_PARAMS


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
        The two matrices; None for more than 2,000 weights, and where H has no Cholesky factor.
    """
    size, count = params.numel(), hparams.numel()
    if size > MAX_PARAMS:
        return None
    inner = problem.bind(hparams)
    point = inner.linearize(params)
    factor, info = torch.linalg.cholesky_ex(point.dense_hessian())
    if bool(info):
        return None
    tuned = problem.tuned(hparams)
    owner, slope = tuned.penalty_owner.reshape(-1), tuned.penalty_slope.reshape(-1)
    w, a = params.reshape(-1), adjoint.reshape(-1)

    def grouped(values: Tensor) -> Tensor:
        return values.new_zeros(size, count).index_put_((torch.arange(size, device=owner.device), owner), values)

    J = -torch.cholesky_solve(grouped(slope * w), factor)
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
