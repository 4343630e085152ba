"""The methods of the figures by their labels, for a spectrum inside [l, L]."""

# ruff: noqa: E741 (l and L are the field's names of the ends of the spectrum)

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt

from bilevel.inner import AsymptoticSobolev, Chebyshev, GradientDescent, HeavyBall, LinearMultistep, Nesterov, Sobolev


def polyak(l: float, L: float) -> HeavyBall:
    """Return heavy ball with Polyak's parameters; its first step is 2/(L+l), which starts with a smaller transient."""
    root = sqrt(l / L)
    h, m = (2.0 / (sqrt(l) + sqrt(L))) ** 2, ((1.0 - root) / (1.0 + root)) ** 2
    return HeavyBall(step_size=h, momentum=m, first_step="half")


def nesterov(l: float, L: float) -> Nesterov:
    """Return the constant scheme: 1/L and ``(1 - sqrt(l/L)) / (1 + sqrt(l/L))``."""
    root = sqrt(l / L)
    return Nesterov(step_size=1.0 / L, momentum=(1.0 - root) / (1.0 + root))


METHODS: Mapping[str, Callable[[float, float], LinearMultistep]] = {
    "GD 1/L": lambda l, L: GradientDescent(step_size=1.0 / L),
    "GD sqrt(2)/L": lambda l, L: GradientDescent(step_size=sqrt(2.0) / L),
    "GD 2/(L+l)": lambda l, L: GradientDescent(step_size=2.0 / (L + l)),
    "Nesterov": nesterov,
    "heavy ball": polyak,
    "Chebyshev": lambda l, L: Chebyshev(l, L),
    "Sobolev": lambda l, L: Sobolev(l, L),
    "Sobolev alpha=0": lambda l, L: Sobolev(l, L, alpha=0.0),
    "asymptotic Sobolev": lambda l, L: AsymptoticSobolev(l, L, first_step="half"),
}


def method(label: str, l: float, L: float) -> LinearMultistep:
    """Return the method of a label, a key of `METHODS`, for eigenvalues from l to L."""
    return METHODS[label](l, L)
