"""Quadratic inner problems whose Hessian moves along the identity, in the eigenbasis of its fixed part.

    inner gradient   g(x, u) = (A + s(u) I) x + b_0 + sum_j u_j b_j,      A = Q diag(a) Q'

In the coordinates ``z = Q' x`` there are d problems of one number each, ``(a_i + s(u)) z_i + b_i(u)``, whatever u is:
A is diagonalised once, and every inner step, its derivative and the solution itself cost d numbers for each u. This is
arithmetic in float64, whatever the dtype of the data: near-singular directions keep no digit of float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

CLOSE = 1e-3
"""Below this q the rounding of 1 - q matters."""
SMALL = 1e-2
"""Below this K q the quotient (1 - (1 - q)^K) / q cancels, and its series takes over."""
TERMS = 8


@dataclass(frozen=True)
class Eigenbasis:
    """What `BilevelProblem.spectrum` returns; leading dimensions of hparams and vectors are batches.

    Results have the dtype of `values`, whatever that of hparams and vectors.

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
        x = x.to(self.vectors)
        return torch.mv(self.vectors.t(), x) if x.dim() == 1 else x @ self.vectors

    def back(self, z: Tensor) -> Tensor:
        """Return ``Q z`` for z of shape (..., d)."""
        return torch.mv(self.vectors, z) if z.dim() == 1 else z @ self.vectors.t()

    def bind(self, hparams: Tensor) -> DiagonalProblem:
        """Return the d problems of one number at fixed hyperparameters of shape (..., *event)."""
        shift, slope = (each.to(self.values) for each in self.shift(hparams))
        linear = self.linear if self.directions is None else self.linear + hparams.to(self.values) @ self.directions
        return DiagonalProblem(self.values + shift[..., None], linear, slope, self.directions)

    def to(self, dtype: torch.dtype) -> Eigenbasis:
        """Return the eigenbasis rounded to a dtype."""
        values, vectors, linear = (each.to(dtype) for each in (self.values, self.vectors, self.linear))
        directions = None if self.directions is None else self.directions.to(dtype)
        return Eigenbasis(values, vectors, linear, self.shift, directions)


@dataclass(frozen=True)
class DiagonalProblem:
    """Inner gradients ``g_i(z) = values_i z_i + linear_i`` at fixed hyperparameters, and how these move them.

    `values` are a + s(u), (..., d), `linear` is b(u) in the eigenbasis, and `slope` is ds/du, (..., *event).
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

    Its cost is one symmetric eigenproblem, in float64.
    """
    matrix, linear = matrix.double(), linear.double()
    directions = None if directions is None else directions.double()
    values, vectors = torch.linalg.eigh(matrix)
    turned = None if directions is None else directions @ vectors
    return Eigenbasis(values, vectors, linear @ vectors, shift, turned)


def geometric(q: Any, count: int) -> tuple[Any, Any, Any, Any]:
    """Return ``r^K``, ``G = sum_{j<K} r^j`` for r = 1 - q, and how they move with r.

    Args:
        q: any numbers, as a tensor or an array; 0 and 1 included.
        count: K, at least one.

    Returns:
        ``(r^K, K r^(K-1), G, dG/dr)``.

    >>> power, slope, total, total_slope = geometric(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), 3)
    >>> total
    tensor([1.0000, 1.7500, 3.0000], dtype=torch.float64)
    >>> total_slope
    tensor([1., 2., 3.], dtype=torch.float64)
    """
    xp: Any = torch if isinstance(q, Tensor) else np
    r = 1.0 - q
    # r^K / r would be nan where a step size of exactly 1/lam makes r vanish.
    below = r ** (count - 1)
    power, power_slope = below * r, count * below
    rest = 1.0 - power
    # Rounding r costs eps / q of 1 - r^K: the logarithm never sees r, and below SMALL the quotients cancel.
    smallest = float(abs(q).min())
    if smallest < CLOSE:
        rest = xp.where(q < 0.5, -xp.expm1(count * xp.log1p(-q)), rest)
    total = rest / q
    total_slope = (total - power_slope) / q
    if count * smallest < SMALL:
        tiny = count * abs(q) < SMALL
        first, second = _series(q, count)
        total, total_slope = xp.where(tiny, first, total), xp.where(tiny, second, total_slope)
    return power, power_slope, total, total_slope


def _series(q: Any, count: int) -> tuple[Any, Any]:
    """Return G and dG/dr for a small K q, from ``G = sum_m binom(K, m + 1) (-q)^m``."""
    total = slope = 0.0 * q
    for m in range(min(TERMS, count) - 1, -1, -1):
        binomial = float(math.comb(count, m + 1))
        total = binomial - q * total
        slope = m * binomial - q * slope if m else slope
    return total, slope
