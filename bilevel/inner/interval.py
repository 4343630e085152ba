"""What the methods share whose coefficients follow from the ends l and L of the spectrum."""

# ruff: noqa: E741 (l and L are the field's names of the ends of the spectrum)

from __future__ import annotations

from dataclasses import dataclass

from bilevel.base import InnerState
from bilevel.core.options import is_positive, option, or_auto, require
from bilevel.inner.multistep import LinearMultistep
from bilevel.numerics.lanczos import CURVATURE_MARGIN, Spectrum
from bilevel.oracles.inner_problem import InnerProblem


@dataclass(frozen=True)
class IntervalMethod(LinearMultistep):
    """Base of the methods for a spectrum in [l, L]; their numbers are constants of the differentiation.

    Each solve starts the sequence of steps anew. An eigenvalue above L makes the iterates grow exponentially, one in
    (0, l) only slows its own mode down.

    Args:
        l: lower end, a positive number, or "auto": the smallest curvature, measured at the start of each solve, over a
            margin of 1.02. Where it is measured by Lanczos alone it may lie well above the true end.
        L: upper end, a number not below l, or "auto": the largest curvature times 1.02. What was measured and what
            became of it are shown in ``certificate.measured``.
    """

    l: float | str = option("auto", "a positive number or 'auto'", or_auto(is_positive))
    L: float | str = option("auto", "a positive number or 'auto'", or_auto(is_positive))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.l, str) and not isinstance(self.L, str):
            require(self, "l", f"at most L={self.L:g}", self.l <= self.L)

    @property
    def automatic(self) -> bool:
        return "auto" in (self.l, self.L)

    def tune(self, spectrum: Spectrum) -> dict[str, float]:
        """Return both ends, with the margin, and the smallest curvature; ``state.measured`` shows them.

        Raises:
            ValueError: if the measured interval is not positive, or does not fit the end that was given.
        """
        name = type(self).__name__
        low, high = spectrum.smallest, spectrum.largest
        if not 0 < low <= high:
            raise ValueError(
                f"{name} with 'auto' ends measured a spectrum of [{low:.3g}, {high:.3g}] at the start, but needs a "
                "positive definite Hessian: add a penalty, start elsewhere, or give `l` and `L` numbers."
            )
        l = low / CURVATURE_MARGIN if isinstance(self.l, str) else float(self.l)
        L = high * CURVATURE_MARGIN if isinstance(self.L, str) else float(self.L)
        if l > L:
            raise ValueError(
                f"{name}(l={self.l!r}, L={self.L!r}) measured a spectrum of [{low:.3g}, {high:.3g}] at the start, "
                f"which makes l={l:.3g} larger than L={L:.3g}: give both ends numbers, or both 'auto'."
            )
        return {"smallest_curvature": low, "l": l, "L": L}

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Start the sequence anew at the iterate: its optimality is from a start at rest."""
        return self.init(inner, state.params)

    def interval(self, state: InnerState) -> tuple[float, float]:
        """Return (l, L) of this solve."""
        return float(self.option("l", state)), float(self.option("L", state))

    def advice(self, state: InnerState, spectrum: Spectrum) -> str:
        l, L = self.interval(state)
        if spectrum.smallest < 0:
            outside, remedy = spectrum.smallest, "add a penalty, as no such method works there"
        elif spectrum.largest > L:
            outside, remedy = spectrum.largest, f"try L={CURVATURE_MARGIN * spectrum.largest:.3g} or 'auto'"
        else:
            return ""
        return (
            f"the Hessian at the start has the eigenvalue {outside:.4g}, outside [l, L] = [{l:.4g}, {L:.4g}]: {remedy}"
        )
