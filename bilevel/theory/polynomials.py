"""Residual polynomials of inner solvers, and the coefficients of the optimal ones, with checked arguments."""

# ruff: noqa: E741 (l and L are the field's names of the ends of the spectrum)

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bilevel.base import InnerSolver, InnerState, describe
from bilevel.core.options import is_int
from bilevel.inner import Chebyshev, LinearMultistep, Sobolev
from bilevel.numerics import polynomials
from bilevel.numerics.polynomials import Array, SobolevCoefficients
from bilevel.theory.checks import demand


def residual_polynomial(method: LinearMultistep, t: int, lam: Any) -> tuple[Array, Array]:
    """Return ``P_t`` and ``P_t'`` at eigenvalues: how t steps shrink the error of x, and of its derivative.

    On a quadratic with Hessian H, where dH commutes with H (Scieur et al. 2022, Theorem 1, with the total derivative):

        x_t - x*   = P_t(H) (x_0 - x*)
        dx_t - dx* = P_t(H) (dx_0 - dx*) + P_t'(H) dH (x_0 - x*)
                   = (P_t(H) - H P_t'(H)) (dx_0 - dx*) + P_t'(H) g,    g = d/du [grad f(x_0(u), u)]

    Args:
        method: a linear multistep solver whose options are numbers, such as ``Chebyshev(l, L)``.
        t: steps, 0 or more.
        lam: eigenvalues, any shape.

    Returns:
        Two float64 arrays shaped as `lam`; units 1 and 1/lam. Rounding about 1e-15 times the largest stored value.

    Raises:
        ValueError: if an option is "auto", the solver is no linear multistep method, or t is no count.

    >>> from bilevel import GradientDescent
    >>> P, slope = residual_polynomial(GradientDescent(step_size=0.5), 3, 1.0)
    >>> float(P), float(slope)
    (0.125, -0.375)
    """
    demand("residual_polynomial", "t", "an int, 0 or more", t, is_int(t, 0))
    *_, last = residual_polynomials("residual_polynomial", method, t, lam)
    return last


def residual_polynomials(function: str, method: LinearMultistep, t: int, lam: Any) -> Iterator[tuple[Array, Array]]:
    """Yield (P_0, P_0'), ..., (P_t, P_t') at eigenvalues; see `residual_polynomial`. `function` is who asks."""
    if not isinstance(method, InnerSolver) or not method.traits.multistep:
        raise ValueError(f"`{function}.method` must be a linear multistep solver, got {method!r}.")
    if method.automatic:
        raise ValueError(f"`{function}.method` must have numbers in place of 'auto', got {describe(method)}.")
    steps = (method.coefficients(InnerState(None, steps=index)) for index in range(t))
    return polynomials.residuals(steps, lam.detach().cpu().numpy() if isinstance(lam, Tensor) else lam)


def chebyshev_coefficients(l: float, L: float, steps: int) -> tuple[Array, Array]:
    """Return (h_t, m_t), t = 1..steps, of Chebyshev's method (Scieur et al. 2022, (10)).

    With ``s = (L + l) / (L - l)``, ``r_1 = 1/s``, ``r_t = 1 / (2 s - r_{t-1})``: ``h_1 = 2 / (L + l)``, ``m_1 = 0``,
    ``h_t = 4 r_t / (L - l)``, ``m_t = r_t r_{t-1}`` for t >= 2. Two arrays of shape (steps,), whose entry t - 1 belongs
    to step t, in the units 1/lam and 1; the spectrum lies in [l, L], l positive.

    >>> h, m = chebyshev_coefficients(1.0, 3.0, 2)
    >>> float(h[0]), round(float(m[1]), 6)
    (0.5, 0.142857)
    """
    Chebyshev(l, L)  # checks its options
    demand("chebyshev_coefficients", "steps", "a positive int", steps, is_int(steps))
    return polynomials.gegenbauer_coefficients(float(l), float(L), steps, alpha=0.0)


def sobolev_coefficients(
    l: float, L: float, steps: int, alpha: float = 1.0, eta: float | str = "auto"
) -> SobolevCoefficients:
    """Return the coefficients of the Sobolev-optimal method (Scieur et al. 2022, (13)-(15)).

        y_t = y_{t-1} - h_t grad f(y_{t-1}) + m_t (y_{t-1} - y_{t-2})
        w_t = y_t - p_t y_{t-2} + q_t w_{t-2},   z_t = w_t / tau_t
        x_t = (A_{t-1} / A_t) x_{t-1} + (a_t / A_t) z_t

    The arrays of shape (steps,) are named h, m, p, q, d, tau, keep (``A_{t-1} / A_t``), weight (``a_t / A_t``), gain
    and log_A; entry t - 1 belongs to step t. `alpha`, above -1/2, is the order of the Gegenbauer weight; `eta`,
    positive and in units of lam^2, is the weight of the derivative: "auto" is L^2. The spectrum lies in [l, L].

    >>> table = sobolev_coefficients(0.01, 1.0, 3, alpha=0.0, eta=10.0)
    >>> round(float(table.tau[2]), 4)
    -1.5478
    """
    Sobolev(l, L, alpha, eta)  # checks its options
    demand("sobolev_coefficients", "steps", "a positive int", steps, is_int(steps))
    weight = float(L) ** 2 if isinstance(eta, str) else float(eta)
    return polynomials.sobolev_coefficients(float(l), float(L), steps, float(alpha), weight)
