"""What can be said of a result: `Status`, an enum whose text is the remedy, and the exceptions that carry it.

Inside the package failure is a value; it becomes an exception or a warning only at the edge
(``on_failure="raise" | "warn" | "return"``).
"""

from __future__ import annotations

import enum
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from bilevel.core.options import require_value

OnFailure: TypeAlias = Literal["raise", "warn", "return"]


class Status(enum.Enum):
    """State of a solve or of a hypergradient; the value of a member is its meaning and the remedy.

    >>> Status.NEGATIVE_CURVATURE.ok
    False
    """

    OK = "the number can be used as it is"
    INNER_NOT_CONVERGED = (
        "the inner solver used all its steps before the residual reached `tol`: "
        "raise `steps`, loosen `tol`, or use a faster inner solver"
    )
    TARGET_NOT_REACHED = "the certificate does not show the `target_error`: ask for less, raise `steps`, or use float64"
    INACCURATE = (
        "the number can be wrong by more than half of itself: run more inner steps, differentiate more of them, "
        "lower the tolerances, or use float64"
    )
    DIVERGED = (
        "the inner solver diverges: use a smaller step size, an interval that holds the spectrum, or 'auto', "
        "or add a penalty where the inner loss is not convex"
    )
    NOT_FINITE = "a value is NaN or infinite: check the data, the start and the losses at the step that is named"
    NEGATIVE_CURVATURE = (
        "the inner Hessian is not positive definite, so the implicit function theorem does not describe a minimum: "
        "add damping (`Implicit(damping=...)`) or a penalty, run more inner steps, or differentiate by unrolling"
    )
    SINGULAR = "the linear system is singular: add a penalty or damping (`Implicit(damping=...)`)"
    LINEAR_NOT_CONVERGED = (
        "the linear solver stopped before its tolerance: raise its `max_steps`, loosen its `tol`, "
        "or add a penalty or damping"
    )
    LINEAR_DIVERGED = "the linear solver diverges: use a smaller `step_size`, 'auto', or CG"
    FAILED_STEP = "the inner solver could not take its step: the message says why"
    WRONG_DERIVATIVE = (
        "a derivative that the loss supplies is not the derivative of its values: look for a custom autograd.Function, "
        "`.detach()`, `no_grad`, numpy or a structured product that is wrong; `check_problem` shows which"
    )
    NOT_SMOOTH = (
        "the inner gradient jumps where the run ends, so neither steps nor the implicit function theorem describe the "
        "solution: smooth the kink, or give the term with the kink as `nonsmooth=` and take FISTA"
    )

    @property
    def ok(self) -> bool:
        """True for `OK` alone."""
        return self is Status.OK

    @property
    def usable(self) -> bool:
        """True where a number exists and the certificate says how far it can be trusted."""
        return self is Status.OK or self in DOUBTS

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return self.value


DOUBTS = (Status.INNER_NOT_CONVERGED, Status.TARGET_NOT_REACHED, Status.INACCURATE, Status.NOT_SMOOTH)
"""States of a number that exists but should be looked at."""


@dataclass(frozen=True)
class Verdict:
    """A status with the sentence that says where and by how much."""

    status: Status = Status.OK
    detail: str = ""
    remedy: str = ""
    """What to do, where that of the status does not help."""

    def __str__(self) -> str:
        remedy = self.remedy or self.status.remedy
        return f"{self.detail} [{self.status.name}] {remedy}." if self.detail else remedy

    def worse(self, other: Verdict) -> Verdict:
        """Return the verdict that matters more: a failure, a doubt, `OK` with a note, `OK`; ties keep the first."""
        if other.status is Status.OK:
            return other if self == Verdict() else self
        ranks = [0 if status.ok else 1 if status.usable else 2 for status in (self.status, other.status)]
        return other if ranks[1] > ranks[0] else self


GOOD = Verdict()


class BilevelWarning(UserWarning):
    """A result that exists but should be looked at; its certificate says why."""


INSIDE = frozenset({"bilevel", "torch", "abc", "contextlib", "functools", "importlib", "_frozen_importlib"})
"""Packages whose frames are not the user's: this one, and those that stand between it and its own functions."""


def warn(text: str, category: type[Warning] = BilevelWarning) -> None:
    """Warn of the line that called into the package: that of the first frame outside it."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame = frame.f_back
    names = frame.f_globals
    registry, module = names.setdefault("__warningregistry__", {}), names.get("__name__")
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


class HypergradientError(RuntimeError):
    """A hypergradient that cannot be used: the verdict, and the `Estimate` as far as it exists."""

    def __init__(self, verdict: Verdict, estimate: Any = None) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict
        self.estimate = estimate


class StepFailure(Exception):
    """Raised by an inner solver's `step` that cannot go on; the loop that runs the steps turns it into a verdict."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.verdict = Verdict(status, detail)


def check_on_failure(on_failure: Any) -> None:
    """Refuse another word than the three."""
    require_value("on_failure", on_failure, "'raise', 'warn' or 'return'", on_failure in ("raise", "warn", "return"))


def report(verdict: Verdict, on_failure: OnFailure, estimate: Any = None) -> None:
    """Turn a verdict into an exception that carries the estimate, or into a warning, as the caller asked.

    A usable number with a doubt (an inner solver short of its tolerance) warns and never raises.

    Raises:
        HypergradientError: for an unusable result with ``on_failure="raise"``.
    """
    check_on_failure(on_failure)
    if verdict.status.ok or on_failure == "return":
        return
    if on_failure == "raise" and not verdict.status.usable:
        raise HypergradientError(verdict, estimate)
    warn(str(verdict), BilevelWarning)
