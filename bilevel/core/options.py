"""One validator and one sentence for every option: name, owner, what is allowed, what it got."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from bilevel.core.spelling import suggest as suggest

LARGEST = 1e75
"""Of larger numbers the squares of squared errors, which standard errors need, are not finite in float64."""


def require(owner: object, name: str, allowed: str, ok: bool) -> None:
    """Raise the one sentence about an option unless `ok`; `allowed` says in words what is allowed."""
    if not ok:
        require_value(f"{type(owner).__name__}.{name}", getattr(owner, name), allowed, ok)


def require_value(name: str, value: Any, allowed: str, ok: bool) -> None:
    """Raise the one sentence about a value that is no option of an object, such as an argument, unless `ok`."""
    if not ok:
        raise ValueError(f"`{name}` must be {allowed}, got {shown_value(value)}{meant(value, allowed)}")


def meant(value: Any, allowed: str) -> str:
    """Return what `suggest` says of a value, or of the first odd one in a list, and the words quoted in `allowed`.

    >>> meant("scalr", "'scalar' or 'per_feature'")
    ': did you mean `scalar`?'
    """
    words = re.findall(r"'([^']+)'", allowed)
    odd = [each for each in (value if isinstance(value, list | tuple) else [value]) if each not in words]
    return suggest(odd[0], words) if odd and isinstance(odd[0], str) else "."


def option(default: Any, allowed: str, fits: Callable[[Any], bool]) -> Any:
    """Return a field of a dataclass that says what its value may be, in words and as a function: see `check_fields`."""
    return field(default=default, metadata={"allowed": allowed, "fits": fits})


def check_fields(owner: Any) -> None:
    """Refuse a value of a dataclass that does not fit what its `option` says, by the sentence of `require`."""
    for name, allowed, fits in _options(owner.__class__):
        if not fits(getattr(owner, name)):
            require(owner, name, allowed, False)


@cache
def _options(cls: type) -> list[tuple[str, str, Callable[[Any], bool]]]:
    return [(each.name, each.metadata["allowed"], each.metadata["fits"]) for each in fields(cls) if each.metadata]


def shown_value(value: Any) -> str:
    """Return a value as error messages show it; a class of options comes with the way to make one.

    >>> shown_value("Adam")
    "'Adam'"
    """
    if not isinstance(value, type):
        return getattr(value, "__name__", "") or repr(value)
    if not is_dataclass(value):
        return f"the class {value.__name__}"
    needed = any(each.default is MISSING and each.default_factory is MISSING for each in fields(value) if each.init)
    return f"the class {value.__name__}: write {value.__name__}({'...' if needed else ''})"


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line of at most 200 characters that ends with a full stop.

    >>> first_line(MemoryError())
    'MemoryError.'
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    # A KeyError says nothing but the key.
    text = f"{kind}: {text}" if text and (isinstance(error, KeyError) or len(text.split()) < 3) else text or kind
    text = text if len(text) <= 200 else f"{text[:197]}..."
    return text if text.endswith((".", "?", "!")) else f"{text}."


def require_arguments(what: str, function: Any, *names: str) -> None:
    """Refuse what cannot be called with so many positional arguments; messages call the function `what`."""
    wanted = f"`{what}` must be a function of ({', '.join(names)})"
    if not callable(function):
        raise ValueError(f"{wanted}, got {shown_value(function)}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # Some functions written in C do not say.
        return
    try:
        signature.bind(*names)
    except TypeError:
        bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
        raise ValueError(f"{wanted}, got one of {inspect.Signature(bare)}.") from None


def is_int(value: Any, at_least: int = 1) -> bool:
    """True for an int (not a bool) that is not below `at_least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= at_least


def is_number(value: Any) -> bool:
    """True for a finite real number (not a bool)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_sizes(values: Any, of: str, names: Sequence[Any] = ()) -> None:
    """Refuse numbers, (rows,) or (rows, columns), of a column that is too large, or all of it too small, to be squared.

    Raises:
        ValueError: in one sentence, with what they are `of`, and the name of the column where there are names.
    """
    sizes = np.atleast_1d(np.fmax.reduce(np.abs(values), axis=0, initial=0.0)).astype(np.float64)
    if (odd := ~(sizes <= LARGEST) | ((sizes < 1 / LARGEST) & (sizes > 0))).any():
        first = int(odd.argmax())
        raise ValueError(
            f"{f'the column {names[first]!r} of {of}' if len(names) else of} holds numbers up to {sizes[first]:.3g}, "
            "whose squares leave the range of floating point: write it in another unit, or as logarithms."
        )


def is_list(value: Any) -> bool:
    """True for a list or tuple that is not empty."""
    return isinstance(value, list | tuple) and bool(value)


def is_positive(value: Any) -> bool:
    """True for a finite number above zero."""
    return is_number(value) and value > 0


def is_bool(value: Any) -> bool:
    """True for True and False alone."""
    return isinstance(value, bool)


def is_not_negative(value: Any) -> bool:
    """True for a finite number that is zero or above."""
    return is_number(value) and value >= 0


def optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return what also fits None."""
    return lambda value: value is None or fits(value)


def or_auto(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return what also fits "auto"."""
    return lambda value: (isinstance(value, str) and value == "auto") or fits(value)


class Relative(float):
    """A tolerance that is a share of the size of what is judged, in place of a number with its unit."""


def default_tolerance(dtype: torch.dtype) -> float:
    """Return ``eps ** (2/3)``: 3.7e-11 in float64, 2.4e-5 in float32."""
    return float(torch.finfo(dtype).eps ** (2 / 3))


def describe(options: Any) -> str:
    """Return a short name for a solver or estimator, such as ``Implicit(linear_solver=CG())``."""
    parts = []
    for option in fields(options):
        value = getattr(options, option.name)
        if option.default is not MISSING and value == option.default:
            continue
        # The repr of a function is its address.
        named = getattr(value, "__name__", "") or repr(value)
        shown = describe(value) if hasattr(value, "__dataclass_fields__") else named
        parts.append(f"{option.name}={shown}")
    return f"{type(options).__name__}({', '.join(parts)})"
