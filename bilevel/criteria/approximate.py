"""Approximate leave-one-out (ALO) of generalised linear models, with its exact gradient."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from bilevel.criteria import newton, newton_cg
from bilevel.criteria.criterion import Array, Criterion, Evaluation, Fit, shared
from bilevel.criteria.data import LinearData, Rows
from bilevel.criteria.leverage import Factored, Sketched, factored
from bilevel.criteria.penalties import Penalties
from bilevel.problems.losses import GLMLoss

LEAST = 1e-10
"""One minus a leverage is at least this."""
LARGE = 1_000_000_000
"""Rows times squared columns from which leverages are sketched, if there are twenty rows for each column."""


class _Point(NamedTuple):
    """What an evaluation computes once.

    With ``h = diag(X1 H^-1 X1')`` and ``q = 1 - h d``, the prediction without row i is ``t = z + h g / q``.
    """

    w: Tensor  # coefficients, with the intercept
    a: Tensor
    factor: Factored
    t: Tensor
    by_z: Tensor  # dt/dz at fixed h
    by_h: Tensor  # dt/dh
    third: Tensor  # s loss'''(z)


class ApproximateLeaveOneOut(Criterion):
    """The mean loss of every row under one Newton step of the model of all others from the model of all rows.

    With g, d and d3 the weighted first three derivatives of the losses at the predictions z, ``H = X'DX + A`` and
    ``h_i = x_i'H^-1 x_i`` (of columns with the one of the intercept),

        value = mean(s loss(t)),    t_i = z_i + h_i g_i / (1 - h_i d_i)

    (Rad and Maleki 2020). Ridge regression: exact. The gradient is exact, by an adjoint: with ``V = X H^-1``,
    ``c1 = 1/q + h^2 g d3 / q^2``, ``c2 = g / q^2``, ``b = loss'(t) c2``,

        dvalue/du_j = -a_j/n [w_j V_j' (loss'(t) c1 - d3 k) + (V_j^2)' b],    k_i = sum_m b_m (x_m'H^-1 x_i)^2

    The Jacobian of the Gauss-Newton model leaves out what h changes by d: ``-a_j V_ij (c1_i w_j + c2_i V_ij)``; that of
    one penalty, and with `full`, is exact. Of many rows (20,000 of 250 columns and more), leverages and their
    derivatives are estimated by a random sketch, `leverage.Sketched`.

    Args:
        data: the rows.
        loss: with one prediction for each row.
        penalties: which coefficients share a penalty.
        tol: relative decrease of the training objective below which a Newton step is the last.

    Raises:
        ValueError: for a loss of several outputs, and for one without a third derivative.

    >>> import numpy as np
    >>> from bilevel.problems import Logistic
    >>> data = LinearData.of([[0.0], [1.0], [2.0], [3.0]], [0, 1, 0, 1], loss=Logistic())
    >>> evaluation = ApproximateLeaveOneOut(data, Logistic(), Penalties.scalar(1)).evaluate(np.zeros(1))
    >>> round(evaluation.value, 4)
    1.2344
    """

    leaves_one_out = True

    def __init__(self, data: LinearData, loss: GLMLoss, penalties: Penalties, *, tol: float = 1e-8) -> None:
        if data.y.dim() > 1 or loss.outputs(data.y) is not None:
            raise ValueError(
                f"approximate leave-one-out takes a loss of one prediction for each row, and {type(loss).__name__} has "
                "several: use K-fold."
            )
        super().__init__(data, loss, penalties)
        loss.third(data.y.new_zeros(1, dtype=data.weights.dtype), data.y[:1])
        self.tol = tol

    def evaluate(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        a = self._penalties(u)
        w, z, kept = self._solved(a, warm)
        data, loss, s = self.data, self.loss, self.data.weights
        g, d, third = (s * part(z, data.y) for part in (loss.slope, loss.curvature, loss.third))
        H: Factored
        if self._large:
            H = Sketched(self._X1, self._low, d, a)
            kept = kept.at(H.gram)
        else:
            H = factored(self._X1, d, a, data.intercept)
        h = H.leverages()
        q = (1.0 - h * d).clamp_min(LEAST)
        shift = h * g / q
        t, by_h = z + shift, g / q.square()
        point = _Point(w, a, H, t, 1.0 / q + h * shift * third / q, by_h, third)
        slopes, curvatures = s * loss.slope(t, data.y), s * loss.curvature(t, data.y)
        losses = (s * loss.value(t, data.y)).double().cpu().numpy()
        jacobian = gauss_newton = None
        if self.penalties.size == 1:
            jacobian = self._exact(point)
            gradient = jacobian.T @ slopes / data.rows
        else:
            gradient = self._gradient(point, slopes)
        if second:
            if jacobian is None:
                jacobian = self._exact(point) if full else self._model(point)
            gauss_newton = (jacobian.T @ (jacobian * curvatures[:, None]) / data.rows).double().cpu().numpy()
        value = float(losses.mean())
        return Evaluation(
            value,
            gradient.double().cpu().numpy(),
            gauss_newton,
            losses,
            t,
            slopes,
            curvatures,
            jacobian if second else None,
            (w, kept),
        )

    def refit(self, u: Array, warm: Any = None) -> Fit:
        w, _, _ = self._solved(self._penalties(u), warm)
        intercept = w[-1] if self.data.intercept else w.new_zeros(())
        return self.given(w[: self.data.features], intercept)

    def take(self, rows: Rows) -> Self:
        return type(self)(self.data.take(rows), self.loss, self.penalties, tol=self.tol)

    @shared
    def _X1(self) -> Tensor:
        dense = self._system.X1
        return self.data.with_ones() if dense is None else dense

    def _penalties(self, u: Array) -> Tensor:
        """Return the penalties of all coefficients, with a zero for the intercept."""
        a = self.penalties.spread(u).exp().to(self._X1)
        return torch.cat([a, a.new_zeros(1)]) if self.data.intercept else a

    @property
    def _large(self) -> bool:
        """Whether there are so many rows that directions are searched in float32, and leverages sketched."""
        rows, features = self.data.rows, self.data.features
        return rows >= 20 * features and rows * features**2 >= LARGE

    @shared
    def _system(self) -> newton_cg.System:
        return newton_cg.System(self.data, self.loss, self.data.weights[None])

    @property
    def _low(self) -> Tensor:
        low = self._system.low.X1
        return self._X1.float() if low is None else low

    def _solved(self, a: Tensor, warm: Any) -> tuple[Tensor, Tensor, Any]:
        """Return the coefficients and the predictions of the model of all rows, and what to keep for the next."""
        data = self.data
        start, kept = (torch.zeros_like(a), None) if warm is None else warm
        if self._large:
            found = newton_cg.solve(self._system, a[None], start[None], kept, self.tol)
            return found.w[0], found.z[0], found.preconditioner
        models = newton.solve(
            *(self._X1, data.y, self.loss, data.weights[None], a[None], start[None]),
            intercept=data.intercept,
            tol=self.tol,
        )
        return models.w[0], models.z[0], None

    def _gradient(self, at: _Point, slopes: Tensor) -> Tensor:
        b = slopes * at.by_h
        adjoint = slopes * at.by_z
        if not self.loss.quadratic:
            adjoint = adjoint - at.third * at.factor.squares(b)
        by_column = -at.a * (at.w * at.factor.collected(adjoint) + at.factor.by_column(b))
        return self.penalties.gather(by_column[: self.data.features]) / self.data.rows

    def _model(self, at: _Point) -> Tensor:
        """Return the Jacobian (rows, k) without what the leverages change by the curvatures of the losses."""
        V = at.factor.V
        by_column = -V * (torch.outer(at.by_z, at.a * at.w) + torch.outer(at.by_h, at.a) * V)
        return self.penalties.gather(by_column[:, : self.data.features])

    def _exact(self, at: _Point) -> Tensor:
        """Return the Jacobian (rows, k); ``dh_i = -sum_j V_ij^2 a_j du_j - sum_k S_ik^2 d3_k dz_k``."""
        if self.penalties.size == 1:
            dz = -at.factor.predicted(at.a * at.w)
            dh = -at.factor.by_row(at.a) if self.loss.quadratic else -at.factor.moved(at.a, at.third * dz)
            return (at.by_z * dz + at.by_h * dh)[:, None]
        V, features = at.factor.V, self.data.features
        dz = self.penalties.gather((-V * (at.a * at.w))[:, :features])
        dh = self.penalties.gather((-V.square() * at.a)[:, :features])
        if not self.loss.quadratic:
            moved = at.third[:, None] * dz
            if self.penalties.size * len(at.a) <= len(moved):
                dh = dh - torch.stack([at.factor.squares(each) for each in moved.T], 1)
            else:
                dh = dh - at.factor.kernel().square() @ moved
        return at.by_z[:, None] * dz + at.by_h[:, None] * dh
