"""Linear models with a tuned weight for every training row: data hyper-cleaning (Franceschi et al. 2017)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.core.options import is_number, require
from bilevel.core.tree import Tree
from bilevel.oracles.error_model import Tuned
from bilevel.oracles.hyper_hessian import hyper_hessians
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.stacking import RowsProblem
from bilevel.problems.linear_model import LinearModelProblem
from bilevel.problems.linear_oracles import LinearModelInner, LinearModelPoint
from bilevel.problems.losses import GLMLoss, Softmax
from bilevel.problems.splits import Split


class SampleWeightPoint(LinearModelPoint):
    """The gradient of a linear model with weighted rows, linearised.

    Predictions and curvature do not depend on the weights, so `rebind` keeps them; the gradient for other weights takes
    half a pass, and is counted as one.
    """

    inner: SampleWeightInner

    def loss(self, z: Tensor, rows: slice) -> Tensor:
        problem = self.inner.problem
        return torch.dot(self.inner.weights[rows], problem.glm.value(z, problem.train.y[rows]))

    def slopes(self, z: Tensor, rows: slice) -> Tensor:
        return super().slopes(z, rows).mul_(self.inner.weights[rows])

    def hessian_product(self, block: int, rows: slice, dz: Tensor) -> Tensor:
        return super().hessian_product(block, rows, dz).mul_(self.inner.weights[rows])

    def weighted_gram(self, block: int, X: Tensor, rows: slice) -> Tensor:
        return super().weighted_gram(block, X * self.inner.weights[rows].sqrt().to(X.dtype), rows)

    def _lasting_gradient(self) -> None:
        """Return nothing: the gradient depends on the weights."""

    def row_gram(self, X: Tensor, rows: slice) -> Tensor:
        return (X * self.inner.weights[rows].to(X.dtype)) @ X.t()

    def _cross(self, v: Tensor) -> Tensor:
        problem = self.inner.problem
        return self._to_rows(
            problem.design.sweep(lambda block, X, rows: self._along(block, rows, problem.predict(X, v)))
        )

    def _vjp(self, v: Tensor) -> tuple[Tensor, Tensor]:
        problem = self.inner.problem
        _ = self.curvature  # made here, by one thread

        def visit(block: int, X: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            dz = problem.predict(X, v)
            along = self._along(block, rows, dz)  # first: the product may overwrite dz
            return problem.collect(X, self.hessian_product(block, rows, dz)), along

        parts = problem.design.sweep(visit)
        product = problem.scale * sum((part for part, _ in parts[1:]), start=parts[0][0])
        return torch.addcmul(product, self.inner.penalty, v), self._to_rows([along for _, along in parts])

    def _cross_jvp(self, hparams_tangent: Tensor) -> Tensor:
        problem = self.inner.problem
        moved = hparams_tangent * self.inner.weight_slopes
        _ = self.predictions  # made here, by one thread

        def visit(block: int, X: Tensor, rows: slice) -> Tensor:
            return problem.collect(
                X, super(SampleWeightPoint, self).slopes(self.predictions[block], rows) * moved[rows]
            )

        return problem.scale * problem.design.total(visit)

    def _along(self, block: int, rows: slice, dz: Tensor) -> Tensor:
        """Return, for every row, the derivative of its unweighted loss along dz."""
        along = self._unweighted(block, rows) * dz
        return along if along.dim() == 1 else along.sum(0)

    def _unweighted(self, block: int, rows: slice) -> Tensor:
        return super().slopes(self.predictions[block], rows)

    def _to_rows(self, parts: list[Tensor]) -> Tensor:
        return self.inner.problem.scale * self.inner.weight_slopes * torch.cat(parts)


class SampleWeightInner(LinearModelInner):
    """A linear model at fixed weights of the rows."""

    linearization = SampleWeightPoint

    def __init__(self, problem: RowWeightProblem, hparams: Tree, counts: Counter[str] | None = None) -> None:
        super().__init__(problem, hparams, counts)
        self.weights: Tensor = problem.weights(self.hparams)
        sigmoid = problem.parametrization == "sigmoid"
        self.weight_slopes: Tensor = self.weights * (1.0 - self.weights) if sigmoid else torch.ones_like(self.weights)

    @property
    def data_curvature(self) -> float:
        return float(self.weights.max()) * super().data_curvature


class RowWeightProblem(LinearModelProblem):
    """A linear model of any loss with a tuned weight for every training row, and fixed penalties.

        inner   c sum_i s_i loss(z_i, y_i) + 1/2 sum_j pen_j w_j^2,   c = 1/n ("mean") or 1 ("sum")
        outer   1/m sum_i loss(z_i, y_i) over the validation rows

    Hyperparameters: u of shape (rows,); ``s = sigmoid(u)``, or u itself with parametrization="direct".

    Args:
        glm: the loss of the predictions.
        penalty: pen, which broadcasts to the weights of the model.
        options: of `LinearModelProblem`.
    """

    inner_problem = SampleWeightInner
    parametrizations = ("sigmoid", "direct")

    def __init__(
        self, X_train: Any, y_train: Any, X_val: Any, y_val: Any, *, glm: GLMLoss, penalty: Any, **options: Any
    ) -> None:
        self.glm = glm
        super().__init__(X_train, y_train, X_val, y_val, **{"parametrization": "sigmoid"} | options)
        X = self.train.X
        self._fixed = torch.as_tensor(penalty, dtype=X.dtype, device=X.device)

    @property
    def unit(self) -> str:
        return "logit of a weight" if self.parametrization == "sigmoid" else "weight"

    def labels(self, features: Sequence[str]) -> list[str]:
        return [f"row {index}" for index in range(self.train.rows)]

    def hparams_shape(self) -> tuple[int, ...]:
        return (self.train.rows,)

    def _rows(self, single: Sequence[BilevelProblem], *data: Split) -> BilevelProblem:
        return RowsProblem(single, f"{type(self).__name__} has its closed forms for one problem")

    def weights(self, hparams: Tensor) -> Tensor:
        """Return the weight of every training row."""
        return torch.sigmoid(hparams) if self.parametrization == "sigmoid" else hparams

    def penalties(self, hparams: Tensor) -> Tensor:
        return self._fixed

    def tuned(self, hparams: Tree) -> Tuned:
        penalty = self.penalties(hparams).double().expand(self.params_shape())
        weights = self.weights(hparams)
        sigmoid = self.parametrization == "sigmoid"
        slopes = weights * torch.sigmoid(-hparams) if sigmoid else torch.ones_like(weights)
        return Tuned(
            penalty=penalty,
            penalty_slope=torch.zeros_like(penalty),
            penalty_owner=torch.zeros(penalty.shape, dtype=torch.int64, device=penalty.device),
            weights=self.scale * weights,
            size=hparams.numel(),
            weight_slope=self.scale * slopes,
            weight_owner=torch.arange(hparams.numel(), device=hparams.device),
        )

    def hyper_hessians(self, hparams: Tree, params: Tree, adjoint: Tree) -> tuple[Tensor, Tensor] | None:
        return hyper_hessians(self, hparams, params, adjoint)

    def penalty_scales(self, hparams: Tree) -> Tree | None:
        return None

    def inner_loss(self, params: Tree, hparams: Tree) -> Tensor:
        losses = self.glm.value(self.predict(self.train.X, params), self.train.y)
        return self.scale * (self.weights(hparams) * losses).sum() + 0.5 * (self._fixed * params * params).sum()


class SampleWeightProblem(RowWeightProblem):
    """Softmax regression with a tuned weight for every training row, such as to find wrong labels.

        inner   c sum_i s_i (logsumexp(z_i) - z_i[y_i]) + pen/2 |W|^2,   z_i = W x_i,   c = 1/n ("mean") or 1 ("sum")
        outer   1/m sum_i (logsumexp(z_i) - z_i[y_i]) over the validation rows

    W has the shape (classes, features). Hyperparameters: u of shape (rows,); ``s = sigmoid(u)``, or u itself with
    parametrization="direct". Other options are those of `LinearModelProblem`; the validation labels have to be right.

    Args:
        penalty: pen, fixed; positive, so that the inner solution is unique.
        parametrization: "sigmoid" or "direct".
        corrupted: bool of shape (rows,), true where a training label is known to be wrong, for `metrics` alone: see
            ``bilevel.data.load(corrupted=...)``.

    >>> X = torch.eye(3, dtype=torch.float64)
    >>> problem = SampleWeightProblem(X, torch.tensor([0, 1, 2]), X, torch.tensor([0, 1, 2]), penalty=0.1)
    >>> problem.weights(problem.initial_hparams())
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    from_dataset = RowWeightProblem.from_dataset | {"corrupted"}
    task = "classification"
    glm = Softmax()
    penalty: float

    # The data's arguments are written out in each class: configs read names and defaults off a signature.
    def __init__(
        self,
        X_train: Any,
        y_train: Any,
        X_val: Any,
        y_val: Any,
        penalty: float = 1e-3,
        *,
        X_test: Any = None,
        y_test: Any = None,
        loss: str = "mean",
        parametrization: str = "sigmoid",
        corrupted: Any = None,
        **unknown: Any,
    ) -> None:
        self.refuse_options(unknown)
        self.penalty = penalty
        require(self, "penalty", "a positive number", is_number(penalty) and penalty > 0)
        super().__init__(
            X_train,
            y_train,
            X_val,
            y_val,
            glm=self.glm,
            penalty=penalty,
            X_test=X_test,
            y_test=y_test,
            loss=loss,
            parametrization=parametrization,
        )
        self.penalty = penalty
        self.corrupted: Tensor | None = None if corrupted is None else self._mask(corrupted)

    def metrics(self, params: Tree, hparams: Tree = None, solver: Any = None) -> dict[str, float]:
        """Return loss and scores on every split, and how well the weights tell which labels are wrong.

        Where `corrupted` and hparams are known, ``corrupted_in_lower_half`` is the share of the corrupted rows among
        the ``floor(rows / 2)`` rows with the smallest weights; equal weights count in the order of the rows.
        """
        figures = super().metrics(params)
        if self.corrupted is None or hparams is None:
            return figures
        lower = hparams.argsort(stable=True)[: self.train.rows // 2]
        share = self.corrupted[lower].sum() / self.corrupted.sum()
        return figures | {"corrupted_in_lower_half": float(share)}

    def _mask(self, corrupted: Any) -> Tensor:
        mask = torch.as_tensor(corrupted, device=self.train.X.device)
        if mask.dtype != torch.bool or mask.shape != (self.train.rows,) or not bool(mask.any()):
            raise ValueError(
                f"`SampleWeightProblem.corrupted` must be a bool Tensor of shape ({self.train.rows},) that is true "
                f"somewhere, got {mask.dtype} of shape {tuple(mask.shape)} with {int((mask != 0).sum())} true."
            )
        return mask
