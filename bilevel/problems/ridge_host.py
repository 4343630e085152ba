"""Exact hypergradients of small ridge problems by arrays on the host, where a call of NumPy takes half of torch's.

    H(u) w = moment,      H(u) a = f_w,      dF/du = -(d pen/du) a w,      H = c X'X + diag(pen)

Both residuals are those of w and a in the coordinates of the data, whatever the way to them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.numerics.dense import EIGENVALUES
from bilevel.numerics.eigenbasis import Eigenbasis
from bilevel.oracles.structure import Exact

EPS = np.finfo(np.float64).eps
Array = NDArray[np.float64]
REDUCED = 1e8
"""Rows times squared features up to which validation rows become a triangle, which the loss cannot tell from them."""
ROUGH = 1e-9
"""Residuals above this share of the moment are left to `ClosedForm`, which judges them."""
IN_EIGENBASIS = {"gradient": 1, "hvp": 1}
BY_FACTOR = {"gradient": 3, "cross": 1}


def on_host(values: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Whether an array stands for a tensor: float64 on the CPU, of no subclass that looks at calls, and of a shape."""
    plain = type(values) is Tensor and values.dtype is torch.float64 and values.is_cpu and not values.requires_grad
    return plain and (shape is None or values.shape == shape)


def penalties_on_host(problem: Any, hparams: Tensor) -> Array | None:
    """Return the penalty of every weight, or None where one is infinite or none that a problem allows."""
    penalty: Array = problem.penalties(hparams).expand(problem.params_shape()).numpy()
    least = penalty.min()
    allowed = least > 0 if problem.parametrization == "log" else least >= 0
    return penalty if allowed and penalty.max() < math.inf else None


class HostRidge:
    """One ridge problem as arrays.

    Args:
        problem: a `RidgeProblem` that is no batch, of up to 300 features, on the host.
    """

    def __init__(self, problem: Any) -> None:
        self.gram, self.moment = problem.gram.numpy(), problem.moment.numpy()
        scale = problem.val.rows**-0.5
        self.rows, self.targets = scale * problem.val.X.t().numpy(), scale * problem.val.y.numpy()
        self._basis: tuple[Array, Array, Array] | None = None

    @staticmethod
    def of(problem: Any) -> HostRidge | None:
        """Return the arrays of a problem, or None where its tensors are too large, or elsewhere."""
        parts = (problem.train.X, problem.train.y, problem.val.X, problem.val.y)
        return HostRidge(problem) if len(problem.train.X) <= EIGENVALUES and all(map(on_host, parts)) else None

    def in_eigenbasis(self, basis: Eigenbasis, penalty: float, slope: float) -> Exact | None:
        """Return the result for one penalty, of which `slope` is the derivative; None for no positive definite H."""
        if self._basis is None:
            self._basis = (basis.values.numpy(), basis.vectors.numpy(), -basis.linear.numpy())
            self._ends = basis.values[[0, -1]].tolist()
            self._reduce()
        values, Q, moment = self._basis
        smallest, largest = self._ends
        if penalty < 0 or not smallest + penalty > EPS * (largest + penalty):
            return None
        values = values + penalty
        z = moment / values
        w = Q.dot(z)
        errors = self.rows.dot(w) - self.targets
        slopes = errors.dot(self.rows)
        t = slopes.dot(Q) / values
        a = Q.dot(t)
        product = self.gram.dot(a) + penalty * a
        by_penalty = np.array(-slope * t.dot(z))
        return self._judged(w, penalty * w, errors, slopes, a, product, by_penalty, IN_EIGENBASIS)

    def by_factor(self, problem: Any, hparams: Tensor) -> Exact | None:
        """Return the result by a Cholesky factor with a step of refinement; None for no positive definite H."""
        penalty = penalties_on_host(problem, hparams)
        if penalty is None:
            return None
        H = self.gram.copy()
        H.reshape(-1)[:: len(H) + 1] += penalty
        factor, info = torch.linalg.cholesky_ex(torch.from_numpy(H))
        if info.item():
            return None

        def solved(right: Array) -> Array:
            x = torch.cholesky_solve(torch.from_numpy(right)[:, None], factor)
            return x[:, 0].numpy()

        w = solved(self.moment)
        w += solved(self.moment - H.dot(w))
        errors = self.rows.dot(w) - self.targets
        slopes = errors.dot(self.rows)
        a = solved(slopes)
        a += solved(slopes - H.dot(a))
        slope = penalty * w if problem.parametrization == "log" else w
        by_hparams = problem.gather(torch.from_numpy(-slope * a)).numpy()
        return self._judged(w, penalty * w, errors, slopes, a, H.dot(a), by_hparams, BY_FACTOR)

    def _reduce(self) -> None:
        """Put the triangle R of ``[X_val y_val] = Q R`` in the place of many validation rows, for many penalties."""
        rows, features = self.rows.shape
        if features + 1 < rows <= REDUCED / features**2:
            triangle = np.asarray(np.linalg.qr(np.column_stack([self.rows, self.targets]), mode="r"))
            self.rows, self.targets = np.ascontiguousarray(triangle[:, :-1]), triangle[:, -1].copy()

    def _judged(
        self,
        w: Array,
        penalised: Array,
        errors: Array,
        slopes: Array,
        a: Array,
        product: Array,
        by_hparams: Array,
        counts: dict[str, int],
    ) -> Exact | None:
        """Return the result with its residuals, or None where something is to be said of it."""
        gap, m = self.gram.dot(w) + penalised - self.moment, self.moment
        residual, size = math.sqrt(gap.dot(gap)), math.sqrt(slopes.dot(slopes))
        rest = slopes - product
        adjoint_residual = math.sqrt(rest.dot(rest)) / size if size > 0 else 0.0
        loss = 0.5 * float(errors.dot(errors))
        doubtful = residual > ROUGH * math.sqrt(m.dot(m)) > 0
        if doubtful or not math.isfinite(loss + residual + adjoint_residual + by_hparams.dot(by_hparams)):
            return None
        params, adjoint, gradient = map(torch.from_numpy, (w, a, by_hparams))
        return Exact(params, adjoint, loss, gradient, residual, adjoint_residual, counts)
