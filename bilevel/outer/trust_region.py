"""The step of a trust region in a box: least value of a quadratic model within a ball and between bounds.

    min over s   g's + 1/2 s'B s      subject to   |s| <= radius,   lower <= s <= upper

A projected Cauchy point, then subspace steps with a projected search (after TRON, Lin and Moré 1999). The models have a
row for each hyperparameter or group of them, so all of it runs on the host, in float64.
"""

from __future__ import annotations

import math

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
    slopes, lowest, spread = -(g @ vectors), float(values[0]), values - values[0]
    least = max(lowest, 1e-15 * max(abs(lowest), float(values[-1]), 1e-285))
    # Hebden's iteration for |s| = radius, in the lowest damped eigenvalue. It begins where one component alone is that
    # long, and goes up to the root, never past it: 1/|s| is concave.
    damped = spread + max(least, float((np.abs(slopes) / radius - spread).max()))
    for _ in range(60):
        step = slopes / damped
        square = float(step @ step)
        length = math.sqrt(square)
        if length <= (1 + 1e-10) * radius:
            break
        damped = damped + (length / radius - 1.0) * square / float(step @ (step / damped))
    short = radius * radius - square
    if short > 1e-5 * radius * radius and lowest < 0:
        # The hard case: along the lowest eigenvector the model falls up to the sphere.
        step[0] = math.copysign(math.sqrt(step[0] * step[0] + short), step[0] + 0.0)
    return np.asarray(vectors @ step)


def box_step(g: Vector, B: Vector, radius: float, lower: Vector, upper: Vector) -> tuple[Vector, float]:
    """Return a step s within the ball and the box, and the decrease ``-(g's + 1/2 s'B s)`` that the model predicts.

    B may be indefinite; lower bounds are at most zero, upper ones at least.

    >>> s, decrease = box_step(np.array([-1.0, -1.0]), np.eye(2), 3.0, np.zeros(2), np.array([0.5, 2.0]))
    >>> s, decrease
    (array([0.5, 1. ]), 0.875)
    """
    near = EDGE * np.minimum(upper - lower, 1.0)
    low, high, apart = lower + near, upper - near, upper > lower

    def free(s: Vector, q: Vector) -> NDArray[np.bool_]:
        return ((s > low) | (q <= 0)) & ((s < high) | (q >= 0)) & apart

    s = bent = np.zeros(len(g))
    slope = np.where(free(s, g), -g, 0.0)
    size = math.sqrt(slope @ slope)
    if size == 0:
        return s, 0.0
    for attempt in range(30):
        trial = np.minimum(np.maximum(radius / size / 4.0**attempt * slope, lower), upper)
        product, along = B @ trial, float(g @ trial)
        if along + 0.5 * float(trial @ product) <= CAUCHY * along:
            s, bent = trial, product
            break
    solved = b""
    for _ in range(PASSES):
        q = g + bent
        moving = free(s, q)
        (at,), mask = moving.nonzero(), moving.tobytes()
        rest = q[at]
        if mask == solved or math.sqrt(rest @ rest) <= 1e-8 * size:
            break
        # The free variables anew, with the others held where they are, in what they leave of the ball.
        held = np.where(moving, 0.0, s)
        room = math.sqrt(max(0.0, radius * radius - float(held @ held)))
        if room == 0:
            break
        model, start, towards = B[at][:, at], s[at], np.zeros(len(g))
        towards[at] = ball_step(rest - model @ start, model, room) - start
        before = 0.5 * float((g + q) @ s)
        found = _searched(g, B, s, before, towards, lower, upper)
        if found is None:
            break
        value, s, bent, whole = found
        if before - value <= GAIN * -value:
            break
        solved = mask if whole else b""
    return s, -0.5 * float((g + g + bent) @ s)


def _searched(
    g: Vector, B: Vector, s: Vector, before: float, towards: Vector, lower: Vector, upper: Vector
) -> tuple[float, Vector, Vector, bool] | None:
    """Return the first lowest value of the model along the projected way, below the one before; None where it rises.

    With it the step, B times the step, and whether it is the whole one, which meets no bound: then none is better.
    """
    best: tuple[float, Vector, Vector, bool] | None = None
    share = 1.0
    for _ in range(12):
        moved = s + share * towards
        trial = np.minimum(np.maximum(moved, lower), upper)
        bent = B @ trial
        value, whole = float(g @ trial) + 0.5 * float(trial @ bent), share == 1.0 and bool((trial == moved).all())
        if value < (before if best is None else best[0]):
            best = (value, trial, bent, whole)
        if whole or (best is not None and best[1] is not trial):
            break
        share /= 2
    return best
