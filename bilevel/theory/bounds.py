"""Non-asymptotic bounds of unrolled derivatives for contractions (Mehmood et al. 2026, sections 2 and 4).

Setting: the fixed-point map A of an inner solver contracts, ``|A(x, u) - A(y, u)| <= rho |x - y|`` with rho < 1, and

    C = L_x |X*| + L_u

with L_x, L_u the Lipschitz constants of D_x A and D_u A in x, and X* the derivative of the solution
(see `bilevel.theory.contraction_constants`). Errors: ``e_k = |x_k - x*|``, ``d_k = |X_k - X*|``. Every argument may be
a number, a numpy array or a tensor; they broadcast.
"""

from __future__ import annotations

from typing import Any

from bilevel.theory.checks import at_least_zero, demand, numbers


def _check(function: str, steps: Any, rho: Any, **errors: Any) -> None:
    demand(function, "steps", "a whole number, 0 or more, or an array of them", steps, _whole(steps, 0))
    demand(function, "rho", "a number in [0, 1), or an array of them", rho, numbers(rho))
    demand(function, "rho", "a number in [0, 1), or an array of them", rho, (rho >= 0) & (rho < 1))
    at_least_zero(function, **errors)


def _whole(value: Any, at_least: int) -> Any:
    return numbers(value) and not isinstance(value, bool) and _all((value >= at_least) & (value % 1 == 0))


def _all(ok: Any) -> bool:
    return bool(ok.all() if hasattr(ok, "all") else ok)


def _previous(steps: Any) -> Any:
    """Return ``max(steps - 1, 0)``: the curse term vanishes at 0 steps whatever its power of rho."""
    return (steps - 1).clip(0) if hasattr(steps, "clip") else max(steps - 1, 0)


def iterate_bound(steps: Any, rho: Any, e0: Any) -> Any:
    """Return ``e_K <= rho^K e_0`` (Mehmood et al. 2026, (8)).

    Args:
        steps: K, 0 or more.
        rho: contraction modulus, in [0, 1).
        e0: initial error of the iterate.

    Returns:
        The bound on ``|x_K - x*|``, in the units of `e0`.

    Raises:
        ValueError: for arguments outside their ranges.

    >>> iterate_bound(3, 0.5, 8.0)
    1.0
    """
    _check("iterate_bound", steps, rho, e0=e0)
    return rho**steps * e0


def unroll_bound(steps: Any, rho: Any, d0: Any, e0: Any, C: Any) -> Any:
    """Return ``d_K <= rho^K d_0 + C K rho^(K-1) e_0`` (Mehmood et al. 2026, Theorem 7, (19)).

    The second term is the curse of unrolling: it grows until ``K = -1 / log rho``, about ``1 / (1 - rho)``.

    Args:
        steps: K, 0 or more.
        rho: contraction modulus, in [0, 1).
        d0: initial error of the derivative: ``|X*|`` for a start that does not depend on the hyperparameters.
        e0: initial error of the iterate.
        C: ``L_x |X*| + L_u``; it is h for gradient descent on ridge regression with a direct scalar penalty.

    Returns:
        The bound on ``|X_K - X*|``, in the units of `d0`.

    Raises:
        ValueError: for arguments outside their ranges.

    >>> unroll_bound(2, 0.5, d0=4.0, e0=1.0, C=3.0)
    4.0
    """
    _check("unroll_bound", steps, rho, d0=d0, e0=e0, C=C)
    return rho**steps * d0 + C * steps * rho ** _previous(steps) * e0


def late_start_bound(steps: Any, tail: Any, rho: Any, d0: Any, e0: Any, C: Any, *, error_at_start: Any = None) -> Any:
    """Return the bound of a derivative of the last n steps alone (Mehmood et al. 2026, Theorem 8, (21)).

        d_K <= rho^n d_0 + C n rho^(K-1) e_0,      n = K - k0 the tail, k0 the truncation index
        d_K <= rho^n d_0 + C n rho^(n-1) e_k0      sharper, where the error e_k0 at the truncation index is known

    Args:
        steps: K, all inner steps.
        tail: n in 1..K, the differentiated ones.
        rho: contraction modulus, in [0, 1).
        d0: error of the derivative at the truncation index: ``|X*|``, as it starts from zero there.
        e0: initial error of the iterate; not used where `error_at_start` is given.
        C: ``L_x |X*| + L_u``.
        error_at_start: ``|x_k0 - x*|``, for the sharper form.

    Returns:
        The bound on the error of the truncated derivative, in the units of `d0`.

    Raises:
        ValueError: for arguments outside their ranges.

    >>> late_start_bound(4, 2, 0.5, d0=4.0, e0=1.0, C=4.0)
    2.0
    """
    _check("late_start_bound", steps, rho, d0=d0, e0=e0, C=C)
    allowed = f"a whole number in 1..steps (steps={steps})"
    demand("late_start_bound", "tail", allowed, tail, _whole(tail, 1) and _all(tail <= steps))
    if error_at_start is None:
        return rho**tail * d0 + C * tail * rho ** (steps - 1) * e0
    at_least_zero("late_start_bound", error_at_start=error_at_start)
    return rho**tail * d0 + C * tail * rho ** (tail - 1) * error_at_start
