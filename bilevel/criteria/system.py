"""The models of several weightings of the same rows, as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.linalg import vecdot

from bilevel.criteria.data import LinearData
from bilevel.numerics.small import paired
from bilevel.problems.losses import GLMLoss

Product = Callable[[Tensor], Tensor]
"""K matrices, as what they make of K vectors."""


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of K vectors of any shape, (K,)."""
    return (a * b).flatten(1).sum(1)


def spread(scalars: Tensor, like: Tensor) -> Tensor:
    """Return K scalars in a shape that broadcasts to K vectors."""
    return scalars.reshape(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True, eq=False)
class System:
    """The models of K weightings; coefficients (K, p1) or (K, outputs, p1) end with the intercept, if there is one.

    Attributes:
        data: the rows.
        loss: of predictions (K, rows) or (K, outputs, rows).
        weights: (K, rows).
    """

    data: LinearData
    loss: GLMLoss
    weights: Tensor

    @cached_property
    def X1(self) -> Tensor | None:
        """Dense rows, with a last column of ones for the intercept, if there is one."""
        return None if self.data.sparse else self.data.with_ones()

    @cached_property
    def low(self) -> Self:
        """The same system in float32, in which directions are searched."""
        data, X1 = self.data, self.X1
        if X1 is not None:
            X1 = X1.float()
            data = replace(data, X=X1[:, : data.features])
        low = type(self)(data.to(torch.float32), self.loss, self.weights.float())
        vars(low)["X1"] = X1
        return low

    @cached_property
    def pairs(self) -> Tensor | None:
        """The products of pairs of dense columns: see `paired`."""
        return None if self.X1 is None else paired(self.X1)

    def product(self, w: Tensor) -> Tensor:
        """Return the predictions of coefficients."""
        if self.X1 is not None:
            return w @ self.X1.T
        return self.data.product(w[..., :-1]) + w[..., -1:] if self.data.intercept else self.data.product(w)

    def collect(self, r: Tensor) -> Tensor:
        """Return ``X1' r``."""
        if self.X1 is not None:
            return r @ self.X1
        collected = self.data.collect(r)
        return torch.cat([collected, r.sum(-1, keepdim=True)], -1) if self.data.intercept else collected

    def weigh(self, r: Tensor) -> Tensor:
        """Return ``S r``."""
        return (self.weights if r.dim() == 2 else self.weights[:, None]) * r

    def objective(self, w: Tensor, z: Tensor, a: Tensor) -> Tensor:
        """Return the training objectives, (K,)."""
        return torch.add(vecdot(self.weights, self.loss.value(z, self.data.y)), dots(a * w, w), alpha=0.5)

    def gradient(self, w: Tensor, z: Tensor, a: Tensor) -> Tensor:
        """Return their gradients."""
        return self.slope(z) + a * w

    def slope(self, z: Tensor) -> Tensor:
        """Return the gradients of the losses."""
        return self.collect(self.weigh(self.loss.slope(z, self.data.y)))

    def hessian(self, z: Tensor, a: Tensor) -> Product:
        """Return the products with the Hessians at predictions z."""
        curvature = self.loss.curvature(z, self.data.y)

        def product(v: Tensor) -> Tensor:
            return self.collect(self.weigh(self.loss.hessian_product(curvature, self.product(v)))) + a * v

        return product
