"""Support vector machines with the squared hinge loss."""

from __future__ import annotations

from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.losses import SquaredHinge


class SquaredHingeProblem(LinearModelProblem):
    """Linear support vector machine of two classes with tuned penalties and the squared hinge loss.

        inner   c/2 sum_i max(0, 1 - y_i x_i'w)^2 + 1/2 sum_j pen_j w_j^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/(2m) sum_i max(0, 1 - y_i x_i'w)^2 over the validation rows

    y holds two labels; the larger one counts as +1. The curvature jumps where a margin is met exactly: there the
    hypergradient has two sides, and near it an error is an estimate.

    Options are those of `LinearModelProblem`.

    >>> import torch
    >>> X = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    >>> problem = SquaredHingeProblem(X, torch.tensor([1, 0]), X, torch.tensor([1, 0]))
    >>> problem.bind(problem.initial_hparams()).grad(torch.zeros(1, dtype=torch.float64))
    tensor([-1.], dtype=torch.float64)
    """

    task = "classification"
    glm = SquaredHinge()
