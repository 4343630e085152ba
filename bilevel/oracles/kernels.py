"""`Kernels`: the oracles of an inner problem whose params are one vector, written into places that are made once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from bilevel.core.tree import Tree


class Stepped(ABC):
    """A gradient on flat vectors: what the steps of a linear multistep solver ask for."""

    form = "flat"
    """What a certificate calls steps on them."""

    size: int | None = None
    """How many numbers of a vector are the point's, where others are carried along."""
    affine: tuple[Tensor, Tensor] | None = None
    """(H, b), of shapes (m, m) and (m,), where the gradient is ``H x + b`` at every x; else None."""
    shape: tuple[int, ...] = (-1,)
    """In which points, gradients and vectors are handed in, m numbers each."""

    def places(self, count: int) -> Any:
        """Return places for what gradients at so many points leave behind, a tensor or a list of so many; empty ones.

        The gradients that follow are those of as many steps, one after the other.
        """
        return torch.empty(count, 0)

    def from_step(self, index: int) -> Self:
        """Return the kernels of the steps from one on, where steps have batches of their own; the same by default."""
        return self

    @abstractmethod
    def gradient(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        """Write the gradient at x into `out`, and what products at x need into `place`."""

    def descend(self, x: Tensor, place: Tensor, h: float, out: Tensor) -> None:
        """Write ``x - h grad(x)`` into `out`, and what products at x need into `place`."""
        self.gradient(x, place, out)
        torch.add(x, out, alpha=-h, out=out)


class Kernels(Stepped):
    """The inner gradient at fixed hyperparameters and its products, on vectors of shape (m,).

    What a long run of steps asks for again and again: no tree, no count, no new tensor but those of a formula's inside.
    """

    basis: Tensor | None = None
    """Orthonormal columns, (size, m): the vectors are coordinates in them of those of the problem. None: they are them.

    No step of a run may lead out of what the columns span.
    """

    def within(self, vectors: Tensor) -> Kernels:
        """Return kernels of fewer numbers for a run from these vectors, (p, m), where there are any; else these."""
        return self

    def at(self, places: Any) -> Any:
        """Return what `product` needs of all these points, made of what their gradients have left."""
        return places

    @abstractmethod
    def product(self, at: Tensor, v: Tensor, out: Tensor) -> None:
        """Write ``H' v`` into `out`, at the point of a row of `at`."""

    def ascend(self, at: Tensor, v: Tensor, h: float, out: Tensor) -> None:
        """Write ``v - h H' v`` into `out`, at the point of a row of `at`."""
        self.product(at, v, out)
        torch.add(v, out, alpha=-h, out=out)

    @abstractmethod
    def cross(self, points: Tensor, vectors: Tensor) -> Tree:
        """Return ``sum_k C(points_k)' vectors_k``, shaped as the hyperparameters, for two tensors of shape (K, m)."""

    def push(self, x: Tensor, out: Tensor) -> None:
        """Write the gradient at ``x[0]`` into ``out[0]``, and ``H t + C e`` for every hyperparameter.

        Here t is the row of x, of shape (1 + k, ...), that belongs to the hyperparameter, e its unit, and the row of
        `out` the same.
        """
        raise NotImplementedError


class Affine(Kernels):
    """The kernels of a quadratic loss, ``grad(x) = H x + b``.

    Args:
        hessian: H, of shape (m, m), symmetric; of rows, (rows, m, m).
        linear: b, of shape (m,) or (rows, m).
        cross_sum: (points, vectors) -> ``sum_k C(points_k)' vectors_k``; of rows, both are those of some rows, of shape
            (some, K, m), and which rows that are is a third argument.
        moves: x -> C at x, of shape (k, m); not needed of rows.
    """

    def __init__(
        self,
        hessian: Tensor,
        linear: Tensor,
        cross_sum: Callable[..., Tree],
        moves: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.affine = self.hessian, self.linear = hessian, linear
        self._cross_sum, self._moves = cross_sum, moves

    def some(self, rows: slice) -> Affine:
        """Return the kernels of some rows."""
        return Affine(self.hessian[rows], self.linear[rows], partial(self._cross_sum, rows=rows))

    def gradient(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        torch.addmv(self.linear, self.hessian, x, out=out)

    def product(self, at: Tensor, v: Tensor, out: Tensor) -> None:
        torch.mv(self.hessian, v, out=out)

    def cross(self, points: Tensor, vectors: Tensor) -> Tree:
        return self._cross_sum(points, vectors)

    def push(self, x: Tensor, out: Tensor) -> None:
        assert self._moves is not None
        torch.mm(x, self.hessian, out=out)
        out[0].add_(self.linear)
        out[1:].add_(self._moves(x[0]))


class Pushed(Stepped):
    """A gradient together with its derivatives by k hyperparameters, on vectors of shape (m + k m,).

    A step of a linear multistep solver does to the derivatives what it does to the point: forward mode is a run on
    longer vectors.
    """

    def __init__(self, of: Kernels, size: int) -> None:
        self.of, self.form = of, of.form
        self.size: int = size
        self.shape = (-1, size) if of.shape == (-1,) else (-1, *of.shape)

    def gradient(self, x: Tensor, place: Tensor, out: Tensor) -> None:
        self.of.push(x, out)
