"""Multinomial logistic (softmax) regression."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.oracles.error_model import LossConstants
from bilevel.problems.linear_batch import LinearBatch, LinearBatchInner
from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.splits import Split, class_labels, training_classes


class SoftmaxProblem(LinearModelProblem):
    """Softmax regression with tuned penalties; weights W of shape (classes, features), predictions ``z_i = W x_i``.

        inner   c sum_i (logsumexp(z_i) - z_i[y_i]) + 1/2 sum pen W^2,   c = 1/n (loss="mean") or 1 (loss="sum")
        outer   1/m sum_i (logsumexp(z_i) - z_i[y_i]) over the validation rows

    Hyperparameters u, with ``pen = exp(u)`` (or u itself with parametrization="direct"):

        penalty="scalar"       shape ()                      one penalty
        penalty="per_class"    shape (classes,)              one for each row of W
        penalty="per_feature"  shape (features,)             one for each column of W
        penalty="per_weight"   shape (classes, features)     one for each (class, feature)

    Args:
        X_train: training inputs, shape (rows, features).
        y_train: training labels, shape (rows,).
        X_val: validation inputs, for the outer loss.
        y_val: validation labels.
        penalty: see above.
        X_test: test inputs, for `metrics` alone.
        y_test: test labels.
        loss: "mean" or "sum" over the training rows.
        parametrization: "log" or "direct".

    >>> X = torch.eye(3, dtype=torch.float64)
    >>> problem = SoftmaxProblem(X, torch.tensor([0, 1, 2]), X, torch.tensor([0, 1, 2]), penalty="per_class")
    >>> problem.params.shape, problem.initial_hparams().shape
    (torch.Size([3, 3]), torch.Size([3]))
    """

    task = "classification"
    max_loss_curvature = 0.5
    # The third cumulant of (a, v, d) is at most range(v) sd(a) sd(d); Popoviciu bounds the standard deviations.
    loss_constants = LossConstants(curvature=0.5, concordance=1.0, third=1.0 / (2.0 * math.sqrt(2.0)), slope=0.25)
    gram_is_cheap = False

    def prepare_targets(self) -> None:
        """Turn the labels into indices."""
        classes = training_classes(self.train)
        self.classes = len(classes)
        self.class_curvature_at_zero = (self.classes - 1) / self.classes**2
        for split in self.splits.values():
            split.y = class_labels(split, classes)

    def batch_class(self) -> type[LinearBatch]:
        """`SoftmaxBatch`."""
        return SoftmaxBatch

    def params_shape(self) -> tuple[int, ...]:
        """(classes, features)."""
        return (self.classes, self.train.X.shape[0])

    def penalty_axes(self) -> Mapping[str, tuple[int, ...]]:
        """One penalty, or one for each class, feature, or weight."""
        return {"scalar": (), "per_class": (0,), "per_feature": (1,), "per_weight": (0, 1)}

    def predict(self, X: Tensor, w: Tensor) -> Tensor:
        """Return ``W x_i`` for every row: (classes, rows)."""
        return w @ X

    def collect(self, X: Tensor, slopes: Tensor) -> Tensor:
        """Return the slopes (classes, rows) gathered into (classes, features)."""
        return slopes @ X.t()

    def losses_at(self, z: Tensor, y: Tensor) -> Tensor:
        """``logsumexp(z_i) - z_i[y_i]`` of every row."""
        return torch.logsumexp(z, 0) - z.gather(0, y[None])[0]

    def loss_at(self, z: Tensor, y: Tensor) -> Tensor:
        """``sum (logsumexp(z_i) - z_i[y_i])``."""
        return self.losses_at(z, y).sum()

    def slope_at(self, z: Tensor, y: Tensor) -> Tensor:
        """``softmax(z) - onehot(y)``."""
        p = torch.softmax(z, 0)
        return p.scatter(0, y[None], p.gather(0, y[None]) - 1.0)

    def curvature_at(self, z: Tensor) -> Tensor:
        """``softmax(z)``."""
        return torch.softmax(z, 0)

    def bend(self, curvature: Tensor, dz: Tensor) -> Tensor:
        """``(diag(p) - p p') dz`` in every row."""
        weighted = curvature * dz
        return weighted - curvature * weighted.sum(0)

    def rate_at(self, z: Tensor) -> Tensor:
        """A variance over a range of one: at most 1/4, and at most the probability outside the likeliest class."""
        return (1.0 - torch.softmax(z, 0).amax(0)).clamp(0.0, 0.25)

    def gram_at(self, X: Tensor, curvature: Tensor) -> Tensor:
        """Return ``X' D X`` over the flattened (class, feature) weights, one block for each pair of classes."""
        p = curvature.to(X.dtype)
        count, features = len(p), len(X)
        gram = X.new_empty(count, features, count, features)
        for i in range(count):
            for j in range(i + 1):
                block = (X * (p[i] * ((1.0 - p[j]) if i == j else -p[j]))) @ X.t()
                gram[i, :, j, :] = block
                gram[j, :, i, :] = block
        return gram.reshape(count * features, count * features)

    def row_losses(self, params: Tree, split: Split) -> Tensor:
        """Return the loss of every row of a split."""
        return self.losses_at(self.predict(split.X, params), split.y)

    def constant_prediction(self) -> Tensor:
        """The logarithms of the shares of the training labels."""
        counts = torch.bincount(self.train.y, minlength=self.classes)
        return (counts.to(self.train.X.dtype) / self.train.rows).log()

    def scores(self, z: Tensor, y: Tensor) -> dict[str, float]:
        """The accuracy."""
        return {"accuracy": float((z.argmax(0) == y).double().mean())}


class SoftmaxBatch(LinearBatch, SoftmaxProblem):
    """Softmax regressions side by side: weights (batch, classes, features), predictions (batch, classes, rows)."""

    inner_problem = LinearBatchInner

    def predict(self, X: Tensor, w: Tensor) -> Tensor:
        """Return ``W x_i`` for every member and row."""
        return w @ X

    def collect(self, X: Tensor, slopes: Tensor) -> Tensor:
        """Return the slopes gathered into (batch, classes, features)."""
        return slopes @ X.mT

    def losses_at(self, z: Tensor, y: Tensor) -> Tensor:
        """``sum (logsumexp(z_i) - z_i[y_i])`` of every member."""
        return (torch.logsumexp(z, -2) - z.gather(-2, self._labels(z, y))[:, 0]).sum(-1)

    def slope_at(self, z: Tensor, y: Tensor) -> Tensor:
        """``softmax(z) - onehot(y)``."""
        labels = self._labels(z, y)
        return torch.softmax(z, -2).scatter_add(-2, labels, z.new_full((1, 1, 1), -1.0).expand_as(labels))

    def curvature_at(self, z: Tensor) -> Tensor:
        """``softmax(z)``."""
        return torch.softmax(z, -2)

    def bend(self, curvature: Tensor, dz: Tensor) -> Tensor:
        """``(diag(p) - p p') dz`` in every row."""
        weighted = curvature * dz
        return weighted - curvature * weighted.sum(-2, keepdim=True)

    def data_hessian(self, curvature: Tensor) -> Tensor:
        """Return the Hessians over the flattened (class, feature) weights, one block for each pair of classes."""
        X, p = self.train.X, curvature
        size, count, features = self.params.shape
        hessian = X.new_empty(size, count, features, count, features)
        for i in range(count):
            for j in range(i + 1):
                weights = p[:, i] * ((1.0 - p[:, j]) if i == j else -p[:, j])
                block = (X * (self.scale * weights[:, None])) @ X.mT
                hessian[:, i, :, j, :] = block
                hessian[:, j, :, i, :] = block
        return hessian.reshape(size, count * features, count * features)

    @staticmethod
    def _labels(z: Tensor, y: Tensor) -> Tensor:
        return y.expand(z.shape[0], z.shape[-1])[:, None]
