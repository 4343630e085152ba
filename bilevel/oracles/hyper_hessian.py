"""Second derivatives of the outer loss by the hyperparameters, at an inner solution.

With w(u) the inner solution, g the inner gradient, H its Hessian, ``J = dw/du = -H^-1 g_u`` and the adjoint vector
``a = H^-1 f_w``, the Lagrangian ``L(w, u) = f(w, u) - a'g(w, u)`` has ``L_w = 0`` there, so that

    d2 f(w(u), u) / du2  =  [J; I]' L'' [J; I],        its Gauss-Newton part   J' f_ww J
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.conjugate_gradients import Krylov, conjugate_gradients
from bilevel.oracles.losses import Losses

MAX_PARAMS = 2000
"""Up to this many inner variables the inner Hessian is factored."""
MAX_TANGENTS = 40
"""Above that the columns of J are solved for one by one, up to this many."""
TANGENT = 1e-6
"""Their relative residuals."""
PRODUCTS = 2000
"""Most products with the inner Hessian for a column."""


def hyper_hessians(problem: Losses, hparams: Tree, params: Tree, adjoint: Tree) -> tuple[Tensor, Tensor] | None:
    """Return the Gauss-Newton and the exact matrix of second derivatives, each (k, k), by autograd.

    The problem is a single one with an inner loss whose third derivatives torch has; the adjoint is ``H^-1 f_w`` at the
    inner solution. None where H is not positive definite, and for more than 2,000 inner variables and 40
    hyperparameters.
    """
    if tree.size(params) > MAX_PARAMS and tree.size(hparams) > MAX_TANGENTS:
        return None
    w_ravel, u_ravel = tree.Raveler(params), tree.Raveler(hparams)
    w = w_ravel.ravel(params).detach().requires_grad_()
    u = u_ravel.ravel(hparams).detach().requires_grad_()
    a = w_ravel.ravel(adjoint).detach()
    with torch.enable_grad():
        outer = problem.outer_loss(w_ravel.unravel(w), u_ravel.unravel(u))
        inner = problem.inner_loss(w_ravel.unravel(w), u_ravel.unravel(u))
        (g,) = torch.autograd.grad(inner, w, create_graph=True)
        J = _tangents(g, w, u)
        if J is None:
            return None
        (slope,) = torch.autograd.grad(outer, w, create_graph=True, materialize_grads=True)
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


def _tangents(g: Tensor, w: Tensor, u: Tensor) -> Tensor | None:
    """Return ``J = -H^-1 g_u`` of a gradient with its graph, (size, k); None where H is not positive definite."""
    if len(w) <= MAX_PARAMS:
        H, cross = _columns(g, (w, u), torch.eye(len(w), dtype=w.dtype, device=w.device))
        factor, info = torch.linalg.cholesky_ex(0.5 * (H + H.T))
        return None if bool(info) else -torch.cholesky_solve(cross, factor)
    # The derivative of g_u' v by v, a row for each hyperparameter.
    v = torch.zeros_like(w).requires_grad_()
    (pulled,) = torch.autograd.grad(g, u, v, create_graph=True, materialize_grads=True)
    if not pulled.requires_grad:
        return w.new_zeros(len(w), len(u))
    (cross,) = _columns(pulled, (v,), torch.eye(len(u), dtype=w.dtype, device=w.device))
    return solved(lambda x: torch.autograd.grad(g, w, x, retain_graph=True)[0], -cross.T)


def solved(product: Callable[[Tensor], Tensor], columns: Tensor) -> Tensor | None:
    """Return ``H^-1 columns``, (size, k), by conjugate gradients; None where H is not definite, or too hard."""
    found, share = [], max(TANGENT, 20.0 * torch.finfo(columns.dtype).eps)
    for b in columns.T:
        goal = share * float(torch.linalg.vector_norm(b))
        run = conjugate_gradients(product, torch.zeros_like(b), b, partial(_enough, goal), PRODUCTS)
        if not run.residual <= goal:
            return None
        found.append(run.x)
    return torch.stack(found, dim=1)


def _enough(goal: float, run: Krylov) -> bool:
    return run.residual <= goal


def _columns(vector: Tensor, of: tuple[Tensor, ...], weights: Tensor) -> tuple[Tensor, ...]:
    """Return the derivatives of ``weights @ vector`` by each of some vectors, a row for each row of the weights."""
    return torch.autograd.grad(
        vector, of, weights, retain_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )
