"""Second derivatives of the outer loss by the hyperparameters, at an inner solution with a dense Hessian.

With w(u) the inner solution, g the inner gradient, H its Hessian, ``J = dw/du = -H^-1 g_u`` and the adjoint vector
``a = H^-1 f_w``, the Lagrangian ``L(w, u) = f(w, u) - a'g(w, u)`` has ``L_w = 0`` there, so that

    d2 f(w(u), u) / du2  =  [J; I]' L'' [J; I],        its Gauss-Newton part   J' f_ww J
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.losses import Losses

MAX_PARAMS = 2000
"""Up to this many inner variables the inner Hessian is factored."""


def hyper_hessians(problem: Losses, hparams: Tree, params: Tree, adjoint: Tree) -> tuple[Tensor, Tensor] | None:
    """Return the Gauss-Newton and the exact matrix of second derivatives, each (k, k), by autograd.

    Args:
        problem: a single problem stated by an inner loss, whose third derivatives torch has.
        hparams: the hyperparameters, k numbers.
        params: the inner solution at them.
        adjoint: ``H^-1 f_w`` there, shaped as params.

    Returns:
        The two matrices; None for more than 2,000 inner variables, and where H has no Cholesky factor.
    """
    if tree.size(params) > MAX_PARAMS:
        return None
    w_ravel, u_ravel = tree.Raveler(params), tree.Raveler(hparams)
    w = w_ravel.ravel(params).detach().requires_grad_()
    u = u_ravel.ravel(hparams).detach().requires_grad_()
    a = w_ravel.ravel(adjoint).detach()
    with torch.enable_grad():
        outer = problem.outer_loss(w_ravel.unravel(w), u_ravel.unravel(u))
        inner = problem.inner_loss(w_ravel.unravel(w), u_ravel.unravel(u))
        (g,) = torch.autograd.grad(inner, w, create_graph=True)
        H, cross = _columns(g, (w, u), torch.eye(len(w), dtype=w.dtype, device=w.device))
        factor, info = torch.linalg.cholesky_ex(0.5 * (H + H.T))
        if bool(info):
            return None
        J = -torch.cholesky_solve(cross, factor)
        slope = _gradient(outer, w)
        (outer_columns,) = _columns(slope, (w,), J.T) if slope.requires_grad else (torch.zeros_like(J.T),)
        lagrangian = outer - a @ g
        slopes = torch.cat(torch.autograd.grad(lagrangian, (w, u), create_graph=True, materialize_grads=True))
        sides = torch.cat([J, torch.eye(len(u), dtype=u.dtype, device=u.device)])
        if slopes.requires_grad:
            second = torch.cat(_columns(slopes, (w, u), sides.T), dim=1)
        else:
            second = torch.zeros_like(sides.T)
    exact = second @ sides
    return outer_columns @ J, 0.5 * (exact + exact.T)


def _gradient(value: Tensor, w: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(value, w, create_graph=True, materialize_grads=True)
    return slope


def _columns(vector: Tensor, of: tuple[Tensor, ...], weights: Tensor) -> tuple[Tensor, ...]:
    """Return the derivatives of ``weights @ vector`` by each of some vectors, a row for each row of the weights."""
    return torch.autograd.grad(
        vector, of, weights, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )
