"""Factors of the regularised Hessian ``H = X1' diag(d) X1 + diag(a, 0)`` of a model of one output, with X1 = (X, 1).

The last coefficient is the intercept, without a penalty. With no more columns than rows H is factored. With more, the
intercept is eliminated (columns are centred by the weights d) and Woodbury's identity leaves a matrix of rows.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


def factor(gram: Tensor, a: Tensor) -> Tensor:
    """Return the Cholesky factor of ``gram + diag(a)``, (..., p, p); where rounding leaves none, of a little more.

    Args:
        gram: positive semidefinite, of shape (..., p, p); it is changed in place.
        a: of shape (..., p), not negative.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += a
    L, info = torch.linalg.cholesky_ex(gram)
    more = 1e-14
    while bool(info.any()) and more < 1.0:
        diagonal += more * diagonal.amax(-1, keepdim=True) + torch.finfo(gram.dtype).tiny
        L, info = torch.linalg.cholesky_ex(gram)
        more *= 10.0
    return L


class Factored:
    """H with no more columns than rows.

    Args:
        X1: rows with a last column of ones, or without where there is no intercept, of shape (rows, p1).
        d: curvatures of the rows, (rows,), not negative.
        a: penalties, (p1,), of the intercept zero.
    """

    def __init__(self, X1: Tensor, d: Tensor, a: Tensor) -> None:
        self.X1 = X1
        self.L = factor(weighted_gram(X1, d), a)

    def solve(self, r: Tensor) -> Tensor:
        """Return ``H^-1 r`` of a vector."""
        return torch.cholesky_solve(r[:, None], self.L)[:, 0]

    @cached_property
    def V(self) -> Tensor:
        """``X1 H^-1``, of shape (rows, p1)."""
        return self.X1 @ torch.cholesky_inverse(self.L)

    def leverages(self) -> Tensor:
        """Return the diagonal of ``X1 H^-1 X1'``."""
        return (self.V * self.X1).sum(1)

    def squares(self, b: Tensor) -> Tensor:
        """Return ``sum_i b_i S_ik^2`` for every k, with ``S = X1 H^-1 X1'``, without S."""
        return ((self.V @ weighted_gram(self.X1, b)) * self.V).sum(1)

    def kernel(self) -> Tensor:
        """Return S, of shape (rows, rows)."""
        return self.V @ self.X1.T


class FactoredRows(Factored):
    """H with more columns than rows; the arguments are those of `Factored`, and `intercept` says what X1 ends with."""

    def __init__(self, X1: Tensor, d: Tensor, a: Tensor, intercept: bool) -> None:
        self.X1, self.d, self.intercept = X1, d, intercept
        X, self.a = (X1[:, :-1], a[:-1]) if intercept else (X1, a)
        self.total = d.sum().clamp_min(torch.finfo(d.dtype).tiny)
        self.mean = (d @ X) / self.total if intercept else torch.zeros_like(X[0])
        self.X = X - self.mean
        scaled, root = self.X / self.a, d.clamp_min(1e-300).sqrt()
        L = factor((scaled @ self.X.T) * root[:, None] * root, torch.ones_like(root))
        self.part = torch.cholesky_solve(scaled * root[:, None], L) / root[:, None]

    def solve(self, r: Tensor) -> Tensor:
        r, last = (r[:-1], r[-1:]) if self.intercept else (r, r[:0])
        r = (r - self.mean * last if self.intercept else r) / self.a
        w = r - (self.d * (self.X @ r)) @ self.part
        return torch.cat([w, last / self.total - self.mean @ w]) if self.intercept else w

    @cached_property
    def V(self) -> Tensor:
        """``X1 H^-1``, of shape (rows, p1)."""
        if not self.intercept:
            return self.part
        return torch.cat([self.part, (1.0 / self.total - self.part @ self.mean)[:, None]], 1)

    def leverages(self) -> Tensor:
        return (self.part * self.X).sum(1) + (1.0 / self.total if self.intercept else 0.0)

    def squares(self, b: Tensor) -> Tensor:
        return b @ self.kernel().square()

    def kernel(self) -> Tensor:
        return self.part @ self.X.T + (1.0 / self.total if self.intercept else 0.0)


def weighted_gram(X: Tensor, d: Tensor) -> Tensor:
    """Return ``X' diag(d) X``, (..., p, p), for d of shape (..., rows)."""
    if d.dim() > 1 and d.numel() * X.shape[1] > 2_000_000:
        return torch.stack([weighted_gram(X, each) for each in d])
    return (X.T * d[..., None, :]) @ X


def factored(X1: Tensor, d: Tensor, a: Tensor, intercept: bool) -> Factored:
    """Return the cheaper factor of the two."""
    return FactoredRows(X1, d, a, intercept) if X1.shape[1] > X1.shape[0] + 1 else Factored(X1, d, a)
