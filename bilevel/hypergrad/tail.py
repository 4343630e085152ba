"""The last inner steps, given by their number or their share."""

from __future__ import annotations

from typing import Any

from bilevel.base import InnerSolver
from bilevel.core.options import is_int, is_number


def is_tail(value: Any) -> bool:
    """True for a positive int, and for a fraction: a float in (0, 1]."""
    return is_int(value) or (isinstance(value, float) and is_number(value) and 0 < value <= 1)


def length_of(tail: int | float | str | None, steps: int) -> int:
    """Return how many of `steps` a tail has: ``ceil(tail * steps)`` of a fraction; all for "auto" and None."""
    if tail is None or isinstance(tail, str):
        return steps
    # 0.07 * 100 is a little above 7 in floating point.
    return max(1, -int(-(tail * steps - 1e-9) // 1)) if isinstance(tail, float) else int(tail)


def check_length(owner: Any, solver: InnerSolver) -> None:
    """Refuse a tail that is longer than the run; ValueError names the `tail` of the estimator `owner`."""
    if solver.steps is not None and length_of(owner.tail, solver.steps) > solver.steps:
        raise ValueError(
            f"`{type(owner).__name__}.tail` is {owner.tail}, but the inner solver takes {solver.steps} steps: "
            f"the tail must be at most {solver.steps}."
        )


def refuse_fixed(tail: int | float | str) -> None:
    """Refuse a tail of a fixed length where a `target_error` is asked for; ValueError says what to give."""
    if isinstance(tail, int):
        raise ValueError(
            f"a tail of {tail} steps leaves an error that no tolerance takes away, so that it leads to no "
            "`target_error`: give `tail` a fraction, or use AdaptiveUnroll() or Implicit()."
        )
