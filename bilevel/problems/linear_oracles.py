"""The closed-form oracles of a linear model: one pass over the data for each linearisation.

    g(w, u) = c X' loss'(z) + pen w,   H v = c X' D X v + pen v,   C' v = (d pen/du) w v, summed over each group

with z = X w and D the curvature of the loss at z. Passes go through `Design`.
"""

from __future__ import annotations

import functools
from collections import Counter
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.dense import PRECONDITIONER, symmetric_product
from bilevel.numerics.lanczos import Spectrum
from bilevel.oracles.inner_problem import InnerProblem, Linearization, Preconditioner
from bilevel.oracles.kernels import Kernels
from bilevel.oracles.losses import Losses
from bilevel.problems.kernels import model_kernels
from bilevel.problems.losses import GLMLoss
from bilevel.problems.precondition import factored


class PenalisedPoint(Linearization):
    """What penalties that enter linearly give to a linearization, of one model or of a batch."""

    inner: PenalisedInner

    def _cross(self, v: Tensor) -> Tensor:
        return self.inner.problem.gather(self.inner.slope * self.params * v)

    def _cross_jvp(self, hparams_tangent: Tensor) -> Tensor:
        return self.inner.slope * self.inner.problem.spread(hparams_tangent) * self.params


class PenalisedInner(InnerProblem):
    """What they give to the bound problem."""

    penalty: Tensor
    slope: Tensor

    def _cross_sum(self, points: Tensor, vectors: Tensor) -> Tensor:
        one = self.slope.numel() == 1  # penalty of all weights
        total = torch.dot(points.reshape(-1), vectors.reshape(-1)) if one else (points * vectors).sum(0)
        return self.problem.gather(self.slope * total)


class LinearModelPoint(PenalisedPoint):
    """The gradient of a linear model, linearised.

    One pass over the data serves the predictions, the gradient, the value and the curvature; whichever is asked for
    first takes it. What belongs to the data alone goes on to other penalties (`rebind`).
    """

    inner: LinearModelInner
    closed_form = True

    def __init__(
        self,
        inner: InnerProblem,
        params: Tree,
        predictions: list[Tensor] | None = None,
        curvature: list[Tensor] | None = None,
        data_gradient: Tensor | None = None,
    ) -> None:
        super().__init__(inner, params)
        self._predictions, self._curvature, self._data_gradient = predictions, curvature, data_gradient

    @property
    def predictions(self) -> list[Tensor]:
        """The predictions of the training rows, by block."""
        if self._predictions is None:
            problem = self.inner.problem
            self._predictions = problem.design.sweep(lambda block, X, rows: problem.predict(X, self.params))
        return self._predictions

    @property
    def data_gradient(self) -> Tensor:
        """``c X' loss'(z)``: the gradient without the penalty; made where autograd does not record."""
        if self._data_gradient is None:
            problem, known = self.inner.problem, self._predictions

            def visit(block: int, X: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
                z = problem.predict(X, self.params) if known is None else known[block]
                return z, problem.collect(X, self.slopes(z, rows))

            result = problem.design.sweep(visit)
            self._predictions = [z for z, _ in result]
            self._data_gradient = problem.scale * functools.reduce(torch.add, [part for _, part in result])
        return self._data_gradient

    @property
    def curvature(self) -> list[Tensor]:
        """The curvatures of the losses at the predictions, by block."""
        if self._curvature is None:
            problem = self.inner.problem
            blocks = zip(self.predictions, problem.design.rows, strict=True)
            self._curvature = [problem.glm.curvature(z, self.targets(rows)) for z, rows in blocks]
        return self._curvature

    @cached_property
    def gradient(self) -> Tensor:
        """The inner gradient; autograd does not record it."""
        with torch.no_grad():
            return torch.addcmul(self.data_gradient, self.inner.penalty, self.params)

    @cached_property
    def value(self) -> Tensor:
        """The inner loss, a 0-d tensor."""
        with torch.no_grad():
            problem = self.inner.problem
            losses = [self.loss(z, rows) for z, rows in zip(self.predictions, problem.design.rows, strict=True)]
            data = problem.scale * functools.reduce(torch.add, losses)
            return data + 0.5 * (self.inner.penalty * self.params * self.params).sum()

    def targets(self, rows: slice) -> Tensor:
        """Return the targets of some training rows."""
        problem = self.inner.problem
        y: Tensor = problem.train.y
        return y if len(problem.design.rows) == 1 else y[..., rows]

    # What weights of the training rows would change -----------------------------------------------------------------

    def loss(self, z: Tensor, rows: slice) -> Tensor:
        """Return the sum of the losses of some training rows."""
        return self.inner.problem.glm.value(z, self.targets(rows)).sum()

    def slopes(self, z: Tensor, rows: slice) -> Tensor:
        """Return the slopes of the losses of some training rows."""
        return self.inner.problem.glm.slope(z, self.targets(rows))

    def hessian_product(self, block: int, rows: slice, dz: Tensor) -> Tensor:
        """Return the second derivative of the losses of a block applied to dz."""
        return self.inner.problem.glm.hessian_product(self.curvature[block], dz)

    def weighted_gram(self, block: int, X: Tensor, rows: slice) -> Tensor:
        """Return a block's ``X' D X`` in the dtype of X, which may be lower than that of the data."""
        return gram(self.inner.problem.glm, X, self.curvature[block], self.inner.problem.outputs)

    def _lasting_gradient(self) -> Tensor | None:
        """Return the data gradient, where it is known and does not depend on the hyperparameters."""
        return self._data_gradient

    def row_gram(self, X: Tensor, rows: slice) -> Tensor:
        """Return ``X'X`` of some training rows."""
        return X @ X.t()

    # The oracles -----------------------------------------------------------------------------------------------------

    def _data_hvp(self, v: Tensor) -> Tensor:
        problem = self.inner.problem
        _ = self.curvature  # made here, by one thread

        def visit(block: int, X: Tensor, rows: slice) -> Tensor:
            return problem.collect(X, self.hessian_product(block, rows, problem.predict(X, v)))

        return problem.scale * problem.design.total(visit)

    def _hvp(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.addcmul(self._data_hvp(v), self.inner.penalty, v)

    def data_hessian(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``c X' D X`` over the flattened weights; in a lower precision it is sooner there."""
        problem = self.inner.problem
        _ = self.curvature  # made here, by one thread
        return problem.scale * problem.design.total(
            lambda block, X, rows: self.weighted_gram(block, X if dtype is None else X.to(dtype), rows)
        )

    def dense_hessian(self) -> Tensor:
        return torch.diag_embed(self.inner.flat_penalty).add_(self.data_hessian())

    def preconditioner(self, cache: Tree = None, lasting: bool = False) -> Preconditioner:
        """Return the inverse of ``c X' D X + diag(pen)``, for up to 2,000 weights, in float32; else the identity.

        What is kept is ``c X' D X`` at some earlier params; the present penalties are added before it is factored.
        Unless it is to last, nothing is measured that costs more than the products that it would save. With fewer than
        half as many rows as weights the data Hessian has few directions, which CG finds sooner than a factor is there.
        """
        problem = self.inner.problem
        if problem.batch is not None or (problem.outputs is None and 2 * problem.train.rows < self.params.numel()):
            return Preconditioner()
        rough = cache is None or "gram" not in cache
        if rough and (self.params.numel() > PRECONDITIONER or not (lasting or problem.outputs is None)):
            return self._rough(cache)
        cache = None if rough else cache
        if cache is None:
            self.inner.counts["curvature"] += 1
            self.inner.factored = factored(self.data_hessian(torch.float32), self.inner.flat_penalty)
        elif self.inner.factored is None or self.inner.factored.cache is not cache:
            self.inner.factored = factored(cache["gram"], self.inner.flat_penalty, cache)
        return self.inner.factored

    def _rough(self, cache: Tree) -> Preconditioner:
        """Return the inverse of the Hessian's class blocks at zero weights, where they share one matrix.

        It costs about two products with the Hessian. Classes with penalties of their own would need an inverse each,
        and applying those takes the time that they save.
        """
        problem, penalty = self.inner.problem, self.inner.penalty.float()
        share, features = problem.class_curvature_at_zero, self.params.shape[-1]
        separate = penalty.dim() == 2 and len(penalty) > 1
        if share is None or features > PRECONDITIONER or separate:
            return Preconditioner()
        if cache is None:
            self.inner.counts["hvp"] += 2
            gram = problem.design.total(lambda block, X, rows: self.row_gram(X.float(), rows))
            block = problem.scale * share * gram + torch.diag(penalty.expand(1, features)[0])
            factor, info = torch.linalg.cholesky_ex(block)
            if bool(info):
                return Preconditioner()
            cache = {"inverse": torch.cholesky_inverse(factor)}
        return Preconditioner(functools.partial(_by_class, cache["inverse"]), cache, rough=True)

    def rebind(self, inner: Any) -> Linearization:
        """Return the linearization for other penalties; gradient and products take no further pass over the data.

        So the gradient at these params is known to `inner` from now on, and it is not counted as one.
        """
        other: Linearization = inner.linearization(
            inner, self.params, self._predictions, self._curvature, self._lasting_gradient()
        )
        # The two hold each other: let go, so that the old ones are freed now and not by the garbage collector.
        self.inner.forget()
        inner.adopt(other)
        return other


def gram(loss: GLMLoss, X: Tensor, curvature: Tensor, outputs: int | None) -> Tensor:
    """Return ``X' D X`` over the flattened weights, in the dtype of X; of several outputs, a block for each pair."""
    if outputs is None:
        weighted = X * curvature.to(X.dtype).unsqueeze(-2)
        return symmetric_product(weighted, X) if X.dim() == 2 else weighted @ X.mT
    shape, features = curvature.shape[:-2], X.shape[-2]
    matrix = X.new_empty(*shape, outputs, features, outputs, features)
    for j in range(outputs):
        unit = torch.zeros_like(curvature)
        unit[..., j, :] = 1.0
        column = loss.hessian_product(curvature, unit).to(X.dtype)
        for i in range(j, outputs):
            block = (X * column[..., i, None, :]) @ X.mT
            matrix[..., i, :, j, :] = block
            matrix[..., j, :, i, :] = block
    return matrix.reshape(*shape, outputs * features, outputs * features)


def _by_class(inverse: Tensor, v: Tensor) -> Tensor:
    """Apply a matrix to the weights of each class."""
    return (v.to(inverse.dtype).reshape(-1, len(inverse)) @ inverse).reshape(-1).to(v.dtype)


class LinearModelInner(PenalisedInner):
    """A linear model at fixed penalties."""

    linearization: type[LinearModelPoint] = LinearModelPoint
    convex = True

    def __init__(self, problem: Losses, hparams: Tree, counts: Counter[str] | None = None) -> None:
        super().__init__(problem, hparams, counts)
        self.factored: Preconditioner | None = None
        self._point: LinearModelPoint | None = None
        self.penalty: Tensor = self.problem.penalties(self.hparams)
        # Of problems side by side, one whose penalty is not finite fails by itself.
        if self.problem.batch is None and not tree.is_finite(self.penalty):
            raise ValueError(
                f"a penalty is not finite: hyperparameters go up to {float(self.hparams.max()):.4g}, "
                "where exp(u) overflows; start lower or use a smaller learning rate."
            )
        self.slope: Tensor = self.penalty if self.problem.parametrization == "log" else torch.ones_like(self.penalty)

    @cached_property
    def slope_rows(self) -> Tensor:
        """The derivatives of the penalties of all weights by every hyperparameter, of one problem, (k, weights)."""
        shape, units = self.problem.params.shape, tree.Raveler(self.hparams).units()
        return torch.stack([(self.slope * self.problem.spread(unit)).expand(shape).reshape(-1) for unit in units])

    @property
    def flat_penalty(self) -> Tensor:
        """The penalty of every weight, flattened."""
        penalty = self.penalty.expand(self.problem.params.shape)
        return penalty.reshape(-1) if self.problem.batch is None else penalty.reshape(len(penalty), -1)

    def linearize(self, params: Tree) -> LinearModelPoint:
        """Return the gradient linearised at `params`; the last one is kept, so that its pass is not taken again."""
        if self._point is None or self._point.params is not params:
            self._point = self.linearization(self, params)
        return self._point

    def adopt(self, point: LinearModelPoint) -> None:
        """Make `point` the last linearization, and its gradient the last gradient if that takes no pass."""
        self._point = point
        if point._data_gradient is not None:
            self._last = (point.params, point.gradient)

    def forget(self) -> None:
        """Drop the last linearization."""
        self._point = None

    def value(self, params: Tree) -> Tensor:
        """Return the inner loss; where a gradient was taken last, it takes no pass and is not counted."""
        if self._point is None or self._point.params is not params or self._point._predictions is None:
            self.counts["value"] += 1
        return self._value(params)

    def kernels(self) -> Kernels | None:
        return model_kernels(self)

    def _value(self, params: Tensor) -> Tensor:
        return self.linearize(params).value

    def _grad(self, params: Tensor) -> Tensor:
        problem = self.problem
        if problem.batch is None:
            return self.linearize(params).gradient
        # Steps of many small problems feel the time that a linearization takes to make.
        X, y = problem.train.X, problem.train.y
        data = problem.collect(X, problem.glm.slope(problem.predict(X, params), y))
        return torch.addcmul(problem.scale * data, self.penalty, params)

    @property
    def data_curvature(self) -> float:
        """A bound of the largest curvature of the data part that holds at every params."""
        # The norm is measured from below, to a relative 1e-6.
        bound: float = self.problem.scale * self.problem.glm.max_curvature * self.problem.gram_norm * (1 + 1e-5)
        return bound

    def curvature(self, params: Tensor) -> Spectrum:
        """Return bounds of the spectrum that hold at every params: an automatic step size is safe everywhere."""
        return Spectrum(float(self.penalty.min()), self.data_curvature + float(self.penalty.max()))

    def majorizer(self, params: Tree, largest: float | None = None) -> Tree:
        """Return the penalty of every weight plus the largest curvature of the data part."""
        return (self.penalty + (largest or self.data_curvature)).expand_as(params)
