"""Binary logistic regression."""

from __future__ import annotations

from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.losses import Logistic


class LogisticProblem(LinearModelProblem):
    """Binary logistic regression with tuned penalties.

        inner   c sum_i log(1 + exp(-y_i x_i'w)) + 1/2 sum_j pen_j w_j^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/m sum_i log(1 + exp(-y_i x_i'w)) over the validation rows

    y holds two labels (0/1, -1/+1, ...); the larger one counts as +1. Options are those of `LinearModelProblem`.

    >>> import torch
    >>> X = torch.tensor([[1.0], [-1.0], [0.5]], dtype=torch.float64)
    >>> problem = LogisticProblem(X, torch.tensor([1, 0, 1]), X, torch.tensor([1, 0, 0]))
    >>> problem.bind(problem.initial_hparams()).grad(torch.zeros(1, dtype=torch.float64))
    tensor([-0.4167], dtype=torch.float64)
    """

    task = "classification"
    glm = Logistic()
