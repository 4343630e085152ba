"""The step of a trust region in a box: least value of a quadratic model within a ball and between bounds.

    min over s   g's + 1/2 s'B s      subject to   |s| <= radius,   lower <= s <= upper

A projected Cauchy point, then subspace steps with a projected search (after TRON, Lin and Moré 1999). The models have a
row for each hyperparameter or group of them, so all of it runs on the host, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

CAUCHY = 0.1
"""The share of the slope's decrease that the Cauchy point has to keep."""
PASSES = 20
"""Most subspace steps."""
GAIN = 1e-3
"""A pass that gains less than this share of the decrease is the last."""
EDGE = 1e-9
"""A bound counts as reached within this share of the box: at the rounding of a shrinkage near one nothing is free."""


def ball_step(g: Vector, B: Vector, radius: float) -> Vector:
    """Return the minimiser of ``g's + 1/2 s'B s`` within ``|s| <= radius``, by eigenvalues; the hard case included.

    >>> ball_step(np.array([1.0, 0.0]), np.diag([1.0, -1.0]), 2.0).round(3)
    array([-0.5  ,  1.936])
    """
    values, vectors = np.linalg.eigh(B)
    slopes = vectors.T @ g
    largest = max(abs(values[0]), abs(values[-1]), 1e-300)
    if values[0] > 1e-14 * largest:
        step = -slopes / values
        if math.sqrt(step @ step) <= radius:
            return np.asarray(vectors @ step)
    # Hebden's iteration for |s(shift)| = radius, which is concave in the reciprocal, kept between bounds.
    low = max(0.0, -values[0]) + 1e-15 * largest
    high = shift = low + math.sqrt(g @ g) / radius + 1e-300
    for _ in range(60):
        step = slopes / (values + shift)
        length = math.sqrt(step @ step)
        if length > radius:
            low = shift
        else:
            high = shift
            if length >= (1 - 1e-6) * radius:
                break
        fall = float(step @ (step / (values + shift)))
        shift += (length / radius - 1.0) * length * length / fall if fall > 0 else 0.0
        if not low < shift < high:
            # The shift may lie many orders above its lower end.
            shift = math.sqrt(low * high) if high > 10 * low > 0 else 0.5 * (low + high)
        if high - low <= 1e-12 * high:
            break
    step = -slopes / (values + high)
    short = radius * radius - step @ step
    if short > 1e-5 * radius * radius and values[0] < 0:
        # The hard case: along the lowest eigenvector the model falls up to the sphere.
        step[0] = math.copysign(math.sqrt(step[0] * step[0] + short), step[0] + 0.0)
    return np.asarray(vectors @ step)


def box_step(g: Vector, B: Vector, radius: float, lower: Vector, upper: Vector) -> tuple[Vector, float]:
    """Return a step s within the ball and the box, and the decrease ``-(g's + 1/2 s'B s)`` that the model predicts.

    Args:
        g: slopes, of shape (k,).
        B: the model's second derivatives, (k, k); may be indefinite.
        radius: of the ball.
        lower: least step of each variable, at most zero.
        upper: largest step, at least zero.

    >>> s, decrease = box_step(np.array([-1.0, -1.0]), np.eye(2), 3.0, np.zeros(2), np.array([0.5, 2.0]))
    >>> s, decrease
    (array([0.5, 1. ]), 0.875)
    """

    def model(s: Vector) -> float:
        return float(g @ s + 0.5 * (s @ (B @ s)))

    near = EDGE * np.minimum(upper - lower, 1.0)
    held = ((lower >= -near) & (g > 0)) | ((upper <= near) & (g < 0))
    slope = np.where(held, 0.0, -g)
    size = math.sqrt(slope @ slope)
    s = np.zeros_like(g)
    if size == 0:
        return s, 0.0
    length = radius / size
    for _ in range(30):
        trial = np.clip(length * slope, lower, upper)
        if model(trial) <= CAUCHY * (g @ trial):
            s = trial
            break
        length /= 4
    for _ in range(PASSES):
        q = g + B @ s
        free = ~(((s <= lower + near) & (q > 0)) | ((s >= upper - near) & (q < 0))) & (upper > lower)
        if not free.any() or np.linalg.norm(q[free]) <= 1e-8 * size:
            break
        # The free variables anew, with the others held where they are, in what they leave of the ball.
        held = np.where(free, 0.0, s)
        room = math.sqrt(max(0.0, radius * radius - float(held @ held)))
        if room == 0:
            break
        towards = np.zeros_like(g)
        towards[free] = ball_step((g + B @ held)[free], B[np.ix_(free, free)], room) - s[free]
        before, best = model(s), _searched(model, s, towards, lower, upper)
        if best is None:
            break
        value, s = best
        if before - value <= GAIN * -value:
            break
    return s, -model(s)


def _searched(model: Any, s: Vector, towards: Vector, lower: Vector, upper: Vector) -> tuple[float, Vector] | None:
    """Return the first lowest value of the model along the projected way, with its step; None where it rises."""
    best: tuple[float, Vector] | None = None
    base, share = model(s), 1.0
    for _ in range(12):
        trial = np.clip(s + share * towards, lower, upper)
        value = model(trial)
        if value < (base if best is None else best[0]):
            best = (value, trial)
        elif best is not None:
            break
        share /= 2
    return best
