"""Tolerance schedules: how exact the hypergradients of an outer run have to be, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bilevel.core.options import is_number, require, require_value
from bilevel.core.status import warn

DECREASES = ("quadratic", "cubic", "exponential")
DEPRECATED = (
    "`schedule` is deprecated: HyperNewton and HyperLBFGS (`optimizer` 'auto') choose their own accuracies, "
    "and a torch optimizer takes one `target_error`."
)


@dataclass(frozen=True)
class ToleranceSchedule:
    """The relative error that the hypergradient of outer step k = 1, 2, ... may have (Pedregosa 2016, section 4).

        quadratic   first / k^2,      cubic   first / k^3,      exponential   first rate^(k-1)

    Deprecated: a search chooses its own accuracies.

    A decrease whose sum is finite keeps the outer iteration convergent: far from the optimum a rough gradient does.

    Args:
        decrease: "quadratic", "cubic" or "exponential".
        first: the error at the first step, in (0, 1).
        rate: the quotient of "exponential", in (0, 1).
        least: the schedule ends at this error, in (0, 1).

    >>> [round(ToleranceSchedule("quadratic").at(step), 4) for step in (1, 2, 10)]
    [0.1, 0.025, 0.001]
    """

    decrease: str = "quadratic"
    first: float = 0.1
    rate: float = 0.9
    least: float = 1e-6

    def __post_init__(self) -> None:
        kinds = "'quadratic', 'cubic' or 'exponential'"
        require(self, "decrease", kinds, isinstance(self.decrease, str) and self.decrease in DECREASES)
        for name in ("first", "rate", "least"):
            value = getattr(self, name)
            require(self, name, "a number in (0, 1)", is_number(value) and 0 < value < 1)

    def at(self, step: int) -> float:
        """Return the relative error for outer step `step`, counted from 1."""
        if self.decrease == "exponential":
            error = self.first * self.rate ** (step - 1)
        else:
            error = self.first / float(step) ** (2 if self.decrease == "quadratic" else 3)
        return max(self.least, error)


def as_schedule(given: Any, target_error: Any) -> ToleranceSchedule | None:
    """Return a schedule given by name or as an object, with its deprecation warning; it ends at `target_error`."""
    if given is None:
        return None
    if isinstance(given, str) and given in DECREASES:
        given = ToleranceSchedule(given) if target_error is None else ToleranceSchedule(given, least=target_error)
    elif not isinstance(given, ToleranceSchedule):
        allowed = f"{', '.join(map(repr, DECREASES))} or a ToleranceSchedule"
        require_value("schedule", given, allowed, False)
    elif target_error is not None:
        raise ValueError("give `target_error` or the `least` of the ToleranceSchedule, not both.")
    warn(DEPRECATED, DeprecationWarning)
    return given
