"""Non-asymptotic bounds of unrolled derivatives for contractions (Mehmood et al. 2026, sections 2 and 4).

Setting: the fixed-point map A of an inner solver contracts, ``|A(x, u) - A(y, u)| <= rho |x - y|`` with rho < 1, and

    C = L_x |X*| + L_u

with L_x, L_u the Lipschitz constants of D_x A and D_u A in x, and X* the derivative of the solution
(see `bilevel.theory.contraction_constants`). Errors: ``e_k = |x_k - x*|``, ``d_k = |X_k - X*|``; a bound has the units
of the error that it bounds. Arguments: `steps` is K, 0 or more; `tail` is n in 1..K; `rho` lies in [0, 1); `d0` is d_0,
which is ``|X*|`` for a start that does not depend on the hyperparameters; `e0` is e_0. Each may be a number, a numpy
array or a tensor; they broadcast, and one outside its range raises a ValueError.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.theory.checks import at_least_zero, demand, every, numbers, whole


def _check(function: str, steps: Any, rho: Any, **errors: Any) -> None:
    demand(function, "steps", "a whole number, 0 or more, or an array of them", steps, whole(steps))
    ok = numbers(rho) and every((rho >= 0) & (rho < 1))
    demand(function, "rho", "a number in [0, 1), or an array of them", rho, ok)
    at_least_zero(function, **errors)


def _previous(steps: Any) -> Any:
    """Return ``max(steps - 1, 0)``: the curse term vanishes at 0 steps whatever its power of rho."""
    return (steps - 1).clip(0) if hasattr(steps, "clip") else max(steps - 1, 0)


def iterate_bound(steps: Any, rho: Any, e0: Any) -> Any:
    """Return ``e_K <= rho^K e_0`` (Mehmood et al. 2026, (8)).

    >>> iterate_bound(3, 0.5, 8.0)
    1.0
    """
    _check("iterate_bound", steps, rho, e0=e0)
    return rho**steps * e0


def accumulated_bound(steps: Any, rho: Any, e0: Any, inputs: Any = None, *, c: Any = None) -> Any:
    """Return the bound of an error that contracts and is fed (Mehmood et al. 2026, Lemma 4).

        e_(k+1) <= rho e_k + b_k  for all k  =>  e_K <= rho^K e_0 + sum_(i<K) rho^(K-1-i) b_i        (15)
        and, where b_i <= c rho^i,               e_K <= rho^K e_0 + c K rho^(K-1)                     (16)

    Both are equalities where the assumptions are. Errors of unrolled derivatives are of this kind, d_k in place of e_k
    and ``b_k = C e_k``: `unroll_bound` is (16) with ``c = C e_0``, and (15) with measured errors of the iterates is
    sharper. Give either `inputs` or `c`.

    Args:
        steps: K.
        rho: the factor of the contraction.
        e0: the error at step 0.
        inputs: ``b_0, b_1, ...`` along the last dimension, at least K of them, each 0 or more, for (15). Other
            dimensions broadcast with the other arguments.
        c: the constant of (16).

    >>> float(accumulated_bound(2, 0.5, 4.0, [3.0, 1.0]))
    3.5
    >>> accumulated_bound(2, 0.5, 4.0, c=3.0)
    4.0
    """
    _check("accumulated_bound", steps, rho, e0=e0)
    given = (inputs is not None) + (c is not None)
    demand("accumulated_bound", "inputs", "given where `c` is not, and left out where it is", inputs, given == 1)
    if inputs is None:
        at_least_zero("accumulated_bound", c=c)
        return rho**steps * e0 + c * steps * rho ** _previous(steps)
    many = isinstance(steps, np.ndarray | Tensor)
    most = int(steps.max() if many else steps)
    allowed = f"an array of at least {most} numbers, each 0 or more (steps={most})"
    fed = np.asarray(inputs) if isinstance(inputs, list | tuple) and numbers(inputs) else inputs
    ok = isinstance(fed, np.ndarray | Tensor) and fed.ndim > 0 and fed.shape[-1] >= most and numbers(fed)
    demand("accumulated_bound", "inputs", allowed, inputs, ok and every(fed >= 0))
    if any(isinstance(each, Tensor) for each in (steps, rho, e0)):
        fed = torch.as_tensor(fed)
    choose: Any = np.where
    if isinstance(fed, Tensor):
        choose, steps = torch.where, torch.as_tensor(steps, device=fed.device)
    bound = e0
    for i in range(most):
        following = rho * bound + fed[..., i]
        # Where `steps` differ, those with fewer stay at what they have.
        bound = choose(i < steps, following, bound) if many else following
    return bound


def unroll_bound(steps: Any, rho: Any, d0: Any, e0: Any, C: Any) -> Any:
    """Return ``d_K <= rho^K d_0 + C K rho^(K-1) e_0`` (Mehmood et al. 2026, Theorem 7, (19)).

    The second term is the curse of unrolling: it grows until ``K = -1 / log rho``, about ``1 / (1 - rho)``. C is h for
    gradient descent on ridge regression with a direct scalar penalty.

    >>> unroll_bound(2, 0.5, d0=4.0, e0=1.0, C=3.0)
    4.0
    """
    _check("unroll_bound", steps, rho, d0=d0, e0=e0, C=C)
    return rho**steps * d0 + C * steps * rho ** _previous(steps) * e0


def late_start_bound(steps: Any, tail: Any, rho: Any, d0: Any, e0: Any, C: Any, *, error_at_start: Any = None) -> Any:
    """Return the bound of a derivative of the last n steps alone (Mehmood et al. 2026, Theorem 8, (21)).

        d_K <= rho^n d_0 + C n rho^(K-1) e_0,      n = K - k0 the tail, k0 the truncation index
        d_K <= rho^n d_0 + C n rho^(n-1) e_k0      sharper, where the error e_k0 at the truncation index is known

    d_0 is the error at the truncation index: ``|X*|``, as the derivative starts from zero there. With `error_at_start`,
    which is e_k0, `e0` is not used.

    >>> late_start_bound(4, 2, 0.5, d0=4.0, e0=1.0, C=4.0)
    2.0
    """
    _check("late_start_bound", steps, rho, d0=d0, e0=e0, C=C)
    allowed = f"a whole number in 1..steps (steps={steps})"
    demand("late_start_bound", "tail", allowed, tail, whole(tail, 1) and every(tail <= steps))
    if error_at_start is None:
        return rho**tail * d0 + C * tail * rho ** (steps - 1) * e0
    at_least_zero("late_start_bound", error_at_start=error_at_start)
    return rho**tail * d0 + C * tail * rho ** (tail - 1) * error_at_start
