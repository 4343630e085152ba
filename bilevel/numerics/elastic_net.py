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

from bilevel.numerics.small import cholesky, solve

Array = NDArray[np.float64]
Index = NDArray[np.intp]

ROUNDS = 200
"""Sweeps at most."""
MOST = 50
"""Coordinates that a sweep takes up at most, or as many as there are in the support."""
SLACK = 1e-11
"""Share of the largest moment by which a coordinate outside the support may violate its condition."""


class GramColumns:
    """A Gram matrix whose columns are formed when they are first asked for.

    Args:
        diagonal: of shape (p,).
        form: from indices (k,) to the columns, as rows of shape (k, p).
    """

    def __init__(self, diagonal: Array, form: Callable[[Index], Array]) -> None:
        self._diagonal, self._form = diagonal, form
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
        places = self._places(index)
        every = np.zeros(self._count)
        every[places] = values
        return every @ self._rows[: self._count]

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


class Solution(NamedTuple):
    """A minimiser.

    Attributes:
        w: of shape (p,).
        rounds: how many sweeps it took.
        converged: whether it is one, up to rounding errors.
    """

    w: Array
    rounds: int
    converged: bool


def solve_gram(
    gram: Array | GramColumns, moment: Array, l1: Array, l2: Array, w: Array, positive: bool = False
) -> Array:
    """Return the minimiser from a start w, such as that of a stronger penalty.

    Args:
        gram: G, of shape (p, p), symmetric positive semidefinite.
        moment: c, of shape (p,).
        l1: weights of ``|w|``, of shape (p,).
        l2: weights of ``w^2 / 2``, of shape (p,).
        w: the start.
        positive: whether w >= 0.

    >>> solve_gram(np.eye(2), np.array([3.0, 0.5]), np.ones(2), np.zeros(2), np.zeros(2))
    array([2., 0.])
    """
    return solution(gram, moment, l1, l2, w, positive).w


def solution(
    gram: Array | GramColumns,
    moment: Array,
    l1: Array,
    l2: Array,
    w: Array,
    positive: bool = False,
    rounds: int = ROUNDS,
) -> Solution:
    """Return `solve_gram` with what it took, after at most so many rounds."""
    w = np.maximum(w, 0.0) if positive else w.copy()
    diagonal = gram.diagonal() + l2
    tolerance = SLACK * float(np.abs(moment).max(initial=0.0))
    for count in range(1, rounds + 1):
        w, support = _on_support(gram, moment, l1, l2, w)
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


def _on_support(gram: Array | GramColumns, moment: Array, l1: Array, l2: Array, w: Array) -> tuple[Array, Index]:
    """Go to the solution on the support of w, without the coordinates whose signs change on the way."""
    support = np.flatnonzero(w)
    while len(support):
        here = w[support]
        signs = np.sign(here)
        # Along the null space of a singular matrix, whose factor is that of a little more, the solution is far away in
        # the direction of descent: there the first sign changes.
        block = gram.block(support) if isinstance(gram, GramColumns) else gram[support][:, support]
        right = moment[support] - l1[support] * signs
        target: Array = solve(cholesky(block, l2[support]), right)
        wrong = target * signs <= 0
        if not wrong.any():
            w[support] = target
            break
        moved = np.where(wrong, 0.0, target)
        step = moved - here
        # No sign changes, so that the objective is a quadratic between here and there.
        if step @ (block @ (here + 0.5 * step) + l2[support] * (here + 0.5 * step) - right) >= 0:
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
    """Return `solve_gram` of tensors of shapes (p, p) and (p,), with the dtype and on the device of `start`."""
    gram, c, first, second, w = [each.detach().double().cpu().numpy() for each in (hessian, moment, l1, l2, start)]
    return torch.from_numpy(solve_gram(gram, c, first, second, w, positive)).to(start)
