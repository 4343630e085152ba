"""Metrics: matrices M below the inner Hessian, in whose inverse norm residuals are measured.

Every bound uses a metric through ``|v|_{M^-1} >= |v|_{H^-1}`` alone, so any symmetric ``0 < M <= H(x)`` keeps it a
bound; the closer to H, the sharper. `Diagonal` (the penalties) is free; `Nystrom` adds a low-rank approximation of the
data part from a few Hessian-vector products; `Cholesky` is H itself.

A metric made at x0 serves at x as well: the data part of the Hessian changes by at most the factor ``exp(t)``, with t
the largest range of ``(x - x0)' a_i`` (self-concordance), so ``exp(-t) M(x0) <= H(x)``. This is called transport.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from bilevel.certify.instance import Instance
from bilevel.numerics.conjugate_gradients import conjugate_gradients
from bilevel.numerics.dense import BOUNDED
from bilevel.oracles.error_model import UNIT, gamma, top_eigenvalue


class Metric(ABC):
    """A matrix M below the Hessian of an instance at one point, and a preconditioner for it.

    `stretch` bounds ``|v|_{H^-1} / |v|_{M^-1}``, which transport makes larger than one.
    """

    def __init__(self, instance: Instance, stretch: float = 1.0) -> None:
        self.instance = instance
        self.stretch = stretch

    plain = False
    """Whether it says nothing that the penalties alone do not say."""

    @abstractmethod
    def half(self, v: Tensor) -> Tensor:
        """Return ``P v`` with ``P' P`` the inverse of the preconditioner."""

    @abstractmethod
    def half_transposed(self, v: Tensor) -> Tensor:
        """Return ``P' v``."""

    def norm(self, v: Tensor) -> float:
        """Return an upper bound of ``|v|_{H^-1}`` for v shaped as params."""
        return min(self.own_norm(v), *self.instance.penalty_norms([v]))

    def own_norm(self, v: Tensor) -> float:
        """Return what the metric says of ``|v|_{H^-1}`` beyond the penalties; infinite for nothing."""
        return self.stretch * float(torch.linalg.vector_norm(self.half(v)))

    def own_rounding_norm(self, v: Tensor) -> float:
        """Return what it says of ``|d|_{H^-1}`` for all d with ``|d| <= v`` elementwise; infinite for nothing."""
        return math.inf

    @cached_property
    def row_lengths(self) -> Tensor:
        """How far ``|e|_H <= 1`` can move the range of every training row's predictions: an upper bound."""
        return self.instance.row_lengths

    @cached_property
    def outer_curvature(self) -> float:
        """Largest eigenvalue of the outer Hessian at any point, relative to H: an upper bound."""
        return self.instance.outer_curvature

    def groups(self, weights: Tensor) -> Tensor | None:
        """Return what it says of ``|weights_k|_{H^-1}``, the part of hyperparameter k; None for nothing."""
        return None

    @property
    def inverse_size(self) -> float:
        """Largest eigenvalue of ``H^-1``: an upper bound."""
        least = self.instance.least_penalty
        return 1.0 / least if least > 0 else math.inf

    def solve(self, z: Tensor, b: Tensor, reduction: float, max_steps: int) -> Tensor:
        """Return an approximate ``H^-1 b`` at predictions z by preconditioned conjugate gradients.

        `reduction` is that of the residual, in the norm of the preconditioner's inverse.
        """
        shape = b.shape

        def matvec(v: Tensor) -> Tensor:
            product = self.instance.product(z, self.half_transposed(v.reshape(shape)))
            return self.half(product).reshape(-1)

        right = self.half(b).reshape(-1)
        goal = reduction**2 * float(torch.dot(right, right))
        run = conjugate_gradients(
            matvec, torch.zeros_like(right), right, lambda run: run.rr <= goal or run.steps >= max_steps
        )
        return self.half_transposed(run.x.reshape(shape))


class Diagonal(Metric):
    """The penalties: free; preconditions by a bound of the Hessian's diagonal."""

    plain = True

    @cached_property
    def _half(self) -> Tensor:
        most = self.instance.constants.curvature * float(self.instance.tuned.weights.max())
        return (self.instance.penalty + most * self.instance.model.train.columns.square()).rsqrt()

    def half(self, v: Tensor) -> Tensor:
        return self._half * v

    half_transposed = half

    def own_norm(self, v: Tensor) -> float:
        return math.inf


class Cholesky(Metric):
    """The Hessian itself, factored: the sharpest metric, and the only one that serves unpenalised weights.

    `z` are the training predictions of the point where it is made.
    """

    def __init__(self, instance: Instance, z: Tensor) -> None:
        size = instance.penalty.numel()
        hessian = _dense(instance, z)
        factor, info = torch.linalg.cholesky_ex(hessian)
        eye = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
        self._inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
        self._inverse_trace = float(self._inverse.square().sum())
        # Backward errors of forming and factoring H (Higham, chapters 3 and 10), relative to H.
        terms = 2 * instance.model.train.count + 4 * size + 64
        rounding = terms * UNIT * float(hessian.diagonal().sum())
        if instance.several:
            # Entries p - p^2 of a saturated curvature have an absolute error, not a relative one.
            rounding += terms * UNIT * float((instance.tuned.weights * instance.model.train.square_lengths).sum())
        relative = rounding * self._inverse_trace * 1.01
        usable = not bool(info) and relative < 0.5
        self._inverse_top = top_eigenvalue(self._inverse.t() @ self._inverse) if usable else math.inf
        self.z = z
        super().__init__(instance, (1.0 - relative) ** -0.5 if usable else math.inf)

    def at(self, z: Tensor) -> Cholesky:
        """Return this metric transported to the predictions z."""
        if self.instance.constants.concordance == 0:
            return self
        moved = copy.copy(self)
        factor = math.exp(0.5 * transport(self.instance, self.z, z))
        moved.z, moved.stretch = z, self.stretch * factor
        # The instance's own figures hold at every point; those of the metric stretch with it.
        moved.row_lengths = torch.minimum(self.row_lengths * factor, self.instance.row_lengths)
        moved.outer_curvature = min(self.outer_curvature * factor**2, self.instance.outer_curvature)
        return moved

    def half(self, v: Tensor) -> Tensor:
        return (self._inverse @ v.reshape(-1)).reshape(v.shape)

    def half_transposed(self, v: Tensor) -> Tensor:
        return (self._inverse.t() @ v.reshape(-1)).reshape(v.shape)

    @property
    def inverse_size(self) -> float:
        return min(super().inverse_size, self.stretch**2 * self._inverse_top)

    def own_rounding_norm(self, v: Tensor) -> float:
        return self.stretch * float(torch.linalg.vector_norm(self._inverse.abs() @ v.reshape(-1)))

    @cached_property
    def row_lengths(self) -> Tensor:
        """Row norms in ``M^-1``; of several classes the two largest, added."""
        features = self.instance.features
        blocks = self._inverse.reshape(len(self._inverse), -1, features).transpose(0, 1)
        lengths = torch.stack([torch.linalg.vector_norm(b @ self.instance.model.train.X, dim=0) for b in blocks])
        own = self.stretch * (lengths.topk(2, dim=0).values.sum(0) if len(lengths) > 1 else lengths[0])
        return torch.minimum(own, self.instance.row_lengths)

    @cached_property
    def outer_curvature(self) -> float:
        """Largest eigenvalue of the outer Hessian at any point, relative to H: an upper bound."""
        own = self.stretch**2 * relative_curvature(self.instance, lambda columns: self._inverse @ columns)
        return min(own, self.instance.outer_curvature)

    def groups(self, weights: Tensor) -> Tensor:
        if not bool(weights.any()):
            return weights.new_zeros(self.instance.tuned.size)
        owner = self.instance.owner
        columns = torch.zeros(len(owner), self.instance.tuned.size, dtype=weights.dtype, device=weights.device)
        columns[torch.arange(len(owner), device=owner.device), owner] = weights.reshape(-1)
        return self.stretch * torch.linalg.vector_norm(self._inverse @ columns, dim=0)


def transport(instance: Instance, z0: Tensor, z: Tensor) -> float:
    """Return t such that the data part of the Hessian at z is at least ``exp(-t)`` times that at z0."""
    if instance.constants.concordance == 0:
        return 0.0
    return instance.constants.concordance * float(instance.extent(z - z0).max())


def _dense(instance: Instance, z: Tensor) -> Tensor:
    X, weights = instance.model.train.X, instance.tuned.weights
    if instance.gram_scale is not None:
        return instance.gram_scale * instance.model.train.gram + torch.diag(instance.penalty)
    classes = len(z) if instance.several else 1
    blocks = []
    for c in range(classes):
        direction = torch.zeros_like(z)
        (direction[c] if instance.several else direction).fill_(1.0)
        curved = (weights * instance.hessian_product(z, direction)).reshape(classes, -1)
        blocks.append(torch.cat([(X * row) @ X.t() for row in curved]))
    hessian = torch.cat(blocks, 1)
    hessian = 0.5 * (hessian + hessian.t())
    return hessian + torch.diag(instance.penalty.reshape(-1))


def relative_curvature(instance: Instance, half_columns: Callable[[Tensor], Tensor]) -> float:
    """Bound the largest eigenvalue of ``P (loss'' bound x Gram matrix of the validation rows) P'``."""
    val, size = instance.model.val, instance.penalty.numel()
    if size > BOUNDED:
        return math.inf
    gram = torch.kron(torch.eye(size // instance.features, dtype=val.gram.dtype, device=val.gram.device), val.gram)
    matrix = half_columns(half_columns(gram).t())
    rounding = gamma(val.count + 4 * size) * float(matrix.diagonal().sum()) * size**0.5
    return instance.constants.curvature * (top_eigenvalue(0.5 * (matrix + matrix.t())) + rounding)
