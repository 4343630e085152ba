"""Generalised linear models with tuned penalties, one class for each loss."""

from __future__ import annotations

from typing import Any

from bilevel.problems.data_problem import with_options_of
from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.losses import Huber, Logistic, Poisson, Softmax, SquaredHinge


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


class SoftmaxProblem(LinearModelProblem):
    """Softmax regression with tuned penalties; weights W of shape (classes, features), predictions ``z_i = W x_i``.

        inner   c sum_i (logsumexp(z_i) - z_i[y_i]) + 1/2 sum pen W^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/m sum_i (logsumexp(z_i) - z_i[y_i]) over the validation rows

    Hyperparameters u, with ``pen = exp(u)`` (or u itself with parametrization="direct"):

        penalty="scalar"       shape ()                      one penalty
        penalty="per_class"    shape (classes,)              one for each row of W
        penalty="per_feature"  shape (features,)             one for each column of W
        penalty="per_weight"   shape (classes, features)     one for each (class, feature)

    Other options are those of `LinearModelProblem`.

    >>> import torch
    >>> X = torch.eye(3, dtype=torch.float64)
    >>> problem = SoftmaxProblem(X, torch.tensor([0, 1, 2]), X, torch.tensor([0, 1, 2]), penalty="per_class")
    >>> problem.params.shape, problem.initial_hparams().shape
    (torch.Size([3, 3]), torch.Size([3]))
    """

    task = "classification"
    glm = Softmax()


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


@with_options_of(LinearModelProblem)
class HuberProblem(LinearModelProblem):
    """Regression with the Huber loss and tuned penalties: rows far off pull no harder than those at the width.

        inner   c sum_i h(x_i'w - y_i) + 1/2 sum_j pen_j w_j^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/m sum_i h(x_i'w - y_i) over the validation rows

    with ``h(r) = r^2 / 2`` up to the width and ``width |r| - width^2 / 2`` beyond. The curvature jumps where a residual
    is the width exactly: there the hypergradient has two sides, and near it an error is an estimate.

    Options are those of `LinearModelProblem`, and `width`: up to which residuals count in squares, in units of the
    targets.

    >>> import torch
    >>> X, y = torch.ones(2, 1, dtype=torch.float64), torch.tensor([0.5, 9.0], dtype=torch.float64)
    >>> problem = HuberProblem(X, y, X, y, width=1.5)
    >>> problem.bind(problem.initial_hparams()).grad(torch.zeros(1, dtype=torch.float64))
    tensor([-1.], dtype=torch.float64)
    """

    task = "regression"

    def __init__(self, *data: Any, width: float = 1.0, **options: Any) -> None:
        self.glm = Huber(width)
        super().__init__(*data, **options)
