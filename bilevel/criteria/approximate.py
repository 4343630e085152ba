"""Approximate leave-one-out (ALO) of generalised linear models, with its exact gradient."""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from bilevel.criteria import newton_cg
from bilevel.criteria.criterion import Array, Criterion, Evaluation, Fit, shared, warn_unsolved
from bilevel.criteria.data import LinearData, Rows
from bilevel.criteria.penalties import Penalties
from bilevel.criteria.system import System
from bilevel.numerics.dense_newton import Rows as DenseRows
from bilevel.numerics.dense_newton import minimise
from bilevel.numerics.factored import SKETCH, Factored, Sketched, factored, serves
from bilevel.numerics.small import array, eigh, tensor, to_numpy
from bilevel.problems.losses import GLMLoss

ROUNDED = 1e-8
"""The least singular value of X, as a part of the largest, that is more than rounding."""
FLOOR, TINY = 1e-12, sys.float_info.min
"""What losses count as at least, for each row, and a decrease that is taken for none."""
SAFE = 0.1
"""Share of the root of a decrease that may be left, as losses of held-out rows move with that root."""
COARSE = 1e-6
"""The tolerance of the models in folds of an outer loop: losses of held-out rows are off by a part in a million."""
LARGE = 1_000_000_000
"""Rows times squared columns from which leverages are sketched, if there are twenty rows for each column."""


class _Point(NamedTuple):
    """What an evaluation computes once.

    With ``h = diag(X1 H^-1 X1')`` and ``q = 1 - h d``, the prediction without row i is ``t = z + h g / q``.
    """

    w: Any  # coefficients, with the intercept
    a: Any
    factor: Factored
    by_z: Any  # dt/dz at fixed h
    by_h: Any  # dt/dh
    third: Any  # s loss'''(z)


class _Kept(NamedTuple):
    """What a next model of many rows begins with: the Hessian, what inverts it, predictions and slopes of losses."""

    H: Sketched
    preconditioner: newton_cg.Preconditioner
    known: tuple[Tensor, Tensor]
    error: float = 0.0  # of the criterion, by the sketch


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
    derivatives are estimated by a random sketch, `bilevel.numerics.factored.Sketched`; `accuracy` says how well.

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

    name = "approximate leave-one-out"
    leaves_one_out = True
    least = 1e-10

    def __init__(self, data: LinearData, loss: GLMLoss, penalties: Penalties, *, tol: float = 1e-8) -> None:
        if data.y.dim() > 1 or loss.outputs(data.y) is not None:
            raise ValueError(
                f"approximate leave-one-out takes a loss of one prediction for each row, and {type(loss).__name__} has "
                "several: use K-fold."
            )
        super().__init__(data, loss, penalties)
        loss.third(data.y.new_zeros(1, dtype=data.weights.dtype), data.y[:1])
        self.tol = tol

    def compute(self, u: Array, warm: Any = None, *, second: bool = True, full: bool = False) -> Evaluation:
        a, rows, loss = self._penalties(u), self._rows, self.loss
        (w, z, g, H), kept, right = self._solved(a, warm)
        third = rows.of(loss.third, z)
        h = H.leverages()
        q = H.free(h, self.least)
        shift = h * g / q
        t, by_h = z + shift, g / (q * q)
        point = _Point(w, a, H, 1.0 / q + h * shift * third / q, by_h, third)
        response, slopes = rows.slopes(t)
        curvatures = rows.curvatures(response)
        losses = to_numpy(rows.of(loss.value, t))
        if isinstance(H, Sketched):
            kept = kept._replace(error=H.error(slopes * by_h) / self.data.rows)
        jacobian = None
        if second:
            jacobian = self._exact(point) if full or self.penalties.size == 1 else self._model(point)
        gradient = partial(self._gradient, point, slopes, jacobian)
        warm = (np.array(u), self._turned_back(w), kept)
        parts = (tensor(t), tensor(slopes), tensor(curvatures), jacobian, warm)
        return Evaluation(float(losses.mean()) if right else np.inf, gradient, None, losses, *parts)

    def refit(self, u: Array, warm: Any = None) -> Fit:
        if warm is not None and np.array_equal(warm[0], u):
            w = tensor(warm[1])
        else:
            model, _, right = self._solved(self._penalties(u), warm)
            w = tensor(self._turned_back(model[0]))
            if not right:
                warn_unsolved(u)
        intercept = w[-1] if self.data.intercept else w.new_zeros(())
        return self.given(w[: self.data.features], intercept)

    def take(self, rows: Rows) -> Self:
        return type(self)(self.data.take(rows), self.loss, self.penalties, tol=self.tol)

    def coarse(self) -> Self:
        other = copy.copy(self)
        other.tol = max(self.tol, COARSE)
        return other

    def accuracy(self, evaluation: Evaluation) -> str:
        kept = evaluation.warm[2]
        if not isinstance(kept, _Kept):
            return ""
        return (
            f"leverages are estimated by a random sketch of {SKETCH} columns, by which the criterion has a standard "
            f"error of {kept.error:.1g}."
        )

    @shared
    def _X1(self) -> Tensor:
        dense = self._system.X1
        return self.data.with_ones() if dense is None else dense

    @property
    def _rows(self) -> DenseRows:
        return self._tensors if self._large else self._turned[0] if self._turns else self._arrays

    @shared
    def _tensors(self) -> DenseRows:
        return DenseRows(self._X1, self.data.weights, self.data.y, self.loss, self.data.intercept)

    @shared
    def _arrays(self) -> DenseRows:
        data = self.data
        return DenseRows(array(self._X1), array(data.weights), data.y, self.loss, data.intercept)

    @property
    def _turns(self) -> bool:
        """Whether one penalty goes through the space of the rows, which has fewer coordinates than columns."""
        return self.penalties.size == 1 and self.data.features > self.data.rows

    @shared
    def _turned(self) -> tuple[DenseRows, Any]:
        """The rows in the eigenbasis of XX', and that basis Q, (features, r): coefficients are ``w = Q c``."""
        data = self.data
        values, U = eigh(data.row_gram())
        size = values.clamp_min(0.0).sqrt()
        some = size >= ROUNDED * size[-1]
        size, U = size[some].clamp_min(torch.finfo(size.dtype).tiny), U[:, some]
        X1 = torch.cat([U * size, torch.ones_like(U[:, :1])], 1) if data.intercept else U * size
        rows = DenseRows(array(X1), array(data.weights), data.y, self.loss, data.intercept)
        return rows, array(data.collect((U / size).T).T)

    def _turned_back(self, w: Any) -> Any:
        """Return coefficients of the columns."""
        if not self._turns:
            return w
        Q = self._turned[1]
        return array(torch.cat([tensor(Q @ w[: Q.shape[1]]), tensor(w[Q.shape[1] :])]))

    def _penalties(self, u: Array) -> Any:
        """Return the penalties of all coefficients, with a zero for the intercept."""
        a = self.penalties.spread(u).exp().to(self.data.weights)
        a = a[: self._turned[1].shape[1]] if self._turns else a
        a = torch.cat([a, a.new_zeros(1)]) if self.data.intercept else a
        return a if self._large else array(a)

    @property
    def _large(self) -> bool:
        """Whether there are so many rows that directions are searched in float32, and leverages sketched."""
        rows, features = self.data.rows, self.data.features
        return rows >= 20 * features and rows * features**2 >= LARGE

    @shared
    def _system(self) -> System:
        return System(self.data, self.loss, self.data.weights[None])

    @property
    def _low(self) -> Tensor:
        low = self._system.low.X1
        return self._X1.float() if low is None else low

    def _solved(self, a: Any, warm: Any) -> tuple[tuple[Any, Any, Any, Factored], Any, bool]:
        """Return coefficients, predictions, weighted slopes and the Hessian of the rows, where to go on, if right."""
        _, start, kept = (None, a * 0.0, None) if warm is None else warm
        rows = self._rows
        if self._turns and warm is not None:
            Q = self._turned[1]
            start = array(torch.cat([tensor(start[: len(Q)] @ Q), tensor(start[len(Q) :])]))
        if not self._large:
            H = kept
            if kept is not None:  # that of other coordinates has its curvatures to give
                same = serves(kept, rows.X1, a, rows.intercept)
                H = kept.under(a) if same else factored(rows.X1, kept.d, a, rows.intercept)
            model, right = self._minimised(a, start, H)
            return model, model[3], right
        pair = (None, None) if kept is None else (kept.preconditioner, kept.known)
        found = newton_cg.solve(self._system, a[None], start[None], pair[0], self.tol, pair[1])
        if not found.left <= self.tol:  # written so that NaN is not; penalties are lost in float32
            model, right = self._minimised(a, found.w[0], None)
            return model, None, right
        z, near = found.z[0], None if kept is None else kept.H.near
        if kept is None and found.preconditioner.dense:  # it is of the start
            near = rows.of(self.loss.curvature, self._X1 @ start), found.preconditioner.hessian
        response, g = rows.slopes(z)
        H = Sketched(self._X1, self._low, rows.curvatures(response), a, near)
        kept = _Kept(H, found.preconditioner.at(H.gram), (found.z, found.slope))
        return (found.w[0], z, g, H), kept, True

    def _minimised(self, a: Any, start: Any, H: Factored | None) -> tuple[tuple[Any, Any, Any, Factored], bool]:
        """Return the model of `_solved`, of Newton's steps in full precision, and whether it is right.

        They end where the next one would lower the objective by less than a part of ``tol^2``, or where rounding does.
        """
        rows, seen = self._rows, dict[int, tuple[float, Any]]()  # points are kept, so that their names stay theirs

        def objective(w: Any, point: Any) -> float:
            if id(point) not in seen:
                seen[id(point)] = rows.value(point.z) + 0.5 * float((a * w) @ w), point
            return seen[id(point)][0]

        def share(w: Any, point: Any, H: Factored, gradient: Any, residual: float, goal: float = 0.0) -> float:
            size = abs(objective(w, point)) + FLOOR * len(point.z)
            # An inverse that is lost in rounding may be indefinite: a decrease below zero is not a small one.
            decrease = max(abs(float(gradient @ H.solve(gradient))), TINY)
            return (goal or SAFE * self.tol) * (size / decrease) ** 0.5

        model = minimise(rows, a, start, (H, None), share, objective=objective)
        left = model.w, model.point, model.H, model.gradient, model.residual
        right = model.converged or share(*left, newton_cg.STALLED**0.5) >= 1.0  # not where it is NaN
        return (model.w, model.point.z, model.point.g, model.H), right

    def _gradient(self, at: _Point, slopes: Any, jacobian: Tensor | None) -> Array:
        if self.penalties.size == 1:
            exact = self._exact(at) if jacobian is None else jacobian
            return to_numpy(exact.T @ tensor(slopes) / self.data.rows)
        b = slopes * at.by_h
        adjoint = slopes * at.by_z
        if not self.loss.quadratic:
            adjoint = adjoint - at.third * at.factor.squares(b)
        by_column = -at.a * (at.w * at.factor.collected(adjoint) + at.factor.by_column(b))
        return to_numpy(self.penalties.gather(tensor(by_column[: self.data.features])) / self.data.rows)

    def _model(self, at: _Point) -> Tensor:
        """Return the Jacobian (rows, k) without what the leverages change by the curvatures of the losses."""
        V = at.factor.V
        by_column = V * at.by_h[:, None]
        by_column *= -at.a
        by_column -= at.by_z[:, None] * (at.a * at.w)
        by_column *= V
        return self.penalties.gather(tensor(by_column[:, : self.data.features]))

    def _exact(self, at: _Point) -> Tensor:
        """Return the Jacobian (rows, k); ``dh_i = -sum_j V_ij^2 a_j du_j - sum_k S_ik^2 d3_k dz_k``."""
        if self.penalties.size == 1:
            dz = -at.factor.predicted(at.a * at.w)
            dh = -at.factor.by_row(at.a) if self.loss.quadratic else -at.factor.moved(at.a, at.third * dz)
            return tensor(at.by_z * dz + at.by_h * dh)[:, None]
        V, features = at.factor.V, self.data.features
        dz = self.penalties.gather(tensor((-V * (at.a * at.w))[:, :features]))
        dh = self.penalties.gather(tensor((-V * V * at.a)[:, :features]))
        if not self.loss.quadratic:
            moved = tensor(at.third)[:, None] * dz
            if self.penalties.size * len(at.a) <= len(moved):
                own = type(at.third)  # arrays stay arrays
                columns = [array(each) if own is np.ndarray else each for each in moved.T]
                dh = dh - torch.stack([tensor(at.factor.squares(each)) for each in columns], 1)
            else:
                dh = dh - tensor(at.factor.kernel()).square() @ moved
        return tensor(at.by_z)[:, None] * dz + tensor(at.by_h)[:, None] * dh
