"""Factors of the regularised Hessian ``H = X1' diag(d) X1 + diag(a, 0)`` of a model of one output, with X1 = (X, 1).

The last coefficient is the intercept, without a penalty. With no more columns than rows H is factored. With more, the
intercept is eliminated (columns are centred by the weights d) and Woodbury's identity leaves a matrix of rows.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bilevel.numerics.small import factor, weighted_gram

SKETCH = 64
"""Columns of a sketch."""


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

    def predicted(self, v: Tensor) -> Tensor:
        """Return ``V v``."""
        return self.V @ v

    def collected(self, r: Tensor) -> Tensor:
        """Return ``V' r``."""
        return self.V.T @ r

    def by_column(self, b: Tensor) -> Tensor:
        """Return ``sum_i b_i V_ij^2`` for every column j."""
        return self.V.square().T @ b

    def by_row(self, a: Tensor) -> Tensor:
        """Return ``sum_j a_j V_ij^2`` for every row i."""
        return self.V.square() @ a

    def moved(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sum of `by_row` and `squares`."""
        return self.by_row(a) + self.squares(b)

    def squares(self, b: Tensor) -> Tensor:
        """Return ``sum_i b_i S_ik^2`` for every k, with ``S = X1 H^-1 X1'``, without S."""
        return ((self.V @ weighted_gram(self.X1, b)) * self.V).sum(1)

    def kernel(self) -> Tensor:
        """Return S, of shape (rows, rows)."""
        return self.V @ self.X1.T


class Sketched(Factored):
    """H with many more rows than columns, whose leverages are estimated by a random sketch, in float32.

    With ``H = L L'`` and Gaussian Omega of shape (p1, 64), ``h_i = |x_i' L^-T Omega|^2 / 64`` has the right mean and a
    deviation of 18 %; of a mean loss that is p / n times as much. Other quadratic forms of the rows likewise.

    Args:
        X1: as of `Factored`.
        low: X1 in float32.
        d: as of `Factored`.
        a: as of `Factored`.
    """

    def __init__(self, X1: Tensor, low: Tensor, d: Tensor, a: Tensor) -> None:
        self.X1, self.low = X1, low
        self.gram = weighted_gram(low, d.float())
        self.L = factor(self.gram.to(torch.float64), a.double()).to(a.dtype)
        draws = torch.randn(len(a), SKETCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.draws = draws.to(a) / SKETCH**0.5
        self.sketch = self._rows(self.draws)

    def _rows(self, T: Tensor) -> Tensor:
        """Return ``X1 L^-T T``."""
        return self.low @ torch.linalg.solve_triangular(self.L.T, T, upper=True).float()

    def _quadratic(self, M: Tensor) -> Tensor:
        """Return ``x_i' H^-1 M H^-1 x_i`` for every row, from ``M L^-T Omega``."""
        turned = self._rows(torch.linalg.solve_triangular(self.L, M, upper=False))
        return (self.sketch * turned).sum(1).to(M.dtype)

    def leverages(self) -> Tensor:
        return self.sketch.square().sum(1).to(self.L.dtype)

    def predicted(self, v: Tensor) -> Tensor:
        return self.X1 @ self.solve(v)

    def collected(self, r: Tensor) -> Tensor:
        return self.solve(self.X1.T @ r)

    def by_column(self, b: Tensor) -> Tensor:
        inverse, gram = torch.cholesky_inverse(self.L), weighted_gram(self.low, b.float()).to(b.dtype)
        return ((inverse @ gram) * inverse).sum(1)

    def by_row(self, a: Tensor) -> Tensor:
        return self._quadratic(self._penalised(a))

    def squares(self, b: Tensor) -> Tensor:
        return self._quadratic(self._weighted(b))

    def moved(self, a: Tensor, b: Tensor) -> Tensor:
        return self._quadratic(self._penalised(a) + self._weighted(b))

    def _penalised(self, a: Tensor) -> Tensor:
        return a[:, None] * torch.linalg.solve_triangular(self.L.T, self.draws, upper=True)

    def _weighted(self, b: Tensor) -> Tensor:
        return (self.low.T @ (b.float()[:, None] * self.sketch)).to(b.dtype)


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


def factored(X1: Tensor, d: Tensor, a: Tensor, intercept: bool) -> Factored:
    """Return the cheaper factor of the two."""
    return FactoredRows(X1, d, a, intercept) if X1.shape[1] > X1.shape[0] + 1 else Factored(X1, d, a)
