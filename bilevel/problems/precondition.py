"""The inverse of a data Hessian plus a diagonal, as a preconditioner: one Cholesky factor in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.oracles import Preconditioner

MAX_DENSE = 2_000
"""Most weights for which a dense matrix is worth its factorisation."""
SHIFTS = (0.0, 1e-6, 1e-3)
"""What is added to the diagonal, relative to its mean, until the factorisation succeeds."""


def factored(gram: Tensor, diagonal: Tensor) -> Preconditioner:
    """Return ``v -> (gram + diag(diagonal))^-1 v``, computed in the dtype of `gram`.

    A matrix that rounding or a negative diagonal makes indefinite is shifted; if that does not help, the result is the
    identity, for which CG and quasi-Newton steps remain right.

    Args:
        gram: symmetric, of shape (size, size).
        diagonal: of shape (size,).

    >>> inverse = factored(torch.zeros(2, 2), torch.tensor([2.0, 4.0]))
    >>> inverse.apply(torch.tensor([2.0, 2.0]))
    tensor([1.0000, 0.5000])
    """
    matrix = gram + torch.diag(diagonal.to(gram.dtype))
    mean = matrix.diagonal().mean()
    for shift in SHIFTS:
        shifted = matrix if shift == 0 else matrix + torch.diag((shift * mean).expand(len(gram)))
        factor, info = torch.linalg.cholesky_ex(shifted)
        if not bool(info) and bool(torch.isfinite(factor.diagonal()).all()):
            return Preconditioner(lambda v: _solve(factor, v), gram)
    return Preconditioner(None, gram)


def _solve(factor: Tensor, v: Tensor) -> Tensor:
    # Two triangular solves: `cholesky_solve` copies the factor first.
    half = torch.linalg.solve_triangular(factor, v.to(factor.dtype)[:, None], upper=False)
    return torch.linalg.solve_triangular(factor.t(), half, upper=True)[:, 0].to(v.dtype)
