"""Sobolev-optimal methods: the error of the unrolled derivative decreases from the first step on (on average).

With ``P*_t`` the polynomial of degree t and ``P(0) = 1`` of least Sobolev norm ``int P^2 dmu + eta int P'^2 dmu``,
where ``dmu ~ (1 - m(lam)^2)^(alpha - 1/2) dlam`` is a probability measure on [l, L] (Scieur et al. 2022, section 4):

    E |dx_t - dx*|^2 <= 2 |P*_t|^2 E |dx_0 - dx*|^2,   |P*_t| <= 1

if ``|dH (x_0 - x*)|^2 <= eta |dx_0 - dx*|^2``, which holds for ``eta = L^2`` whenever the total derivative of the
gradient at the start vanishes (such as ridge regression from zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from bilevel.base import InnerState, Traits
from bilevel.core.options import is_number, is_positive, option, or_auto
from bilevel.core.tree import Tree
from bilevel.inner.coefficients import Coefficients
from bilevel.inner.interval import IntervalMethod
from bilevel.numerics.polynomials import asymptotic_coefficients, sobolev_coefficients


@dataclass(frozen=True)
class Sobolev(IntervalMethod):
    """The Gegenbauer-Sobolev method, in a form without divisions that holds for every alpha > -1/2.

        y_t = y_{t-1} - h_t grad(y_{t-1}) + m_t (y_{t-1} - y_{t-2})
        w_t = y_t - p_t y_{t-2} + q_t w_{t-2}
        x_t = (A_{t-1} / A_t) x_{t-1} + (tau_t / (d_t B_t)) w_t,      x_t - x* = P*_t(H) (x_0 - x*)

    with the numbers of `bilevel.numerics.polynomials.sobolev_coefficients`; all vectors begin at x_0. Scieur et al.
    write ``z_t = w_t / tau_t``, which does not exist for every alpha < 1/2, where tau_t may vanish. The gradient
    is taken at y, so with `tol` each look at the residual costs one more gradient: it is looked at every 8 steps.

    Args:
        l: lower end of the spectrum, or "auto"; see `IntervalMethod`.
        L: upper end, or "auto".
        alpha: order of the weight, above -1/2: 0 has the smallest worst-case transient, 1 a smaller average one.
        eta: weight of the derivative in the Sobolev norm, in units of the curvature squared, or "auto": L^2.

    >>> Sobolev(l=0.1, L=2.0, alpha=0.0, steps=50)
    Sobolev(steps=50, tol=None, l=0.1, L=2.0, alpha=0.0, eta='auto')
    """

    alpha: float = option(1.0, "a number above -1/2", lambda alpha: is_number(alpha) and alpha > -0.5)
    eta: float | str = option("auto", "a positive number or 'auto'", or_auto(is_positive))

    traits = Traits(rowwise=True, multistep=True, check_every=8)

    def vectors(self, params: Tree) -> tuple[Tree, ...]:
        return (params, params, params, params)

    def coefficients(self, state: InnerState) -> Coefficients:
        l, L = self.interval(state)  # noqa: E741
        eta = L * L if isinstance(self.eta, str) else float(self.eta)
        return _coefficients(l, L, float(self.alpha), eta, state.steps)


@lru_cache(maxsize=4096)
def _coefficients(l: float, L: float, alpha: float, eta: float, index: int) -> Coefficients:  # noqa: E741
    table = sobolev_coefficients(l, L, 1 << max(6, index.bit_length()), alpha, eta)
    columns = (table.h, table.m, table.p, table.q, table.keep, table.gain)
    h, m, p, q, keep, gain = (float(column[index]) for column in columns)
    return Coefficients(
        read=(0.0, 1.0, 0.0, 0.0, 0.0),
        mix=(
            (keep, gain * (1.0 + m), -gain * (m + p), 0.0, gain * q),
            (0.0, 1.0 + m, -m, 0.0, 0.0),
            (0.0, 1.0, 0.0, 0.0, 0.0),
            (0.0, 1.0 + m, -(m + p), 0.0, q),
            (0.0, 0.0, 0.0, 1.0, 0.0),
        ),
        write=(-gain * h, -h, 0.0, -h, 0.0),
    )


@dataclass(frozen=True)
class AsymptoticSobolev(IntervalMethod):
    """The limit of `Sobolev` for t -> infinity, the same for every alpha and eta: two constants.

        y_t = y_{t-1} - h grad(y_{t-1}) + m (y_{t-1} - y_{t-2}),      x_t = y_t + m (x_{t-1} - y_{t-2})
        h = (2 / (sqrt l + sqrt L))^2,   m = ((sqrt L - sqrt l) / (sqrt L + sqrt l))^2,   y_{-1} = y_0 = x_0

    (Scieur et al. 2022, (16)-(17), with the sign of the gradient and h corrected.) The derivative's error decreases
    like ``t^2 m^(t/2)``. As printed, the first step is h and overshoots: "half" keeps the first growth of that error
    small. The residual is looked at every 8 steps, as in `Sobolev`.

    Args:
        l: lower end of the spectrum, or "auto"; see `IntervalMethod`.
        L: upper end, or "auto".
        first_step: "full" takes h, "half" takes ``h / (1 + m) = 2 / (L + l)``.

    >>> AsymptoticSobolev(l=0.1, L=2.0).l
    0.1
    """

    first_step: str = option("full", "'full' or 'half'", ("full", "half").__contains__)

    traits = Traits(rowwise=True, multistep=True, stationary_from=1, check_every=8)

    def vectors(self, params: Tree) -> tuple[Tree, ...]:
        return (params, params)

    def coefficients(self, state: InnerState) -> Coefficients:
        l, L = self.interval(state)  # noqa: E741
        return _asymptotic(l, L, self.first_step == "half" and state.steps == 0)


@lru_cache
def _asymptotic(l: float, L: float, half: bool) -> Coefficients:  # noqa: E741
    h, m = asymptotic_coefficients(l, L)
    if half:
        h /= 1.0 + m
    return Coefficients(
        read=(0.0, 1.0, 0.0), mix=((m, 1.0 + m, -2.0 * m), (0.0, 1.0 + m, -m), (0.0, 1.0, 0.0)), write=(-h, -h, 0.0)
    )
