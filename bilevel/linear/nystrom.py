"""The Nystrom solve of a damped system: a low-rank Hessian inverted by Woodbury's formula (Hataya & Yamada 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import BLOW_UP, LinearSolution, LinearSolver, LinearSystem
from bilevel.core import tree
from bilevel.core.options import is_int, option
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.numerics.low_rank import gaussian_basis, low_rank

ROUNDING = 1e3
"""Rounding units of the largest eigenvalue below which another one is zero."""


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """``(H_k + rho I)^-1 b`` for ``A = H + rho I``, with the rank-k Nystrom approximation H_k of H.

    H must be symmetric positive semidefinite (a convex loss, or ``Implicit(curvature="gauss-newton")``), and rho is
    what the system says: ``Implicit(Nystrom(rank=20), damping=0.1)``; it must be above zero where the rank is below the
    size. With an orthonormal basis Omega of k Gaussian vectors, ``H_k = (H Omega) (Omega' H Omega)^-1 (H Omega)' = U
    diag(l) U'`` and

        x = U diag(1 / (l + rho)) U' b + (b - U U' b) / rho.

    The error is that of H_k, small where the eigenvalues of H beyond the k-th are small beside rho. One more product
    gives the residual ``|b - A x| / |b|`` of the damped system that was asked for; above 10 the solve has failed.
    Memory: about four times `rank` vectors, so for networks of millions of weights prefer ``CG(steps=k)``.

    Args:
        rank: number of products; at most the size.
        seed: of the Gaussian vectors: the same seed gives the same solution.

    >>> matrix = torch.diag(torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64))
    >>> b = torch.tensor([9.0, 5.0, 1.0], dtype=torch.float64)
    >>> Nystrom(rank=2).solve(lambda v: matrix @ v + v / 2, b, damping=0.5).x
    tensor([2.0000, 2.0000, 2.0000], dtype=torch.float64)
    """

    rank: int = option(10, "a positive int", is_int)
    seed: int = option(0, "an int that is not negative", lambda seed: is_int(seed, at_least=0))

    requires = frozenset({"symmetric"})

    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        b, matvec, rho = system.b, system.matvec, system.damping
        size, rank = b.numel(), min(self.rank, b.numel())
        if rho == 0 and rank < size:
            raise ValueError(
                f"`Nystrom.rank` is {self.rank} and the system has {size:,} unknowns, so it needs something on the "
                "diagonal: Implicit(Nystrom(...), damping=0.1)."
            )
        omega = gaussian_basis(size, rank, self.seed, b)
        Y = torch.stack([matvec(column) for column in omega.t()], dim=1) - rho * omega
        nu = torch.finfo(b.dtype).eps * size**0.5 * tree.vector_norm(Y.reshape(-1))
        result = low_rank(omega, Y + nu * omega, nu)
        if result is None:
            return LinearSolution(torch.zeros_like(b), 1.0, rank, _refused(omega, Y))
        U, values = result
        if rank == size and bool(values[-1] + rho <= ROUNDING * torch.finfo(b.dtype).eps * values[0]):
            detail = f"the eigenvalues go from {float(values[-1]) + rho:.3g} to {float(values[0]) + rho:.3g}"
            return LinearSolution(torch.zeros_like(b), 1.0, rank, Verdict(Status.SINGULAR, detail))
        inside = U.t() @ b
        x = U @ (inside / (values + rho))
        if rank < size:
            x = x + (b - U @ inside) / rho
        residual = float(torch.linalg.vector_norm(b - matvec(x)) / torch.linalg.vector_norm(b))
        verdict = GOOD
        if not residual <= BLOW_UP:
            detail = (
                f"Nystrom of rank {rank} leaves the relative residual {residual:.2e}, because eigenvalues that it has "
                f"left out are large beside the damping {rho:.3g}: raise one of the two"
            )
            verdict = Verdict(Status.LINEAR_NOT_CONVERGED, detail)
        return LinearSolution(x, residual, rank, verdict)


def _refused(omega: Tensor, Y: Tensor) -> Verdict:
    """Say why products are not those of a positive semidefinite matrix."""
    rank = omega.shape[1]
    if not bool(torch.isfinite(Y).all()):
        return Verdict(Status.NOT_FINITE, f"Nystrom met a NaN or infinite product among {rank}")
    values = torch.linalg.eigvalsh(omega.t() @ Y)
    smallest, largest = float(values[0]), float(values[-1])
    if smallest >= -ROUNDING * torch.finfo(Y.dtype).eps * max(largest, -smallest):
        return Verdict(Status.SINGULAR, f"Nystrom met no curvature beyond rounding in {rank} products")
    detail = (
        f"Nystrom met the curvature {smallest:.3g} among {rank} products, and needs a positive semidefinite Hessian "
        "whatever the damping: Implicit(curvature='gauss-newton') has one"
    )
    return Verdict(Status.NEGATIVE_CURVATURE, detail)
