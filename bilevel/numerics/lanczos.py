"""Extreme eigenvalues of a symmetric operator by the Lanczos process (Golub & Van Loan, chapter 10)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.device import check_interval

SEED = 0x5EED_1A5C
CURVATURE_MARGIN = 1.02
"""A measured largest curvature can lie below the true one; step sizes are computed from this much more."""


@dataclass(frozen=True)
class Spectrum:
    """Measured ends of a spectrum: from `lanczos` they lie inside it, from a closed form they may be bounds.

    `steps` are products that were used; `exact`: up to rounding, as the Krylov space is the whole one, or by a closed
    form.
    """

    smallest: float
    largest: float
    steps: int = 0
    exact: bool = False


def lanczos(matvec: Callable[[Tensor], Tensor], like: Tensor, steps: int = 30, rtol: float = 1e-3) -> Spectrum:
    """Return the ends of the spectrum of a symmetric operator, from a fixed pseudo-random start.

    Both lie inside the true spectrum, so users add a margin. It stops when the largest Ritz value has changed by less
    than `rtol` over three steps, after `steps` products at most. Full reorthogonalisation: the basis takes ``steps *
    size`` numbers. `like` gives size, dtype and device.

    >>> diagonal = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    >>> round(lanczos(lambda v: diagonal * v, diagonal).largest, 10)
    5.0
    """
    size, limit = like.numel(), min(steps, like.numel())
    every = check_interval(like.device)
    # Drawn on the CPU so that the start is the same on every device; the seed is one that no data set starts from.
    generator = torch.Generator().manual_seed(SEED)
    vector = torch.randn(size, generator=generator, dtype=torch.float64).to(like)
    vector = vector / torch.linalg.vector_norm(vector)
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    history: list[float] = []
    smallest = largest = float("nan")
    for step in range(1, limit + 1):
        basis.append(vector)
        product = matvec(vector)
        diagonal.append(torch.dot(vector, product))
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough (Kahan-Parlett)
            product = product - stacked.t() @ (stacked @ product)
        off.append(tree.vector_norm(product))
        vector = product / off[-1]
        if step % every and step != limit:
            continue
        # One transfer; not every accelerator has float64. Steps beyond the end are dropped, so that every device
        # measures the same.
        alpha, beta = torch.stack([*diagonal, *off]).cpu().double().chunk(2)
        for used in range(len(history) + 1, step + 1):
            smallest, largest, last = _ritz(alpha[:used], beta[:used])
            history.append(largest)
            # A Krylov space that closes early may have missed eigenvectors orthogonal to the start: not called exact.
            closed = not last > 10 * torch.finfo(like.dtype).eps * max(abs(smallest), abs(largest))
            if closed or (used > 3 and abs(largest - history[-4]) <= rtol * abs(largest)):
                return Spectrum(smallest, largest, used, exact=used == size and largest == largest)
    return Spectrum(smallest, largest, limit, exact=limit == size and largest == largest)


def _ritz(alpha: Tensor, beta: Tensor) -> tuple[float, float, float]:
    """Return (smallest, largest) eigenvalue of the Lanczos matrix and its last off-diagonal entry; NaN stays NaN."""
    if not bool(torch.isfinite(alpha).all() & torch.isfinite(beta).all()):
        return float("nan"), float("nan"), float("nan")
    values = torch.linalg.eigvalsh(torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1))
    return float(values[0]), float(values[-1]), float(beta[-1])
