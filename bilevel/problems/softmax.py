"""Multinomial logistic (softmax) regression."""

from __future__ import annotations

from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.losses import Softmax


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
