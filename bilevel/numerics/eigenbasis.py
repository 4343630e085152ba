"""Quadratic inner problems whose Hessian moves along the identity, in the eigenbasis of its fixed part.

    inner gradient   g(x, u) = (A + s(u) I) x + b_0 + sum_j u_j b_j,      A = Q diag(a) Q'

In the coordinates ``z = Q' x`` there are d problems of one number each, ``(a_i + s(u)) z_i + b_i(u)``, whatever u is:
A is diagonalised once, and every inner step, its derivative and the solution itself cost d numbers for each u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLOSE = 1e-3
"""Below this q the rounding of 1 - q matters."""
SMALL = 1e-2
"""Below this K q the quotient (1 - (1 - q)^K) / q cancels, and its series takes over."""


@dataclass(frozen=True)
class Eigenbasis:
    """What `BilevelProblem.spectrum` returns; leading dimensions of hparams and vectors are batches.

    Args:
        values: eigenvalues a of A in ascending order, of shape (d,).
        vectors: eigenvectors Q, in columns, of shape (d, d).
        linear: ``Q' b_0``, of shape (d,).
        shift: hparams of shape (..., *event) -> s(u) of shape (...) and ds/du of shape (..., *event).
        directions: ``Q' b_j`` in rows, of shape (p, d), for hparams of shape (..., p); None where b does not move.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> basis = Eigenbasis(eye.diagonal(), eye, -eye[0], lambda u: (u.exp(), u.exp()))
    >>> basis.bind(torch.zeros((), dtype=torch.float64)).solution
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """

    values: Tensor
    vectors: Tensor
    linear: Tensor
    shift: Callable[[Tensor], tuple[Tensor, Tensor]]
    directions: Tensor | None = None

    def turn(self, x: Tensor) -> Tensor:
        """Return ``Q' x`` for x of shape (..., d)."""
        return torch.mv(self.vectors.t(), x) if x.dim() == 1 else x @ self.vectors

    def back(self, z: Tensor) -> Tensor:
        """Return ``Q z`` for z of shape (..., d)."""
        return torch.mv(self.vectors, z) if z.dim() == 1 else z @ self.vectors.t()

    def bind(self, hparams: Tensor) -> DiagonalProblem:
        """Return the d problems of one number at fixed hyperparameters of shape (..., *event)."""
        shift, slope = self.shift(hparams)
        linear = self.linear if self.directions is None else self.linear + hparams @ self.directions
        return DiagonalProblem(self.values + shift[..., None], linear, slope, self.directions)


@dataclass(frozen=True)
class DiagonalProblem:
    """Inner gradients ``g_i(z) = values_i z_i + linear_i`` at fixed hyperparameters, and how these move them.

    Attributes:
        values: a + s(u), of shape (..., d).
        linear: b(u) in the eigenbasis, of a shape that broadcasts to (..., d).
        slope: ds/du, of shape (..., *event).
        directions: see `Eigenbasis`.
    """

    values: Tensor
    linear: Tensor
    slope: Tensor
    directions: Tensor | None

    @property
    def solution(self) -> Tensor:
        """The minimiser ``-linear / values``, of shape (..., d)."""
        return -self.linear / self.values

    def pull(self, by_shift: Tensor, by_linear: Tensor) -> Tensor:
        """Return the cotangent of the hyperparameters, of shape (..., *event), from those of `values` and of `linear`.

        Both have the shape (..., d); a shift moves all eigenvalues.
        """
        total = by_shift.sum(-1)
        if self.slope.dim() > total.dim():
            total = total[..., None]
        by_hparams = self.slope * total
        return by_hparams if self.directions is None else by_hparams + by_linear @ self.directions.t()


def diagonalise(
    matrix: Tensor, linear: Tensor, shift: Callable[[Tensor], tuple[Tensor, Tensor]], directions: Tensor | None = None
) -> Eigenbasis:
    """Return the `Eigenbasis` of a problem stated by A, b_0, the shift and the b_j, in rows of shape (p, d).

    Its cost is one symmetric eigenproblem.
    """
    values, vectors = torch.linalg.eigh(matrix)
    turned = None if directions is None else directions @ vectors
    return Eigenbasis(values, vectors, linear @ vectors, shift, turned)
