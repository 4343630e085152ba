"""Linear models with an elastic-net penalty, along decreasing penalties: squared loss, or proximal Newton steps."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.criteria.criterion import Array, Fit, given
from bilevel.criteria.data import LinearData
from bilevel.numerics.elastic_net import ROUNDS, GramColumns, solution
from bilevel.numerics.small import block_grams, paired
from bilevel.problems.losses import GLMLoss

WIDE = 2
"""Features for each row from which no Gram matrix is formed, but the columns that the support needs."""
STEPS, TOL = 50, 1e-8
"""Newton steps at most, and the relative decrease of the objective, as foreseen, of the last one: the next would be
about its square."""
FLOOR = 1e-10
"""Second derivatives of losses are at least this, so that every step has a length."""


class NetModels(NamedTuple):
    """Models along a path.

    Attributes:
        fit: in the units of the X that was given: coefficients (m, [outputs,] features), intercepts (m, [outputs]).
        rounds: sweeps of the solver for each, (m,).
        converged: whether none was short of them.
    """

    fit: Fit
    rounds: NDArray[np.intp]
    converged: bool


class _Quadratic(NamedTuple):
    """``1/2 w'Gw - c'w``, with ``b = intercept - lines w``, and the slopes of the loss by the predictions.

    w is flat, (outputs features,), b of shape (outputs,), and lines has a row for each of these.
    """

    gram: Array | GramColumns
    moment: Array
    lines: Array
    intercept: Array
    slopes: Tensor


class Net:
    """Models of some rows with an elastic-net penalty, ``mean_i s_i loss(x_i'w + b, y_i) + penalty(w)``.

        penalty(w) = alpha sum_j f_j (r |w_j| + (1 - r)/2 w_j^2)

    with r the l1_ratio and f the factors, of standardised columns: alpha and r are those of scikit-learn. The loss is
    replaced by its second-order model at the last w, in which the intercept is eliminated; that is solved exactly, and
    a line search takes the step (Lee, Sun and Saunders 2014). Squared loss is its own model. Several classes have
    coefficients and an intercept each, with one model of all.

    Args:
        data: the rows.
        loss: of a row's prediction, or of its predictions for every class.
        positive: whether w >= 0.
        rounds: of the solver, at most.
        outputs: how many classes; None for one prediction.
    """

    def __init__(
        self,
        data: LinearData,
        loss: GLMLoss,
        positive: bool = False,
        rounds: int = ROUNDS,
        outputs: int | None = None,
    ) -> None:
        self.data, self.loss, self.positive, self.rounds = data, loss, positive, rounds
        self._leading = () if outputs is None else (outputs,)

    def largest(self, factors: Array | None = None) -> float:
        """Return the least alpha at which all coefficients are zero with l1_ratio 1; 0 where they are without any."""
        zero, intercepts = self._zeros()
        with np.errstate(invalid="ignore"):
            w, b, *_ = self._solve(np.full_like(zero, np.inf), zero, zero, intercepts)
        slopes = -_array(self.data.collect(self._slopes(self._predictions(w, b))))
        size = (slopes if self.positive else np.abs(slopes)) / (1.0 if factors is None else factors)
        return float(size.max(initial=0.0))

    def path(self, alphas: Array, l1_ratio: float = 1.0, factors: Array | None = None) -> NetModels:
        """Return the models at decreasing alphas, (m,), each from the one before it.

        Args:
            alphas: weights of the penalty.
            l1_ratio: r, from 0 to 1.
            factors: f, shaped as w, ([outputs,] features); None for ones.
        """
        w, b = self._zeros()
        factors = np.ones(w.size) if factors is None else factors.ravel()
        found, intercepts = np.empty((len(alphas), w.size)), np.empty((len(alphas), b.size))
        rounds, converged = np.ones(len(alphas), dtype=np.intp), True
        for index, alpha in enumerate(alphas):
            l1, l2 = l1_ratio * alpha * factors, (1.0 - l1_ratio) * alpha * factors
            w, b, rounds[index], fine = self._solve(l1, l2, w, b)
            found[index], intercepts[index] = w, b
            converged = converged and fine
        like, leading = self.data.scale, (len(alphas), *self._leading)
        coef = torch.from_numpy(found).to(like).reshape(*leading, -1)
        return NetModels(
            given(self.data, coef, torch.from_numpy(intercepts).to(like).reshape(leading)), rounds, converged
        )

    def dual_gap(self, fit: Fit, alpha: float, l1_ratio: float) -> float:
        """Return how far the objective of squared loss is above its least value at most, by a point of its dual.

        Args:
            fit: the model, in the units of the X that was given.
            alpha: its penalty, with factors one.
            l1_ratio: r.
        """
        data, l1, l2 = self.data, alpha * l1_ratio, alpha * (1.0 - l1_ratio)
        w = (fit.coef * data.scale).double()
        y = data.y - (data.y * data.weights).mean() if data.intercept else data.y
        residual, share = y - data.product(w), data.weights / data.rows
        correlation = data.collect(residual * share) - l2 * w
        largest = float((correlation if self.positive else correlation.abs()).max())
        shrink = l1 / largest if largest > l1 else 1.0
        squares, size = float(share @ residual.square()), float(w.abs().sum())
        gap = 0.5 * (1.0 + shrink**2) * (squares + l2 * float(w @ w)) + l1 * size
        return gap - shrink * float(share @ (residual * y))

    def _zeros(self) -> tuple[Array, Array]:
        """Return flat coefficients, and intercepts."""
        count = self._leading[0] if self._leading else 1
        return np.zeros(count * self.data.features), np.zeros(count)

    def _solve(self, l1: Array, l2: Array, w: Array, b: Array) -> tuple[Array, Array, int, bool]:
        """Return flat coefficients of standardised columns, intercepts, rounds, and whether it converged."""
        if self.loss.quadratic:
            model = self._squared
            found = solution(model.gram, model.moment, l1, l2, w, self.positive, self.rounds)
            return found.w, model.intercept - model.lines @ found.w, found.rounds, found.converged
        rounds, z = 0, self._predictions(w, b)
        value = self._loss(z) + _penalty(w, l1, l2)
        for _ in range(STEPS):
            model = self._model(z, w, b)
            found = solution(model.gram, model.moment, l1, l2, w, self.positive, self.rounds)
            rounds += found.rounds
            new = found.w, model.intercept - model.lines @ found.w
            step = self._predictions(*new) - z
            foreseen = float(model.slopes.flatten() @ step.flatten()) + _penalty(new[0], l1, l2) - _penalty(w, l1, l2)
            length = 1.0
            while length > 1e-8:
                there = w + length * (new[0] - w)
                reached = self._loss(z + length * step) + _penalty(there, l1, l2)
                if reached <= value + 1e-4 * length * foreseen:
                    break
                length *= 0.5
            else:
                return w, b, max(rounds, 1), found.converged
            w, b, z = there, b + length * (new[1] - b), z + length * step
            little, value = -foreseen <= TOL * abs(value), reached
            if little:
                return w, b, rounds, found.converged
        return w, b, rounds, False

    @cached_property
    def _squared(self) -> _Quadratic:
        w, b = self._zeros()
        return self._model(self._predictions(w, b), w, b)

    def _model(self, z: Tensor, w: Array, b: Array) -> _Quadratic:
        """Return the second-order model of the mean loss at predictions z, as a function of w."""
        data, count, slopes, d = self.data, len(b), self._slopes(z), self._curvatures(z)
        gradient = _array(data.collect(slopes)).ravel()
        cross: Array = np.zeros((count, w.size))
        lines, intercept = cross, np.zeros(count)
        if data.intercept:
            total, cross = _array(d.sum(-1)), _array(data.collect(d)).reshape(count, -1)
            if count > 1:
                # Intercepts that all change alike change nothing: this holds their mean, and one that has no rows.
                total += total.trace() / count + FLOOR * np.eye(count)
            shift = _array(slopes.sum(-1)).reshape(-1)
            lines = np.asarray(np.linalg.solve(total, cross), dtype=np.float64)
            intercept = b - np.linalg.solve(total, shift) + lines @ w
            gradient = gradient - shift @ lines
        gram = self._gram(d, cross, lines)
        support = np.flatnonzero(w)
        return _Quadratic(gram, w[support] @ gram[support] - gradient, lines, intercept, slopes)

    def _gram(self, d: Tensor, cross: Array, lines: Array) -> Array | GramColumns:
        """Return the Hessian by w, without what the intercepts take up."""
        data, (count, size) = self.data, lines.shape
        if size <= WIDE * data.rows and count > 1 and self._pairs is not None:
            return _array(block_grams(self._pairs, d, data.features)) - cross.T @ lines
        if size <= WIDE * data.rows:
            blocks = np.empty((count, count, data.features, data.features))
            for one in range(count):
                blocks[one, one:] = _array(data.gram(d[one, one:, None]))
                blocks[one:, one] = blocks[one, one:]
            return blocks.swapaxes(1, 2).reshape(size, size) - cross.T @ lines

        def form(index: NDArray[np.intp]) -> Array:
            found = np.empty((len(index), count, data.features))
            output, feature = np.divmod(index, data.features)
            for one in np.unique(output):
                at = np.flatnonzero(output == one)
                found[at] = _array(data.gram(d[one, :, None], torch.from_numpy(feature[at]))).swapaxes(0, 1)
            return found.reshape(-1, size) - cross.T[index] @ lines

        def multiply(w: Array) -> Array:
            product = data.product(torch.from_numpy(w).to(d))
            return _array(data.collect(d[0, 0] * product)) - cross[0] * float(lines[0] @ w)

        diagonal = _array(data.squares(d.diagonal().T)).ravel() - (cross * lines).sum(0)
        return GramColumns(diagonal, form, multiply if data.sparse and count == 1 else None)

    @cached_property
    def _pairs(self) -> Tensor | None:
        return None if self.data.sparse else paired(self.data.X)

    def _predictions(self, w: Array, b: Array) -> Tensor:
        like = self.data.scale
        w_, b_ = (torch.from_numpy(each).to(like).reshape(*self._leading, -1) for each in (w, b))
        return self.data.product(w_) + b_

    def _loss(self, z: Tensor) -> float:
        return float((self.loss.value(z, self.data.y) * self.data.weights).mean())

    def _curvatures(self, z: Tensor) -> Tensor:
        """Return the second derivatives of the mean loss by predictions z, (outputs, outputs, rows)."""
        curvature, share = self.loss.curvature(z, self.data.y), self.data.weights / self.data.rows
        if z.dim() == 1:
            return (share * curvature.clamp_min(FLOOR))[None, None]
        unit = torch.eye(len(z)).to(z)[..., None].expand(-1, -1, z.shape[-1])
        return self.loss.hessian_product(curvature, unit) * share

    def _slopes(self, z: Tensor) -> Tensor:
        """Return the derivatives of the mean loss by predictions z."""
        return self.data.weights * self.loss.slope(z, self.data.y) / self.data.rows


def _penalty(w: Array, l1: Array, l2: Array) -> float:
    used = np.flatnonzero(w)
    return float(l1[used] @ np.abs(w[used]) + 0.5 * l2[used] @ w[used] ** 2)


def _array(values: Tensor) -> Array:
    return np.asarray(values.double().cpu().numpy())
