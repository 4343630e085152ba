"""Heavy ball (Polyak 1964): ``x_{k+1} = x_k - h grad(x_k) + m (x_k - x_{k-1})``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from bilevel.base import InnerState, Traits
from bilevel.core.options import option
from bilevel.inner.coefficients import Coefficients
from bilevel.inner.multistep import MomentumMethod
from bilevel.numerics.lanczos import CURVATURE_MARGIN, Spectrum


@dataclass(frozen=True)
class HeavyBall(MomentumMethod):
    """Gradient descent with momentum m; the first step has none (``x_{-1} = x_0``).

    Stable on a quadratic for ``0 < h < 2 (1 + m) / L``. ``momentum="auto"`` takes Polyak's parameters
    ``h = (2 / (sqrt l + sqrt L))^2``, ``m = ((sqrt L - sqrt l) / (sqrt L + sqrt l))^2``. Its map on (x_k, x_{k-1}) has
    a spectral radius below one but a norm above one: iterates and derivatives may first grow (Scieur et al. 2022).

    Args:
        step_size: h, or "auto": 1/L.
        momentum: m in [0, 1), or "auto".
        first_step: "full" takes h, "half" takes h / (1 + m) without momentum: 2 / (L + l) for Polyak's parameters, with
            a smaller transient of the unrolled derivative (worst case 9.2 instead of 20.8 at l = 0.5, L = 10).

    >>> HeavyBall(step_size=0.1, momentum=0.8, steps=100).momentum
    0.8
    """

    first_step: str = option("full", "'full' or 'half'", ("full", "half").__contains__)

    traits = Traits(rowwise=True, multistep=True, stationary_from=1, oscillates=True)

    def coefficients(self, state: InnerState) -> Coefficients:
        h, m = self.option("step_size", state), self.option("momentum", state)
        if state.steps == 0 and self.first_step == "half":
            # A warm start must not add its momentum to a step that stands for a start at rest.
            return _coefficients(h / (1.0 + m), 0.0)
        return _coefficients(h, m)

    def tune(self, spectrum: Spectrum) -> dict[str, float]:
        tuned = super().tune(spectrum)
        if self.momentum != "auto":
            return tuned
        root = math.sqrt(self.inverse_condition(spectrum))
        step_size = (2.0 / (1.0 + root)) ** 2 / (CURVATURE_MARGIN * spectrum.largest)
        return {"step_size": step_size, "momentum": ((1.0 - root) / (1.0 + root)) ** 2}

    def max_step_size(self, state: InnerState, curvature: float) -> float:
        return 2.0 * (1.0 + self.option("momentum", state)) / curvature


@lru_cache
def _coefficients(h: float, m: float) -> Coefficients:
    return Coefficients(read=(1.0, 0.0), mix=((1.0 + m, -m), (1.0, 0.0)), write=(-h, 0.0))
