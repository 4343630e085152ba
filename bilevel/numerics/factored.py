"""Factors of the regularised Hessian ``H = X1' diag(d) X1 + diag(a, 0)`` of a model of one output, with X1 = (X, 1).

The last coefficient is the intercept, without a penalty. With no more columns than rows H is factored. With more,
Woodbury's identity leaves a matrix of rows. Arguments are all arrays of NumPy, or all tensors.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel.numerics.small import array, cholesky, half_solve, inverse, row_dots, solve, tensor, weighted_gram

SKETCH = 64
"""Columns of a sketch."""
SAME = 0.05
"""The relative change of curvatures, but for a factor of all, up to which a sketch keeps a Gram matrix of others."""
WEAK = 1e-4
"""Penalties beside the mean curvature below which as many columns as rows fit every row but for what rounding hides."""
REFINEMENTS = 2
"""Of solutions with a Gram matrix of others."""


class Factored:
    """H with no more columns than rows.

    Args:
        X1: rows with a last column of ones, or without where there is no intercept, of shape (rows, p1).
        d: curvatures of the rows, (rows,), not negative.
        a: penalties, (p1,), of the intercept zero.
        gram: ``X1' diag(d) X1``, where it is known.
    """

    def __init__(self, X1: Any, d: Any, a: Any, gram: Any = None) -> None:
        self.X1, self.d, self.a = X1, d, a
        self.gram = weighted_gram(X1, d) if gram is None else gram
        self.L = cholesky(self.gram, a)

    def under(self, a: Any) -> Factored:
        """Return H of the same curvatures under other penalties."""
        return Factored(self.X1, self.d, a, self.gram)

    def at(self, d: Any) -> Factored:
        """Return H of other curvatures under the same penalties."""
        return Factored(self.X1, d, self.a)

    def solve(self, r: Any) -> Any:
        """Return ``H^-1 r`` of a vector."""
        return solve(self.L, r)

    def product(self, v: Any) -> Any:
        """Return ``H v`` of a vector."""
        return self.gram @ v + self.a * v

    @cached_property
    def half(self) -> Any:
        """``X1 L^-T``, of shape (rows, p1)."""
        return half_solve(self.L, self.X1.T).T

    @cached_property
    def V(self) -> Any:
        """``X1 H^-1``, of shape (rows, p1)."""
        return half_solve(self.L, self.half.T, transposed=True).T

    def leverages(self) -> Any:
        """Return the diagonal of ``X1 H^-1 X1'``."""
        return row_dots(self.half, self.half)

    def free(self, leverages: Any, least: float) -> Any:
        """Return one minus the leverages times the curvatures, at least the least that is not rounding."""
        return (1.0 - leverages * self.d).clip(least)

    def predicted(self, v: Any) -> Any:
        """Return ``V v``."""
        return self.X1 @ self.solve(v)

    def collected(self, r: Any) -> Any:
        """Return ``V' r``."""
        return self.solve(r @ self.X1)

    def by_column(self, b: Any) -> Any:
        """Return ``sum_i b_i V_ij^2`` for every column j."""
        return b @ (self.V * self.V)

    def by_row(self, a: Any) -> Any:
        """Return ``sum_j a_j V_ij^2`` for every row i."""
        return (self.V * self.V) @ a

    def moved(self, a: Any, b: Any) -> Any:
        """Return the sum of `by_row` and `squares`."""
        return self.by_row(a) + self.squares(b)

    def squares(self, b: Any) -> Any:
        """Return ``sum_i b_i S_ik^2`` for every k, with ``S = X1 H^-1 X1'``, without S."""
        return row_dots(self.half @ weighted_gram(self.half, b), self.half)

    def kernel(self) -> Any:
        """Return S, of shape (rows, rows)."""
        return self.half @ self.half.T


class Sketched(Factored):
    """H with many more rows than columns, whose leverages are estimated by a random sketch, in float32.

    With ``H = L L'`` and Gaussian Omega of shape (p1, 64), ``h_i = |x_i' L^-T Omega|^2 / 64`` has the right mean and a
    deviation of 18 %; of a mean loss that is p / n times as much. Other quadratic forms of the rows likewise.

    Args:
        X1: as of `Factored`.
        low: X1 in float32.
        d: as of `Factored`.
        a: as of `Factored`.
        near: other curvatures and their Gram matrix. It serves where these are the same but for a factor of all: what
            h changes by the rest is a mean over the rows of what curvatures do, near zero. Solutions are refined.
    """

    def __init__(
        self, X1: Tensor, low: Tensor, d: Tensor, a: Tensor, near: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.X1, self.low, self.d, self.a = X1, low, d, a
        self.near, self.exact = _same(near, d), False
        if self.near is None:
            self.near, self.exact = (d, weighted_gram(low, d.float())), True
        self.gram = self.near[1]
        self.L = cholesky(self.gram.to(torch.float64), a.double()).to(a.dtype)
        draws = torch.randn(len(a), SKETCH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.draws = draws.to(a) / SKETCH**0.5
        self.sketch = self._rows(self.draws)

    def solve(self, r: Tensor) -> Tensor:
        x = solve(self.L, r)
        for _ in range(0 if self.exact else REFINEMENTS):
            low = self.low.T @ (self.d.float() * (self.low @ x.float()))
            x = x + solve(self.L, r - self.a * x - low.to(x.dtype))
        return x

    def error(self, by_h: Tensor) -> float:
        """Return the standard error of ``sum_i by_h_i h_i``, by the differences between the columns of the sketch."""
        return float((by_h.float() @ self.sketch.square()).std()) * SKETCH**0.5

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
    """H with no fewer columns than rows.

    It is solved by ``M = (I + diag(r) K diag(r))^-1`` with ``K = X A^-1 X'`` and ``r = sqrt(d)``. An intercept adds
    ``t r r'`` to K, where t is of the size of K: weak penalties would lose the direction that centred columns leave.
    The arguments are those of `Factored`; `intercept` says what X1 ends with, and `gram` is K.
    """

    def __init__(self, X1: Any, d: Any, a: Any, intercept: bool, gram: Any = None) -> None:
        self.X1, self.d, self.a, self.intercept = X1, d, a, intercept
        self.X, self.penalties = (X1[:, :-1], a[:-1]) if intercept else (X1, a)
        if gram is None:
            scaled = self.X / self.penalties**0.5
            gram = scaled @ scaled.T
        self.gram = gram
        self.roots = d.clip(1e-300) ** 0.5
        turned = gram * self.roots[:, None] * self.roots
        if intercept:
            self.shift = (1.0 + turned.diagonal().sum()) / (self.roots @ self.roots).clip(1e-300)
            turned += self.shift * self.roots[:, None] * self.roots
        self.L = cholesky(turned, 1.0)
        if intercept:
            self.ones = solve(self.L, self.roots)  # M r
            self.total = (self.roots @ self.ones).clip(1e-300)

    def under(self, a: Any) -> FactoredRows:
        return FactoredRows(self.X1, self.d, a, self.intercept)

    def at(self, d: Any) -> FactoredRows:
        return FactoredRows(self.X1, d, self.a, self.intercept, self.gram)

    def solve(self, r: Any) -> Any:
        if not self.intercept:
            r = r / self.penalties
            return r - ((self.roots * solve(self.L, self.roots * (self.X @ r))) @ self.X) / self.penalties
        result = r * 0.0
        w = r[:-1] / self.penalties
        moved = solve(self.L, self.roots * (self.X @ w))
        result[-1] = (r[-1] - self.roots @ moved) / self.total
        moved = self.roots * (moved + result[-1] * self.ones)
        result[-1] -= self.shift * r[-1]
        result[:-1] = w - (moved @ self.X) / self.penalties
        return result

    def product(self, v: Any) -> Any:
        return (self.d * (self.X1 @ v)) @ self.X1 + self.a * v

    @cached_property
    def rest(self) -> Any:
        """What is left of targets times r: M, without what the intercept takes, of shape (rows, rows)."""
        M = inverse(self.L)
        if self.intercept:
            M -= self.ones[:, None] * (self.ones / self.total)
        return M

    @cached_property
    def V(self) -> Any:
        """``X1 H^-1``, of shape (rows, p1)."""
        part = (self.rest * (self.roots / self.roots[:, None])) @ (self.X / self.penalties)
        if not self.intercept:
            return part
        last = self.ones / (self.roots * self.total)
        return array(torch.cat([tensor(part), tensor(last)[:, None]], 1))

    def leverages(self) -> Any:
        return row_dots(self.V, self.X1)

    def free(self, leverages: Any, least: float) -> Any:
        return self.rest.diagonal().clip(1e-300)

    def predicted(self, v: Any) -> Any:
        return self.V @ v

    def collected(self, r: Any) -> Any:
        return r @ self.V

    def squares(self, b: Any) -> Any:
        S = self.kernel()
        return b @ (S * S)

    def kernel(self) -> Any:
        return self.V @ self.X1.T


def _same(near: tuple[Tensor, Tensor] | None, d: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return curvatures with the sum of d, and their Gram matrix, where others are the same as d but for a factor."""
    if near is None:
        return None
    ratio = d.sum() / near[0].sum()
    return (ratio * near[0], ratio.float() * near[1]) if (d - ratio * near[0]).norm() <= SAME * d.norm() else None


def factored(X1: Any, d: Any, a: Any, intercept: bool) -> Factored:
    """Return the cheaper factor of the two, but where only that of rows has digits."""
    wide = X1.shape[1] > X1.shape[0] + 1 or _is_interpolated(X1, d, a, intercept)
    return FactoredRows(X1, d, a, intercept) if wide else Factored(X1, d, a)


def serves(H: Factored, X1: Any, a: Any, intercept: bool) -> bool:
    """Whether a factor of these rows serves under penalties a as well."""
    return H.X1 is X1 and (isinstance(H, FactoredRows) or not _is_interpolated(X1, H.d, a, intercept))


def fit_every_row(X1: Any, intercept: bool) -> bool:
    """Whether there are columns enough to fit all rows but one exactly."""
    rows, columns = X1.shape
    return bool(columns > rows + 1 - 2 * intercept)


def _is_interpolated(X1: Any, d: Any, a: Any, intercept: bool) -> bool:
    """Whether as many columns as rows, under penalties that weak, leave residuals that are a difference of equals."""
    if not fit_every_row(X1, intercept):
        return False
    columns = X1.shape[1]
    level = float(d @ row_dots(X1, X1)) / columns
    return not float(a[: columns - intercept].min()) >= WEAK * level
