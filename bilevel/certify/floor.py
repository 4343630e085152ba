"""The rounding floor: how accurate a hypergradient can be in the dtype of its problem; measured, not proved.

The pair (x, w) is perturbed by relative amounts of one rounding unit with random signs. What that does to the residuals
is what rounding does to them, and two short linear solves carry it over to x, to w and to the hypergradient p:

    floor = |C(n_x)' w + C' n_w| + |p(x_1, w_1) - p(x, w)|,   n_x = H^-1 (s_1 - s),   n_w = H^-1 (r_1 - r + f_xx n_x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.certify.inverse import Inverse
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.problem import BilevelProblem

SEEDS = (11, 12)


def rounding_floor(
    problem: BilevelProblem, hparams: Tree, params: Tree, adjoint: Tree, inverse: Inverse | None = None
) -> float:
    """Return an estimate of the smallest error that a hypergradient at `hparams` can have in the dtype of `params`.

    `params` are near the inner solution, `adjoint` near ``H^-1 f_x`` there. A target below the floor asks for float64
    or for a larger penalty. It is the larger one of two draws of signs; NaN where the Hessian is not positive definite.
    Cost: four linear solves and some gradients.

    >>> from bilevel.problems import QuadraticProblem
    >>> problem = QuadraticProblem.random(size=5, hyperparameters=2, condition=10.0, seed=0)
    >>> u = torch.zeros(2, dtype=torch.float64)
    >>> x = torch.ones(5, dtype=torch.float64)
    >>> 1e-18 < rounding_floor(problem, u, x, x) < 1e-13
    True
    """
    inner, ravel_x, ravel_u = problem.bind(hparams), tree.Raveler(params), tree.Raveler(hparams)

    def at(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        point = inner.linearize(ravel_x.unravel(x))
        _, outer, direct = problem.outer_value_and_grads(point.params, hparams)
        v = ravel_x.unravel(w)
        outer = ravel_x.ravel(outer)
        p = ravel_u.ravel(direct) - ravel_u.ravel(point.cross(v))
        return ravel_x.ravel(inner.grad(point.params)), ravel_x.ravel(point.hvp(v)) - outer, outer, p

    x, w = ravel_x.ravel(params), ravel_x.ravel(adjoint)
    point = inner.linearize(params)
    s, r, outer, p = at(x, w)

    inverse = Inverse() if inverse is None else inverse

    def solve(b: Tensor, transposed: bool) -> Tensor:
        solved = inverse.solve(point, ravel_x, b, transposed)
        return torch.full_like(b, torch.nan) if solved.reason else solved.x

    floors = []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the CPU so that the signs are the same on every device.
        signs = torch.randint(0, 2, (2, len(x)), generator=generator).to(x) * 2 - 1
        unit = torch.finfo(x.dtype).eps
        s_1, r_1, _, p_1 = at(x * (1 + unit * signs[0]), w * (1 + unit * signs[1]))
        n_x = solve(s_1 - s, False)
        _, _, outer_x, p_x = at(x + n_x, w)
        n_w = solve(r_1 - r + outer_x - outer, True)
        along = p_x - p - ravel_u.ravel(point.cross(ravel_x.unravel(n_w)))
        floors.append(float(torch.linalg.vector_norm(along) + torch.linalg.vector_norm(p_1 - p)))
    return max(floors)
