"""Exact leave-one-out of ridge regression: value, gradient and Gauss-Newton model from one factorisation."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria.criterion import Array, Criterion, Evaluation, Fit, shared
from bilevel.criteria.data import LinearData, Rows
from bilevel.criteria.penalties import Penalties
from bilevel.numerics.factored import FactoredRows
from bilevel.numerics.small import (
    array,
    cholesky,
    eigh,
    half_solve,
    inverse,
    is_regular,
    row_dots,
    solve,
    tensor,
    to_numpy,
)
from bilevel.problems.losses import GLMLoss, Squared

EVEN = 0.1
"""The least root of a weight, as a part of the largest, that eigenvectors are divided by."""
TALL = 3
"""Rows for each feature from which a Gram matrix is inverted."""


class _Rows(NamedTuple):
    """The rows, as arrays or tensors.

    Attributes:
        s: weights, (rows,).
        free: one minus what a row has in the intercept, (rows,).
        y: targets about their weighted mean, (targets, rows).
        given: targets, (targets, rows).
    """

    s: Any
    free: Any
    y: Any
    given: Any


class _Basis(NamedTuple):
    """The basis B in which predictions are ``B (c / (g + a))``.

    Attributes:
        B: (rows, r).
        squared: its squares.
        values: g, eigenvalues, (r,).
        c: ``B'S y``, (r, targets).
        vectors: what turns ``c / (g + a)`` into standardised coefficients: see `RidgeLeaveOneOut._from_basis`.
        whole: whether B is that of all that the rows can be, but for the intercept: residuals are then
            ``B (a c / (g + a))``, and what is not leverage ``a squared / (g + a)``, without a difference.
    """

    B: Any
    squared: Any
    values: Any
    c: Any
    vectors: Tensor
    whole: bool = False

    def at(self, a: Any, rows: _Rows) -> tuple[Any, Any, Any, Any]:
        """Return f, t, e and m, by which ``1 - h = f - t squared / (g + a)`` and residuals are ``e - B m / (g + a)``.

        Args:
            a: penalties, (..., 1).
            rows: the rows.
        """
        if self.whole:
            return 0.0, -a, 0.0, -a * self.c.T
        return rows.free, rows.s, rows.y, self.c.T


class RidgeLeaveOneOut(Criterion):
    """The mean squared error of every row (halved) under the ridge regression of all others, without a refit.

    With ``V = X (X'SX + A)^-1``, ``w = V'Sy``, ``h_i = s_i (V_i'x_i + 1/sum s)`` and centred columns, the error of row
    i without itself is ``e_i = (y_i - x_i'w) / (1 - h_i)``, and

        value = 1/2 mean(s e^2),    de_i/du_j = a_j V_ij (w_j - s_i e_i V_ij) / (1 - h_i)

    (Allen 1974; the derivatives are those of the formula). One penalty for all columns, or for each target, goes
    through the eigenbasis of X'SX or, with more columns than rows, of XX': an evaluation is then two products.

    Args:
        data: the rows; y may hold several targets, of which the loss is the mean.
        penalties: which coefficients share a penalty.

    >>> data = LinearData.of([[0.0], [1.0], [3.0]], [0.0, 1.0, 2.0])
    >>> evaluation = RidgeLeaveOneOut(data, Penalties.scalar(1)).evaluate(np.zeros(1))
    >>> round(evaluation.value, 4), evaluation.gradient.round(4)
    (0.2893, array([0.2085]))
    """

    name = "exact leave-one-out"
    leaves_one_out = True
    loss: GLMLoss
    least = 1e-12

    def __init__(self, data: LinearData, penalties: Penalties) -> None:
        super().__init__(data, Squared(), penalties)
        self.y = data.y.reshape(-1, data.rows)  # (targets, rows)
        mean = array(self.y) @ array(data.weights) / data.rows
        self.mean = tensor(mean if data.intercept else 0.0 * mean)[:, None]  # (targets, 1)

    def compute(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        if not self._even:
            return self._uneven_evaluation(u, self.penalties.spread(u), second)
        log_a = self.penalties.spread_outputs(u)
        if self.data.y.dim() == 1:
            return self._evaluation(float(log_a.exp()), second)
        return self._even_evaluations(log_a[None], second)[0]

    def scan(self, u: Array) -> list[Evaluation]:
        if not self._even:
            return super().scan(u)
        found = self._even_evaluations(self.penalties.spread_outputs(u), second=False)
        return [self._judged(at, each) for at, each in zip(u, found, strict=True)]

    def refit(self, u: Array, warm: Any = None) -> Fit:
        if warm is not None and np.array_equal(warm[0], u):
            w = tensor(warm[1])
        elif self._even:
            basis, a = self._basis, array(self.penalties.spread_outputs(u).exp().to(self.y))
            w = self._from_basis(basis.c / (basis.values[:, None] + a))
        else:
            a = array(self.penalties.spread(u).exp().to(self.y).expand(len(self.y), -1))
            w = torch.stack([tensor(self._coefficients(a[t], t)) for t in range(len(a))])
        single = self.data.y.dim() == 1
        return self.given(w[0] if single else w, self.mean[0, 0] if single else self.mean[:, 0])

    def take(self, rows: Rows) -> Self:
        return type(self)(self.data.take(rows), self.penalties)

    @property
    def _tall(self) -> bool:
        """Whether columns leave something of every row's target unexplained."""
        return self.data.features < self.data.rows - self.data.intercept

    @shared
    def _rows(self) -> _Rows:
        s, y = array(self.data.weights), array(self.y)
        return _Rows(s, 1.0 - s / self.data.rows * self.data.intercept, y - array(self.mean), y)

    # One penalty for all columns ------------------------------------------------------------------------------------

    @property
    def _even(self) -> bool:
        return self.penalties.even

    @shared
    def _basis(self) -> _Basis:
        """The eigenbasis of X'SX or, with more columns than rows, of XX'."""
        data, s, y = self.data, self.data.weights, self.y - self.mean
        if self._tall:
            if not data.sparse:
                gram, moment = self._gram
                values, Q = eigh(tensor(gram))
                B = self._X @ array(Q)
                return _Basis(B, B * B, array(values).clip(0.0), array(Q).T @ moment.T, Q)
            values, Q = eigh(data.gram(s))
            B = array(data.product(Q.T).T.contiguous())
            return _Basis(B, B * B, array(values).clip(0.0), B.T @ array((y * s).T), Q)
        root, kernel = array(s.sqrt()), array(data.row_gram()) * 1.0
        kernel *= root[:, None] * root
        if data.intercept:  # the direction of the intercept is the last, and left out
            kernel += (1.0 + 2.0 * kernel.trace()) / data.rows * root[:, None] * root
        values, Q = (array(each)[..., : data.rows - data.intercept] for each in eigh(tensor(kernel)))
        values, weighted = values.clip(0.0), root[:, None] * Q
        if bool(root.min() > EVEN * root.max()):
            B = Q / root[:, None]
            return _Basis(B, Q * Q, values, weighted.T @ array(y).T, tensor(weighted), whole=True)
        # Without a division by weights, which may be zero.
        size = values.clip(1e-16 * values[-1]) ** 0.5
        turned = weighted / size
        B = array(data.row_gram()) @ turned
        return _Basis(B, B * B, values, size[:, None] * (weighted.T @ array(y).T), tensor(turned))

    def _from_basis(self, shrunk: Any) -> Tensor:
        """Return the standardised coefficients, (targets, features), of ``c / (g + a)``, (r, targets)."""
        data, turned = self.data, tensor(array(self._basis.vectors) @ shrunk)
        return turned.T if self._tall else data.collect(turned.T)

    def _evaluation(self, a: float, second: bool) -> Evaluation:
        """Return what `_even_evaluations` does, of one target and one penalty: in half as many calls."""
        basis, s = self._basis, self._rows.s
        B, squared = basis.B, basis.squared
        free, by_leverage, y, c = basis.at(a, self._rows)
        shrink = 1.0 / (basis.values + a)
        slope = -a * shrink * shrink  # by u
        q = (free - by_leverage * (squared @ shrink)).clip(1e-300 if basis.whole else self.least)
        error = (y if basis.whole else y[0]) - B @ (c[0] * shrink)
        error /= q
        slopes = -s * error
        moved = (B @ (c[0] * slope) - by_leverage * error * (squared @ slope)) / q  # of the predictions: - de/du
        gradient = np.array([float(slopes @ moved) / self.data.rows])
        return self._of_one(error, slopes, gradient, tensor(moved)[:, None] if second else None)

    def _even_evaluations(self, log_a: Tensor, second: bool) -> list[Evaluation]:
        """Return the evaluations of several log penalties, (m, 1) or (m, targets)."""
        basis, s = self._basis, self._rows.s
        B, squared, values = basis.B, basis.squared, basis.values
        count, targets = len(log_a), len(self.y)
        a = array(log_a.exp().to(self.y).expand(count, targets))[..., None]
        free, by_leverage, y, c = basis.at(a, self._rows)
        shrink = 1.0 / (a + values)  # (m, targets, r)
        slope = -a * shrink * shrink  # by u

        def product(left: Any, right: Any) -> Any:
            return (left.reshape(-1, len(values)) @ right.T).reshape(count, targets, -1)  # (m, targets, rows)

        q = (free - by_leverage * product(shrink, squared)).clip(1e-300 if basis.whole else self.least)
        error = (y - product(c * shrink, B)) / q
        moved = (product(c * slope, B) - by_leverage * error * product(slope, squared)) / q  # of predictions: - de/du
        slopes = (-1.0 / targets) * s * error
        gather = self.penalties.gather_outputs
        gradients = to_numpy(gather(tensor((slopes * moved).sum(2))) / self.data.rows)
        if second:
            jacobian = tensor(moved[0])[..., None]
            if self.penalties.size > 1:
                jacobian = jacobian * torch.eye(self.penalties.size).to(jacobian)[:, None]
            return [self._answer(error[0], slopes[0], gradients[0], jacobian)]
        if self.data.y.dim() > 1:
            return [self._answer(error[m], slopes[m], gradients[m], None) for m in range(count)]
        losses = to_numpy(slopes * error)[:, 0] * -0.5
        parts = zip(*(tensor(each)[:, 0] for each in (self._rows.given - error, slopes)), strict=True)
        values, weights = (losses.sum(1) / self.data.rows).tolist(), self.data.weights
        return [
            Evaluation(values[m], gradients[m], None, losses[m], z, slope, weights, None)
            for m, (z, slope) in enumerate(parts)
        ]

    def _answer(
        self, error: Any, slopes: Any, gradient: Array, jacobian: Tensor | None, warm: Any = None
    ) -> Evaluation:
        """Return the evaluation of every target's errors, (targets, rows)."""
        if self.data.y.dim() == 1:
            return self._of_one(error[0], slopes[0], gradient, None if jacobian is None else jacobian[0], warm)
        losses = to_numpy((error * slopes).sum(0)) * -0.5
        weights = (self.data.weights / len(error)).expand(self.y.shape)
        parts = (self.y - tensor(error), tensor(slopes), weights, jacobian)
        return Evaluation(float(losses.mean()), gradient, None, losses, *parts, warm)

    def _of_one(
        self, error: Any, slopes: Any, gradient: Array, jacobian: Tensor | None, warm: Any = None
    ) -> Evaluation:
        """Return the evaluation of the errors of one target, (rows,)."""
        losses = to_numpy(slopes * error) * -0.5
        parts = (tensor(self._rows.given[0] - error), tensor(slopes), self.data.weights, jacobian)
        return Evaluation(float(losses.sum()) / len(losses), gradient, None, losses, *parts, warm)

    # Any penalties --------------------------------------------------------------------------------------------------

    @shared
    def _X(self) -> Any:
        return array(self.data.dense())

    @shared
    def _gram(self) -> tuple[Any, Any]:
        """X'SX and its products with the targets, (targets, features)."""
        s, _, y, _ = self._rows
        scaled = self._X * s[:, None] ** 0.5
        return scaled.T @ scaled, (s * y) @ self._X

    def _coefficients(self, a: Any, target: int) -> Any:
        """Return the coefficients of a target, (features,), at the penalties of all columns."""
        if not self._tall:
            return self._solve(a)[1][target]
        gram, moment = self._gram
        return solve(cholesky(gram, a), moment[target])

    def _solve(self, a: Any) -> tuple[Any, Any, Any, Any]:
        """Return V, (rows, features), with coefficients (targets, features), what is not leverage, and residuals.

        Args:
            a: penalties of all columns.
        """
        (s, free, y, _), X = self._rows, self._X
        if not self._tall:
            X1, zero = array(self.data.with_ones()), [0.0] * self.data.intercept
            H = FactoredRows(X1, s, array(torch.cat([tensor(a), tensor(a).new_tensor(zero)])), self.data.intercept)
            V = H.V[:, : len(a)]
            return V, (s * y) @ V, H.free(None, 0.0), ((y * H.roots) @ H.rest) / H.roots
        gram, moment = self._gram
        L = cholesky(gram, a)
        product = len(s) > TALL * len(a)  # it takes less than two systems
        V = X @ inverse(L) if product else half_solve(L, half_solve(L, X.T), transposed=True).T
        w = _stacked([solve(L, each) for each in moment])
        w = w if is_regular(L, gram) else w * np.nan
        return V, w, (free - s * row_dots(V, X)).clip(self.least), y - w @ X.T

    def _uneven_evaluation(self, u: Array, log_a: Tensor, second: bool) -> Evaluation:
        s, outputs, a = self._rows.s, len(self.y), array(log_a.exp().to(self.y))
        shared = self._solve(a) if a.ndim == 1 else None
        errors, slopes, weights, gradients, jacobians = [], [], [], [], []
        for t in range(outputs):
            at = a if a.ndim == 1 else a[t]
            V, coefficients, q, residuals = shared or self._solve(at)
            w, error = coefficients[t], residuals[t] / q
            slope = (-1.0 / outputs) * s * error
            if second:
                J = V * (s * error)[:, None]
                J -= w
                J *= V
                J *= at
                J *= (1.0 / q)[:, None]
                gradients.append(slope @ J)
                jacobians.append(array(self._columns(tensor(J), t)))
            else:
                by_row = slope / q
                gradients.append(at * ((s * error * by_row) @ (V * V) - w * (by_row @ V)))
            errors.append(error)
            slopes.append(slope)
            weights.append(w)
        by_column = _stacked(gradients)
        by_penalty = self.penalties.gather(tensor(by_column[0] if self.penalties.outputs is None else by_column))
        jacobian = tensor(_stacked(jacobians)) if second else None
        warm = (np.array(u), _stacked(weights))
        gradient = to_numpy(by_penalty) / self.data.rows
        return self._answer(_stacked(errors), _stacked(slopes), gradient, jacobian, warm)

    def _columns(self, J: Tensor, target: int) -> Tensor:
        """Return derivatives by all log penalties, (rows, k), from those by the columns of one target."""
        if self.penalties.outputs is None:
            return self.penalties.gather(J)
        owner = self.penalties.owner[target].to(J.device)
        return J.new_zeros(len(J), self.penalties.size).index_add_(1, owner, J)


def _stacked(each: list[Any]) -> Any:
    return each[0][None] if len(each) == 1 else array(torch.stack([tensor(one) for one in each]))
