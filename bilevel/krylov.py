"""Conjugate gradients (Hestenes & Stiefel 1952), written once: for linear solves, error estimates and balanced runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Krylov:
    """A CG run, as far as it has come.

    Attributes:
        x: the iterate.
        rr: squared norm of its recursive residual.
        negative: the curvature that stopped the run, None where all were positive; NaN for a NaN product.
        lengths: step lengths.
        ratios: quotients of successive squared residual norms.
        energies: what each step took off the squared energy norm of the error.
    """

    x: Tensor
    rr: float
    negative: float | None = None
    lengths: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.lengths)

    @property
    def residual(self) -> float:
        """Norm of the recursive residual."""
        return self.rr**0.5

    def spectrum(self) -> tuple[float, float]:
        """Return the ends of the spectrum of CG's Lanczos matrix, inside that of A; (inf, 0) without steps."""
        if not self.lengths:
            return float("inf"), 0.0
        a = torch.tensor(self.lengths, dtype=torch.float64)
        b = torch.tensor(self.ratios, dtype=torch.float64)
        diagonal = 1.0 / a
        diagonal[1:] += b[:-1] / a[:-1]
        off = b[:-1].sqrt() / a[:-1]
        values = torch.linalg.eigvalsh(torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
        return float(values[0]), float(values[-1])


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, enough: Callable[[Krylov], bool]
) -> Krylov:
    """Run CG from x, whose residual is r, until `enough`.

    The scalars are Python floats: on the CPU that is cheaper than keeping them in tensors.

    Args:
        matvec: a symmetric operator on vectors of shape (size,).
        x: start.
        r: its residual.
        enough: looks at the run before each step; True ends it.

    Returns:
        The run with its last iterate; a direction of negative or zero curvature ends it before the step along it.

    >>> A, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    >>> run = conjugate_gradients(lambda v: A @ v, torch.zeros(2), b, lambda run: run.steps == 2)
    >>> bool((A @ run.x - b).norm() < 1e-6)
    True
    """
    run = Krylov(x, float(torch.dot(r, r)))
    p = r
    while not enough(run) and run.rr > 0:
        product = matvec(p)
        energy = float(torch.dot(p, product))
        if not energy > 0:
            run.negative = energy / float(torch.dot(p, p))
            return run
        length = run.rr / energy
        run.x, r = torch.add(run.x, p, alpha=length), torch.sub(r, product, alpha=length)
        before, run.rr = run.rr, float(torch.dot(r, r))
        run.lengths.append(length)
        run.ratios.append(run.rr / before)
        run.energies.append(length * before)
        p = torch.add(r, p, alpha=run.ratios[-1])
    return run


def conjugate_gradients_of_rows(
    matvec: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, goals: Tensor, limit: int, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run CG on independent systems side by side; a row that has reached its goal stands still.

    Args:
        matvec: a symmetric operator for each row, on matrices of shape (rows, size).
        x: starts.
        r: their residuals.
        goals: squared residual norms at which rows end.
        limit: most steps.
        every: steps between two looks at whether any row still moves.

    Returns:
        (last iterates, steps of each row, the last curvature of each row; one that is not positive ended it).

    >>> A, b = torch.tensor([[[2.0]], [[4.0]]]), torch.tensor([[2.0], [2.0]])
    >>> conjugate_gradients_of_rows(lambda v: (A @ v[..., None])[..., 0], 0 * b, b, torch.zeros(2), 5, 1)[0]
    tensor([[1.0000],
            [0.5000]])
    """
    p, rr = r, torch.linalg.vecdot(r, r)
    curvature, steps = torch.ones_like(rr), torch.zeros_like(rr, dtype=torch.int64)
    for step in range(limit):
        moving = (rr > goals) & (curvature > 0)
        if step % every == 0 and not bool(moving.any()):
            break
        product = matvec(p)
        energy = torch.linalg.vecdot(p, product)
        curvature = torch.where(moving, energy / torch.linalg.vecdot(p, p), curvature)
        moving = moving & (curvature > 0)
        length = torch.where(moving, rr / energy, 0.0)[:, None]
        still = ~moving[:, None]
        # A row that broke may hold NaN, which a length of zero would not keep out.
        x = torch.where(still, x, torch.addcmul(x, length, p))
        r = torch.where(still, r, torch.addcmul(r, -length, product))
        before, rr = rr, torch.linalg.vecdot(r, r)
        p = torch.where(still, p, torch.addcmul(r, (rr / before)[:, None], p))
        steps = steps + moving
    return x, steps, curvature
