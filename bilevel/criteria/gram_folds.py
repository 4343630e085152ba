"""K-fold of ridge regression from the Gram matrices of the folds: an evaluation does not sweep the rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria.criterion import Array, Criterion, Evaluation, Fit, shared
from bilevel.criteria.data import LinearData, Rows
from bilevel.criteria.penalties import Penalties
from bilevel.criteria.splits import checked_folds, restricted
from bilevel.numerics.small import factor, is_regular
from bilevel.problems.losses import Squared


class _Grams(NamedTuple):
    """Centred moments of K folds: those of training by their own means, those of validation by these means, too."""

    train: Tensor  # (K, features, features)
    cross: Tensor  # (K, features, targets)
    held: Tensor
    held_cross: Tensor
    mean: Tensor  # (K, features)
    target: Tensor  # means of the targets, (K, targets)
    variance: Tensor  # of the training columns, (K, features); one where these are constant


class RidgeFolds(Criterion):
    """The mean squared error (halved) of ridge regression on held-out folds, from the Gram matrices of the folds.

    For every fold, with G and c the training rows' ``X'SX`` and ``X'Sy`` about their own means, and Gv, cv those of the
    validation rows about the same means,

        w = (G + A)^-1 c,    loss = 1/2 (yy - 2 cv'w + w'Gv w),    dloss/du = -a w (G + A)^-1 (Gv w - cv)

    and the Gauss-Newton matrix is ``D'Gv D`` with ``D = (G + A)^-1 diag(a w)``. A fold standardises columns by its own
    training rows: its penalties are a times their variances. Made for many more rows than features.

    Args:
        data: the rows; y may hold several targets, of which the loss is the mean.
        penalties: which coefficients share a penalty.
        folds: pairs (training rows, validation rows), such as ``KFold(5).split(X)`` of scikit-learn.

    >>> data = LinearData.of([[0.0], [1.0], [2.0], [3.0]], [0.0, 1.0, 2.0, 3.0])
    >>> criterion = RidgeFolds(data, Penalties.scalar(1), [([0, 3], [1, 2]), ([1, 2], [0, 3])])
    >>> round(criterion.evaluate(np.array([-20.0])).value, 4)
    0.0
    """

    name = "held-out folds"

    def __init__(self, data: LinearData, penalties: Penalties, folds: Iterable[Any]) -> None:
        super().__init__(data, Squared(), penalties)
        self.folds = checked_folds(folds, data, self.loss)
        self.y = data.y.reshape(-1, data.rows)

    def compute(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        grams, penalties, outputs = self._grams, self.penalties, len(self.y)
        a = penalties.spread(u).exp().to(self.y).expand(outputs, -1)
        shared = penalties.outputs is None or bool((a == a[:1]).all())
        scaled = a[:, None] * grams.variance  # (targets, K, features)
        factors = [factor(grams.train.clone(), each) for each in (scaled[:1] if shared else scaled)]
        w, gradients = torch.zeros_like(scaled), torch.zeros_like(a)
        gauss_newton = np.zeros((penalties.size, penalties.size))
        for t in range(outputs):
            L = factors[0 if shared else t]
            w[t] = torch.cholesky_solve(grams.cross[..., t, None], L)[..., 0]
            residual = torch.einsum("kij,kj->ki", grams.held, w[t]) - grams.held_cross[..., t]
            moved = scaled[t] * w[t]
            gradients[t] = -(moved * torch.cholesky_solve(residual[..., None], L)[..., 0]).sum(0)
            if second:
                D = torch.cholesky_solve(self._by_penalty(moved, t), L)
                model = torch.einsum("kim,kij,kjn->mn", D, grams.held, D)
                gauss_newton += model.double().cpu().numpy() / outputs
        total = gradients.sum(0) if penalties.outputs is None else gradients
        gradient = penalties.gather(total).double().cpu().numpy() / outputs
        found = self._answer(w, gradient, gauss_newton if second else None)
        return found if all(is_regular(each, grams.train) for each in factors) else replace(found, value=np.inf)

    def refit(self, u: Array, warm: Any = None) -> Fit:
        data, mean = self.data, self._centre
        gram, cross = data.gram(data.weights), data.collect((self.y - mean) * data.weights)
        a = self.penalties.spread(u).exp().to(self.y).expand(len(self.y), -1)
        pairs = zip(cross, a, strict=True)
        w = torch.stack([torch.cholesky_solve(c[:, None], factor(gram.clone(), at))[:, 0] for c, at in pairs])
        return self.given(w[0], mean[0, 0]) if data.y.dim() == 1 else self.given(w, mean[:, 0])

    def fits(self, evaluation: Evaluation) -> list[tuple[Fit, Tensor]]:
        intercepts = self._intercepts(evaluation.warm)
        pairs = zip(evaluation.warm.transpose(0, 1), intercepts.T, self.folds, strict=True)
        single = self.data.y.dim() == 1
        return [(self.given(w[0], b[0]) if single else self.given(w, b), held) for w, b, (_, held) in pairs]

    def take(self, rows: Rows) -> Self:
        return type(self)(self.data.take(rows), self.penalties, restricted(self.folds, rows, self.data.rows))

    @shared
    def _grams(self) -> _Grams:
        """The moments of every fold; where training is all but validation, by differences from those of all rows."""
        whole, parts = self._moments(torch.arange(self.data.rows)), []
        for train, held in self.folds:
            validation = self._moments(held)
            rest = len(train) + len(held) == self.data.rows
            parts.append((whole - validation if rest else self._moments(train), validation))
        train, held = (torch.stack(side) for side in zip(*parts, strict=True))
        features = self.data.features
        total = train[:, features, features, None]
        means = train[:, features] / total
        if not self.data.intercept:
            means = torch.zeros_like(means)
        train, held = (_centred(each, means, features) for each in (train, held))
        share = 1.0 / self.data.weights[self.held_out].sum()
        variance = (train.diagonal(dim1=1, dim2=2)[:, :features] / total).clamp_min(0.0)
        size = whole.diagonal()[:features] / self.data.rows
        variance = variance.masked_fill(variance <= 1e-14 * size, 1.0)
        if not self.data.standardize:
            variance = torch.ones_like(variance)
        coefficients, targets = slice(0, features), slice(features + 1, None)
        return _Grams(
            train[:, coefficients, coefficients],
            train[:, coefficients, targets],
            held[:, coefficients, coefficients] * share,
            held[:, coefficients, targets] * share,
            means[:, :features],
            means[:, features + 1 :],
            variance,
        )

    @shared
    def _centre(self) -> Tensor:
        """The mean targets of all rows, (targets, 1): moments about them lose no digits."""
        means = (self.y * self.data.weights).mean(1, keepdim=True)
        return means if self.data.intercept else torch.zeros_like(means)

    def _moments(self, rows: Tensor) -> Tensor:
        """Return ``Z'SZ`` of some rows of ``Z = (X, 1, y)``."""
        data = self.data
        s, y = data.weights[rows], (self.y - self._centre)[:, rows]
        sides = torch.cat([torch.ones_like(y[:1]), y])
        if data.sparse:
            full = sides.new_zeros(len(sides), data.rows).index_copy_(1, rows, sides * s)
            gram, cross = data.gram(full[0]), data.collect(full)
        else:
            X = data.X[rows]
            gram, cross = (X.T * s) @ X, (sides * s) @ X
        return torch.cat([torch.cat([gram, cross.T], 1), torch.cat([cross, (sides * s) @ sides.T], 1)])

    def _by_penalty(self, moved: Tensor, target: int) -> Tensor:
        """Return ``a w`` in a column for each penalty, (K, features, k)."""
        penalties = self.penalties
        owner = penalties.owner if penalties.outputs is None else penalties.owner[target]
        columns = moved.new_zeros(len(moved), self.data.features, penalties.size)
        columns[:, torch.arange(len(owner)), owner] = moved
        return columns

    def _intercepts(self, w: Tensor) -> Tensor:
        """Return those of the standardised coefficients of every fold, (targets, K)."""
        return self._centre + self._grams.target.T - (w * self._grams.mean).sum(2)

    def _answer(self, w: Tensor, gradient: Array, gauss_newton: Array | None) -> Evaluation:
        data, intercepts, outputs = self.data, self._intercepts(w), len(self.y)
        parts = [self.data.product(w[:, k], held) + intercepts[:, k, None] for k, (_, held) in enumerate(self.folds)]
        predictions, y = torch.cat(parts, 1), self.y[:, self.held_out]
        weight = self.share / outputs
        slopes = weight * (predictions - y)
        losses = (0.5 * (predictions - y) * slopes).sum(0).double().cpu().numpy()
        shaped = (predictions, slopes, weight.expand(slopes.shape))
        if data.y.dim() == 1:
            shaped = (predictions[0], slopes[0], weight)
        return Evaluation(float(losses.mean()), gradient, gauss_newton, losses, *shaped, None, w)


def _centred(moments: Tensor, means: Tensor, one: int) -> Tensor:
    """Return ``sum s (z - m)(z - m)'`` from ``sum s z z'``, whose entry (one, one) is ``sum s``."""
    cross = torch.einsum("ki,kj->kij", means, moments[:, one])
    square = torch.einsum("ki,kj->kij", means, means) * moments[:, one, one, None, None]
    return moments - cross - cross.transpose(1, 2) + square
