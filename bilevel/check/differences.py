"""Derivatives from values alone: extrapolated central differences, and a search for jumps.

Central differences at steps h, h/4, h/16, ... are extrapolated to h = 0 (Ridders 1982); how much two extrapolations
differ says how far the result can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

LEVELS = 8
SHRINK = 4.0
FIRST = 0.05
"""The largest step of a difference, for a direction of length one."""
PIECES = 16
HALVINGS = 30
NOTHING = 1e-9
"""Share of the largest value below which what is unexplained of a piece is no jump."""


def derivative(function: Callable[[float], float], first: float = FIRST, levels: int = LEVELS) -> tuple[float, float]:
    """Return the derivative of a function of one number at zero, and its uncertainty: infinite where all is NaN.

    `first` is the largest step, `levels` the most steps; those at which the function is not finite are left out.

    >>> value, uncertainty = derivative(math.exp)
    >>> abs(value - 1) < 1e-10, uncertainty < 1e-9
    (True, True)
    """
    best, uncertainty = math.nan, math.inf
    row: list[float] = []
    for level in range(levels):
        h = first / SHRINK**level
        quotient = (function(h) - function(-h)) / (2 * h)
        if not math.isfinite(quotient):
            row = []
            continue
        following = [quotient]
        for order, before in enumerate(row, start=1):
            power = SHRINK ** (2 * order)
            following.append((power * following[-1] - before) / (power - 1))
            apart = max(abs(following[-1] - following[-2]), abs(following[-1] - before))
            if apart <= uncertainty:
                best, uncertainty = following[-1], apart
        # Where the extrapolations get worse, rounding has taken over.
        if row and abs(following[-1] - row[-1]) > 2 * uncertainty and level >= 3:
            break
        row = following
    return best, uncertainty


def largest_jump(function: Callable[[float], tuple[float, float]]) -> tuple[float, float]:
    """Return the largest jump on [0, 1] of a function t -> (value, slope), and the largest of its values.

    A piece whose values differ by what the integral of the slope does not explain is halved again and again: at a jump
    the difference stays, at a kink or a steep slope it vanishes. Where a value is not finite, the jump is zero.

    >>> round(largest_jump(lambda t: (t**2 + (t > 0.7), 2 * t))[0], 6)
    1.0
    """

    def unexplained(a: float, b: float, at_a: tuple[float, float], at_b: tuple[float, float]) -> Any:
        middle = (a + b) / 2
        at_middle = function(middle)
        integral = (b - a) / 6 * (at_a[1] + 4 * at_middle[1] + at_b[1])
        return abs(at_b[0] - at_a[0] - integral), (a, b, at_a, at_b), middle, at_middle

    grid = [index / PIECES for index in range(PIECES + 1)]
    values = [function(t) for t in grid]
    size = max(abs(value) for value, _ in values)
    if not all(math.isfinite(value) and math.isfinite(slope) for value, slope in values):
        return 0.0, math.inf
    pieces = [unexplained(*each) for each in zip(grid, grid[1:], values, values[1:], strict=False)]
    worst = max(pieces, key=lambda piece: piece[0])
    for _ in range(HALVINGS):
        gap, (a, b, at_a, at_b), middle, at_middle = worst
        if gap <= NOTHING * size:
            break
        halves = unexplained(a, middle, at_a, at_middle), unexplained(middle, b, at_middle, at_b)
        worst = max(halves, key=lambda piece: piece[0])
    jump = worst[0]
    return (jump if math.isfinite(jump) else 0.0), size
