"""The inverse of a data Hessian plus a diagonal, as a preconditioner: one Cholesky factor in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import Preconditioner

DRIFT = 0.25
"""Relative change of the diagonal up to which a factor is used again."""
SHIFTS = (0.0, 1e-6, 1e-3)
"""What is added to the diagonal, relative to its mean, until the factorisation succeeds."""


def factored(gram: Tensor, diagonal: Tensor, cache: Tree = None) -> Preconditioner:
    """Return ``v -> (gram + diag(diagonal))^-1 v``, computed in the dtype of `gram`, which is symmetric.

    A factor made for another diagonal (`cache`) is used again while no entry has moved by more than `DRIFT` of itself.
    A matrix that rounding or a negative diagonal makes indefinite is shifted; if that does not help, the result is the
    identity, for which CG and quasi-Newton steps remain right.

    >>> inverse = factored(torch.zeros(2, 2), torch.tensor([2.0, 4.0]))
    >>> inverse.apply(torch.tensor([2.0, 2.0]))
    tensor([1.0000, 0.5000])
    """
    diagonal = diagonal.to(gram.dtype)
    if cache is not None and bool(((diagonal - cache["diagonal"]).abs() <= DRIFT * cache["diagonal"]).all()):
        return Preconditioner(_inverse(cache["factor"]), cache)
    matrix = gram.clone()
    matrix.diagonal().add_(diagonal)
    mean = matrix.diagonal().mean()
    for shift in SHIFTS:
        factor, info = torch.linalg.cholesky_ex(
            matrix + torch.diag((shift * mean).expand(len(gram))) if shift else matrix
        )
        if not bool(info) and bool(torch.isfinite(factor.diagonal()).all()):
            return Preconditioner(_inverse(factor), {"gram": gram, "factor": factor, "diagonal": diagonal})
    # No later diagonal is near NaN, so what stands for the factor is never used.
    return Preconditioner(None, {"gram": gram, "factor": gram, "diagonal": torch.full_like(diagonal, float("nan"))})


def _inverse(factor: Tensor) -> Callable[[Tensor], Tensor]:
    def apply(v: Tensor) -> Tensor:
        # Two triangular solves: `cholesky_solve` copies the factor first.
        half = torch.linalg.solve_triangular(factor, v.to(factor.dtype)[:, None], upper=False)
        return torch.linalg.solve_triangular(factor.t(), half, upper=True)[:, 0].to(v.dtype)

    return apply
