"""What a problem tells of itself so that the errors of its hypergradients can be bounded: data, loss constants, slopes.

The class is that of penalised linear models, with predictions ``z_i = W a_i`` and curvatures ``S_i = loss''(z_i)``:

    inner   g(W, u) = sum_i omega_i(u) loss(W a_i, y_i) + 1/2 sum_j pen_j(u) W_j^2
    outer   f(W)    = 1/m sum_i loss(W b_i, y_i)

A problem of this class returns a `Certifiable` from its method `certifiable`; `bilevel.certify` needs nothing else.
Everything is in float64 whatever the dtype of the problem, and the products are summed in blocks, so that a proved
constant for their rounding is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.numerics.dense import REFACTORED

BLOCK = 16
"""Terms that a product adds in an unknown order; the blocks are then added in pairs."""
UNIT = 2.0**-53
"""Unit roundoff of float64."""
CHUNK = 64
"""Rows that a Gram matrix adds in an unknown order; the chunks are then added in pairs."""


def gamma(count: float) -> float:
    """Return Higham's ``k u / (1 - k u)``, the relative error of k roundings in float64.

    >>> round(gamma(100) / 2**-53, 6)
    100.0
    """
    return count * UNIT / (1.0 - count * UNIT)


def roundings(length: int, block: int = BLOCK) -> int:
    """Return how many roundings a term of `blocked_product` meets at most."""
    blocks = length // block
    return length if blocks <= 1 else block + math.ceil(math.log2(blocks)) + 2


def blocked_product(A: Tensor, B: Tensor, block: int = BLOCK) -> Tensor:
    """Return ``A @ B``, summed in blocks: ``|error| <= gamma(roundings(n, block)) |A| |B|``; one of them is small.

    >>> blocked_product(torch.ones(1, 70), torch.ones(70, 2))
    tensor([[70., 70.]])
    """
    length = A.shape[1]
    blocks = length // block
    if blocks <= 1:
        return A @ B
    cut = blocks * block
    parts = torch.bmm(A[:, :cut].reshape(len(A), blocks, block).transpose(0, 1), B[:cut].reshape(blocks, block, -1))
    while blocks > 1:
        half = (blocks + 1) // 2
        parts[: blocks - half] += parts[half:blocks]
        blocks = half
    return parts[0] + A[:, cut:] @ B[cut:] if cut < length else parts[0]


def pairwise_product(A: Tensor, B: Tensor) -> Tensor:
    """Return ``A @ B``, summed pairwise over chunks: ``|error| <= gamma(chunk_roundings(n)) |A| |B|``, for large n.

    >>> pairwise_product(torch.ones(1, 700), torch.ones(700, 2))
    tensor([[700., 700.]])
    """
    length = A.shape[1]
    if length <= CHUNK:
        return A @ B
    cut = CHUNK * max(1, length // CHUNK // 2)
    return pairwise_product(A[:, :cut], B[:cut]) + pairwise_product(A[:, cut:], B[cut:])


def chunk_roundings(length: int) -> int:
    """Return how many roundings a term of `pairwise_product` meets at most."""
    return CHUNK + math.ceil(math.log2(max(2, length / CHUNK))) + 2


def top_eigenvalue(matrix: Tensor) -> float:
    """Return an upper bound of the largest eigenvalue of a symmetric positive semidefinite matrix.

    A few power steps make a guess; a Cholesky factorisation of ``bound I - matrix`` proves it, rounding included.

    >>> 5.0 <= top_eigenvalue(torch.diag(torch.tensor([1.0, 5.0], dtype=torch.float64))) <= 5.6
    True
    """
    size, trace = len(matrix), float(matrix.diagonal().sum())
    v = matrix.sum(1) + matrix.diagonal()
    guess = 0.0
    for _ in range(12):
        length = float(torch.linalg.vector_norm(v))
        if not 0 < length < math.inf:
            break
        v = matrix @ (v / length)
        guess = float(torch.linalg.vector_norm(v))
    best = min(trace, float(torch.linalg.matrix_norm(matrix)))
    slack = (size + 4) * 2 * UNIT
    for factor in (1.05, 1.3, 2.0):
        bound = factor * guess
        if not 0 < bound < best:
            break
        shifted = torch.diag(matrix.new_full((size,), bound)) - matrix
        if not bool(torch.linalg.cholesky_ex(shifted).info):
            return bound * (1 + slack * size)
    return best * (1 + slack)


@dataclass(frozen=True)
class Rows:
    """One part of the data: inputs X of shape (features, rows) in float64, targets y, and what follows from them."""

    X: Tensor
    y: Tensor

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.X.shape[1]

    def predict(self, W: Tensor) -> Tensor:
        """Return ``W a_i`` for weights (k, features): shape (k, rows)."""
        return blocked_product(W, self.X)

    def collect(self, S: Tensor) -> Tensor:
        """Return ``sum_i S_i a_i`` for S of shape (k, rows): shape (k, features)."""
        # In this order the blocks of X are read along its rows.
        return blocked_product(self.X, S.t().contiguous()).t()

    @cached_property
    def columns(self) -> Tensor:
        """Euclidean norm of every feature, at least the smallest normal number: (features,)."""
        return torch.linalg.vector_norm(self.X, dim=1).clamp_min(torch.finfo(self.X.dtype).tiny ** 0.5)

    @cached_property
    def scaled_lengths(self) -> Tensor:
        """Euclidean norm of every row when features are scaled to length one: (rows,)."""
        return (self.squares.t() @ self.columns.pow(-2)).sqrt()

    @cached_property
    def squares(self) -> Tensor:
        """Squares of the inputs, which weighted row norms are made of: (features, rows)."""
        return self.X.square()

    @cached_property
    def square_lengths(self) -> Tensor:
        """Squared Euclidean norm of every row: (rows,)."""
        return self.squares.sum(0)

    @cached_property
    def gram(self) -> Tensor:
        """``X X' / rows``, of shape (features, features)."""
        return pairwise_product(self.X, self.X.t()) / self.count

    @cached_property
    def moment(self) -> Tensor:
        """``X y / rows``, of shape (features,)."""
        return pairwise_product(self.X, self.y[:, None].to(self.X.dtype))[:, 0] / self.count

    def on_gram(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``W X X' / rows`` for weights (k, features), and a bound of its rounding, that of `moment` included.

        By Cauchy-Schwarz ``sum_i |a_ij a_il|`` is at most the product of the features' norms.
        """
        product = blocked_product(W, self.gram, CHUNK)
        size = torch.mv(W.abs(), self.mean_lengths) + self.target_length
        terms = chunk_roundings(self.count) + roundings(W.shape[1], CHUNK) + 6
        return product, torch.outer(gamma(terms) * size, self.mean_lengths)

    @cached_property
    def mean_lengths(self) -> Tensor:
        """Root mean square of every feature, at least that of `columns`: (features,)."""
        return self.columns / self.count**0.5

    @cached_property
    def target_length(self) -> float:
        """``|y| / sqrt(rows)``."""
        return float(torch.linalg.vector_norm(self.y.to(self.X.dtype))) / self.count**0.5

    @cached_property
    def mean_squares(self) -> Tensor:
        """Mean square of every feature: (features,)."""
        return self.squares.mean(1)

    @cached_property
    def gram_top(self) -> float:
        """Upper bound of the largest eigenvalue of `gram`."""
        return self._top(torch.ones_like(self.columns))

    def scaled_gram_top(self, half: Tensor) -> float:
        """Return an upper bound of the top eigenvalue of ``diag(half) gram diag(half)``, for half > 0, (features,).

        Factors that differ little are taken out of the product, for `gram_top` is there already: that costs at most a
        factor 2 of the bound, and 100 above 300 features. The result depends on nothing that was asked before.
        """
        largest = float(half.max())
        spread = 2.0 if len(half) <= REFACTORED else 100.0
        if largest**2 <= spread * float(half.min()) ** 2:
            return self.gram_top * largest**2 * (1 + 8 * UNIT)
        return self._top(half)

    def _top(self, half: Tensor) -> float:
        matrix = half[:, None] * self.gram * half
        rounding = gamma(chunk_roundings(self.count) + 8) * float(matrix.diagonal().sum())
        return top_eigenvalue(matrix) + rounding

    def weighted_squares(self, inverse: Tensor) -> Tensor:
        """Return ``sum_j inverse_cj a_ij^2`` for every row of `inverse` (k, features): shape (k, rows)."""
        if bool((inverse == inverse[:, :1]).all()):
            return inverse[:, :1] * self.square_lengths
        if bool((inverse == inverse[:1]).all()):
            return (inverse[:1] @ self.squares).expand(len(inverse), -1)
        return inverse @ self.squares


@dataclass(frozen=True)
class LossConstants:
    """Constants of a loss as a function of its prediction, proved for every prediction.

    Attributes:
        curvature: largest eigenvalue of ``loss''``.
        concordance: the least M with ``|loss'''[v, v, d]| <= M range(d) loss''[v, v]``; 0 for a quadratic loss.
        third: Lipschitz constant of ``loss''``: ``|(loss''(z) - loss''(z')) v| <= third range(v) range(z - z')``.
        slope: Lipschitz constant of ``loss'``, from the range of ``z - z'`` to the dual norm of the difference.

    For one prediction a row, range and dual norm are the absolute value. For several they are ``max - min`` and half
    the 1-norm: such losses do not see a number added to all predictions.
    """

    curvature: float
    concordance: float
    third: float
    slope: float


class LossDerivatives(Protocol):
    """The derivatives of a loss by its prediction, as the error bounds use them."""

    def slope(self, z: Tensor, y: Tensor) -> Tensor:
        """Return ``loss'`` at predictions z and targets y."""

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        """Return what `hessian_product` needs."""

    def hessian_product(self, curvature: Tensor, dz: Tensor) -> Tensor:
        """Return ``loss'' dz``."""

    def curvature_norm(self, z: Tensor, y: Tensor) -> Tensor:
        """Return, for every row, the norm of ``loss''`` from range to dual norm, or a number above it."""


@dataclass(frozen=True)
class Tuned:
    """How inner coefficients depend on the hyperparameters, at one value of these.

    Attributes:
        penalty: ``pen_j >= 0``, shaped as params.
        penalty_slope: ``d pen_j / d u_k`` with k the owner of weight j, shaped as params.
        penalty_owner: index k into the flattened hyperparameters, shaped as params.
        weights: ``omega_i >= 0``, of shape (rows,).
        size: number of hyperparameters.
        weight_slope: ``d omega_i / d u_k`` with k the owner of row i; None where the weights are not tuned.
        weight_owner: that k, of shape (rows,).
    """

    penalty: Tensor
    penalty_slope: Tensor
    penalty_owner: Tensor
    weights: Tensor
    size: int
    weight_slope: Tensor | None = None
    weight_owner: Tensor | None = None


@dataclass(frozen=True)
class Certifiable:
    """A penalised linear model, as the error bounds see it; `tuned` gives coefficients of hyperparameters in float64.

    Each validation row has the weight ``1 / rows`` in the outer loss. Predictions have the shape (rows,) for weights of
    shape (features,), and (classes, rows) for (classes, features).
    """

    train: Rows
    val: Rows
    loss: LossDerivatives
    constants: LossConstants
    tuned: Callable[[Tree], Tuned]
