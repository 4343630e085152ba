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
from bilevel.problems.losses import GLMLoss

WIDE = 2
"""Features for each row from which no Gram matrix is formed, but the columns that the support needs."""
STEPS, TOL = 50, 1e-6
"""Newton steps at most, and the relative decrease of the objective, as foreseen, of the last one: the next would be
about its square."""
FLOOR = 1e-10
"""Second derivatives of losses are at least this, so that every step has a length."""


class NetModels(NamedTuple):
    """Models along a path.

    Attributes:
        fit: in the units of the X that was given: coefficients (m, features), intercepts (m,).
        rounds: sweeps of the solver for each, (m,).
        converged: whether none was short of them.
    """

    fit: Fit
    rounds: NDArray[np.intp]
    converged: bool


class _Quadratic(NamedTuple):
    """``1/2 w'Gw - c'w``, with ``b = intercept - mean'w``, and the slopes of the loss by the predictions."""

    gram: Array | GramColumns
    moment: Array
    mean: Array
    intercept: float
    slopes: Tensor


class Net:
    """Models of some rows with an elastic-net penalty, ``mean_i s_i loss(x_i'w + b, y_i) + penalty(w)``.

        penalty(w) = alpha sum_j f_j (r |w_j| + (1 - r)/2 w_j^2)

    with r the l1_ratio and f the factors, of standardised columns: alpha and r are those of scikit-learn. The loss is
    replaced by its second-order model at the last w, in which the intercept is eliminated; that is solved exactly, and
    a line search takes the step (Lee, Sun and Saunders 2014). Squared loss is its own model.

    Args:
        data: the rows.
        loss: of one prediction.
        positive: whether w >= 0.
        rounds: of the solver, at most.
    """

    def __init__(self, data: LinearData, loss: GLMLoss, positive: bool = False, rounds: int = ROUNDS) -> None:
        self.data, self.loss, self.positive, self.rounds = data, loss, positive, rounds

    def largest(self, factors: Array | None = None) -> float:
        """Return the least alpha at which all coefficients are zero with l1_ratio 1; 0 where they are without any."""
        zero = np.zeros(self.data.features)
        with np.errstate(invalid="ignore"):
            w, b, *_ = self._solve(np.full_like(zero, np.inf), zero, zero, 0.0)
        slopes = -_array(self.data.collect(self._slopes(self._predictions(w, b))))
        size = (slopes if self.positive else np.abs(slopes)) / (1.0 if factors is None else factors)
        return float(size.max(initial=0.0))

    def path(self, alphas: Array, l1_ratio: float = 1.0, factors: Array | None = None) -> NetModels:
        """Return the models at decreasing alphas, (m,), each from the one before it.

        Args:
            alphas: weights of the penalty.
            l1_ratio: r, from 0 to 1.
            factors: f, (features,); None for ones.
        """
        factors = np.ones(self.data.features) if factors is None else factors
        found, w, b = np.empty((len(alphas), self.data.features)), np.zeros(self.data.features), 0.0
        intercepts, rounds, converged = np.empty(len(alphas)), np.ones(len(alphas), dtype=np.intp), True
        for index, alpha in enumerate(alphas):
            l1, l2 = l1_ratio * alpha * factors, (1.0 - l1_ratio) * alpha * factors
            w, b, rounds[index], fine = self._solve(l1, l2, w, b)
            found[index], intercepts[index] = w, b
            converged = converged and fine
        like = self.data.scale
        fit = given(self.data, torch.from_numpy(found).to(like), torch.from_numpy(intercepts).to(like))
        return NetModels(fit, rounds, converged)

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

    def _solve(self, l1: Array, l2: Array, w: Array, b: float) -> tuple[Array, float, int, bool]:
        """Return coefficients of standardised columns and the intercept, rounds, and whether it converged."""
        if self.loss.quadratic:
            model = self._squared
            found = solution(model.gram, model.moment, l1, l2, w, self.positive, self.rounds)
            return found.w, model.intercept - float(model.mean @ found.w), found.rounds, found.converged
        rounds, z = 0, self._predictions(w, b)
        value = self._loss(z) + _penalty(w, l1, l2)
        for _ in range(STEPS):
            model = self._model(z, w, b)
            found = solution(model.gram, model.moment, l1, l2, w, self.positive, self.rounds)
            rounds += found.rounds
            new = found.w, model.intercept - float(model.mean @ found.w)
            step = self._predictions(*new) - z
            foreseen = float(model.slopes @ step) + _penalty(new[0], l1, l2) - _penalty(w, l1, l2)
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
        zero = np.zeros(self.data.features)
        return self._model(self._predictions(zero, 0.0), zero, 0.0)

    def _model(self, z: Tensor, w: Array, b: float) -> _Quadratic:
        """Return the second-order model of the mean loss at predictions z, as a function of w."""
        data, n = self.data, self.data.rows
        slopes = self._slopes(z)
        gradient = _array(data.collect(slopes))
        d = data.weights * self.loss.curvature(z, data.y).clamp_min(FLOOR) / n
        if data.intercept:
            total = float(d.sum())
            mean = _array(data.collect(d)) / total
            shift = float(slopes.sum())
            intercept = b - shift / total + float(mean @ w)
            gradient = gradient - mean * shift
        else:
            total, mean, intercept = 0.0, np.zeros(data.features), 0.0
        gram = self._gram(d, mean, total)
        support = np.flatnonzero(w)
        return _Quadratic(gram, w[support] @ gram[support] - gradient, mean, intercept, slopes)

    def _gram(self, d: Tensor, mean: Array, total: float) -> Array | GramColumns:
        data = self.data
        if data.features <= WIDE * data.rows:
            return _array(data.gram(d)) - total * np.multiply.outer(mean, mean)

        def form(index: NDArray[np.intp]) -> Array:
            return _array(data.gram(d, torch.from_numpy(index))) - total * np.multiply.outer(mean[index], mean)

        return GramColumns(_array(data.squares(d)) - total * mean**2, form)

    def _predictions(self, w: Array, b: float) -> Tensor:
        return self.data.product(torch.from_numpy(w).to(self.data.scale)) + b

    def _loss(self, z: Tensor) -> float:
        return float((self.loss.value(z, self.data.y) * self.data.weights).mean())

    def _slopes(self, z: Tensor) -> Tensor:
        """Return the derivatives of the mean loss by predictions z."""
        return self.data.weights * self.loss.slope(z, self.data.y) / self.data.rows


def _penalty(w: Array, l1: Array, l2: Array) -> float:
    used = np.flatnonzero(w)
    return float(l1[used] @ np.abs(w[used]) + 0.5 * l2[used] @ w[used] ** 2)


def _array(values: Tensor) -> Array:
    return np.asarray(values.double().cpu().numpy())
