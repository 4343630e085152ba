"""The one sentence about an argument of a function: name, owner, what is allowed, what it got."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def demand(function: str, name: str, allowed: str, value: Any, ok: Any) -> None:
    """Raise the sentence about an argument unless all of `ok` holds.

    Args:
        function: the function that has the argument.
        name: the argument's name.
        allowed: what is allowed, in words.
        value: what was given.
        ok: a bool, or an array or tensor of them.

    Raises:
        ValueError: if `ok` does not hold, such as "`budget.omega` must be a positive number, got -1."
    """
    if not bool(ok.all() if isinstance(ok, np.ndarray | Tensor) else ok):
        raise ValueError(f"`{function}.{name}` must be {allowed}, got {value!r}.")


def numbers(value: Any) -> bool:
    """True for a finite number, or an array or tensor of them."""
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return False
    return array.dtype.kind in "iuf" and bool(np.isfinite(array).all())


def at_least_zero(function: str, **values: Any) -> None:
    """Demand that every named argument is a number, 0 or more, or an array of them."""
    for name, value in values.items():
        allowed = "a number, 0 or more, or an array of them"
        demand(function, name, allowed, value, numbers(value))
        demand(function, name, allowed, value, value >= 0)
