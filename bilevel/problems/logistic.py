"""Binary logistic regression."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bilevel.core.tree import Tree
from bilevel.oracles.error_model import LossConstants
from bilevel.problems.linear_batch import LinearBatch, LinearBatchInner
from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.splits import Split, class_labels, training_classes


class LogisticProblem(LinearModelProblem):
    """Binary logistic regression with tuned penalties.

        inner   c sum_i log(1 + exp(-y_i x_i'w)) + 1/2 sum_j pen_j w_j^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/m sum_i log(1 + exp(-y_i x_i'w)) over the validation rows

    y holds two labels (0/1, -1/+1, ...); the larger one counts as +1. Hyperparameters: u of shape () for
    penalty="scalar", (features,) for "per_feature"; ``pen = exp(u)``, or u itself with parametrization="direct".
    There is no intercept: add a column of ones, which is penalised as the others are.

    Args:
        X_train: training inputs, shape (rows, features).
        y_train: training labels, shape (rows,).
        X_val: validation inputs, for the outer loss.
        y_val: validation labels.
        penalty: "scalar" or "per_feature".
        X_test: test inputs, for `metrics` alone.
        y_test: test labels.
        loss: "mean" or "sum" over the training rows.
        parametrization: "log" or "direct".

    >>> X = torch.tensor([[1.0], [-1.0], [0.5]], dtype=torch.float64)
    >>> problem = LogisticProblem(X, torch.tensor([1, 0, 1]), X, torch.tensor([1, 0, 0]))
    >>> problem.bind(problem.initial_hparams()).grad(torch.zeros(1, dtype=torch.float64))
    tensor([-0.4167], dtype=torch.float64)
    """

    task = "classification"
    max_loss_curvature = 0.25
    # |sigma''| <= sigma' and |sigma''| <= 1 / (6 sqrt 3) (Bach 2010).
    loss_constants = LossConstants(curvature=0.25, concordance=1.0, third=1.0 / (6.0 * math.sqrt(3.0)), slope=0.25)

    def prepare_targets(self) -> None:
        """Turn the labels into -1 and +1.

        Raises:
            ValueError: unless there are exactly two labels.
        """
        classes = training_classes(self.train)
        if len(classes) != 2:
            raise ValueError(
                f"y_train holds {len(classes)} classes: LogisticProblem takes two, SoftmaxProblem any number."
            )
        for split in self.splits.values():
            split.y = 2.0 * class_labels(split, classes).to(split.X.dtype) - 1.0

    def batch_class(self) -> type[LinearBatch]:
        """`LogisticBatch`."""
        return LogisticBatch

    def params_shape(self) -> tuple[int, ...]:
        """(features,)."""
        return (self.train.X.shape[0],)

    def penalty_axes(self) -> Mapping[str, tuple[int, ...]]:
        """One penalty, or one for each feature."""
        return {"scalar": (), "per_feature": (0,)}

    def loss_at(self, z: Tensor, y: Tensor) -> Tensor:
        """``sum log(1 + exp(-y z))``."""
        return softplus(-y * z).sum()

    def slope_at(self, z: Tensor, y: Tensor) -> Tensor:
        """``-y sigma(-y z)``."""
        return -y * torch.sigmoid(-y * z)

    def curvature_at(self, z: Tensor) -> Tensor:
        """``sigma(z) sigma(-z)``."""
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def bend(self, curvature: Tensor, dz: Tensor) -> Tensor:
        """``sigma(z) sigma(-z) dz``."""
        return curvature * dz

    def rate_at(self, z: Tensor) -> Tensor:
        """The curvature."""
        return self.curvature_at(z)

    def row_losses(self, params: Tree, split: Split) -> Tensor:
        """Return the loss of every row of a split."""
        return softplus(-split.y * self.predict(split.X, params))

    def constant_prediction(self) -> Tensor:
        """The logit of the share of +1 among the training labels."""
        return torch.logit((self.train.y > 0).to(self.train.X.dtype).mean())

    def scores(self, z: Tensor, y: Tensor) -> dict[str, float]:
        """The accuracy."""
        return {"accuracy": float((z * y > 0).double().mean())}


class LogisticBatch(LinearBatch, LogisticProblem):
    """Logistic regressions side by side; see `LogisticProblem.batched` and `bilevel.stack`."""

    inner_problem = LinearBatchInner

    def losses_at(self, z: Tensor, y: Tensor) -> Tensor:
        """``sum log(1 + exp(-y z))`` of every member."""
        return softplus(-y * z).sum(-1)
