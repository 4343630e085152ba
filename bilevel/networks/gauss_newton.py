"""Gauss-Newton products: the Hessian of an inner loss without the curvature of the model.

With the inner loss as a loss of the model's outputs z and of params, ``l(z(x), x)``, and ``F(x) = (z(x), x)``,

    H = J' H_l J + sum_i (dl/dz_i) z_i''          G = J' H_l J

where J is the Jacobian of F and H_l the Hessian of l in (z, params) (Schraudolph 2002). G is positive semidefinite
where l is convex in (z, params), such as cross-entropy or squared error plus penalties, whatever the model is. It
equals H where the model is linear in its parameters, and where the loss has no slope in any output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.autograd import edges, pushforward, vector_jacobian
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import Linearization
from bilevel.oracles.losses import SplitLoss


def gauss_newton(point: Linearization, loss: SplitLoss) -> Callable[[Tree], Tree]:
    """Return ``v -> G v`` on trees shaped as params; the graphs are built once, and a product is counted as an HVP.

    Each product takes three backward passes: ``J v`` is the derivative of the VJP by its cotangent. `loss` is that of
    the linearised gradient, on its batch, in two halves.
    """
    hparams, params, own = point.inner.hparams, tree.attach(point.params), tree.attach(point.params)
    with torch.enable_grad():
        outputs = loss.outputs(params, hparams)
    moving = [leaf for leaf in tree.leaves(outputs) if _moves(leaf)]
    push = pushforward(moving, tree.leaves(params))
    # The loss with the outputs and params as independent variables.
    free = tree.tree_map(lambda leaf: leaf.detach().requires_grad_() if _moves(leaf) else leaf, outputs)
    variables = [leaf for leaf in tree.leaves(free) if _moves(leaf)] + tree.leaves(own)
    with torch.enable_grad():
        value = loss.at_outputs(free, own, hparams)
        slope = edges(torch.autograd.grad(value, variables, create_graph=True, materialize_grads=True))

    def product(v: Tree) -> Tree:
        point.inner.counts["hvp"] += 1
        direct = tree.leaves(v)
        product = vector_jacobian(slope, variables, push(direct) + direct)
        by_outputs, by_params = product[: len(moving)], product[len(moving) :]
        through = vector_jacobian(moving, tree.leaves(params), by_outputs)
        del product
        # One leaf after the other is let go of.
        return tree.rebuild(point.params, [through.pop(0) + by_params.pop(0) for _ in direct])

    return product


def _moves(leaf: object) -> bool:
    """Whether a leaf of the model's outputs depends on params; a model may return other things besides."""
    return isinstance(leaf, Tensor) and leaf.requires_grad
