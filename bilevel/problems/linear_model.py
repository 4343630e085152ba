"""What ridge, logistic and softmax regression share: a linear model, a loss of its predictions, a quadratic penalty.

    inner   g(w, u) = c sum_i loss(z_i, y_i) + 1/2 sum_j pen_j(u) w_j^2      over the training rows, z_i = x_i' w
    outer   f(w)    = 1/m sum_i loss(z_i, y_i)                               over the validation rows

with c = 1/n ("mean", the default) or 1 ("sum"), and pen = exp(u) ("log", the default) or u ("direct"). A penalty name
says which weights share a hyperparameter. The closed-form oracles, with D the curvature of the loss at the predictions:

    grad = c X' loss'(z) + pen w,   H v = c X' D X v + pen v,   C' v = (d pen/du) w v, summed over each group

Data are kept feature-major (a contiguous (features, rows) copy): matrix-vector products along rows are then faster.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import check_size
from bilevel.inputs import check_trees
from bilevel.lanczos import Spectrum, lanczos
from bilevel.oracles import InnerProblem, Linearization
from bilevel.problem import BilevelProblem
from bilevel.problems.linear_batch import LinearBatch
from bilevel.problems.splits import Split
from bilevel.tree import Tree


class LinearModelPoint(Linearization):
    """The gradient of a linear model, linearised: the curvature at the predictions is computed once."""

    inner: LinearModelInner

    @cached_property
    def curvature(self) -> Any:
        """What the loss's curvature at the training predictions needs, in the family's own form."""
        problem = self.inner.problem
        return problem.curvature_at(problem.predict(problem.train.X, self.params))

    def _data_hvp(self, v: Tensor) -> Tensor:
        problem = self.inner.problem
        bent = problem.bend(self.curvature, problem.predict(problem.train.X, v))
        return problem.scale * problem.collect(problem.train.X, bent)

    def _hvp(self, v: Tensor) -> Tensor:
        return torch.addcmul(self._data_hvp(v), self.inner.penalty, v)

    def _cross(self, v: Tensor) -> Tensor:
        return self.inner.problem.gather(self.inner.slope * self.params * v)

    def _cross_jvp(self, hparams_tangent: Tensor) -> Tensor:
        return self.inner.slope * self.inner.problem.spread(hparams_tangent) * self.params

    def rebind(self, inner: InnerProblem) -> Linearization:
        """Return the linearization for other penalties; the data part is kept."""
        other = super().rebind(inner)
        if "curvature" in self.__dict__:
            other.__dict__["curvature"] = self.curvature
        return other


class LinearModelInner(InnerProblem):
    """A linear model at fixed penalties."""

    linearization = LinearModelPoint

    def __init__(self, problem: LinearModelProblem, hparams: Tree, counts: Any = None) -> None:
        super().__init__(problem, hparams, counts)
        self.penalty: Tensor = problem.penalties(self.hparams)
        if not bool(torch.isfinite(self.penalty).all()):
            raise ValueError(
                f"a penalty is not finite: hyperparameters go up to {float(self.hparams.max()):.4g}, "
                "where exp(u) overflows; start lower or use a smaller learning rate."
            )
        self.slope: Tensor = self.penalty if problem.parametrization == "log" else torch.ones_like(self.penalty)

    def _value(self, params: Tensor) -> Tensor:
        with torch.no_grad():
            value: Tensor = self.problem.inner_loss(params, self.hparams)
        return value

    def _grad(self, params: Tensor) -> Tensor:
        problem = self.problem
        slopes = problem.slope_at(problem.predict(problem.train.X, params), problem.train.y)
        return torch.addcmul(problem.scale * problem.collect(problem.train.X, slopes), self.penalty, params)

    def curvature(self, params: Tensor) -> Spectrum:
        """Return bounds of the spectrum that hold at every params: an automatic step size is safe everywhere."""
        # The norm is measured from below, to a relative 1e-6.
        largest = self.problem.scale * self.problem.max_loss_curvature * self.problem.gram_norm * (1 + 1e-5)
        return Spectrum(float(self.penalty.min()), largest + float(self.penalty.max()))


class LinearModelProblem(BilevelProblem):
    """Base of `RidgeProblem`, `LogisticProblem` and `SoftmaxProblem`.

    A family gives the loss of the predictions, its slope and its curvature.

    Args:
        X_train: training inputs of shape (rows, features), floating.
        y_train: training targets of shape (rows,).
        X_val: validation inputs, for the outer loss.
        y_val: validation targets.
        penalty: which weights share a penalty, a name in `penalty_axes`.
        X_test: test inputs, for `metrics` alone.
        y_test: test targets.
        loss: "mean" or "sum" over the training rows.
        parametrization: "log": penalties are ``exp(hparams)``; "direct": they are the hparams.
    """

    inner_problem: type[InnerProblem] = LinearModelInner
    max_loss_curvature: float
    """Largest second derivative of the loss with respect to a prediction."""

    def __init__(
        self,
        X_train: Any,
        y_train: Any,
        X_val: Any,
        y_val: Any,
        penalty: str = "scalar",
        *,
        X_test: Any = None,
        y_test: Any = None,
        loss: str = "mean",
        parametrization: str = "log",
    ) -> None:
        for name, value, allowed in (
            ("loss", loss, ("mean", "sum")),
            ("parametrization", parametrization, ("log", "direct")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"`{type(self).__name__}.{name}` must be {' or '.join(map(repr, allowed))}, got {value!r}."
                )
        if (X_test is None) != (y_test is None):
            raise ValueError("give X_test and y_test together, or neither.")
        self.train = Split("train", X_train, y_train)
        self.val = Split("val", X_val, y_val)
        self.test = None if X_test is None else Split("test", X_test, y_test)
        for split in self.splits.values():
            if split.X.shape[0] != self.train.X.shape[0] or split.X.dtype != self.train.X.dtype:
                raise ValueError(
                    f"X_{split.name} has {split.X.shape[0]} features in {split.X.dtype}, "
                    f"but X_train has {self.train.X.shape[0]} in {self.train.X.dtype}."
                )
            if split.X.device != self.train.X.device:
                raise ValueError(f"X_{split.name} is on {split.X.device}, but X_train on {self.train.X.device}.")
        self.loss, self.parametrization = loss, parametrization
        self.scale = 1.0 / self.train.rows if loss == "mean" else 1.0
        self.prepare_targets()
        axes = self.penalty_axes()
        if penalty not in axes:
            raise ValueError(
                f"`{type(self).__name__}.penalty` must be one of {', '.join(map(repr, axes))}, got {penalty!r}."
            )
        self.penalty = penalty
        shape = self.params_shape()
        self._hparams_shape = tuple(shape[axis] for axis in axes[penalty])
        self._group_shape = tuple(size if axis in axes[penalty] else 1 for axis, size in enumerate(shape))
        super().__init__(params=self.train.X.new_zeros(self.params_shape()))

    @property
    def splits(self) -> Mapping[str, Split]:
        """The parts of the data by name."""
        parts = {"train": self.train, "val": self.val}
        return parts if self.test is None else parts | {"test": self.test}

    # What a family gives ---------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare_targets(self) -> None:
        """Check the targets and bring them into the family's own form."""

    @abstractmethod
    def params_shape(self) -> tuple[int, ...]:
        """Return the shape of the weights."""

    @abstractmethod
    def penalty_axes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the axes of the weights along which penalties vary, by the name of the choice."""

    @abstractmethod
    def loss_at(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the losses of predictions z."""

    @abstractmethod
    def slope_at(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the derivatives of the losses with respect to z."""

    @abstractmethod
    def curvature_at(self, z: Tensor) -> Any:
        """Return what `bend` needs of the predictions."""

    @abstractmethod
    def bend(self, curvature: Any, dz: Tensor) -> Tensor:
        """Return the second derivative of the losses applied to dz."""

    @abstractmethod
    def scores(self, z: Tensor, y: Tensor) -> dict[str, float]:
        """Return figures of merit of predictions, besides the loss."""

    # Shared ----------------------------------------------------------------------------------------------------------

    def predict(self, X: Tensor, w: Tensor) -> Tensor:
        """Return the predictions for feature-major X: (rows,)."""
        return torch.mv(X.t(), w)

    def collect(self, X: Tensor, slopes: Tensor) -> Tensor:
        """Return ``X' slopes``, shaped as the weights; the transpose of `predict`."""
        return torch.mv(X, slopes)

    def hparams_shape(self) -> tuple[int, ...]:
        """Return the shape of the hyperparameters."""
        return self._hparams_shape

    def batch_class(self) -> type[LinearBatch]:
        """Return the class of a batch of such problems.

        Raises:
            ValueError: for a family without one.
        """
        raise ValueError(f"{type(self).__name__} does not run in batches: state it by two functions instead.")

    def batched(self, size: int, data: Tree = None) -> BilevelProblem:
        """Return `size` members that share these data, with the closed forms on a leading dimension.

        Args:
            size: number of members.
            data: not taken.

        Raises:
            ValueError: for a size that is no positive int, and for `data`.
        """
        check_size(size)
        if self.batch is not None:
            raise ValueError(f"this problem is a batch of {self.batch} already.")
        if data is not None:
            raise ValueError(f"{type(self).__name__} holds its data itself: stack problems by `bilevel.stack`.")
        batch: BilevelProblem = self.batch_class().of(self, [self] * size)
        return batch

    def stacked(self, problems: Sequence[BilevelProblem]) -> BilevelProblem:
        """Return such problems as one batch, their data stacked: see `bilevel.stack`."""
        batch: BilevelProblem = self.batch_class().stack(problems)
        return batch

    def initial_hparams(self, value: float = 0.0) -> Tensor:
        """Return hyperparameters that all have one value."""
        return torch.full(self.hparams_shape(), value, dtype=self.train.X.dtype, device=self.train.X.device)

    def spread(self, hparams: Tensor) -> Tensor:
        """Return a hyperparameter-shaped tensor in a shape that broadcasts to the weights."""
        return hparams.reshape(self._group_shape)

    def gather(self, weights: Tensor) -> Tensor:
        """Return the sums over each group of weights, shaped as the hyperparameters; the transpose of `spread`."""
        return weights.sum_to_size(self._group_shape).reshape(self.hparams_shape())

    def penalties(self, hparams: Tensor) -> Tensor:
        """Return the penalty of every weight, broadcastable to the weights."""
        return self.spread(hparams.exp() if self.parametrization == "log" else hparams)

    @cached_property
    def gram_norm(self) -> float:
        """The largest eigenvalue of X'X over the training rows, by Lanczos."""
        X = self.train.X
        return lanczos(lambda v: X @ (X.t() @ v), X[:, 0], steps=60, rtol=1e-6).largest

    def inner_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the penalised training loss, in plain torch."""
        loss = self.scale * self.loss_at(self.predict(self.train.X, params), self.train.y)
        return loss + 0.5 * (self.penalties(hparams) * params * params).sum()

    def outer_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the mean validation loss, in plain torch."""
        return self.loss_at(self.predict(self.val.X, params), self.val.y) / self.val.rows

    def outer_value_and_grads(self, params: Tree, hparams: Tree) -> tuple[Tensor, Tree, Tree]:
        """Return the validation loss and its gradients, in closed form."""
        z = self.predict(self.val.X, params)
        gradient = self.collect(self.val.X, self.slope_at(z, self.val.y)) / self.val.rows
        return self.loss_at(z, self.val.y) / self.val.rows, gradient, torch.zeros_like(hparams)

    def metrics(self, params: Tree) -> dict[str, float]:
        """Return loss and scores on every split, such as ``test_loss`` and ``test_accuracy``."""
        figures = {}
        for name, split in self.splits.items():
            z = self.predict(split.X, params)
            figures[f"{name}_loss"] = float(self.loss_at(z, split.y)) / split.rows
            figures |= {f"{name}_{score}": value for score, value in self.scores(z, split.y).items()}
        return figures

    def check(self, params: Tree, hparams: Tree) -> None:
        """Look at shapes, dtype and device.

        Raises:
            ValueError: in one sentence.
        """
        check_trees(params, hparams)
        for name, value, shape in (
            ("params", params, self.params_shape()),
            ("hparams", hparams, self.hparams_shape()),
        ):
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"`{name}` of {type(self).__name__}(penalty={self.penalty!r}) must be a Tensor of shape {shape}, "
                    f"got {got}."
                )
            X = self.train.X
            if (value.dtype, value.device) != (X.dtype, X.device):
                raise ValueError(
                    f"`{name}` is {value.dtype} on {value.device}, but X_train is {X.dtype} on {X.device}: "
                    "they must share dtype and device."
                )
        if self.parametrization == "direct" and bool((hparams < 0).any()):
            raise ValueError(
                f"a penalty is negative ({float(hparams.min()):.3g}): declare a positive constraint, "
                "or use parametrization='log'."
            )
