"""Factors of regularised Hessians, and their inverses."""

from __future__ import annotations

import torch
from torch import Tensor


def factor(gram: Tensor, a: Tensor) -> Tensor:
    """Return the Cholesky factor of ``gram + diag(a)``, (..., p, p); where rounding leaves none, of a little more.

    Args:
        gram: positive semidefinite, of shape (..., p, p).
        a: of shape (..., p), not negative.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    diagonal += a
    L, info = torch.linalg.cholesky_ex(hessian)
    more = 1e-14
    while bool(info.any()):
        diagonal += more * diagonal.amax(-1, keepdim=True)
        L, info = torch.linalg.cholesky_ex(hessian)
        more *= 10.0
    return L


def symmetric_inverse(L: Tensor) -> Tensor:
    """Return the inverse of ``L L'``."""
    return torch.cholesky_inverse(L)
