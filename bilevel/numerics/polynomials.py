"""Residual polynomials of first-order methods on a quadratic, and the coefficients of the optimal ones.

On ``f(x) = 1/2 x' H x + b' x`` a linear first-order method gives ``x_t - x* = P_t(H) (x_0 - x*)`` with a residual
polynomial of degree at most t and ``P_t(0) = 1``. For dH that commute with H, differentiating the loop gives

    dx_t - dx* = P_t(H) (dx_0 - dx*) + P_t'(H) dH (x_0 - x*)

so the derivative of P_t governs the unrolled derivative (Scieur et al. 2022, Theorem 1). Chebyshev's polynomials
minimise ``max |P|``; the Sobolev-optimal ones minimise ``int P^2 dmu + eta int P'^2 dmu`` for a probability measure
``dmu ~ (1 - m(lam)^2)^(alpha - 1/2) dlam`` on [l, L], where ``m(lam) = (2 lam - L - l) / (L - l)``.

Everything here is plain floating-point arithmetic in float64; numbers l, L, eta have the units lam, lam and lam^2. The
recurrences are shifted by the value at the ends of the interval, so that nothing cancels where l/L is tiny.
"""

# ruff: noqa: E741 (l and L are the field's names of the ends of the spectrum)

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NARROWEST = 1e-9
"""A Sobolev interval narrower than this fraction of L is widened to it: the norm degenerates on a single point."""


class Recurrence(Protocol):
    """The numbers of one step of a linear multistep method (see `bilevel.inner.Coefficients`)."""

    @property
    def read(self) -> Sequence[float]:
        """Weights of the point where the gradient is evaluated."""

    @property
    def mix(self) -> Sequence[Sequence[float]]:
        """Rows of weights, the new vectors from the old."""

    @property
    def write(self) -> Sequence[float]:
        """Weights of the gradient in the new vectors."""


def residuals(recurrences: Iterable[Recurrence], lam: Any) -> Iterator[tuple[Array, Array]]:
    """Yield ``(P_t, P_t')``, t = 0, 1, ..., at eigenvalues: a method and its derivative on scalar quadratics.

    With every stored vector at 1, each step is ``y = sum read_i s_i``, ``g = lam y``,
    ``s_j <- sum mix_ji s_i + write_j g``; the derivative obeys the differentiated recurrence, with ``g' = lam y' + y``.

    Yields:
        P_t and its derivative with respect to lam, shaped as `lam`; one pair more than steps. Units: 1 and 1/lam.

    >>> from types import SimpleNamespace
    >>> step = SimpleNamespace(read=(1.0,), mix=((1.0,),), write=(-0.5,))  # gradient descent, h = 1/2
    >>> [(float(P), float(slope)) for P, slope in residuals([step, step], 1.0)]
    [(1.0, 0.0), (0.5, -0.5), (0.25, -0.5)]
    """
    lam = np.asarray(lam, dtype=np.float64)
    yield np.ones_like(lam), np.zeros_like(lam)
    values: list[Array] = []
    slopes: list[Array] = []
    for step in recurrences:
        if not values:
            values, slopes = [np.ones_like(lam) for _ in step.read], [np.zeros_like(lam) for _ in step.read]
        y, dy = _combine(step.read, values), _combine(step.read, slopes)
        g, dg = lam * y, lam * dy + y
        rows = list(zip(step.mix, step.write, strict=True))
        values, slopes = (
            [_combine((*row, weight), [*values, g]) for row, weight in rows],
            [_combine((*row, weight), [*slopes, dg]) for row, weight in rows],
        )
        yield values[0], slopes[0]


def _combine(weights: Sequence[float], arrays: Sequence[Array]) -> Array:
    total = np.zeros_like(arrays[0])
    for weight, array in zip(weights, arrays, strict=True):
        if weight != 0:
            total = total + weight * array
    return total


def optimal_factor(l: float, L: float) -> float:
    """Return ``xi = (1 - sqrt kappa) / (1 + sqrt kappa)``, ``kappa = l/L``: the factor per step of optimal methods.

    >>> optimal_factor(1.0, 9.0)
    0.5
    """
    return (L - l) / (math.sqrt(L) + math.sqrt(l)) ** 2


def asymptotic_coefficients(l: float, L: float) -> tuple[float, float]:
    """Return Polyak's ``h = (2 / (sqrt l + sqrt L))^2`` and ``m = xi^2``: the limits of (h_t, m_t) for every alpha.

    >>> asymptotic_coefficients(1.0, 9.0)
    (0.25, 0.25)
    """
    return 4.0 / (math.sqrt(l) + math.sqrt(L)) ** 2, optimal_factor(l, L) ** 2


class _Gegenbauer(NamedTuple):
    """Step n of the monic Gegenbauer recurrence, lengths multiplied by ``c = (L - l) / 2``.

    Attributes:
        gamma: ``pi_{n+1} = x pi_n - gamma_n pi_{n-1}``.
        one: ``c pi_n(1) / pi_{n-1}(1)``.
        excess: what the ratio at the point m(0) has more than that.
        growth: ``c |pi_n(m(0)) / pi_{n-1}(m(0))| = one + excess``, the inverse of h_n.
    """

    gamma: float
    one: float
    excess: float
    growth: float


def _gegenbauer(l: float, half: float, alpha: float) -> Iterator[_Gegenbauer]:
    """Yield the steps n = 1, 2, ...; all terms are positive, so nothing cancels."""
    last = _Gegenbauer(1.0 / (2.0 * (1.0 + alpha)), half, l, half + l)
    n = 1
    while True:
        yield last
        n += 1
        one = half * (n + 2.0 * alpha - 1.0) / (2.0 * (n + alpha - 1.0))
        # On an interval of one point half and one vanish, and with them the second term.
        excess = l + (half * last.gamma * (half / last.one) * last.excess / last.growth if half else 0.0)
        gamma = n * (n + 2.0 * alpha - 1.0) / (4.0 * (n + alpha) * (n + alpha - 1.0))
        last = _Gegenbauer(gamma, one, excess, one + excess)


def gegenbauer_coefficients(l: float, L: float, steps: int, alpha: float) -> tuple[Array, Array]:
    """Return (h_t, m_t), t = 1..steps, of the method whose residual polynomials are Gegenbauer's.

        y_t = y_{t-1} - h_t grad f(y_{t-1}) + m_t (y_{t-1} - y_{t-2}),   Q_t(lam) = C_t^alpha(m(lam)) / C_t^alpha(m(0))

    for a spectrum in [l, L], 0 < l <= L, and alpha > -1/2: 0 is Chebyshev's first kind, 1/2 Legendre, 1 Chebyshev's
    second kind. Entry t - 1 of both arrays belongs to step t. Relative error about 1e-15.

    >>> h, m = gegenbauer_coefficients(1.0, 3.0, 2, alpha=0.0)
    >>> h.tolist(), m.round(6).tolist()
    ([0.5, 0.5714285714285714], [0.0, 0.142857])
    """
    half = (L - l) / 2.0
    h, m = np.empty(steps), np.zeros(steps)
    before: _Gegenbauer | None = None
    for index, now in zip(range(steps), _gegenbauer(l, half, alpha), strict=False):
        h[index] = 1.0 / now.growth
        if before is not None:
            m[index] = (half / before.growth) * (half / now.growth) * before.gamma
        before = now
    return h, m


@dataclass(frozen=True, eq=False)
class SobolevCoefficients:
    """Everything that the Sobolev-optimal method needs; entry t - 1 of each array belongs to step t = 1..steps.

    Attributes:
        h: step sizes h_t of the Gegenbauer sequence y.
        m: momenta m_t of it.
        p: ``p_t``, the weight of y_{t-2} in ``w_t = y_t - p_t y_{t-2} + q_t w_{t-2}``.
        q: ``q_t = p_t / d_{t-2}``.
        d: ``d_t``, the squared Sobolev norm of S_t over the squared plain norm of the monic Gegenbauer polynomial.
        tau: ``tau_t = S_t(m(0)) / pi_t(m(0))``, the sum of the weights in w_t; may be zero or negative if alpha < 1/2.
        keep: ``A_{t-1} / A_t``, the weight of x_{t-1} in ``x_t = keep_t x_{t-1} + gain_t w_t``.
        gain: ``tau_t / (d_t B_t)``; ``keep + gain tau = 1``.
        log_A: ``log A_t``, where ``1 / A_t`` is the squared Sobolev norm of the optimal polynomial P*_t.
    """

    h: Array
    m: Array
    p: Array
    q: Array
    d: Array
    tau: Array
    keep: Array
    gain: Array
    log_A: Array

    @property
    def weight(self) -> Array:
        """``a_t / A_t = tau_t^2 / (d_t B_t)``, the weight of ``z_t = w_t / tau_t`` in x_t."""
        return self.gain * self.tau


@lru_cache(maxsize=16)
def sobolev_coefficients(l: float, L: float, steps: int, alpha: float, eta: float) -> SobolevCoefficients:
    """Return the coefficients of the Sobolev-optimal method (Scieur et al. 2022, section 4.2), without cancellation.

        P*_t = argmin over P of degree t with P(0) = 1 of  int P^2 dmu + eta int P'^2 dmu

    With the orthogonal ``S_n = pi_n - eps_n pi_{n-2} + (eps_n / d_{n-2}) S_{n-2}`` and ``etab = 4 eta / (L - l)^2``,

        e_n = etab n^2 / gam_n + (eps_n^2 / (gam_n gam_{n-1})) e_{n-2} / (1 + e_{n-2}),   d_n = 1 + e_n
        B_n = B_{n-1} gam_n / rho_n^2 + tau_n^2 / d_n,   A_{n-1} / A_n = B_{n-1} gam_n / (rho_n^2 B_n)

    for 0 < l <= L, alpha > -1/2 and eta > 0 in units of lam^2. A_n itself would overflow: only ratios and its logarithm
    are kept. Treat the arrays as read-only, they are cached.

    >>> first = sobolev_coefficients(1.0, 3.0, 4, 1.0, 9.0)
    >>> bool(np.allclose(first.keep + first.gain * first.tau, 1.0))
    True
    """
    half = max(L - l, NARROWEST * L) / 2.0
    scaled_eta = (eta / half) / half
    d, tau, e = [1.0], [1.0], [0.0]
    rows: list[tuple[float, ...]] = []
    before: _Gegenbauer | None = None
    B, log_ratio = 1.0, 0.0
    for n, now in zip(range(1, steps + 1), _gegenbauer(l, half, alpha), strict=False):
        e.append(scaled_eta * n * n / now.gamma)
        m = p = q = 0.0
        total = 1.0
        if before is not None:
            m = (half / before.growth) * (half / now.growth) * before.gamma
        if before is not None and n >= 3:
            eps = n * (n - 1.0) / (4.0 * (alpha + n - 1.0) * (alpha + n - 2.0))
            e[n] += eps * eps / (now.gamma * before.gamma) * e[n - 2] / (1.0 + e[n - 2])
            p = eps * (half / before.growth) * (half / now.growth)
            q = p / d[n - 2]
            excess = half * half * (2.0 * alpha - 1.0) / (2.0 * (n + alpha - 2.0))
            excess += now.one * before.excess + before.one * now.excess + now.excess * before.excess
            total = excess / (now.growth * before.growth) + q * tau[n - 2]
        d.append(1.0 + e[n])
        tau.append(total)
        shrink = now.gamma * (half / now.growth) ** 2
        kept = B * shrink
        B = kept + total * total / d[n]
        log_ratio -= math.log(shrink)
        rows.append((1.0 / now.growth, m, p, q, d[n], total, kept / B, total / (d[n] * B), math.log(B) + log_ratio))
        before = now
    return SobolevCoefficients(*np.array(rows, dtype=np.float64).reshape(steps, 9).T)
