"""Chebyshev's method: the fastest worst-case decrease on quadratics with a spectrum in [l, L]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bilevel.base import InnerState
from bilevel.core.tree import Tree
from bilevel.inner.coefficients import Coefficients
from bilevel.inner.interval import IntervalMethod
from bilevel.numerics.polynomials import Array, gegenbauer_coefficients


@dataclass(frozen=True)
class Chebyshev(IntervalMethod):
    """``x_t = x_{t-1} - h_t grad(x_{t-1}) + m_t (x_{t-1} - x_{t-2})``, with ``P_t = T_t(m(lam)) / T_t(m(0))``.

    With ``s = (L + l) / (L - l)``, ``r_1 = 1/s``, ``r_t = 1 / (2 s - r_{t-1})``:

        h_1 = 2 / (L + l),  m_1 = 0,    h_t = 4 r_t / (L - l),  m_t = r_t r_{t-1}   (t >= 2)

    The error of its unrolled derivative first grows, up to about ``0.532 L/l`` times at ``t = 1.03 sqrt(L/l)`` in the
    worst case (Scieur et al. 2022, Theorem 3, with the constants corrected): see `Sobolev`.

    >>> Chebyshev(l=0.1, L=2.0, steps=50)
    Chebyshev(steps=50, tol=None, l=0.1, L=2.0)
    """

    def vectors(self, params: Tree) -> tuple[Tree, ...]:
        return (params,)

    def coefficients(self, state: InnerState) -> Coefficients:
        l, L = self.interval(state)  # noqa: E741
        return _coefficients(l, L, state.steps)


@lru_cache(maxsize=4096)
def _coefficients(l: float, L: float, index: int) -> Coefficients:  # noqa: E741
    steps, momenta = _table(l, L, 1 << max(6, index.bit_length()))
    h, m = float(steps[index]), float(momenta[index])
    return Coefficients(read=(1.0, 0.0), mix=((1.0 + m, -m), (1.0, 0.0)), write=(-h, 0.0))


@lru_cache(maxsize=16)
def _table(l: float, L: float, steps: int) -> tuple[Array, Array]:  # noqa: E741
    return gegenbauer_coefficients(l, L, steps, alpha=0.0)
