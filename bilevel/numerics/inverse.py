"""The inverse of a positive definite matrix, and how far rounding moves what two solves with it give.

    H x = b,      H a = f(x),      g = g(x, a)

The entries of H are known to some rounding units of ``D_i D_j``, with D the roots of its diagonal. So x and a are known
up to solutions for random right-hand sides of sizes ``D_i |D x|`` and ``D_i |D a|``, and g up to what these do to it:
the small-sample condition estimate of Kenney and Laub 1994. Arrays on the host and tensors are treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.numerics.small import lapack, norm

PROBES, FAR = 3, 1e3
"""Solutions for random right-hand sides; one is enough where it is smaller than need be by this factor."""
UNITS = 4.0
"""Rounding units of an entry of H."""
RIGHT = 1e-2
"""Share of a hypergradient up to which its error is accepted; see `scripts/studies/near_singular.py`."""


class ByFactor:
    """``H^-1`` by the Cholesky factor, for one right-hand side or several in columns; `fails` where there is none."""

    def __init__(self, matrix: Any) -> None:
        if isinstance(matrix, Tensor):
            self.factor, info = torch.linalg.cholesky_ex(matrix)
        else:
            self.factor, info = lapack().dpotrf(matrix, lower=1, clean=0)
        self.fails = bool(info)

    def __call__(self, right: Any) -> Any:
        if isinstance(right, Tensor):
            return torch.cholesky_solve(right.reshape(len(right), -1), self.factor).reshape(right.shape)
        return lapack().dpotrs(self.factor, right, lower=1)[0]

    def smallest(self) -> float:
        """Return the smallest eigenvalue of H, but for a factor of some units; of arrays."""
        return float(lapack().dpocon(self.factor, 1.0, uplo="L")[0])


class InBasis:
    """``H^-1 = Q diag(values)^-1 Q'``, likewise."""

    def __init__(self, vectors: Any, values: Any) -> None:
        self.vectors, self.values = vectors, values

    def smallest(self) -> float:
        """Return the smallest eigenvalue of H."""
        return float(self.values[0])

    def __call__(self, right: Any) -> Any:
        values = self.values if right.ndim == 1 else self.values[:, None]
        if isinstance(right, Tensor):
            return self.vectors @ ((self.vectors.T @ right) / values)
        return self.vectors.dot(self.vectors.T.dot(right) / values)  # half the time of `@`, on few numbers


@lru_cache
def _probes(size: int, *like: Any) -> Any:
    # Normal numbers: of signs, no draw of a few sees the difference of two columns whose signs agree in all.
    made = np.random.default_rng(size).standard_normal((2, PROBES, size))
    return torch.as_tensor(made, dtype=like[0], device=like[1]) if like else made


def rounding(
    inverse: Callable[[Any], Any],
    scale: Any,
    x: Any,
    a: Any,
    outer: Callable[[Any], tuple[Any, Any]],
    pull: Callable[[Any, Any], Any],
    probes: int = PROBES,
) -> tuple[Any, Any, Any]:
    """Return by how much rounding moves a hypergradient, its norm, and that of its parts, which may cancel in it.

    Args:
        inverse: ``H^-1`` of vectors in columns.
        scale: roots of the diagonal of H.
        x: the solution.
        a: the adjoint vector.
        outer: x -> f(x), and the part of the hypergradient that depends on x alone.
        pull: (x, a) -> the other part.
        probes: how many solutions for random right-hand sides; one alone is too small by a factor w in about one of
            w cases.
    """
    xp: Any = torch if isinstance(x, Tensor) else np
    drawn = _probes(len(x), x.dtype, x.device) if isinstance(x, Tensor) else _probes(len(x))
    first, second = drawn[:, :probes]
    unit, by = UNITS * xp.finfo(x.dtype).eps, scale[:, None]
    dx = unit * (inverse(by * first.T * norm(scale * x)) + x[:, None] * first.T)
    f, direct = outer(x)
    ends = [outer(x + each) for each in dx.T]
    df = xp.stack([each - f for each, _ in ends], 1)
    da = inverse(unit * norm(scale * a) * by * second.T + df) + unit * a[:, None] * second.T
    total = direct + pull(x, a)
    moves = [there + pull(x + p, a + q) - total for (_, there), p, q in zip(ends, dx.T, da.T, strict=True)]
    parts = [pull(x, a * each) for each in first]
    return norm(xp.stack(moves)) / probes**0.5, norm(total), norm(xp.stack(parts)) / probes**0.5


def is_right(error: float, size: float, parts: float, eps: float) -> bool:
    """Whether a hypergradient is right to `RIGHT` of its norm, or to half of the digits of its parts."""
    return math.isfinite(error) and error <= max(RIGHT * size, eps**0.5 * parts)
