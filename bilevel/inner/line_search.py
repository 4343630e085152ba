"""A line search for descent directions: sufficient decrease and a slope that has flattened (Hager & Zhang 2005)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import Linearization

DECREASE, FLATTENED = 1e-4, 0.9
"""Share of the predicted decrease that is enough, and of the slope that is still too steep."""
PROGRESS = 0.9
"""A convex problem's gradient norm below this multiple of the last one is progress that needs no further look."""
TRIALS, FLOOR_TRIALS = 40, 5
"""Most steps to look at, and where the predicted decrease is below the rounding of the loss."""


@dataclass(frozen=True)
class Ray:
    """Where a search starts (`gradient` is flat there), and where it goes: ``params - t * direction``."""

    point: Linearization
    raveler: tree.Raveler
    gradient: Tensor
    direction: Tensor


@dataclass(frozen=True)
class Found:
    """An accepted step: where it leads, the flat gradient there, and its norm relative to that at the start."""

    params: Tree
    gradient: Tensor
    rate: float


def search(ray: Ray, length: float = 1.0) -> Found | None:
    """Return a step along the ray, or None at the rounding floor, where the loss cannot tell steps apart.

    A step t is accepted where the loss has fallen by ``1e-4 t`` times its slope and the slope has flattened to 0.9 of
    itself (Wolfe's conditions). Where losses differ by rounding alone, the slopes stand in for them. For a problem that
    is known to be convex, a gradient norm that falls by a tenth is enough: steps that all do so lead to the minimum.

    Raises:
        ArithmeticError: if no t, from `length` on, is accepted above the rounding floor.
    """
    inner, x = ray.point.inner, ray.raveler.ravel(ray.point.params)
    norm = float(tree.norm(ray.gradient))
    slope = -float(torch.dot(ray.gradient, ray.direction))
    value: float | None = None
    slack = 0.0
    low, high, t = 0.0, math.inf, length
    for count in range(TRIALS):
        if value is not None and count >= FLOOR_TRIALS and -slope * length <= slack:
            return None
        if value is None and not inner.convex:
            value, slack = _start(ray.point, x.dtype)
        trial = ray.raveler.unravel(torch.sub(x, ray.direction, alpha=t))
        gradient = ray.raveler.ravel(inner.grad(trial))
        rate = float(tree.norm(gradient)) / norm
        if inner.convex and rate <= PROGRESS:
            return Found(trial, gradient, rate)
        if value is None:
            value, slack = _start(ray.point, x.dtype)
        there = float(inner.value(trial))
        slope_there = -float(torch.dot(gradient, ray.direction))
        decreased = there <= value + DECREASE * t * slope
        decreased |= there <= value + slack and slope_there <= (2 * DECREASE - 1) * slope
        if decreased and math.isfinite(rate):
            if slope_there >= FLATTENED * slope:
                return Found(trial, gradient, rate)
            low = t
        else:
            high = t
        t = 2 * t if high == math.inf else (low + high) / 2
    what = "falls without end" if high == math.inf else "does not fall"
    raise ArithmeticError(f"the loss {what} along a direction of slope {slope:.3g}")


def _start(point: Linearization, dtype: torch.dtype) -> tuple[float, float]:
    """Return the loss at the start, and how much of it is rounding."""
    value = float(point.value)
    return value, 1e3 * torch.finfo(dtype).eps * abs(value)
