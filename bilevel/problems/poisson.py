"""Poisson regression."""

from __future__ import annotations

from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.losses import Poisson


class PoissonProblem(LinearModelProblem):
    """Poisson regression of counts or rates with tuned penalties: the expectation of y_i is ``exp(x_i'w)``.

        inner   c sum_i (exp(z_i) - y_i z_i) + 1/2 sum_j pen_j w_j^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/m sum_i (exp(z_i) - y_i z_i) over the validation rows

    both with ``y log y - y`` added to each row, so that a loss is half a deviance. The curvature ``exp(z)`` has no
    bound, so no step size is safe and "auto" is refused: use `QuasiNewton`, whose line search needs none, or `Newton`.

    Options are those of `LinearModelProblem`; `metrics` has ``d2``, the share of the deviance that is explained.

    >>> import torch
    >>> X = torch.ones(3, 1, dtype=torch.float64)
    >>> problem = PoissonProblem(X, torch.tensor([0, 1, 5]), X, torch.tensor([1, 2, 3]))
    >>> problem.bind(problem.initial_hparams()).grad(torch.zeros(1, dtype=torch.float64))
    tensor([-1.], dtype=torch.float64)
    """

    task = "raw"
    glm = Poisson()
