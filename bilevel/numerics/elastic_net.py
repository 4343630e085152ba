"""Squared loss with an elastic-net penalty on a Gram matrix: coordinate descent with active sets.

    minimise  1/2 w'G w - c'w + sum_j (l1_j |w_j| + l2_j / 2 w_j^2),      w >= 0 where asked for

No cost depends on the number of rows. At a solution with support S and signs s, ``(G + l2)_SS w_S = c_S - l1_S s``, and
``|c - G w| <= l1`` outside S. A sweep of coordinate descent over the coordinates that violate this (Friedman et al.
2010) takes them up; then w goes to the solution on its support. Where signs change on the way, their coordinates leave
it, all of them if the objective falls by that, else the first, until none changes. No support comes twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.numerics.small import cholesky, half_solve, solve

Array = NDArray[np.float64]
Index = NDArray[np.intp]

ROUNDS = 200
"""Sweeps at most."""
MOST = 50
"""Coordinates that a sweep takes up at most, or as many as there are in the support."""
SLACK = 1e-11
"""Share of the largest moment by which a coordinate outside the support may violate its condition."""
BORDER = 8
"""A factor serves for supports that differ from its own by one part in so many, ..."""
SINGULAR = 1e-6
"""... if no pivot is below this part of the diagonal."""


class GramColumns:
    """A Gram matrix whose columns are formed when they are first asked for.

    `form` makes them, of indices (k,), as rows of shape (k, p); `multiply` makes the product with a vector (p,), where
    that is quicker than by columns.
    """

    def __init__(
        self, diagonal: Array, form: Callable[[Index], Array], multiply: Callable[[Array], Array] | None = None
    ) -> None:
        self._diagonal, self._form, self._multiply = diagonal, form, multiply
        self._base: _Bordered | None = None
        self.bordered = False  # whether the last solution is by the factor of another support
        self._place = np.full(len(diagonal), -1)
        self._rows, self._count = np.empty((0, len(diagonal))), 0

    def diagonal(self) -> Array:
        """Return the diagonal, (p,)."""
        return self._diagonal

    def __getitem__(self, index: Index) -> Array:
        places = self._places(index)  # before the rows, which it may replace
        return self._rows[places]

    def block(self, index: Index) -> Array:
        """Return the rows and columns of indices, (k, k)."""
        places = self._places(index)
        return self._rows[np.ix_(places, index)]

    def product(self, index: Index, values: Array) -> Array:
        """Return the combination of the columns of indices, (p,)."""
        if self._multiply is not None:
            whole = np.zeros(len(self._diagonal))
            whole[index] = values
            return self._multiply(whole)
        places = self._places(index)
        every = np.zeros(self._count)
        every[places] = values
        return every @ self._rows[: self._count]

    def solve(self, support: Index, l2: Array, right: Array, anew: bool = False) -> Array:
        """Return ``(G + l2)_SS^-1 right`` on a support S, increasing, by the factor of one near by where one serves.

        ``l2`` has the shape (p,), the others (k,); with `anew` no factor serves.
        """
        base = None if anew else self._base
        found = None if base is None else base.solve(self, support, l2, right)
        self.bordered = found is not None
        if found is None:
            self._base = _Bordered(support, l2[support], cholesky(self.block(support), l2[support]))
            found = np.asarray(solve(self._base.L, right))
        return found

    def _places(self, index: Index) -> Index:
        """Return where the columns are kept; those that are not known are formed."""
        unknown = index[self._place[index] < 0]
        if len(unknown):
            count = self._count + len(unknown)
            if count > len(self._rows):
                grown = np.empty((2 * count, len(self._diagonal)))
                grown[: self._count] = self._rows[: self._count]
                self._rows = grown
            self._rows[self._count : count] = self._form(unknown)
            self._place[unknown] = np.arange(self._count, count)
            self._count = count
        return self._place[index]


class _Bordered:
    """The factor L of ``(G + l2)_BB`` of a support B, increasing, and what supports near by add to it."""

    def __init__(self, support: Index, l2: Array, L: Array) -> None:
        self.support, self.l2, self.L = support, l2, L
        self.serves = bool(L.diagonal().min() ** 2 > SINGULAR * L.diagonal().max() ** 2)
        self._columns: dict[int, Array] = {}

    def solve(self, gram: GramColumns, support: Index, l2: Array, right: Array) -> Array | None:
        """Return the solution on another support; None where the factor does not serve for that.

        Coordinates that are new border the matrix; those that have left are held at zero by multipliers.
        """
        base, count = self.support, len(self.support)
        stays, new = np.isin(base, support), np.isin(support, base, invert=True)
        added, border = support[new], np.concatenate([support[new], base[~stays]])
        if not self.serves or BORDER * len(border) > count or not np.array_equal(self.l2, l2[base]):
            return None
        unknown = np.array([each for each in border if each not in self._columns], dtype=np.intp)
        if len(unknown):
            ours, sides = np.isin(unknown, base), np.zeros((count, len(unknown)))
            sides[:, ~ours] = gram[unknown[~ours]][:, base].T
            sides[np.searchsorted(base, unknown[ours]), np.flatnonzero(ours)] = 1.0
            self._columns.update(zip(unknown.tolist(), half_solve(self.L, sides).T, strict=True))
        W = np.array([self._columns[each] for each in border]).reshape(-1, count)
        corner = np.zeros((len(border), len(border)))
        size = len(added)
        corner[:size, :size] = gram.block(added)
        corner.reshape(-1)[: size * len(border) : len(border) + 1] += l2[added]
        scale = float(corner.diagonal()[:size].max(initial=0.0))
        corner -= W @ W.T
        if size and not cholesky(corner[:size, :size], 0.0).diagonal().min() ** 2 > SINGULAR * scale:
            return None
        side, last = np.zeros(count), np.zeros(len(border))
        side[stays], last[:size] = right[~new], right[new]
        side = half_solve(self.L, side[:, None])[:, 0]
        last = np.linalg.solve(corner, last - W @ side)
        side = half_solve(self.L, (side - last @ W)[:, None], transposed=True)[:, 0]
        found = np.empty(len(support))
        found[~new], found[new] = side[stays], last[:size]
        return found


class Solution(NamedTuple):
    """A minimiser of shape (p,), how many sweeps it took, and whether it is one, up to rounding errors."""

    w: Array
    rounds: int
    converged: bool


def solution(
    gram: Array | GramColumns,
    moment: Array,
    l1: Array,
    l2: Array,
    w: Array,
    positive: bool = False,
    rounds: int = ROUNDS,
) -> Solution:
    """Return the minimiser from a start w, such as that of a stronger penalty, after at most so many rounds.

    G is positive semidefinite, (p, p); c, l1 (of ``|w|``) and l2 (of ``w^2 / 2``) are of shape (p,).

    >>> solution(np.eye(2), np.array([3.0, 0.5]), np.ones(2), np.zeros(2), np.zeros(2)).w
    array([2., 0.])
    """
    w = np.maximum(w, 0.0) if positive else w.copy()
    diagonal = gram.diagonal() + l2
    tolerance = SLACK * float(np.abs(moment).max(initial=0.0))
    for count in range(1, rounds + 1):
        w, support = _on_support(gram, moment, l1, l2, w)
        correlation = moment - _product(gram, support, w[support])
        if isinstance(gram, GramColumns) and gram.bordered:
            here = w[support]
            left = correlation[support] - l1[support] * np.sign(here) - l2[support] * here
            if np.abs(left).max(initial=0.0) > tolerance:
                w, support = _on_support(gram, moment, l1, l2, w, anew=True)
                correlation = moment - _product(gram, support, w[support])
        excess = (correlation if positive else np.abs(correlation)) - l1
        excess[support] = -np.inf
        violators = np.flatnonzero((excess > tolerance) & (diagonal > 0))
        if not len(violators):
            return Solution(w, count, True)
        violators = violators[np.argsort(-excess[violators])[: max(MOST, len(support))]]
        for j, column in zip(violators, gram[violators], strict=True):
            # Of a coordinate at zero; where others have come before it, it may stay there.
            size = (correlation[j] if positive else abs(correlation[j])) - l1[j]
            if size > 0:
                w[j] = np.copysign(size, correlation[j]) / diagonal[j]
                correlation -= w[j] * column
    return Solution(w, rounds, False)


def _product(gram: Array | GramColumns, support: Index, values: Array) -> Array:
    """Return ``G w`` of a w with a support."""
    if isinstance(gram, GramColumns):
        return gram.product(support, values)
    return values @ gram[support]


def _on_support(
    gram: Array | GramColumns, moment: Array, l1: Array, l2: Array, w: Array, anew: bool = False
) -> tuple[Array, Index]:
    """Go to the solution on the support of w, without the coordinates whose signs change on the way."""
    support = np.flatnonzero(w)
    while len(support):
        here = w[support]
        signs = np.sign(here)
        # Along the null space of a singular matrix, whose factor is that of a little more, the solution is far away in
        # the direction of descent: there the first sign changes.
        right = moment[support] - l1[support] * signs
        if isinstance(gram, GramColumns):
            target = gram.solve(support, l2, right, anew)
        else:
            block = gram[support][:, support]
            target = solve(cholesky(block, l2[support]), right)
        wrong = target * signs <= 0
        if not wrong.any():
            w[support] = target
            break
        moved = np.where(wrong, 0.0, target)
        step, middle = moved - here, 0.5 * (here + moved)
        # No sign changes, so that the objective is a quadratic between here and there.
        by = gram.product(support, middle)[support] if isinstance(gram, GramColumns) else block @ middle
        if step @ (by + l2[support] * middle - right) >= 0:
            steps = here[wrong] / (here[wrong] - target[wrong])
            first = steps.min()
            moved = here + first * (target - here)
            moved[np.flatnonzero(wrong)[steps <= first]] = 0.0
        w[support] = moved
        support = support[moved != 0]
    return w, support


def minimise_quadratic(
    hessian: Tensor, moment: Tensor, l1: Tensor, l2: Tensor, start: Tensor, positive: bool = False
) -> Tensor:
    """Return the minimiser for tensors of shapes (p, p) and (p,), with the dtype and on the device of `start`."""
    gram, c, first, second, w = [each.detach().double().cpu().numpy() for each in (hessian, moment, l1, l2, start)]
    return torch.from_numpy(solution(gram, c, first, second, w, positive).w).to(start)
