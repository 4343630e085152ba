"""The Nystrom approximation of a positive semidefinite matrix from its products with a few vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_basis(size: int, rank: int, seed: int, like: Tensor) -> Tensor:
    """Return Omega, an orthonormal basis of `rank` Gaussian vectors of a seed, of shape (size, rank).

    The numbers are drawn on the CPU, the same for every device; `like` gives dtype and device.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn.to(like))[0]


def low_rank(omega: Tensor, Y: Tensor, nu: float | Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (U, l) with ``U diag(l) U' = Y (Omega' Y)^-1 Y' - nu I`` on the range of Y, l cut off at zero.

    Omega has orthonormal columns, of shape (size, rank), and ``Y = (A + nu I) Omega``. The shift nu keeps the small
    matrix away from singular by more than rounding (Tropp, Yurtsever, Udell & Cevher 2017, algorithm 3). By its Schur
    complement ``U diag(l) U'`` is below A + nu I. U has orthonormal columns, l falls. None where ``Omega' Y`` is not
    positive definite, or not finite.

    >>> A = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    >>> omega = torch.eye(3, dtype=torch.float64)[:, :2]
    >>> low_rank(omega, A @ omega, 0.0)[1]
    tensor([4., 1.], dtype=torch.float64)
    """
    factor, info = torch.linalg.cholesky_ex(omega.t() @ Y)
    if not bool((info == 0) & torch.isfinite(factor).all()):
        return None
    B = torch.linalg.solve_triangular(factor, Y.t(), upper=False).t()
    U, values, _ = torch.linalg.svd(B, full_matrices=False)
    return U, (values.square() - nu).clamp_min(0.0)
