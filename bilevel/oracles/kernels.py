"""`Kernels`: the oracles of an inner problem whose params are one vector, written into places that are made once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.core.tree import Tree


class Kernels(ABC):
    """The inner gradient at fixed hyperparameters and its products, on vectors of shape (m,).

    What a long run of steps asks for again and again: no tree, no count, no new tensor but those of a formula's inside.
    """

    affine: tuple[Tensor, Tensor] | None = None
    """(H, b), of shapes (m, m) and (m,), where the gradient is ``H x + b`` at every x; else None."""

    def places(self, count: int) -> Tensor:
        """Return places, (count, ...), for what gradients at so many points leave for `at`; empty by default."""
        return torch.empty(count, 0)

    def at(self, places: Tensor) -> Tensor:
        """Return what `product` needs of all these points, made of what their gradients have left."""
        return places

    @abstractmethod
    def gradient(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        """Write the gradient at x into `out`, and what `at` needs of x into `place`."""

    @abstractmethod
    def product(self, at: Tensor, v: Tensor, out: Tensor) -> None:
        """Write ``H' v`` into `out`, at the point of a row of `at`."""

    @abstractmethod
    def cross(self, points: Tensor, vectors: Tensor) -> Tree:
        """Return ``sum_k C(points_k)' vectors_k``, shaped as the hyperparameters, for two tensors of shape (K, m)."""


class Affine(Kernels):
    """The kernels of a quadratic loss, ``grad(x) = H x + b``.

    Args:
        hessian: H, of shape (m, m), symmetric.
        linear: b, of shape (m,).
        cross_sum: (points, vectors) -> ``sum_k C(points_k)' vectors_k``.
    """

    def __init__(self, hessian: Tensor, linear: Tensor, cross_sum: Callable[[Tensor, Tensor], Tree]) -> None:
        self.affine = self.hessian, self.linear = hessian, linear
        self._cross_sum = cross_sum

    def gradient(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        torch.addmv(self.linear, self.hessian, x, out=out)

    def product(self, at: Tensor, v: Tensor, out: Tensor) -> None:
        torch.mv(self.hessian, v, out=out)

    def cross(self, points: Tensor, vectors: Tensor) -> Tree:
        return self._cross_sum(points, vectors)
