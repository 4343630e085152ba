"""Extreme eigenvalues of a symmetric operator by the Lanczos process (Golub & Van Loan, chapter 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Measured ends of a spectrum.

    Attributes:
        smallest: smallest Ritz value; never below the true smallest eigenvalue.
        largest: largest Ritz value; never above the true largest eigenvalue.
        steps: products that were used.
        exact: whether the values are exact up to rounding (the Krylov space was exhausted, or a closed form was used).
    """

    smallest: float
    largest: float
    steps: int = 0
    exact: bool = False


def lanczos(matvec: Callable[[Tensor], Tensor], like: Tensor, steps: int = 30, rtol: float = 1e-3) -> Spectrum:
    """Measure the ends of the spectrum of a symmetric operator from a fixed pseudo-random start.

    Stops when the largest Ritz value has changed by less than `rtol` over three steps. Full reorthogonalisation:
    the basis takes ``steps * size`` numbers.

    Args:
        matvec: v of shape (size,) -> A v of shape (size,).
        like: a vector that gives size, dtype and device.
        steps: most products to use.
        rtol: relative change at which to stop.

    Returns:
        The `Spectrum`; both ends lie inside the true spectrum, so users add a margin.

    >>> diagonal = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    >>> round(lanczos(lambda v: diagonal * v, diagonal).largest, 10)
    5.0
    """
    size = like.numel()
    # Drawn on the CPU so that the start is the same on every device.
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = start.to(like)
    vector = vector / torch.linalg.vector_norm(vector)
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    history: list[float] = []
    ritz = torch.zeros(1)
    floor = 10 * torch.finfo(like.dtype).eps
    for step in range(min(steps, size)):
        basis.append(vector)
        product = matvec(vector)
        diagonal.append(torch.dot(vector, product))
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough (Kahan-Parlett)
            product = product - stacked.t() @ (stacked @ product)
        off.append(torch.linalg.vector_norm(product))
        # One transfer a step: the small tridiagonal problem is solved on the CPU.
        alpha, beta = torch.stack(diagonal).double().cpu(), torch.stack(off).double().cpu()
        if not (torch.isfinite(alpha).all() and torch.isfinite(beta).all()):
            return Spectrum(float("nan"), float("nan"), step + 1)
        small = torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)
        ritz = torch.linalg.eigvalsh(small)
        history.append(float(ritz[-1]))
        exhausted = float(beta[-1]) <= floor * max(abs(float(ritz[0])), abs(float(ritz[-1])))
        if exhausted or step + 1 == size:
            return Spectrum(float(ritz[0]), float(ritz[-1]), step + 1, exact=True)
        if len(history) > 3 and abs(history[-1] - history[-4]) <= rtol * abs(history[-1]):
            break
        vector = product / off[-1]
    return Spectrum(float(ritz[0]), float(ritz[-1]), len(basis))
