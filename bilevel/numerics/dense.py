"""Dense algebra of small problems: the sizes up to which it is used, in unknowns, and the factor of a Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.numerics.small import array, tensor

REFINED = 150
"""Error estimates make the Hessian from products: about as many as the search and the solves take beyond."""
EIGENVALUES = 300
"""The ends of the spectrum are computed, and not measured by Lanczos."""
METRIC = 300
"""A Cholesky factor as the metric of a bound costs less than the products that it saves."""
REFACTORED = 300
"""The Gram matrix of an error model is factored again for every set of penalties."""
BOUNDED = 1_000
"""Bounds make a dense matrix at all."""
REFEREE = 1_500
"""The referee of a comparison factors the Hessian."""
PRECONDITIONER = 2_000
"""The Gram matrix of a linear model is factored to precondition CG."""
FACTORED = 5_000
"""`Newton` and `ClosedForm` factor the Hessian; above, they refuse."""
EIGENBASIS = 5_000
"""The eigenbasis of a Gram matrix is computed; above, that takes minutes."""

HALVED = 512
"""A symmetric product of matrices is made by its upper blocks: below, the calls cost what they save."""
BLOCK = 256


def symmetric_product(A: Tensor, B: Tensor) -> Tensor:
    """Return ``A B'``, of shape (d, d), where it is symmetric, such as ``X D X'``: for large d at half of the work.

    >>> symmetric_product(torch.eye(2), torch.eye(2))
    tensor([[1., 0.],
            [0., 1.]])
    """
    if A is B and A.device.type == "cpu":
        return tensor(array(A) @ array(A).T)  # NumPy computes one triangle, where it sees the same matrix twice
    size = A.shape[0]
    if size < HALVED or A.device.type != "cpu":
        return A @ B.mT
    product = A.new_empty(size, size)
    for low in range(0, size, BLOCK):
        rows = slice(low, min(low + BLOCK, size))
        torch.mm(A[rows], B[low:].mT, out=product[rows, low:])
        product[rows.stop :, rows] = product[rows, rows.stop :].mT
    return product


def check_factored(method: str, size: int, remedy: str) -> None:
    """Refuse a size above `FACTORED`, with the remedy."""
    if size > FACTORED:
        raise ValueError(
            f"{method}() factors a dense Hessian, for at most {FACTORED:,} parameters, got {size:,}: use {remedy}."
        )


def factored(hessian: Tensor) -> tuple[Tensor, float | None]:
    """Return the Cholesky factor and None; where there is none, the smallest eigenvalue instead of None."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    return factor, float(torch.linalg.eigvalsh(hessian)[0]) if bool(info) else None
