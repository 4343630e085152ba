"""Conjugate gradients that report what their Lanczos matrix says of the spectrum, and stop at negative curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Krylov:
    """A CG run with what its Lanczos matrix says of the spectrum.

    Attributes:
        x: last iterate.
        residual: norm of its recursive residual.
        steps: products taken.
        negative: the curvature that stopped it, None where all were positive.
        smallest: smallest Ritz value, an upper bound of the smallest eigenvalue; infinite without steps.
        largest: largest Ritz value.
    """

    x: Tensor
    residual: float
    steps: int
    negative: float | None = None
    smallest: float = float("inf")
    largest: float = 0.0


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor],
    x: Tensor,
    r: Tensor,
    enough: Callable[[Tensor, float, int], bool],
) -> Krylov:
    """Run CG from x, whose residual is r, until `enough(x, residual norm, steps)`.

    Args:
        matvec: a symmetric operator on vectors.
        x: start.
        r: its residual.
        enough: looked at before each step.

    Returns:
        The last iterate; negative curvature stops the run before the step along it.
    """
    p, rr = r, torch.dot(r, r)
    lengths: list[float] = []
    ratios: list[float] = []
    while not enough(x, float(rr.sqrt()), len(lengths)) and bool(rr > 0):
        product = matvec(p)
        energy = float(torch.dot(p, product))
        if not energy > 0:
            curvature = energy / float(torch.dot(p, p))
            return Krylov(x, float(rr.sqrt()), len(lengths), curvature, *_ritz(lengths, ratios))
        lengths.append(float(rr) / energy)
        x, r = torch.add(x, p, alpha=lengths[-1]), torch.add(r, product, alpha=-lengths[-1])
        before, rr = rr, torch.dot(r, r)
        ratios.append(float(rr / before))
        p = torch.add(r, p, alpha=ratios[-1])
    return Krylov(x, float(rr.sqrt()), len(lengths), None, *_ritz(lengths, ratios))


def _ritz(lengths: list[float], ratios: list[float]) -> tuple[float, float]:
    """Return the ends of the spectrum of CG's Lanczos matrix."""
    if not lengths:
        return float("inf"), 0.0
    a, b = torch.tensor(lengths, dtype=torch.float64), torch.tensor(ratios, dtype=torch.float64)
    diagonal = 1.0 / a
    diagonal[1:] += b[:-1] / a[:-1]
    off = b[:-1].sqrt() / a[:-1]
    values = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return float(values[0]), float(values[-1])
