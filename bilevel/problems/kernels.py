"""The kernels of generalised linear models, for long runs of steps on few data."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.oracles.kernels import Kernels

FEW = 200_000
"""Numbers in X, times outputs, up to which the time of a step is that of its calls, and not of its arithmetic."""


def model_kernels(inner: Any) -> Kernels | None:
    """Return the kernels of a bound linear model, a `LinearModelInner`; None for a batch, and for many data."""
    problem = inner.problem
    if (
        not problem.predicts_linearly
        or problem.batch is not None
        or problem.params.shape[:-1].numel() * problem.train.X.numel() > FEW
    ):
        return None
    return ModelKernels(inner)


class ModelKernels(Kernels):
    """``grad(x) = c loss'(x X) X' + pen x``, with x of shape (outputs, features) and X of (features, rows).

    With the loss's `Response`, signs of the rows go into X, and a place holds the response: a step is two products with
    X and two kernels on vectors. Without one a place holds the predictions. The curvatures of all points are made at
    once, before the sweep.
    """

    def __init__(self, inner: Any) -> None:
        problem = inner.problem
        self.inner, self.glm, self.scale, self.y = inner, problem.glm, problem.scale, problem.train.y
        self.X, self.shape = problem.train.X, (problem.outputs or 1, problem.params.shape[-1])
        self.penalty = inner.flat_penalty.reshape(self.shape)
        response = self.response = self.glm.response(self.y, problem.outputs)
        self.target = None if response is None or response.target is None else response.target.to(self.X)
        if response is not None and response.sign is not None:
            self.X = self.X * response.sign
        self.rows = self.X.t()
        self.turned = self.places(1)[0]

    def places(self, count: int) -> Tensor:
        return self.X.new_empty(count, self.shape[0], self.X.shape[1])

    def at(self, places: Tensor) -> Tensor:
        return self.glm.curvature(places, self.y) if self.response is None else self.response.curvature(places)

    def gradient(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        torch.mul(self.penalty, x, out=out)
        out.addmm_(self._slope(torch.mm(x, self.X, out=place)), self.rows, alpha=self.scale)

    def descend(self, x: Tensor, place: Tensor, h: float, out: Tensor) -> None:
        torch.addcmul(x, self.penalty, x, value=-h, out=out)
        out.addmm_(self._slope(torch.mm(x, self.X, out=place)), self.rows, alpha=-h * self.scale)

    def product(self, at: Tensor, v: Tensor, out: Tensor) -> None:
        torch.mul(self.penalty, v, out=out)
        turned = self.glm.hessian_product(at, torch.mm(v, self.X, out=self.turned))
        out.addmm_(turned, self.rows, alpha=self.scale)

    def ascend(self, at: Tensor, v: Tensor, h: float, out: Tensor) -> None:
        torch.addcmul(v, self.penalty, v, value=-h, out=out)
        turned = self.glm.hessian_product(at, torch.mm(v, self.X, out=self.turned))
        out.addmm_(turned, self.rows, alpha=-h * self.scale)

    def cross(self, points: Tensor, vectors: Tensor) -> Tree:
        shape = (points.shape[0], *self.inner.problem.params.shape)
        return self.inner._cross_sum(points.view(shape), vectors.view(shape))

    def push(self, x: Tensor, out: Tensor) -> None:
        torch.mul(self.penalty, x, out=out).addcmul_(self.slopes, x[:1])
        # The predictions of the point and of all its derivatives are one product, and so is what comes back from them.
        predictions, first, others = self.pushed
        torch.mm(x.view(-1, self.shape[1]), self.X, out=predictions)
        slope = self._slope(first)
        others.copy_(self.glm.hessian_product(self.at(first), others))
        if slope is not first:
            first.copy_(slope)
        out.view(-1, self.shape[1]).addmm_(predictions, self.rows, alpha=self.scale)

    @cached_property
    def slopes(self) -> Tensor:
        """The derivatives of the penalties by the hyperparameters, (1 + k, outputs, features), after a row of zeros."""
        rows = self.inner.slope_rows.view(-1, *self.shape)
        return torch.cat([torch.zeros_like(rows[:1]), rows])

    @cached_property
    def pushed(self) -> tuple[Tensor, Tensor, Tensor]:
        """A place for the predictions of a point and of its derivatives, (outputs (1 + k), rows), and both of them."""
        each = self.places(len(self.slopes))
        return each.view(-1, each.shape[-1]), each[0], each[1:]

    def _slope(self, place: Tensor) -> Tensor:
        """Return the slopes of the losses at predictions, which may turn into their response."""
        if self.response is None:
            return self.glm.slope(place, self.y)
        self.response.apply(place)
        return place if self.target is None else torch.sub(place, self.target, out=self.turned)
