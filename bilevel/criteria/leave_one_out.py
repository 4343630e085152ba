"""Exact leave-one-out of ridge regression: value, gradient and Gauss-Newton model from one factorisation."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria.criterion import Array, Criterion, Evaluation, Fit, shared
from bilevel.criteria.data import LinearData, Rows
from bilevel.criteria.leverage import factor
from bilevel.criteria.penalties import Penalties
from bilevel.problems.losses import GLMLoss, Squared

LEAST = 1e-12
"""One minus a leverage is at least this: a row that decides its prediction alone has no leave-one-out error."""


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

    leaves_one_out = True
    loss: GLMLoss

    def __init__(self, data: LinearData, penalties: Penalties) -> None:
        super().__init__(data, Squared(), penalties)
        self.y = data.y.reshape(-1, data.rows)  # (targets, rows)
        share = data.weights / data.rows
        self.mean = (self.y * share).sum(1, keepdim=True) if data.intercept else torch.zeros_like(self.y[:, :1])
        self.own = share if data.intercept else torch.zeros_like(share)  # of a row in the intercept

    def evaluate(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        log_a = self.penalties.spread(u)
        if self.data.y.dim() == 1 and self.penalties.size == 1:
            return self._evaluation(float(log_a[0].exp()), second)
        if self._even:
            return self._even_evaluations(log_a[..., 0].reshape(1, -1), second)[0]
        return self._uneven_evaluation(log_a, second)

    def scan(self, u: Array) -> list[Evaluation]:
        if not self._even:
            return super().scan(u)
        log_a = self.penalties.spread(u)[..., 0]
        return self._even_evaluations(log_a.reshape(len(u), -1), second=False)

    def refit(self, u: Array, warm: Any = None) -> Fit:
        log_a = self.penalties.spread(u)
        if self._even:
            _, values, c, collect = self._basis
            w = collect(c / (values[:, None] + log_a[..., 0].exp().to(values)))
        else:
            a = log_a.exp().to(self.y).reshape(-1, self.data.features).expand(len(self.y), -1)
            w = torch.stack([self._coefficients(a[t], t) for t in range(len(a))])
        single = self.data.y.dim() == 1
        return self.given(w[0] if single else w, self.mean[0, 0] if single else self.mean[:, 0])

    def take(self, rows: Rows) -> Self:
        return type(self)(self.data.take(rows), self.penalties)

    @shared
    def _centred(self) -> Tensor:
        """The targets about their weighted mean, (targets, rows)."""
        return self.y - self.mean

    # One penalty for all columns ------------------------------------------------------------------------------------

    @property
    def _even(self) -> bool:
        return self.penalties.even

    @shared
    def _basis(self) -> Any:
        """The basis B (rows, r) in which predictions are ``B (c / (g + a))``, with eigenvalues g and ``c = B'S y``.

        Returns:
            B, g, c, and the function from ``c / (g + a)`` to standardised coefficients, (targets, features).
        """
        data, s = self.data, self.data.weights
        if data.features <= data.rows:
            values, Q = torch.linalg.eigh(data.gram(s))
            B = data.product(Q.T).T
            c = B.T @ (self._centred * s).T
            return B, values.clamp_min(0.0), c, lambda shrunk: (Q @ shrunk).T
        root = s.sqrt()
        kernel = data.row_gram()
        values, Q = torch.linalg.eigh(kernel * root[:, None] * root)
        size = values.clamp_min(0.0).sqrt()
        # Weights may be zero: B = K S^(1/2) Q / size needs no division by them.
        kept = size > 1e-8 * size[-1]
        values, size, Q = values[kept], size[kept], Q[:, kept]
        B = kernel @ (root[:, None] * Q) / size
        c = size[:, None] * (Q.T @ (root * self._centred).T)
        return B, values, c, lambda shrunk: data.collect((root[:, None] * (Q @ (shrunk / size[:, None]))).T)

    @shared
    def _squared_basis(self) -> Tensor:
        return self._basis[0].square()

    @shared
    def _vectors(self) -> tuple[Tensor, Tensor]:
        """``B'S y`` and one minus what a row has in the intercept, of one target."""
        return self._basis[2][:, 0].contiguous(), 1.0 - self.own

    def _evaluation(self, a: float, second: bool) -> Evaluation:
        """Return what `_even_evaluations` does, of one target and one penalty: in half as many calls."""
        (B, values, _, _), squared, (c, free), s = self._basis, self._squared_basis, self._vectors, self.data.weights
        shrink = (values + a).reciprocal_()
        slope = shrink.square().mul_(-a)  # by u
        q = torch.addcmul(free, s, squared @ shrink, value=-1.0).clamp_min_(LEAST)
        error = (self._centred[0] - B @ (c * shrink)).div_(q)
        slopes = -s * error
        moved = (B @ (c * slope)).addcmul_(slopes, squared @ slope).div_(q)  # of the predictions: - de/du
        losses, by_u, rows = _numpy(slopes * error) * -0.5, slopes @ moved, self.data.rows
        gradient, gauss_newton, jacobian = np.array([float(by_u) / rows]), None, None
        if second:
            gauss_newton = np.array([[float((s * moved) @ moved) / rows]])
            jacobian = moved[:, None]
        parts = (self.data.y - error, slopes, s, jacobian)
        return Evaluation(float(losses.mean()), gradient, gauss_newton, losses, *parts)

    def _even_evaluations(self, log_a: Tensor, second: bool) -> list[Evaluation]:
        """Return the evaluations of several log penalties, (m, 1) or (m, targets)."""
        (B, values, c, _), y, s = self._basis, self.y, self.data.weights
        count, targets = len(log_a), len(y)
        a = log_a.exp().to(values).expand(count, targets).reshape(-1)
        shrink = 1.0 / (values[:, None] + a)
        both = torch.cat([shrink, -a * shrink.square()], 1)  # with the derivatives by u
        c = c if count == 1 else c.repeat(1, count)
        products = torch.stack([(B @ (torch.cat([c, c], 1) * both)).T, (self._squared_basis @ both).T])
        fitted, moved, leverage, dleverage = products.reshape(4, count, targets, -1)
        q = (1.0 - self.own - s * leverage).clamp_min_(LEAST)
        error = (self._centred - fitted) / q
        moved = (moved - s * error * dleverage) / q  # of the predictions: - de/du
        weight = s / targets
        slopes = -weight * error
        by_target = (slopes * moved).sum(2)
        if second:
            return [self._answer(error[0], slopes[0], *self._by_penalty(by_target[0], moved[0], weight))]
        gradients = _numpy(self.penalties.gather_outputs(by_target) / self.data.rows)
        losses = _numpy(s * (0.5 * error.square()).mean(1))
        return [
            Evaluation(value, gradients[m], None, losses[m], *self._shaped(y - error[m], slopes[m], weight), None)
            for m, value in enumerate(losses.mean(1).tolist())
        ]

    def _by_penalty(self, by_target: Tensor, moved: Tensor, weight: Tensor) -> tuple[Tensor, Array, Tensor]:
        """Return gradient, Gauss-Newton matrix and Jacobian of the moves of every target's predictions."""
        gather, rows = self.penalties.gather_outputs, self.data.rows
        curvature = gather((weight * moved.square()).sum(1)) / rows
        jacobian = moved[..., None]
        if self.penalties.size > 1:
            jacobian = jacobian * torch.eye(self.penalties.size).to(moved)[:, None]
        return gather(by_target) / rows, np.diag(_numpy(curvature)), jacobian

    def _answer(
        self, error: Tensor, slopes: Tensor, gradient: Tensor, gauss_newton: Array | None, jacobian: Tensor | None
    ) -> Evaluation:
        """Return the evaluation of every target's errors."""
        losses = _numpy(self.data.weights * (0.5 * error.square()).mean(0))
        shaped = self._shaped(self.y - error, slopes, self.data.weights / len(error))
        jacobian = jacobian[0] if jacobian is not None and self.data.y.dim() == 1 else jacobian
        return Evaluation(float(losses.mean()), _numpy(gradient), gauss_newton, losses, *shaped, jacobian)

    def _shaped(self, predictions: Tensor, slopes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return them with curvatures, of one target without its axis."""
        if self.data.y.dim() == 1:
            return predictions[0], slopes[0], weight
        return predictions, slopes, weight.expand(slopes.shape)

    # Any penalties --------------------------------------------------------------------------------------------------

    @shared
    def _X(self) -> Tensor:
        return self.data.dense()

    @shared
    def _gram(self) -> tuple[Tensor, Tensor]:
        """X'SX and its products with the targets, (targets, features)."""
        weighted = self._X.T * self.data.weights
        return weighted @ self._X, (weighted @ self._centred.T).T

    def _coefficients(self, a: Tensor, target: int) -> Tensor:
        """Return the coefficients of a target, (features,), at the penalties of all columns."""
        if len(a) > self.data.rows:
            return self._solve(a)[1][target]
        gram, moment = self._gram
        return torch.cholesky_solve(moment[target][:, None], factor(gram.clone(), a))[:, 0]

    def _solve(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return V, (rows, features), and the coefficients (targets, features), at the penalties of all columns."""
        X, s = self._X, self.data.weights
        if len(a) <= len(X):
            gram, moment = self._gram
            inverse = torch.cholesky_inverse(factor(gram.clone(), a))
            return X @ inverse, moment @ inverse
        scaled, root = X / a, s.clamp_min(1e-300).sqrt()
        kernel = (scaled @ X.T) * root[:, None] * root
        L = factor(kernel, torch.ones_like(root))
        V = torch.cholesky_solve(scaled * root[:, None], L) / root[:, None]
        return V, (s * self._centred) @ V

    def _uneven_evaluation(self, log_a: Tensor, second: bool) -> Evaluation:
        data, s, size = self.data, self.data.weights, self.penalties.size
        a = log_a.exp().to(self.y)
        shared = self._solve(a) if a.dim() == 1 else None
        outputs = len(self.y)
        a, errors, slopes = a.expand(outputs, -1), [], []
        gradients = torch.zeros_like(a)
        gauss_newton = np.zeros((size, size))
        jacobians = []
        for t in range(outputs):
            V, coefficients = shared or self._solve(a[t])
            w = coefficients[t]
            q = (1.0 - self.own - s * (V * self._X).sum(1)).clamp_min(LEAST)
            error = (self._centred[t] - self._X @ w) / q
            slope = -s * error / outputs
            errors.append(error)
            slopes.append(slope)
            by_row = slope / q
            if second:
                J = V * (torch.outer(s * error / q, a[t]) * V - (a[t] * w) / q[:, None])
                gradients[t] = J.T @ slope
                J = self._columns(J, t)
                gauss_newton += _numpy(J.T @ (J * (s / outputs)[:, None])) / data.rows
                jacobians.append(J)
            else:
                gradients[t] = a[t] * (V.square().T @ (s * error * by_row) - w * (V.T @ by_row))
        total = gradients.sum(0) if self.penalties.outputs is None else gradients
        gradient = self.penalties.gather(total) / data.rows
        jacobian = torch.stack(jacobians) if second else None
        return self._answer(
            torch.stack(errors), torch.stack(slopes), gradient, gauss_newton if second else None, jacobian
        )

    def _columns(self, J: Tensor, target: int) -> Tensor:
        """Return derivatives by all log penalties, (rows, k), from those by the columns of one target."""
        if self.penalties.outputs is None:
            return self.penalties.gather(J)
        owner = self.penalties.owner[target].to(J.device)
        return J.new_zeros(len(J), self.penalties.size).index_add_(1, owner, J)


def _numpy(values: Tensor) -> Array:
    return values.double().cpu().numpy()
