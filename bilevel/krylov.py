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
        ratios: quotients of successive squared residual norms (in the norm of the preconditioner, if any).
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
    matvec: Callable[[Tensor], Tensor],
    x: Tensor,
    r: Tensor,
    enough: Callable[[Krylov], bool],
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Krylov:
    """Run CG from x, whose residual is r, until `enough`.

    The scalars are Python floats: on the CPU that is cheaper than keeping them in tensors.

    Args:
        matvec: a symmetric operator on vectors of shape (size,).
        x: start.
        r: its residual.
        enough: looks at the run before each step; True ends it.
        precondition: a symmetric positive definite operator near the inverse; then `ratios`, and so `spectrum`, are
            those of the preconditioned operator.

    Returns:
        The run with its last iterate; a direction of negative or zero curvature ends it before the step along it.

    >>> A, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    >>> run = conjugate_gradients(lambda v: A @ v, torch.zeros(2), b, lambda run: run.steps == 2)
    >>> bool((A @ run.x - b).norm() < 1e-6)
    True
    """
    run = Krylov(x, float(torch.dot(r, r)))
    p = z = r if precondition is None else precondition(r)
    rz = run.rr if precondition is None else float(torch.dot(r, z))
    while not enough(run) and run.rr > 0:
        product = matvec(p)
        energy = float(torch.dot(p, product))
        if not energy > 0:
            run.negative = energy / float(torch.dot(p, p))
            return run
        length = rz / energy
        run.x, r = torch.add(run.x, p, alpha=length), torch.sub(r, product, alpha=length)
        run.rr = float(torch.dot(r, r))
        z = r if precondition is None else precondition(r)
        before, rz = rz, run.rr if precondition is None else float(torch.dot(r, z))
        run.lengths.append(length)
        run.ratios.append(rz / before)
        run.energies.append(length * before)
        p = torch.add(z, p, alpha=run.ratios[-1])
    return run
