"""Exact hypergradients of small ridge problems by arrays on the host.

    H(u) w = moment,      H(u) a = f_w,      dF/du = -(d pen/du) a w,      H = c X'X + diag(pen)

Both residuals are those of w and a in the coordinates of the data, whatever the way to them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.numerics.dense import EIGENVALUES
from bilevel.numerics.eigenbasis import Eigenbasis, geometric
from bilevel.numerics.inverse import RIGHT, UNITS, ByFactor, InBasis, is_right, rounding
from bilevel.numerics.small import norm
from bilevel.oracles.exact import Exact
from bilevel.problems.host import EPS, Array, on_host, penalties_on_host

REDUCED = 1e8
"""Rows times squared features up to which validation rows become a triangle, which the loss cannot tell from them."""
IN_EIGENBASIS = {"gradient": 1, "hvp": 1}
STEPPED = {"gradient": 2}
BY_FACTOR = {"gradient": 3, "cross": 1}


class HostRidge:
    """One ridge problem as arrays.

    Args:
        problem: a `RidgeProblem` that is no batch, of up to 300 features, on the host.
    """

    def __init__(self, problem: Any) -> None:
        self.gram, self.moment = problem.gram.numpy(), problem.moment.numpy()
        columns, targets = (problem.val.rows**-0.5 * each.numpy() for each in (problem.val.X, problem.val.y))
        self.rows, self.targets, self.curvature = columns.T, targets, norm(columns) ** 2
        self.diagonal = self.gram.diagonal()
        self.trace = float(self.diagonal.sum())
        self._basis: tuple[Array, ...] | None = None

    @staticmethod
    def of(problem: Any) -> HostRidge | None:
        """Return the arrays of a problem, or None where its tensors are too large, or elsewhere."""
        parts = (problem.train.X, problem.train.y, problem.val.X, problem.val.y)
        return HostRidge(problem) if len(problem.train.X) <= EIGENVALUES and all(map(on_host, parts)) else None

    def exact(self, problem: Any, hparams: Tensor, basis: Eigenbasis | None) -> Exact | None:
        """Return the result, in the eigenbasis or by a Cholesky factor; None where something is to be said of it."""
        penalty = penalties_on_host(problem, hparams)
        if penalty is None:
            return None
        rows, targets, counts = self.rows, self.targets, BY_FACTOR
        inverse: ByFactor | InBasis | None = None
        if basis is not None:
            values, Q, _, *reduced = self._in_basis(basis)
            values = values + penalty
            if values[0] > EPS**0.5 * values[-1]:
                (rows, targets), counts, inverse = reduced, IN_EIGENBASIS, InBasis(Q, values)
        if inverse is None:
            H = self.gram.copy()
            H.reshape(-1)[:: len(H) + 1] += penalty
            inverse = factor = ByFactor(H)
            if factor.fails:
                return None
        scalar, slope = problem.penalty == "scalar", penalty if problem.parametrization == "log" else 1.0

        def outer(w: Array) -> tuple[Array, Array]:
            errors = rows.dot(w) - targets
            return errors.dot(rows), errors

        def pull(w: Array, a: Array) -> Array:
            return np.array(-a.dot(slope * w)) if scalar else -a * (slope * w)

        w = inverse(self.moment)
        f, errors = outer(w)
        a = inverse(f)
        total, size, loss = pull(w, a), norm(f), 0.5 * float(errors.dot(errors))
        gap = self.gram.dot(w) + penalty * w - self.moment
        rest = f - self.gram.dot(a) - penalty * a
        most = slope if isinstance(slope, float) else slope.max()
        error = most * self._error(inverse.smallest(), penalty, norm(w), norm(a))
        if not error <= RIGHT * (norm(total) if total.ndim else abs(total)) and not is_right(
            *rounding(inverse, np.sqrt(self.diagonal + penalty), w, a, lambda w: (outer(w)[0], 0.0), pull), EPS
        ):
            return None
        params, adjoint, gradient = map(torch.from_numpy, (w, a, total))
        return Exact(params, adjoint, loss, gradient, norm(gap), norm(rest) / size if size > 0 else 0.0, counts)

    def _error(self, smallest: float, penalty: Any, size: float, adjoint: float) -> float:
        """Return a bound of what rounding does to ``a w``, from the norms of both, where it is small."""
        trace = self.trace + (len(self.moment) * penalty if isinstance(penalty, float) else float(penalty.sum()))
        share = UNITS * EPS * (1.0 + trace / smallest)
        return share * size * (2.0 * adjoint + self.curvature * size / smallest)

    @np.errstate(all="ignore")  # runs that diverge are judged by their end
    def stepped(
        self, problem: Any, hparams: Tensor, basis: Eigenbasis, start: Array, numbers: tuple[float, ...], steps: int
    ) -> Exact | None:
        """Return the result of equal steps of one vector, ``x <- mix x + write grad(read x)``; see `geometric`.

        None where the residual has grown.
        """
        penalty = penalties_on_host(problem, hparams)
        if penalty is None:
            return None
        values, Q, moment, rows, targets = self._in_basis(basis)
        values = values + penalty
        mix, read, write = numbers
        q = (1.0 - mix) - write * read * values
        power, power_slope, total, total_slope = geometric(q, steps)
        pushed, z = -write * moment, start.dot(Q)
        by_value = write * read * (total_slope * pushed + power_slope * z)
        w = Q.dot(total * pushed + power * z)
        begun, gap = (self.gram.dot(x) + penalty * x - self.moment for x in (start, w))
        residual = math.sqrt(gap.dot(gap))
        errors = rows.dot(w) - targets
        loss = 0.5 * float(errors.dot(errors))
        slope = penalty if problem.parametrization == "log" else 1.0
        by_penalty = np.array(slope * errors.dot(rows).dot(Q).dot(by_value))
        if not residual <= math.sqrt(begun.dot(begun)) or not math.isfinite(loss + by_penalty):
            return None
        made = torch.from_numpy(w), None, loss, torch.from_numpy(by_penalty), residual, None, STEPPED
        return Exact(*made, steps, steps, form="eigenbasis")

    def _in_basis(self, basis: Eigenbasis) -> tuple[Array, ...]:
        """Return eigenvalues, eigenvectors, the moment in their coordinates, and validation rows and targets.

        In the place of many rows is the triangle R of ``[X_val y_val] = Q R``, for many penalties.
        """
        if self._basis is None:
            rows, targets = self.rows, self.targets
            count, features = rows.shape
            if features + 1 < count <= REDUCED / features**2:
                triangle = np.asarray(np.linalg.qr(np.column_stack([rows, targets]), mode="r"))
                rows, targets = np.ascontiguousarray(triangle[:, :-1]), triangle[:, -1].copy()
            # At once: other threads see all of it or nothing.
            self._basis = basis.values.numpy(), basis.vectors.numpy(), -basis.linear.numpy(), rows, targets
        return self._basis
