"""What truncation buys at equal cost, and how much to truncate (Mehmood et al. 2026, sections 4.3 and 5).

With omega the marginal cost of one derivative step in units of one iteration, K steps with derivatives cost
``(1 + omega) K``. Dropping N derivative steps pays for more iterations:

    K(N) = K + floor(omega N),   n = K - N derivative steps,   k0 = K(N) - n = N + floor(omega N) the truncation index

Operation counts of automatic differentiation are often quoted as the joint cost of a function with its derivative
(forward mode 2 to 5/2, reverse mode 3 to 4); with ``joint=True`` omega is such a figure and omega - 1 takes its place.
Arguments outside their ranges raise a ValueError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bilevel.core.options import is_int, is_number
from bilevel.theory.checks import at_least_zero, demand

ROUNDING = 1e-9
"""0.29 * 100 is a little below 29 in floating point: floors are taken after adding this."""


@dataclass(frozen=True)
class Budget:
    """How a budget is spent.

    Attributes:
        steps: K(N), all inner steps.
        tail: n, the differentiated ones among them.
        truncation_index: k0 = K(N) - n, the first state that enters the derivative.
        cost: ``K(N) + omega n``, in units of one iteration, with the marginal omega.
    """

    steps: int
    tail: int
    truncation_index: int
    cost: float


def marginal(function: str, omega: float, joint: bool) -> float:
    """Return the marginal cost of a derivative step, checked."""
    demand(function, "omega", "a positive number", omega, is_number(omega) and omega > 0)
    if joint:
        demand(function, "omega", "above 1 where it is a joint cost", omega, omega > 1)
        return omega - 1.0
    return omega


def budget(steps: int, dropped: int, omega: float, joint: bool = False) -> Budget:
    """Return the run of equal cost when N of K derivative steps are dropped (Mehmood et al. 2026, section 4.3).

    K = `steps` are those without truncation, N = `dropped` lies in 0..K-1. The cost is at most ``(1 + omega) K`` with
    the marginal omega.

    >>> budget(100, 20, omega=3)
    Budget(steps=160, tail=80, truncation_index=80, cost=400.0)
    >>> budget(100, 20, omega=3, joint=True).steps
    140
    """
    demand("budget", "steps", "a positive int", steps, is_int(steps))
    allowed = f"an int in 0..{steps - 1}, so that one derivative step is left of steps={steps}"
    demand("budget", "dropped", allowed, dropped, is_int(dropped, 0) and dropped < steps)
    weight = marginal("budget", omega, joint)
    total, tail = steps + math.floor(weight * dropped + ROUNDING), steps - dropped
    return Budget(total, tail, total - tail, float(total + weight * tail))


def split_budget(total: float, tail: int, omega: float, joint: bool = False) -> Budget:
    """Return the longest run whose last n = `tail` steps are differentiated at a cost of at most `total` iterations.

    ``K = floor(total - omega n)``, with ``K >= n``; a budget too small for the tail is refused.

    >>> split_budget(400, 80, omega=3).truncation_index
    80
    """
    weight = marginal("split_budget", omega, joint)
    least = 1.0 + weight
    allowed = f"at least {least:g}, the cost of one step with its derivative (omega={omega:g})"
    demand("split_budget", "total", allowed, total, is_number(total) and total >= least - ROUNDING)
    most = math.floor(total / least + ROUNDING)
    demand("split_budget", "tail", f"an int in 1..{most} for total={total:g}", tail, is_int(tail) and tail <= most)
    steps = math.floor(total - weight * tail + ROUNDING)
    return Budget(steps, tail, steps - tail, float(steps + weight * tail))


def optimal_truncation(
    steps: int,
    rho: float,
    d0: float,
    e0: float,
    C: float,
    omega: float,
    joint: bool = False,
    method: str = "integer",
) -> float:
    """Return the number N of derivative steps to drop that minimises the bound (Mehmood et al. 2026, (22)).

        psi(N) = d_0 rho^(K-N) + C e_0 (K-N) rho^(K + omega N - 1)

    psi is strictly convex on [0, K]. With ``s = -log rho``, ``q = (1 + omega) / omega`` and Lambert's function W, its
    minimiser is ``N = K - n``,

        n = (W(z) / q - 1) / (s omega),   log z = log(q d_0 s / (C e_0)) + s ((1 + omega) K - 1) + q

    or the fixed point of ``N = (s + log((C e_0 / d_0) (1/s + omega (K - N)))) / (s (1 + omega))``. It grows like log K.

    The arguments are those of `unroll_bound` and `budget`; `method` is "integer" (every N with K(N) rounded down,
    exact), or the relaxed minimiser by "lambert" or "fixed_point". N lies in [0, K - 1]: at least one derivative step
    is kept, though the bound may prefer none.

    >>> N = optimal_truncation(100, 0.9, d0=1.0, e0=10.0, C=1.0, omega=3.0)
    >>> N, round(optimal_truncation(100, 0.9, 1.0, 10.0, 1.0, 3.0, method="lambert"), 3)
    (19, 18.843)
    """
    demand("optimal_truncation", "steps", "a positive int", steps, is_int(steps))
    demand("optimal_truncation", "rho", "a number in [0, 1)", rho, is_number(rho) and 0 <= rho < 1)
    at_least_zero("optimal_truncation", d0=d0, e0=e0, C=C)
    methods = ("integer", "lambert", "fixed_point")
    demand("optimal_truncation", "method", "'integer', 'lambert' or 'fixed_point'", method, method in methods)
    weight = marginal("optimal_truncation", omega, joint)
    curse = C * e0
    if rho == 0 or curse == 0:
        return 0
    if d0 == 0:
        return steps - 1
    s = -math.log(rho)
    if method == "integer":
        return int(np.argmin(_log_bounds(steps, s, d0, curse, weight)))
    solve = _by_lambert if method == "lambert" else _by_fixed_point
    return min(max(solve(steps, s, math.log(d0) - math.log(curse), weight), 0.0), float(steps - 1))


def _log_bounds(steps: int, s: float, d0: float, curse: float, omega: float) -> NDArray[np.float64]:
    """Return log psi at N = 0..K-1, with K(N) rounded down: psi itself underflows on long runs."""
    dropped = np.arange(steps)
    tail, total = steps - dropped, steps + np.floor(omega * dropped + ROUNDING)
    return np.logaddexp(math.log(d0) - s * tail, math.log(curse) + np.log(tail) - s * (total - 1))


def _by_lambert(steps: int, s: float, log_ratio: float, omega: float) -> float:
    from scipy.special import wrightomega  # slow to import, and needed here alone

    q = (1.0 + omega) / omega
    log_z = math.log(q * s) + log_ratio + s * ((1.0 + omega) * steps - 1.0) + q
    # Wright's function of log z is Lambert's of z, which may overflow.
    return steps - (float(wrightomega(log_z)) / q - 1.0) / (s * omega)


def _by_fixed_point(steps: int, s: float, log_ratio: float, omega: float) -> float:
    # A contraction with the factor omega / ((1 + omega) (1 + s omega n)), as long as n = K - N stays positive.
    dropped = 0.0
    for _ in range(100_000):
        tail = max(steps - dropped, 0.0)
        following = (s - log_ratio + math.log(1.0 / s + omega * tail)) / (s * (1.0 + omega))
        if abs(following - dropped) <= 1e-14 * max(1.0, abs(dropped)):
            return following
        dropped = following
    return dropped
