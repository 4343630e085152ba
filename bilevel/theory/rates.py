"""Worst-case errors of unrolled derivatives on quadratics with a spectrum in [l, L] (Scieur et al. 2022).

Under the assumptions of its Theorem 1, with ``D_t = |dx_t - dx*|`` and ``G = |d/du [grad f(x_0(u), u)]|`` (a total
derivative, Frobenius norms), ``D_t <= max over lam of |P_t - lam P_t'| D_0 + |P_t'| G``. ``kappa = l/L`` is the inverse
condition number. G = 0 for ridge regression from zero.

Arguments: `steps` is t, 0 or more; l and L are the ends of the spectrum, ``0 < l <= L``; `d0` is D_0, whose units a
bound has. Step counts and errors may be numbers or arrays. An argument outside its range raises a ValueError.
"""

# ruff: noqa: E741 (l and L are the field's names of the ends of the spectrum)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bilevel.core.options import is_int, is_number, is_positive
from bilevel.inner import LinearMultistep
from bilevel.numerics.polynomials import Array, optimal_factor
from bilevel.theory.checks import at_least_zero, demand, numbers, whole
from bilevel.theory.polynomials import residual_polynomials


def check_interval(function: str, l: float, L: float) -> None:
    """Demand ``0 < l <= L``."""
    demand(function, "L", "a positive number", L, is_positive(L))
    demand(function, "l", f"a positive number, at most L={L:g}", l, is_positive(l) and l <= L)


def _counts(function: str, steps: Any, d0: Any, G: Any) -> Any:
    """Return the step counts as they came, or as an array of floats, checked."""
    at_least_zero(function, d0=d0, G=G)
    demand(function, "steps", "a whole number, 0 or more, or an array of them", steps, whole(steps))
    return steps.double() if isinstance(steps, Tensor) else np.asarray(steps, dtype=np.float64)[()]


def _larger(a: Any, b: Any) -> Any:
    return a.maximum(b) if isinstance(a, Tensor) else np.maximum(a, b)


def gd_rate(steps: Any, l: float, L: float, d0: Any = 1.0, G: Any = 0.0, step_size: float | None = None) -> Any:
    """Return the worst case of gradient descent with step size h (Scieur et al. 2022, Theorem 2).

        D_t <= max over lam in {l, L} of |1 - h lam|^(t-1) ((1 + (t-1) h lam) D_0 + h t G),   t >= 1

    The maximum over [l, L] is attained at an end. With G = 0 and h = 1/L it decreases; with h = 2/(L+l) it first grows
    (Corollary 1); it decreases from the first step on if and only if ``h L < sqrt 2`` (Corollary 2). The default h is
    1/L; it must be below 2/L. At t = 0 the bound is D_0.

    >>> [round(float(gd_rate(t, 0.1, 1.0, step_size=2 / 1.1)), 3) for t in (0, 1, 5, 20)]
    [1.0, 1.0, 3.707, 0.785]
    """
    check_interval("gd_rate", l, L)
    t = _counts("gd_rate", steps, d0, G)
    h = 1.0 / L if step_size is None else step_size
    demand("gd_rate", "step_size", f"a number in (0, 2/L) = (0, {2 / L:.6g})", step_size, is_positive(h) and h * L < 2)

    def at(lam: float) -> Any:
        powers = abs(1.0 - h * lam) ** (t - 1).clip(0)
        return powers * ((1.0 + (t - 1) * (h * lam)) * d0 + h * t * G)

    # At t = 0 the bracket above is (1 - h lam) D_0.
    return _start(t, _larger(at(l), at(L)), d0)


def _start(t: Any, values: Any, d0: Any) -> Any:
    return values.where(t > 0, d0 + 0.0 * values) if isinstance(t, Tensor) else np.where(t > 0, values, d0)[()]


def gd_monotone_step_size(L: float) -> float:
    """Return sqrt(2) / L: the worst case with G = 0 decreases from the first step on below it (S, Corollary 2)."""
    demand("gd_monotone_step_size", "L", "a positive number", L, is_positive(L))
    return math.sqrt(2.0) / L


def chebyshev_rate(steps: Any, l: float, L: float, d0: Any = 1.0, G: Any = 0.0) -> Any:
    """Return the worst case of Chebyshev's method (Scieur et al. 2022, Theorem 3).

        D_t <= 2 / (xi^t + xi^-t) ((2 t^2 / (1 - kappa) - 1) D_0 + (2 t^2 / (L - l)) G)

    with ``xi = (1 - sqrt kappa) / (1 + sqrt kappa)`` and l < L, attained at lam = L for t >= 1. At t = 0 it is D_0.

    >>> round(float(chebyshev_rate(33, 1e-3, 1.0)), 2)
    532.08
    """
    check_interval("chebyshev_rate", l, L)
    demand("chebyshev_rate", "l", f"below L={L:g}", l, l < L)
    t = _counts("chebyshev_rate", steps, d0, G)
    bracket = (2.0 * t**2 * (L / (L - l)) - 1.0) * d0 + 2.0 * t**2 / (L - l) * G
    return _start(t, _decrease(t, l, L) * bracket, d0)


def _decrease(t: Any, l: float, L: float) -> Any:
    """Return ``2 / (xi^t + xi^-t) = 1 / T_t(|m(0)|)``, without overflow."""
    xi = optimal_factor(l, L)
    return 2.0 * xi**t / (1.0 + xi ** (2 * t))


def lower_bound(steps: Any, l: float, L: float, d0: Any = 1.0) -> Any:
    """Return what no first-order method can beat with G = 0 (Scieur et al. 2022, Proposition 1).

    Some f with a spectrum in [l, L] has ``D_t >= 2 / (xi^t + xi^-t) D_0``. Not tight: see `minimax_error`.

    >>> round(float(lower_bound(1, 1.0, 3.0)), 12)  # (L - l) / (L + l)
    0.5
    """
    check_interval("lower_bound", l, L)
    t = _counts("lower_bound", steps, d0, 0.0)
    return _decrease(t, l, L) * d0


def minimax_error(t: int, l: float, L: float, points: int | None = None) -> float:
    """Return the smallest worst case of all methods with G = 0: a linear program.

    The error's polynomial ``R = P_t - lam P_t'`` has R(0) = 1 and R'(0) = 0, and is otherwise free, so

        min over R of degree t with R(0) = 1, R'(0) = 0   of   max over [l, L] of |R|

    exceeds `lower_bound` by a factor that grows like t: unrolling is harder than optimisation. t is 2 or more (R = 1
    for t = 1), and l < L. The maximum is taken on Chebyshev points, by default 20 t + 200: the relative error is
    ``(t / points)^2``.

    >>> round(minimax_error(2, 0.05, 1.0) / float(lower_bound(2, 0.05, 1.0)), 2)
    1.44
    """
    from scipy.optimize import linprog  # slow to import, and needed here alone

    check_interval("minimax_error", l, L)
    demand("minimax_error", "l", f"below L={L:g}", l, l < L)
    demand("minimax_error", "t", "an int, 2 or more", t, is_int(t, 2))
    count = points or 20 * t + 200
    x = np.cos(np.pi * np.arange(count) / (count - 1))
    values = np.polynomial.chebyshev.chebvander(x, t)
    # T_j and T_j' at m(0), over those of j = t: hyperbolic functions of z j with cosh z = |m(0)|, signs (-1)^j.
    z, j = -math.log(optimal_factor(l, L)), np.arange(t + 1)
    signs = (-1.0) ** (t - j)
    at_zero = signs * np.exp(z * (j - t)) * (1 + np.exp(-2 * z * j)) / (1 + math.exp(-2 * z * t))
    slope = -signs * (j / t) * np.exp(z * (j - t)) * (1 - np.exp(-2 * z * j)) / (1 - math.exp(-2 * z * t))
    ones = np.ones((count, 1))
    solved = linprog(
        np.append(np.zeros(t + 1), 1.0),
        A_ub=np.block([[values, -ones], [-values, -ones]]),
        b_ub=np.zeros(2 * count),
        A_eq=np.stack([np.append(at_zero, 0.0), np.append(slope, 0.0)]),
        b_eq=[1.0, 0.0],
        bounds=(None, None),
        method="highs",
    )
    return float(solved.fun) * float(_decrease(t, l, L))


def worst_case_curve(
    method: LinearMultistep, l: float, L: float, steps: int, d0: float = 1.0, G: float = 0.0, points: int = 801
) -> Array:
    """Return the worst case of any linear multistep method for t = 0..steps, on a grid of [l, L].

        max over lam of |P_t - lam P_t'| D_0 + |P_t'| G,    of shape (steps + 1,)

    The options of the method are numbers; the grid are Chebyshev points, which include both ends.

    >>> from bilevel import Chebyshev
    >>> bool(np.allclose(worst_case_curve(Chebyshev(0.1, 1.0), 0.1, 1.0, 9), chebyshev_rate(np.arange(10), 0.1, 1.0)))
    True
    """
    check_interval("worst_case_curve", l, L)
    demand("worst_case_curve", "steps", "a positive int", steps, is_int(steps))
    demand("worst_case_curve", "points", "an int, 2 or more", points, is_int(points, 2))
    demand("worst_case_curve", "G", "a number, 0 or more", G, is_number(G) and G >= 0)
    lam = (L + l) / 2 - (L - l) / 2 * np.cos(np.pi * np.arange(points) / (points - 1))
    pairs = residual_polynomials("worst_case_curve", method, steps, lam)
    return np.array([np.max(np.abs(P - lam * slope) * d0 + np.abs(slope) * G) for P, slope in pairs])


@dataclass(frozen=True)
class Peak:
    """The largest value of an error curve, its step, and its ratio to the one at step 0; 1 where there is no curse."""

    index: int
    value: float
    ratio: float


def curse_peak(curve: Any) -> Peak:
    """Return index and height of the largest error of a curve, by argmax (the first, where several are equal).

    The errors at steps 0, 1, ... are one row of finite numbers, 0 or more. For the worst cases in closed form see
    `gd_peak` and `chebyshev_peak`; for any other method take `bilevel.theory.worst_case_curve`.

    >>> curse_peak([1.0, 3.0, 2.0])
    Peak(index=1, value=3.0, ratio=3.0)
    """
    values = curve.detach().cpu().numpy() if isinstance(curve, Tensor) else np.asarray(curve)
    ok = values.ndim == 1 and values.size > 0 and numbers(values) and bool((values >= 0).all())
    demand("curse_peak", "curve", "one row of finite numbers, 0 or more", curve, ok)
    index = int(np.argmax(values))
    value, start = float(values[index]), float(values[0])
    return Peak(index, value, value / start if start > 0 else math.inf if value > 0 else 1.0)


def gd_peak(l: float, L: float, step_size: float | None = None) -> Peak:
    """Return the exact peak of `gd_rate` with G = 0 and D_0 = 1 (Scieur et al. 2022, Corollary 1, with its constants).

    The mode at lam = L grows while ``t < 2 (u - 1) / (u (2 - u))``, ``u = h L``. For h = 2/(L+l) that is
    ``(1 - kappa^2) / (2 kappa)``, the default, and the height is about ``1 / (e kappa)``. The index is 0 where the
    curve never exceeds its start.

    >>> gd_peak(1e-3, 1.0).index
    500
    """
    check_interval("gd_peak", l, L)
    u = (2.0 / (1.0 + l / L)) if step_size is None else step_size * L
    demand("gd_peak", "step_size", f"a number in (0, 2/L) = (0, {2 / L:.6g})", step_size, is_positive(u) and u < 2)
    # 2 - u = 2 kappa / (1 + kappa) for the default, without cancellation.
    gap = 2.0 * l / (L + l) if step_size is None else 2.0 - u
    index = max(math.ceil(2.0 * (u - 1.0) / (u * gap) - 1e-9), 0)
    value = float(gd_rate(index, l, L, step_size=u / L)) if index else 1.0
    return Peak(index, value, value) if value > 1.0 else Peak(0, 1.0, 1.0)


def chebyshev_peak(l: float, L: float) -> Peak:
    """Return the exact peak of `chebyshev_rate` with G = 0 and D_0 = 1 (Scieur et al. 2022, Theorem 3).

    For small kappa it lies at ``1.0327 / sqrt(kappa)`` (``tanh z = 2/z``, ``z = 2 sqrt(kappa) t``) and is
    ``0.532 / kappa`` high. The index is 0 where the curve never exceeds its start.

    >>> peak = chebyshev_peak(1e-3, 1.0)
    >>> peak.index, round(peak.value, 2)
    (33, 532.08)
    """
    check_interval("chebyshev_peak", l, L)
    demand("chebyshev_peak", "l", f"below L={L:g}", l, l < L)
    near = 1.0327 * math.sqrt(L / l)
    steps = np.unique(np.rint(np.linspace(max(0.7 * near - 5, 0.0), 1.3 * near + 5, 2000)))
    for _ in range(4):  # the curve has one maximum: look closer around the best step so far
        best = steps[int(np.argmax(chebyshev_rate(steps, l, L)))]
        width = max(3.0, float(np.diff(steps).max()))
        steps = np.unique(np.rint(np.linspace(max(best - 2 * width, 0.0), best + 2 * width, 2000)))
    curve = chebyshev_rate(steps, l, L)
    index = int(np.argmax(curve))
    value = float(curve[index])
    return Peak(int(steps[index]), value, value) if value > 1.0 else Peak(0, 1.0, 1.0)
