"""What ridge, logistic and softmax regression share: a linear model, a loss of its predictions, a quadratic penalty.

    inner   g(w, u) = c sum_i loss(z_i, y_i) + 1/2 sum_j pen_j(u) w_j^2      over the training rows, z_i = x_i' w
    outer   f(w)    = 1/m sum_i loss(z_i, y_i)                               over the validation rows

with c = 1/n ("mean", the default) or 1 ("sum"), and pen = exp(u) ("log", the default) or u ("direct"). A penalty name
says which weights share a hyperparameter. The closed-form oracles, with D the curvature of the loss at the predictions:

    grad = c X' loss'(z) + pen w,   H v = c X' D X v + pen v,   C' v = (d pen/du) w v, summed over each group

Data are kept feature-major (a contiguous (features, rows) copy): matrix-vector products along rows are then faster.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.core import rows
from bilevel.core.options import require, require_value
from bilevel.core.tree import Tree
from bilevel.numerics.lanczos import lanczos
from bilevel.oracles import batching as batches
from bilevel.oracles.batching import check_own_data, stacked_trees
from bilevel.oracles.error_model import Certifiable, Rows, Tuned
from bilevel.oracles.exact import Exact
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.purity import look
from bilevel.oracles.validation import Reads, check_tensor, check_trees, fits
from bilevel.problems.data_problem import DataProblem
from bilevel.problems.design import Design
from bilevel.problems.glm_host import HostModel
from bilevel.problems.host import known_on_host, on_host
from bilevel.problems.hyper_hessian import linear_hyper_hessians
from bilevel.problems.linear_oracles import LinearModelInner
from bilevel.problems.losses import GLMLoss
from bilevel.problems.old_hooks import with_hooks
from bilevel.problems.row_steps import row_directions
from bilevel.problems.splits import Split, check_equal, stacked_splits


class LinearModelProblem(DataProblem):
    """A linear model with tuned penalties; the loss of its predictions is the class attribute `glm`.

    `RidgeProblem`, `LogisticProblem`, ... name their loss. A problem of a loss of one's own is a subclass that does::

        class ProbitProblem(LinearModelProblem):
            glm = Probit()

    Hyperparameters: u of shape () for penalty="scalar", (features,) for "per_feature"; ``pen = exp(u)``, or u itself
    with parametrization="direct". There is no intercept: add a column of ones, which is penalised as the others are.

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
        unknown: nothing: an option of another name is refused, with what to do in its place.
    """

    glm: GLMLoss
    """The loss of the predictions."""
    predicts_linearly: ClassVar[bool] = True
    """Whether no subclass has predictions of its own."""
    solved_on_host: ClassVar[bool] = True
    """Whether small problems on the CPU are solved by arrays."""
    inner_problem: type[InnerProblem] = LinearModelInner
    directions = row_directions
    parametrizations: tuple[str, ...] = ("log", "direct")
    penalty: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = LinearModelProblem
        cls.predicts_linearly = (cls.predict, cls.collect) == (own.predict, own.collect)
        cls.solved_on_host &= known_on_host(cls)

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
        **unknown: Any,
    ) -> None:
        self.refuse_options(unknown)
        glm = with_hooks(self, getattr(self, "glm", None))
        if not isinstance(glm, GLMLoss):
            name = type(self).__name__
            raise ValueError(f"{name} needs a loss, a `GLMLoss`: name it in the class, such as `glm = Poisson()`.")
        for name, value, allowed in (
            ("loss", loss, ("mean", "sum")),
            ("parametrization", parametrization, self.parametrizations),
        ):
            words = " or ".join(map(repr, allowed))
            require_value(f"{type(self).__name__}.{name}", value, words, value in allowed)
        self.take_splits(X_train, y_train, X_val, y_val, X_test, y_test)
        self.design, self._val_design = Design(self.train.X), Design(self.val.X)
        self.loss, self.parametrization = loss, parametrization
        self.scale = 1.0 / self.train.rows if loss == "mean" else 1.0
        self.glm = glm
        for name, y in self.glm.encode(self.splits).items():
            self.splits[name].y = y
        self.outputs = self.glm.outputs(self.train.y)
        self.class_curvature_at_zero = None if self.outputs is None else self.glm.curvature_at_zero(self.outputs)
        if self.structure.quadratic != self.glm.quadratic:
            self.structure = replace(self.structure, quadratic=self.glm.quadratic)
        axes = self.penalty_axes()
        remedy = "" if isinstance(penalty, str) else " (values of penalties are hyperparameters)"
        known = isinstance(penalty, str) and penalty in axes
        self.penalty = penalty
        require(self, "penalty", f"one of {', '.join(map(repr, axes))}{remedy}", known)
        shape = self.params_shape()
        self._hparams_shape = tuple(shape[axis] for axis in axes[penalty])
        self._group_shape = tuple(size if axis in axes[penalty] else 1 for axis, size in enumerate(shape))
        super().__init__(params=self.train.X.new_zeros(self.params_shape()))

    def params_shape(self) -> tuple[int, ...]:
        """Return the shape of the weights: (features,), or (outputs, features) for several predictions for each row."""
        features = self.train.X.shape[-2]
        return (features,) if self.outputs is None else (self.outputs, features)

    def penalty_axes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the axes of the weights along which penalties vary, by the name of the choice."""
        if self.outputs is None:
            return {"scalar": (), "per_feature": (0,)}
        return {"scalar": (), "per_class": (0,), "per_feature": (1,), "per_weight": (0, 1)}

    def predict(self, X: Tensor, w: Tensor) -> Tensor:
        """Return the predictions for feature-major X, of shape ([batch,] [outputs,] rows)."""
        if self.outputs is not None:
            return w @ X
        if w.dim() == 1:
            return torch.mv(X.t(), w)
        return w @ X if X.dim() == 2 else torch.bmm(w[:, None], X)[:, 0]

    def collect(self, X: Tensor, slopes: Tensor) -> Tensor:
        """Return ``X' slopes``, shaped as the weights; the transpose of `predict`."""
        if self.outputs is not None:
            return slopes @ X.mT
        if slopes.dim() == 1:
            return torch.mv(X, slopes)
        return slopes @ X.t() if X.dim() == 2 else torch.bmm(X, slopes[:, :, None])[:, :, 0]

    def hparams_shape(self) -> tuple[int, ...]:
        """Return the shape of the hyperparameters."""
        return self._hparams_shape

    @property
    def unit(self) -> str:
        return "log penalty" if self.parametrization == "log" else "penalty"

    def labels(self, features: Sequence[str]) -> list[str]:
        shape = self.hparams_shape()
        if not shape:
            return ["all weights"]
        classes = [f"class {index}" for index in range(shape[0])]
        if len(shape) == 2:
            return [f"{label}, {feature}" for label in classes for feature in features]
        return list(features) if self.penalty == "per_feature" else classes

    def batched(self, size: int, data: Tree = None) -> BilevelProblem:
        check_own_data(self, size, data)
        return self._rows([self] * size)

    def stacked(self, problems: Sequence[BilevelProblem]) -> BilevelProblem:
        check_equal(problems, ("penalty", "loss", "parametrization", "glm"))
        stacked_trees("the inner variable", [problem.params for problem in problems])
        # The test data are looked at by each member's own `metrics`, so they need no equal shapes.
        parts = [[getattr(each, name) for each in problems] for name in ("train", "val")]
        return self._rows(problems, *map(stacked_splits, parts))

    def _rows(self, single: Sequence[BilevelProblem], *data: Split) -> BilevelProblem:
        """Return members side by side, on these data or on those given, whose leading dimension is the members'."""
        batch, size = copy.copy(self), len(single)
        if data:
            batch.train, batch.val = data
            batch.design, batch._val_design = Design(batch.train.X), Design(batch.val.X)
        batch.params = rows.expand(self.params, size)
        batch._hparams_shape, batch._group_shape = (size, *self._hparams_shape), (size, *self._group_shape)
        return batch.as_batch(single)

    def initial_hparams(self, value: float = 0.0) -> Tensor:
        return torch.full(self.hparams_shape(), value, dtype=self.train.X.dtype, device=self.train.X.device)

    def spread(self, hparams: Tensor) -> Tensor:
        """Return a hyperparameter-shaped tensor in a shape that broadcasts to the weights."""
        return hparams.reshape(self._group_shape)

    def gather(self, weights: Tensor) -> Tensor:
        """Return the sums over each group of weights, shaped as the hyperparameters; the transpose of `spread`."""
        if weights.shape == self._hparams_shape == self._group_shape:
            return weights
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
        loss = self.scale * self.glm.value(self.predict(self.train.X, params), self.train.y).sum()
        return loss + 0.5 * (self.penalties(hparams) * params * params).sum()

    def outer_loss(self, params: Tree, hparams: Tree) -> Tensor:
        """Return the mean validation loss, of a batch of shape (batch,), in plain torch."""
        return self.glm.value(self.predict(self.val.X, params), self.val.y).sum(-1) / self.val.rows

    def outer_value_and_grads(self, params: Tree, hparams: Tree) -> tuple[Tensor, Tree, Tree]:
        def visit(block: int, X: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            z, y = self.predict(X, params), self.val.y[..., rows]
            return self.glm.value(z, y).sum(-1), self.collect(X, self.glm.slope(z, y))

        loss, gradient = (
            functools.reduce(torch.add, part) for part in zip(*self._val_design.sweep(visit), strict=True)
        )
        return loss / self.val.rows, gradient / self.val.rows, torch.zeros_like(hparams)

    def certifiable(self) -> Certifiable | None:
        """Return the model as the error bounds see it, in float64; its data caches are kept. None without constants."""
        return None if self.glm.constants is None else self._certifiable

    @cached_property
    def _certifiable(self) -> Certifiable:
        train, val = (
            Rows(split.X.double(), split.y.double() if split.y.is_floating_point() else split.y)
            for split in (self.train, self.val)
        )
        assert self.glm.constants is not None
        return Certifiable(train=train, val=val, loss=self.glm, constants=self.glm.constants, tuned=self.tuned)

    @cached_property
    def penalty_owner(self) -> Tensor:
        """For every weight the index of its hyperparameter, shaped as the weights."""
        shape = self.hparams_shape()
        owner = torch.arange(math.prod(shape), device=self.train.X.device).reshape(shape)
        return self.spread(owner).expand(self.params_shape()).contiguous()

    def tuned(self, hparams: Tree) -> Tuned:
        """Return the inner coefficients at some hyperparameters, and how they depend on them."""
        penalty = self.penalties(hparams).expand(self.params_shape())
        return Tuned(
            penalty=penalty,
            penalty_slope=penalty if self.parametrization == "log" else torch.ones_like(penalty),
            penalty_owner=self.penalty_owner,
            weights=penalty.new_full((self.train.rows,), self.scale),
            size=hparams.numel(),
        )

    @cached_property
    def _arrays(self) -> HostModel | None:
        plain = self.inner_problem is LinearModelInner and self.nonsmooth is None and self.solved_on_host
        return HostModel.of(self) if plain else None

    def newton(self, hparams: Tree, start: Tree, most: int, tol: float, cache: Tree = None) -> Exact | None:
        if self.batch is not None or self._arrays is None:
            return None
        if not on_host(hparams, self.hparams_shape()) or not on_host(start, self.params_shape()):
            return None
        return self._arrays.newton(self, hparams, start, most, tol, cache)

    def hyper_hessians(self, hparams: Tree, params: Tree, adjoint: Tree) -> tuple[Tensor, Tensor] | None:
        return linear_hyper_hessians(self, hparams, params, adjoint)

    def penalty_scales(self, hparams: Tree) -> Tree | None:
        if self.parametrization != "log":
            return None
        diagonal = self.scale * self.glm.typical_curvature(self.train.y, self.outputs) * self.train.X.square().sum(-1)
        diagonal = diagonal.expand(self.params_shape())
        scales = self.gather(diagonal) / self.gather(torch.ones_like(diagonal))
        return scales.clamp_min(1e-12 * float(scales.max()))

    def row_losses(self, params: Tree, split: Split) -> Tensor:
        return self.glm.value(self.predict(split.X, params), split.y)

    def constant_loss(self, split: Split) -> float | None:
        z = self.glm.constant_prediction(self.train.y)
        if z is None:
            return None
        return float(self.glm.value(z[..., None].expand(*z.shape, split.rows), split.y).sum()) / split.rows

    def metrics(self, params: Tree, hparams: Tree = None, solver: Any = None) -> dict[str, float]:
        """Return loss and scores on every split, such as ``test_loss`` and ``test_accuracy``."""
        if self.batch is not None:
            raise ValueError("a batch has no metrics of its own: use batch.member(i).metrics(params[i]).")
        figures = {}
        for name, split in self.splits.items():
            z = self.predict(split.X, params)
            figures[f"{name}_loss"] = float(self.glm.value(z, split.y).sum()) / split.rows
            figures |= {f"{name}_{score}": value for score, value in self.glm.scores(z, split.y).items()}
        return figures

    def check(self, params: Tree, hparams: Tree, reads: Reads | None = None) -> None:
        if self.batch is not None:
            batches.check(self, params, hparams)
            return self.check_range(hparams)
        given = ("params", params, self.params_shape()), ("hparams", hparams, self.hparams_shape())
        # The sentences take longer than one look, with which most calls are done.
        if not all(fits(value, shape, self.train.X) for _, value, shape in given):
            self.refuse_no_penalty(hparams)
            check_trees(params, hparams)
            owner = f"{type(self).__name__}(penalty={self.penalty!r})"
            for name, value, shape in given:
                check_tensor(name, value, shape, self.train.X, owner, "X_train")
        self.check_range(hparams)
        look(self, params, hparams)  # a subclass may have losses of its own

    def refuse_no_penalty(self, hparams: Tree) -> None:
        """Refuse the logarithm of a zero penalty, which has no derivative."""
        known = isinstance(hparams, Tensor) and not hparams.is_meta
        if known and self.parametrization == "log" and bool((hparams == -math.inf).any()):
            raise ValueError(
                "a log penalty is -inf, which is no penalty at all: use parametrization='direct', where it is 0, or a "
                "small penalty, such as a log penalty of -20."
            )

    def check_range(self, hparams: Tensor) -> None:
        """Refuse negative penalties (in another family, what its hyperparameters are)."""
        if self.parametrization == "direct" and bool((hparams < 0).any()):
            raise ValueError(
                f"a {self.unit} is negative ({float(hparams.min()):.3g}): declare a positive constraint, "
                f"or use parametrization={self.parametrizations[0]!r}."
            )
