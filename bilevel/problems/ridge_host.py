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
from bilevel.numerics.eigenbasis import CLOSE, SMALL, Eigenbasis
from bilevel.oracles.exact import Exact

EPS = np.finfo(np.float64).eps
Array = NDArray[np.float64]
KNOWN = (
    *("inner_problem", "inner_loss", "outer_loss", "outer_value_and_grads", "gram", "moment", "penalties", "spread"),
    *("gather", "_shift", "_eigenbasis", "spectrum", "bind", "predict", "collect", "start"),
)
"""What arrays rest on."""
REDUCED = 1e8
"""Rows times squared features up to which validation rows become a triangle, which the loss cannot tell from them."""
ROUGH = 1e-9
"""Residuals above this share of the moment are left to `ClosedForm`, which judges them, and so are adjoints with less
than half of the digits."""
IN_EIGENBASIS = {"gradient": 1, "hvp": 1}
STEPPED = {"gradient": 2}
BY_FACTOR = {"gradient": 3, "cross": 1}


def on_host(values: Any, shape: tuple[int, ...] | None = None) -> bool:
    """Whether an array stands for a tensor: float64 on the CPU, of no subclass that looks at calls, and of a shape."""
    plain = type(values) is Tensor and values.dtype is torch.float64 and values.is_cpu and not values.requires_grad
    return plain and (shape is None or values.shape == shape)


def known_on_host(cls: type[Any]) -> bool:
    """Whether a class does nothing in another way than the class of this package that it is made of."""
    ours = next(each for each in cls.__mro__ if each.__module__.startswith("bilevel.problems."))
    return all(getattr(cls, name, None) is getattr(ours, name, None) for name in KNOWN)


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
        self._basis: tuple[Array, ...] | None = None

    @staticmethod
    def of(problem: Any) -> HostRidge | None:
        """Return the arrays of a problem, or None where its tensors are too large, or elsewhere."""
        parts = (problem.train.X, problem.train.y, problem.val.X, problem.val.y)
        return HostRidge(problem) if len(problem.train.X) <= EIGENVALUES and all(map(on_host, parts)) else None

    def in_eigenbasis(self, basis: Eigenbasis, penalty: float, slope: float) -> Exact | None:
        """Return the result for one penalty, of which `slope` is the derivative; None for no positive definite H."""
        values, Q, moment, rows, targets = self._in_basis(basis)
        values = values + penalty
        if penalty < 0 or not values[0] > EPS * values[-1]:
            return None
        z = moment / values
        w = Q.dot(z)
        errors = rows.dot(w) - targets
        slopes = errors.dot(rows)
        t = slopes.dot(Q) / values
        a = Q.dot(t)
        product = self.gram.dot(a) + penalty * a
        by_penalty = np.array(-slope * t.dot(z))
        return self._judged(w, penalty * w, errors, slopes, a, product, by_penalty, IN_EIGENBASIS)

    @np.errstate(all="ignore")  # runs that diverge are judged by their end
    def stepped(
        self, basis: Eigenbasis, penalty: float, slope: float, start: Array, numbers: tuple[float, ...], steps: int
    ) -> Exact | None:
        """Return the result of equal steps of one vector, ``x <- mix x + write grad(read x)``; see `geometric`.

        None where its quotients cancel, and where the residual has grown.
        """
        values, Q, moment, rows, targets = self._in_basis(basis)
        values = values + penalty
        mix, read, write = numbers
        q = (1.0 - mix) - write * read * values
        least = np.abs(q).min()
        if penalty < 0 or not steps * least >= SMALL:
            return None
        below = (1.0 - q) ** (steps - 1)
        power, power_slope = below * (1.0 - q), steps * below
        rest = 1.0 - power
        if least < CLOSE:
            rest = np.where(q < 0.5, -np.expm1(steps * np.log1p(-np.minimum(q, 0.5))), rest)
        total, pushed, z = rest / q, -write * moment, start.dot(Q)
        by_value = write * read * ((total - power_slope) / q * pushed + power_slope * z)
        w = Q.dot(total * pushed + power * z)
        begun, gap = (self.gram.dot(x) + penalty * x - self.moment for x in (start, w))
        residual = math.sqrt(gap.dot(gap))
        errors = rows.dot(w) - targets
        loss = 0.5 * float(errors.dot(errors))
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
        doubtful = adjoint_residual > EPS**0.5 or residual > ROUGH * math.sqrt(m.dot(m)) > 0
        if doubtful or not math.isfinite(loss + residual + adjoint_residual + by_hparams.dot(by_hparams)):
            return None
        params, adjoint, gradient = map(torch.from_numpy, (w, a, by_hparams))
        return Exact(params, adjoint, loss, gradient, residual, adjoint_residual, counts)
