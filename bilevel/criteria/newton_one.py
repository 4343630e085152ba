"""Newton's method for one model of one output, which keeps the factor of a Hessian while that serves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from bilevel.numerics.factored import Factored, factored
from bilevel.numerics.small import array, tensor
from bilevel.problems.losses import GLMLoss

TINY = sys.float_info.min
STEPS = 200
"""Steps at most; a start that is far takes about ten."""
SHORTEST = 1e-8
"""The shortest part of a step that is tried."""
SERVES = 0.01
"""A Hessian of other coefficients serves while each step leaves less than this part of the last step's decrease."""


class Model(NamedTuple):
    """A solved model.

    Attributes:
        w: coefficients, (p1,), the intercept last.
        z: predictions, (rows,).
        g: weighted slopes of the losses there, (rows,).
        d: weighted curvatures, (rows,).
        H: the Hessian there.
    """

    w: Any
    z: Any
    g: Any
    d: Any
    H: Factored


class Rows:
    """The rows of a model, as arrays, or as tensors; only targets are always a tensor.

    Args:
        X1: with a last column of ones, or without, (rows, p1).
        s: weights, (rows,).
        y: targets, (rows,).
        loss: of a prediction.
        intercept: whether there is one.
    """

    def __init__(self, X1: Any, s: Any, y: Tensor, loss: GLMLoss, intercept: bool) -> None:
        self.X1, self.s, self.y, self.loss, self.intercept = X1, s, y, loss, intercept
        self._response = loss.response(y, None)
        if self._response is not None:
            kind = (lambda t: t) if isinstance(s, Tensor) else array
            sign, target = self._response.sign, self._response.target
            self._sign = None if sign is None else kind(sign.to(s.dtype) if isinstance(s, Tensor) else sign.double())
            self._target = None if target is None else kind(target)
            self._signed = s if self._sign is None else s * self._sign

    def of(self, part: Callable[[Tensor, Tensor], Tensor], z: Any) -> Any:
        """Return the weighted values of a part of the loss, such as its slope, at predictions."""
        values = part(tensor(z), self.y)
        return self.s * (values if isinstance(z, Tensor) else array(values))

    def derivatives(self, z: Any) -> tuple[Any, Any]:
        """Return the weighted slopes and curvatures of the losses at predictions."""
        response = self._response
        if response is None:
            return self.of(self.loss.slope, z), self.of(self.loss.curvature, z)
        p = tensor(z * 1.0 if self._sign is None else self._sign * z)
        response.apply(p)
        d = response.curvature(p)
        if not isinstance(z, Tensor):
            p, d = array(p), array(d)
        return self._signed * (p if self._target is None else p - self._target), self.s * d

    def objective(self, w: Any, z: Any, a: Any) -> float:
        """Return ``sum_i s_i loss(z_i, y_i) + 1/2 sum_j a_j w_j^2``."""
        return float(self.of(self.loss.value, z).sum() + 0.5 * ((a * w) @ w))


def solve(rows: Rows, a: Any, start: Any, kept: Factored | None, tol: float) -> Model:
    """Return the model at penalties a.

    A step whose expected decrease is below tol times the objective is taken and ends the iteration: what it leaves is
    of the order of its square. With the Hessian of other coefficients, the decrease that a step leaves is foreseen from
    the last two, and more steps of that kind are taken until as little is left.

    Args:
        rows: of the model.
        a: penalties, (p1,), of the intercept zero.
        start: coefficients, (p1,).
        kept: the Hessian of a model near by.
        tol: relative decrease below which a Newton step is the last.
    """
    X1, floor = rows.X1, 1e-12 * len(rows.s)
    w, z = start, X1 @ start
    g, d = rows.derivatives(z)
    exact = kept is None  # whether H is that of the current coefficients
    if kept is not None and kept.X1 is X1:
        H = kept.under(a)
    else:  # that of other coordinates has its curvatures to give
        H = factored(X1, d if kept is None else kept.d, a, rows.intercept)
    value, last = rows.objective(w, z, a), 0.0
    for _ in range(STEPS):
        gradient = g @ X1 + a * w
        move = H.solve(gradient)
        decrease = float(gradient @ move)
        scale = abs(value) + floor
        left = decrease * (decrease / scale if exact else decrease / max(last, decrease, TINY))
        w, z, new = _searched(rows, a, w, z, move, value, decrease)
        g, d = rows.derivatives(z)
        rose = not new < value
        value, last = new, decrease
        # A step that rounding leaves without a decrease ends it, too.
        if left <= tol**2 * scale or (exact and rose):
            break
        serves = not rose and (exact or left <= SERVES * decrease)
        exact = not serves
        if exact:
            H = H.at(d)
    return Model(w, z, g, d, H.at(d))


def _searched(rows: Rows, a: Any, w: Any, z: Any, move: Any, value: float, decrease: float) -> tuple[Any, Any, float]:
    """Return the end of a step, halved until the objective falls, with its predictions and its objective."""
    dz, length = rows.X1 @ move, 1.0
    while True:
        there, predicted = w - length * move, z - length * dz
        new = rows.objective(there, predicted, a)
        # Written so that NaN counts as a rise.
        if new <= value - 1e-4 * length * decrease + 1e-12 * abs(value) or length <= SHORTEST:
            return there, predicted, new
        length *= 0.5
