"""The directions of stochastic steps for linear models: rows in fixed batches, and [w v] as one matrix.

    P = [w; v] X_i',    g = c loss'(P_w) X_i,    H v = c (loss''(P_w) P_v) X_i,    f_w = loss'(X_j w) X_j / m

Both losses take their responses at once. Rows are shuffled once, so that a batch is a view; what is missing in the last
one are rows of zeros. The sums over a batch are scaled so that their mean over the batches is the sum over all rows.
The penalty needs no rows: its steps are implicit, ``z / (1 + rate pen)``, and ``C' v = (d pen/du) w v``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.numerics.lanczos import Spectrum
from bilevel.oracles.directions import Array, Directions
from bilevel.oracles.samplers import ORDER, keyed_generator
from bilevel.problems.glm_loss import GLMLoss
from bilevel.problems.splits import Split

DENSE, ROWS = 500, 4096
"""The most features, and the rows, of which the smallest curvature is measured."""


class Batches:
    """The rows of a split in batches of one size, shuffled once; see above.

    Args:
        split: X feature-major, (features, rows), and encoded targets.
        glm: the loss.
        outputs: predictions for each row, None for one.
        size: rows in a batch.
        seed: of the order.
        scale: of the sum of the losses over all rows.
    """

    def __init__(self, split: Split, glm: Any, outputs: int | None, size: int, seed: int, scale: float) -> None:
        device, rows = split.X.device, split.rows
        self.count = math.ceil(rows / size)
        self.share, self.scale = 1.0 / self.count, scale * self.count
        order = torch.randperm(rows, generator=keyed_generator(seed, ORDER)).to(device)
        X, y = split.X.t()[order], split.y[order]
        missing = self.count * size - rows
        X = torch.cat([X, X.new_zeros(missing, X.shape[1])])
        y = torch.cat([y, y[:1].expand(missing)])
        response = glm.response(y, outputs)
        self.apply = None if response is None else response.apply
        self.curvature = None if response is None else response.curvature
        if response is not None and response.sign is not None:
            X = X * response.sign[:, None].to(X)
        target = y if response is None else response.target if response.target is None else response.target.to(X)
        self.X = [each.contiguous() for each in torch.split(X, size)]
        self.targets = [None] * self.count if target is None else list(torch.split(target, size, -1))


class RowDirections(Directions):
    """The directions of a `LinearModelProblem`, by arrays on the host; `RowSteps` has those of large batches.

    Args:
        problem: the problem, no batch, whose oracles are those of its class.
        size: rows in a batch.
        seed: of the order of the rows.
    """

    host, form = True, "closed form on the host"

    def __init__(self, problem: Any, size: int, seed: int) -> None:
        self.problem, self.glm = problem, problem.glm
        self._shape, self._group = tuple(problem.params.shape), problem._group_shape
        self.size, self._features = problem.params.numel(), self._shape[-1]
        size = min(size, max(problem.train.rows, problem.val.rows))
        self.inner = Batches(problem.train, self.glm, problem.outputs, size, seed, problem.scale)
        self.outer = Batches(problem.val, self.glm, problem.outputs, size, seed + 1, 1.0 / problem.val.rows)
        self.parts, self.shares = (self.inner.count, self.outer.count), (self.inner.share, self.outer.share)
        self._logarithm = problem.parametrization == "log"
        pairs = enumerate(zip(self._group, self._shape, strict=True))
        self._shared = tuple(axis for axis, (group, full) in pairs if group < full)
        self._alone = problem.penalty == "scalar"
        self._plain = type(self.glm).hessian_product is GLMLoss.hessian_product

        self._lay_out(size)

    def _lay_out(self, size: int) -> None:
        """Make room for predictions on the outer batch, those on the inner one, and products with v there."""
        places = self.problem.train.X.new_empty(3, *self._shape[:-1], size)
        self._slopes, self._others = places[:2], places.unbind(0)
        self._flat = [each.view(-1, size).numpy() for each in (places[0], places[1:])]
        self._data = [[(each.numpy(), each.numpy().T) for each in side.X] for side in (self.inner, self.outer)]

    def array(self, flat: Tensor) -> Array:
        return flat.detach().clone().numpy()

    def tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(np.array(array))

    def sampled(self, i: int, j: int, z: Array, u: Array) -> tuple[Array, Array]:
        (A, columns), (B, others) = self._data[0][i], self._data[1][j]
        outside, inside = self._flat
        np.dot(z.reshape(-1, self._features), columns, out=inside)
        np.dot(z[: self.size].reshape(-1, self._features), others, out=outside)
        self._respond(self._slopes, self._others, (self.inner.targets[i], self.outer.targets[j]))
        q = np.dot(inside, A).reshape(-1)
        f = np.dot(outside, B).reshape(-1)
        q *= self.inner.scale
        f *= self.outer.scale
        return q, f

    def _respond(self, both: Tensor, parts: Any, targets: Sequence[Any]) -> None:
        """Turn predictions into slopes, and products with v into those of the curvature.

        Args:
            both: all predictions, a view.
            parts: those on the outer batch, those on the inner one, and products with v there.
            targets: of the inner and of the outer batch.
        """
        (outside, inside, turned), (target, outer_target) = parts, targets
        glm, inner = self.glm, self.inner
        if inner.apply is None or inner.curvature is None:
            slope = glm.slope(inside, target)
            turned.copy_(glm.hessian_product(glm.curvature(inside, target), turned))
            inside.copy_(slope)
            outside.copy_(glm.slope(outside, outer_target))
            return
        inner.apply(both)
        curvature = inner.curvature(inside)
        if self._plain:
            turned.mul_(curvature)
        else:
            turned.copy_(glm.hessian_product(curvature, turned))
        if target is not None:
            inside.sub_(target)
            outside.sub_(outer_target)

    def complete(self, direction: Array, z: Array, u: Array) -> tuple[Array, Array, Array]:
        penalty = self._penalty(u)
        if self._alone:  # all weights together, as they lie
            moved = z[: self.size] @ z[self.size :]
            return direction, (moved * penalty if self._logarithm else moved).reshape(-1), penalty.reshape(-1)
        w, v = z.reshape(2, *self._shape)
        moved = w * v
        if self._logarithm:
            moved *= penalty
        if self._shared:
            moved = moved.sum(self._shared)
        return direction, moved.reshape(-1), penalty

    def shrunk(self, z: Array, rate: float, penalty: Array) -> Array:
        if self._alone:
            return z / (1.0 + rate * penalty)
        return (z.reshape(2, *self._shape) / (1.0 + rate * penalty)).reshape(-1)

    def preconditioner(self, u: Array) -> tuple[Array, float] | None:
        scale = self.problem.scale * self.glm.max_curvature * self.problem.train.rows
        X, gram = self._sample
        if not self.host or self.problem.outputs is not None or gram is None or not 0.0 < scale < math.inf:
            return None
        # Where features are the same, or zero, and nothing is penalised, P would raise rounding to steps.
        least = float(gram.trace()) * scale / len(X) / self._features * np.finfo(u.dtype).eps ** 0.5
        penalty = np.broadcast_to(np.maximum(self._penalty(u), least or 1.0), self._features)
        P = np.linalg.inv(scale / len(X) * gram + np.diag(penalty))
        alone = scale * float(((X @ P) * X).sum(-1).max())
        size = self.inner.X[0].shape[0]
        return P.astype(u.dtype), 1.0 if self.inner.count == 1 else 1.0 - 1.0 / size + alone / size

    def turned(self, direction: Array, z: Array, penalty: Array, P: Array) -> Array:
        turned: Array = (direction.reshape(2, -1) + penalty * z.reshape(2, -1)) @ P
        return turned.reshape(-1)

    @cached_property
    def _sample(self) -> tuple[Array, Array | None]:
        """Some rows in their shuffled order, in float64, and the products of their columns where these are few."""
        rows, size = min(ROWS, self.problem.train.rows), self.inner.X[0].shape[0]
        X = torch.cat(self.inner.X[: math.ceil(rows / size)])[:rows].double()
        gram = X.t() @ X if self._features <= min(DENSE, rows) else None
        return (X.numpy(), None if gram is None else gram.numpy()) if self.host else (X, gram)

    def _penalty(self, u: Array) -> Array:
        return np.exp(u.reshape(self._group)) if self._logarithm else u.reshape(self._group)

    def curvature(self, z: Array, u: Array, step: int | None = None) -> Spectrum:
        problem, size = self.problem, self.inner.X[0].shape[0]
        scale = problem.scale * self.glm.max_curvature
        together: float = scale * problem.gram_norm
        if self.inner.count == 1:
            return Spectrum(self._smallest, together)
        alone = scale * problem.train.rows * float(problem.train.X.square().sum(0).max())
        return Spectrum(self._smallest, (1.0 - 1.0 / size) * together + alone / size)

    def least(self, penalty: Array, measured: float) -> Array | None:
        return self._smallest + (penalty if self._alone else penalty.min())

    @cached_property
    def _smallest(self) -> float:
        """The smallest curvature of the data where all predictions are zero, from some of the rows."""
        X, gram = self._sample
        if gram is None:
            return 0.0
        at_zero = self.glm.typical_curvature(self.problem.train.y, self.problem.outputs)
        smallest = float(torch.linalg.eigvalsh(torch.as_tensor(gram))[0]) * self.problem.train.rows / len(X)
        return max(0.0, self.problem.scale * at_zero * smallest)
