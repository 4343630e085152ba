"""The one sentence about an argument of a function: name, owner, what is allowed, what it got."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from bilevel.core.options import require_value


def demand(function: str, name: str, allowed: str, value: Any, ok: Any) -> None:
    """Raise a sentence such as "`budget.omega` must be a positive number, got -1." unless all of `ok` holds."""
    if not every(ok):
        require_value(f"{function}.{name}", value, allowed, False)


def every(ok: Any) -> bool:
    """Whether a bool, or every one of an array or tensor, is true."""
    return bool(ok.all() if isinstance(ok, np.ndarray | Tensor) else ok)


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
        demand(function, name, "a number, 0 or more, or an array of them", value, numbers(value) and every(value >= 0))


def whole(value: Any, at_least: int = 0) -> bool:
    """True for a whole number that is not below `at_least`, or an array or tensor of them."""
    return numbers(value) and not isinstance(value, bool) and every((value >= at_least) & (value % 1 == 0))
