"""Nesterov's accelerated gradient: the gradient is taken at the extrapolated point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from bilevel.base import InnerState, Traits
from bilevel.inner.coefficients import Coefficients
from bilevel.inner.multistep import MomentumMethod
from bilevel.numerics.lanczos import Spectrum


@dataclass(frozen=True)
class Nesterov(MomentumMethod):
    """``y = x_k + m (x_k - x_{k-1})``, ``x_{k+1} = y - h grad(y)``, with constant momentum m.

    Stable on a quadratic for ``0 < h < 2 (1 + m) / ((1 + 2 m) L)``. ``momentum="auto"`` takes the constant scheme for
    strongly convex functions, ``h = 1/L``, ``m = (1 - sqrt(l/L)) / (1 + sqrt(l/L))`` (Nesterov 2004, section 2.2). With
    `tol`, each look at the residual costs one more gradient (at x, not at y), so it is looked at every 8 steps.

    >>> Nesterov(momentum="auto", tol=1e-8).step_size
    'auto'
    """

    traits = Traits(rowwise=True, multistep=True, stationary_from=0, check_every=8)

    def coefficients(self, state: InnerState) -> Coefficients:
        return _coefficients(self.option("step_size", state), self.option("momentum", state))

    def tune(self, spectrum: Spectrum) -> dict[str, float]:
        tuned = super().tune(spectrum)
        if self.momentum == "auto":
            root = math.sqrt(self.inverse_condition(spectrum))
            tuned["momentum"] = (1.0 - root) / (1.0 + root)
        return tuned

    def max_step_size(self, state: InnerState, curvature: float) -> float:
        m = self.option("momentum", state)
        return 2.0 * (1.0 + m) / ((1.0 + 2.0 * m) * curvature)


@lru_cache
def _coefficients(h: float, m: float) -> Coefficients:
    look = (1.0 + m, -m)
    return Coefficients(read=look, mix=(look, (1.0, 0.0)), write=(-h, 0.0))
