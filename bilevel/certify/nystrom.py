"""The Nystrom metric: penalties plus a low-rank matrix below the data part of the Hessian, from a few products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel.certify.instance import Instance
from bilevel.certify.metrics import Metric, relative_curvature, transport
from bilevel.numerics.low_rank import gaussian_basis, low_rank
from bilevel.oracles.error_model import UNIT, gamma

SEED = 0xCE27


@dataclass(frozen=True)
class Sketch:
    """A low-rank matrix ``U diag(l) U'`` below the data part of the Hessian at predictions z, up to `slack`.

    It does not depend on the penalties: one sketch serves a whole outer loop. U is orthonormal, (size, rank), l are the
    `values`; ``U diag(l) U' - slack I`` is below, whatever the rounding of the products, for the given row weights.
    """

    U: Tensor
    values: Tensor
    slack: float
    z: Tensor
    weights: Tensor


def sketch(instance: Instance, z: Tensor, rank: int) -> Sketch:
    """Return the Nystrom approximation of the data part of the Hessian from `rank` products with Gaussian vectors.

    With orthonormal Omega and ``Y = (A + nu I) Omega``, the Schur complement makes ``Y (Omega' Y)^-1 Y' <= A + nu I``
    (Tropp, Yurtsever, Udell & Cevher 2017 for the form with the shift nu).
    """
    size = instance.penalty.numel()
    rank = min(rank, size)
    omega = gaussian_basis(size, rank, SEED, z)
    columns = [instance.product(z, column.reshape(instance.shape)).reshape(-1) for column in omega.t()]
    Y = torch.stack(columns, 1) - instance.penalty.reshape(-1, 1) * omega
    # The products' rounding, and that of adding the penalties and taking them off again, is part of the shift.
    train = instance.model.train
    largest = instance.constants.curvature * float((instance.tuned.weights * train.square_lengths).sum())
    rounded = gamma(train.count + instance.features + 32) * largest + 4 * UNIT * float(instance.penalty.max())
    nu = max(3 * rounded * rank**0.5, 20 * UNIT * size**0.5 * float(torch.linalg.matrix_norm(Y)))
    result = low_rank(omega, Y + nu * omega, nu)
    if result is None:
        return Sketch(omega[:, :0], omega.new_zeros(0), 0.0, z, instance.tuned.weights)
    return Sketch(*result, 4 * nu, z, instance.tuned.weights)


class Nystrom(Metric):
    """Penalties plus a low-rank approximation of the data part, transported from where its sketch was made.

    Args:
        instance: the problem; every weight penalised.
        sketch: the low-rank part, of this problem at any point and penalties.
        z: training predictions of the point at which the metric is used.
    """

    def __init__(self, instance: Instance, sketch: Sketch, z: Tensor) -> None:
        self.sketch = sketch
        shrink = math.exp(-transport(instance, sketch.z, z)) * _least_ratio(instance.tuned.weights, sketch.weights)
        super().__init__(instance, (1.0 + sketch.slack / instance.least_penalty) ** 0.5)
        self._scale = instance.penalty.reshape(-1).rsqrt()
        scaled = self._scale[:, None] * sketch.U * (shrink * sketch.values).sqrt()
        self._V, singular, _ = torch.linalg.svd(scaled, full_matrices=False)
        self._damp = (1.0 + singular.square()).rsqrt() - 1.0

    def half(self, v: Tensor) -> Tensor:
        """Return ``(I + V diag(damp) V') pen^(-1/2) v``, whose norm is that of ``M^-1``."""
        return self.half_columns(v.reshape(-1, 1)).reshape(v.shape)

    def half_columns(self, columns: Tensor) -> Tensor:
        """Apply `half` to every column of a matrix of shape (size, k)."""
        scaled = self._scale[:, None] * columns
        return scaled + self._V @ (self._damp[:, None] * (self._V.t() @ scaled))

    def half_transposed(self, v: Tensor) -> Tensor:
        flat = v.reshape(-1)
        return (self._scale * (flat + self._V @ (self._damp * (self._V.t() @ flat)))).reshape(v.shape)

    @cached_property
    def outer_curvature(self) -> float:
        """Largest eigenvalue of the outer Hessian at any point, relative to H: an upper bound."""
        return min(super().outer_curvature, self.stretch**2 * relative_curvature(self.instance, self.half_columns))

    def groups(self, weights: Tensor) -> Tensor | None:
        """Return the norm of the one group; of several the norms in the inverse penalties serve."""
        return weights.new_tensor([self.own_norm(weights)]) if self.instance.tuned.size == 1 else None


def _least_ratio(weights: Tensor, before: Tensor) -> float:
    """Return the smallest quotient of row weights; data parts of Hessians are at least in that proportion."""
    if weights is before:
        return 1.0
    return float(torch.where(before > 0, weights / before, torch.ones_like(weights)).min())
