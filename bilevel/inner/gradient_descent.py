"""Gradient descent: ``x <- x - h grad(x)``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bilevel.base import InnerState, Traits
from bilevel.inner.coefficients import Coefficients
from bilevel.inner.multistep import StepSizeMethod


@dataclass(frozen=True)
class GradientDescent(StepSizeMethod):
    """Gradient descent with a constant step size h.

    Converges for ``0 < h < 2/L`` with L the largest curvature; "auto" takes 1/L. Its unrolled derivative is
    ``X_{k+1} = (I - h H_k) X_k - h C_k`` (Mehmood et al. 2026, section 2).

    >>> GradientDescent(step_size=0.1, steps=100)
    GradientDescent(steps=100, tol=None, step_size=0.1)
    """

    traits = Traits(rowwise=True, multistep=True, stationary_from=0)

    def coefficients(self, state: InnerState) -> Coefficients:
        return _coefficients(self.option("step_size", state))

    def max_step_size(self, state: InnerState, curvature: float) -> float:
        return 2.0 / curvature


@lru_cache
def _coefficients(h: float) -> Coefficients:
    return Coefficients(read=(1.0,), mix=((1.0,),), write=(-h,))
