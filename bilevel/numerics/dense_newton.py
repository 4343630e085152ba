"""Dense Newton steps of a linear model of one output, by arrays or tensors.

    H step = gradient,      gradient = X1' g + a w,      H = X1' diag(d) X1 + diag(a)

with g and d the weighted slopes and curvatures of the losses at the predictions ``z = X1 w``. One Hessian serves for
several steps, that of other penalties for the first ones, while these are quick: such a step takes two products with
X1, and a Hessian many. A step is halved until the norm of the gradient falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bilevel.numerics.factored import Factored, factored
from bilevel.numerics.small import norm

LOWER, SHORTEST, KINKED = 1e-4, 1e-3, 1e-8
"""The share of its length by which a step has to lower what it is judged by; the least length, by what that is."""
ROUNDED = 1e-12
"""Share of an objective below which a change is rounding."""
STEPS, COLUMNS, MOST = 2.0, 10.0, 10.0
"""A new Hessian costs about as much as so many steps, and one more for every so many columns; at most so many."""
HOST: tuple[Any, ...] = (np.dot, np.ndarray.copy, torch.from_numpy, Tensor.numpy)
DEVICE: tuple[Any, ...] = (torch.matmul, Tensor.clone, *2 * (lambda values: values,))
"""Products, copies, tensors of what there is and what there is of tensors: of arrays, and of tensors."""


class Point(NamedTuple):
    """The losses of a model.

    Attributes:
        z: predictions, (rows,).
        response: what curvatures are made of.
        g: weighted slopes.
        slope: their gradient, ``X1' g``.
    """

    z: Any
    response: Any
    g: Any
    slope: Any


class Model(NamedTuple):
    """Where steps have ended.

    Attributes:
        w: coefficients, (p1,), the intercept last.
        point: the losses there.
        gradient: of the objective, and its norm.
        residual: that norm.
        H: the Hessian there.
        counts: gradients, Hessians and steps.
        converged: whether as little is left as was asked for.
    """

    w: Any
    point: Point
    gradient: Any
    residual: float
    H: Factored
    counts: tuple[int, int, int]
    converged: bool


class Rows:
    """The rows of a model, as arrays, or as tensors; only targets are always a tensor.

    Args:
        X1: with a last column of ones, or without, (rows, p1).
        s: weights, (rows,), or one for all.
        y: targets, (rows,).
        loss: of a prediction, a `GLMLoss`.
        intercept: whether there is one.
        signed: whether rows of X1, and with them predictions, take the signs that the slopes have.
    """

    def __init__(self, X1: Any, s: Any, y: Tensor, loss: Any, intercept: bool = False, signed: bool = False) -> None:
        self.s, self.y, self.loss, self.intercept = s, y, loss, intercept
        # Chosen once, and for arrays what is quickest: on few rows the time of a step is that of its calls.
        self._dot, self._copy, self._given, self._made = HOST if isinstance(X1, np.ndarray) else DEVICE
        self._response = loss.response(y, None)
        sign, target = (None, None) if self._response is None else (self._response.sign, self._response.target)
        sign = None if sign is None else self._made(sign.double() if isinstance(X1, np.ndarray) else sign.to(X1))
        self._target = None if target is None else self._made(target)
        self.X1 = X1 if sign is None or not signed else (X1.T * sign).T  # X1 keeps its order in memory
        self._sign: Any = None if signed else sign
        self._undo: Any = sign if signed else None
        self._signed = s if self._sign is None else s * self._sign
        rows, columns = X1.shape
        self.wide = columns > rows + 1
        self.patience = STEPS if self.wide else min(STEPS + columns / COLUMNS, MOST)

    def of(self, part: Callable[[Tensor, Tensor], Tensor], z: Any) -> Any:
        """Return the weighted values of a part of the loss, such as its slope, at predictions."""
        return self.s * self._made(part(self._given(z if self._undo is None else z * self._undo), self.y))

    def value(self, z: Any) -> float:
        """Return the weighted sum of the losses at predictions."""
        if self._response is None or self._response.value is None:
            return float(self.of(self.loss.value, z).sum())
        values = self._response.value(self._given(z if self._sign is None else self._sign * z))
        return float((self.s * self._made(values)).sum())

    def slopes(self, z: Any) -> tuple[Any, Any]:
        """Return the response to predictions, and the weighted slopes of the losses."""
        if self._response is None:
            return z, self.of(self.loss.slope, z)
        p = self._copy(z) if self._sign is None else self._sign * z
        self._response.apply(self._given(p))
        return p, self._signed * (p if self._target is None else p - self._target)

    def curvatures(self, response: Any) -> Any:
        """Return the weighted curvatures, from what `slopes` has returned."""
        if self._response is None:
            return self.of(self.loss.curvature, response)
        return self.s * self._made(self._response.curvature(self._given(response)))

    def at(self, w: Any) -> Point:
        """Return the losses of coefficients."""
        z = self._dot(self.X1, w)
        p, g = self.slopes(z)
        return Point(z, p, g, self._dot(g, self.X1))

    def hessian(self, point: Point, a: Any, H: Factored | None) -> Factored:
        """Return H at a point; H of another one shares what only penalties change."""
        d = self.curvatures(point.response)
        return factored(self.X1, d, a, self.intercept) if H is None else H.at(d)


def minimise(
    rows: Rows,
    a: Any,
    start: Any,
    known: tuple[Factored | None, Any],
    share: Callable[[Any, Any, Factored, Any, float], float],
    most: int = 200,
    objective: Callable[[Any, Any], float] | None = None,
) -> Model:
    """Return the model at penalties a, of an intercept zero, with its own Hessian.

    Args:
        rows: of the model.
        a: penalties, (p1,).
        start: coefficients, (p1,).
        known: H near by, under the same penalties, and `Point.slope` of the start, which shortens the way and shows
            nothing; None for what is not known.
        share: (w, point, H, gradient, its norm) -> the share of it that may be left; from 1 on, steps end.
        most: steps at most.
        objective: (w, point) -> what a step by its own Hessian has to lower. Without one its gradient has to fall,
            which slopes with kinks or bounds make rise on the way, or fall far from it.
    """
    (H, slope), w, step, point = known, start, start, None
    shortest = SHORTEST if objective is None else KINKED
    base: tuple[Any, ...] = (w, point, slope)
    before, t, own, stale, converged, tried, made, steps = math.inf, 1.0, False, H is None, False, 0, 0, 0
    while True:
        if slope is None:
            point, tried = rows.at(w), tried + 1
            slope = point.slope
        residual = float(norm(gradient := slope + a * w))
        fell = residual <= (1.0 - LOWER * t) * before  # not where it is NaN
        if own and objective is not None and before < math.inf:
            least = LOWER * t * float(step @ (base[2] + a * base[0]))
            fell = _is_lower(objective(*base[:2]), objective(w, point), least, fell)
        if not fell:
            if before == math.inf or t < shortest:
                break
            if own:
                t /= 2
                w, slope = base[0] - t * step, None
            else:  # the Hessian of elsewhere leads uphill
                (w, point, slope), before, stale = base, math.inf, True
            continue
        if H is not None and not stale:
            left = share(w, point, H, gradient, residual)
            stale = left >= 1.0 or _is_slow(residual / before, left, rows.patience)
        own = stale
        if stale:
            if point is None:
                slope = None
                continue
            H, made = rows.hessian(point, a, H), made + 1
            converged = share(w, point, H, gradient, residual) >= 1.0
        if H is None or converged or steps == most or residual == math.inf:
            break
        base, step, before, t, steps = (w, point, slope), H.solve(gradient), residual, 1.0, steps + 1
        w, point, slope, stale = w - step, None, None, False
    return _ended(rows, a, base if t < shortest else (w, point, slope), H, (tried, made, steps), converged)


def _ended(
    rows: Rows, a: Any, there: tuple[Any, ...], H: Factored | None, counts: tuple[int, int, int], converged: bool
) -> Model:
    w = there[0]
    point = rows.at(w) if there[1] is None else there[1]
    gradient = point.slope + a * w
    own = H if converged and H is not None else rows.hessian(point, a, H)
    return Model(w, point, gradient, float(norm(gradient)), own, counts, converged)


def _is_lower(old: float, new: float, least: float, fell: bool) -> bool:
    """Whether an objective has fallen, and by enough; where rounding leaves open by how much, its gradient decides."""
    return new <= old - least + ROUNDED * abs(old) and (new < old or fell)


def _is_slow(rate: float, left: float, patience: float) -> bool:
    """Whether more steps are to be expected, at the rate of the last one, than a new Hessian costs."""
    return rate > 0 and left > 0 and not rate**patience <= left
