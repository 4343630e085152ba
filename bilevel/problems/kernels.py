"""The kernels of generalised linear models, for long runs of steps on few data."""

from __future__ import annotations

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
    several = problem.outputs is not None
    return SeveralOutputs(inner) if several else OneOutput(inner)


class OneOutput(Kernels):
    """``grad(x) = c X' loss'(X x) + pen x`` of one prediction for each row.

    With the loss's `Response`, signs of the rows go into X, and a place holds the response: a step is two products with
    X and two kernels on vectors. Without one a place holds the predictions. The curvatures of all points are made at
    once, before the sweep.
    """

    def __init__(self, inner: Any) -> None:
        problem = inner.problem
        self.inner, self.glm, self.scale, self.y = inner, problem.glm, problem.scale, problem.train.y
        self.response = self.glm.response(self.y, problem.outputs)
        self.X, self.penalty, self.shape = problem.train.X, inner.flat_penalty, problem.params.shape
        self.target = None if self.response is None or self.response.target is None else self.response.target.to(self.X)
        if self.response is not None and self.response.sign is not None:
            self.X = self.X * self.response.sign
        self.rows = self.X.t()

    def places(self, count: int) -> Tensor:
        return self.X.new_empty(count, *self.shape[:-1], self.X.shape[1])

    def at(self, places: Tensor) -> Tensor:
        return self.glm.curvature(places, self.y) if self.response is None else self.response.curvature(places)

    def gradient(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        torch.mul(self.penalty, x, out=out)
        out.addmv_(self.X, self._slope(torch.mv(self.rows, x, out=place)), alpha=self.scale)

    def product(self, at: Tensor, v: Tensor, out: Tensor) -> None:
        torch.mul(self.penalty, v, out=out)
        out.addmv_(self.X, torch.mv(self.rows, v).mul_(at), alpha=self.scale)

    def cross(self, points: Tensor, vectors: Tensor) -> Tree:
        shape = (points.shape[0], *self.shape)
        return self.inner._cross_sum(points.view(shape), vectors.view(shape))

    def push(self, x: Tensor, place: Tensor, tangents: Tensor, out: Tensor) -> None:
        torch.mul(self.penalty, tangents, out=out)
        out.addcmul_(self.inner.slope_rows, x)
        turned = self._turn(self.at(place), tangents)
        out.view(-1, self.X.shape[0]).addmm_(turned, self.rows, alpha=self.scale)

    def _turn(self, at: Tensor, tangents: Tensor) -> Tensor:
        """Return the derivatives of the slopes along tangents, in rows."""
        return (tangents @ self.X).mul_(at)

    def _slope(self, place: Tensor) -> Tensor:
        """Return the slopes of the losses at predictions, which may turn into their response."""
        if self.response is None:
            return self.glm.slope(place, self.y)
        self.response.apply(place)
        return place if self.target is None else place - self.target


class SeveralOutputs(OneOutput):
    """The same with several predictions for each row; x is flattened."""

    def gradient(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        torch.mul(self.penalty, x, out=out)
        slope = self._slope(torch.mm(x.view(self.shape), self.X, out=place))
        out.view(self.shape).addmm_(slope, self.rows, alpha=self.scale)

    def product(self, at: Tensor, v: Tensor, out: Tensor) -> None:
        torch.mul(self.penalty, v, out=out)
        turned = self.glm.hessian_product(at, v.view(self.shape) @ self.X)
        out.view(self.shape).addmm_(turned, self.rows, alpha=self.scale)

    def _turn(self, at: Tensor, tangents: Tensor) -> Tensor:
        along = (tangents.view(-1, self.shape[-1]) @ self.X).view(-1, *at.shape)
        return self.glm.hessian_product(at, along).view(-1, at.shape[-1])
