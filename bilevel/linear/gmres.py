"""Restarted GMRES (Saad & Schultz 1986), for matrices that are not symmetric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import LinearSolution, LinearSolver, LinearSystem
from bilevel.options import is_int, is_positive, require
from bilevel.status import GOOD, Status, Verdict


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Minimises ``|b - A x|`` over a growing Krylov space, restarted when the space is full.

    Works for any invertible A, symmetric or not, definite or not: it does not notice negative curvature, so for an
    inner minimisation prefer CG. Memory: ``restart`` vectors.

    Args:
        tol: relative residual to reach; default ``eps ** (2/3)`` (3.7e-11 in float64).
        max_steps: most products in all; default 10 times the size, at least 100.
        restart: size of the Krylov space.

    >>> matrix = torch.tensor([[0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)
    >>> x = GMRES().solve(lambda v: matrix @ v, torch.tensor([2.0, -1.0], dtype=torch.float64)).x
    >>> torch.allclose(x, torch.ones(2, dtype=torch.float64))
    True
    """

    tol: float | None = None
    max_steps: int | None = None
    restart: int = 50

    def __post_init__(self) -> None:
        require(self, "tol", "a positive number or None", self.tol is None or is_positive(self.tol))
        require(self, "max_steps", "a positive int or None", self.max_steps is None or is_int(self.max_steps))
        require(self, "restart", "a positive int", is_int(self.restart))

    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        """Run restarted GMRES on vectors."""
        matvec, b, tol = system.matvec, system.b, system.tol
        limit = self.max_steps or max(100, 10 * b.numel())
        scale = torch.linalg.vector_norm(b)
        x, r = system.start()
        residual, steps = float(torch.linalg.vector_norm(r) / scale), 0
        while residual > tol and steps < limit:
            before = residual
            update, used = self._cycle(matvec, r, tol * scale, min(self.restart, limit - steps, b.numel()))
            steps += used
            x = x + update
            r = b - matvec(x)
            residual = float(torch.linalg.vector_norm(r) / scale)
            if not residual < 0.99 * before:  # stagnation, or NaN
                break
        if residual != residual:
            verdict = Verdict(Status.NOT_FINITE, f"GMRES met a NaN or infinite product after {steps} steps")
        elif residual > 10 * tol:
            verdict = Verdict(
                Status.LINEAR_NOT_CONVERGED,
                f"GMRES stopped after {steps} steps at the relative residual {residual:.2e}, above tol={tol:.1e}",
            )
        else:
            verdict = GOOD
        return LinearSolution(x, residual, steps, verdict)

    def _cycle(self, matvec: Callable[[Tensor], Tensor], r: Tensor, goal: Tensor, size: int) -> tuple[Tensor, int]:
        """Return (update, products) of one Arnoldi cycle that starts from the residual r."""
        length = torch.linalg.vector_norm(r)
        basis = [r / length]
        hessenberg = r.new_zeros(size + 1, size)
        target = r.new_zeros(size + 1)
        target[0] = length
        used = size
        weights = r.new_zeros(0)
        for step in range(size):
            product = matvec(basis[step])
            stacked, before = torch.stack(basis), torch.linalg.vector_norm(product)
            for _ in range(2):
                overlap = stacked @ product
                product = product - stacked.t() @ overlap
                hessenberg[: step + 1, step] += overlap
            height = torch.linalg.vector_norm(product)
            if not bool(torch.isfinite(height)):
                return product, step + 1  # NaN, which the caller reports
            hessenberg[step + 1, step] = height
            small, right = hessenberg[: step + 2, : step + 1], target[: step + 2]
            weights = torch.linalg.pinv(small) @ right
            # One transfer a step, beside a small least-squares problem: GMRES is the solver of last resort.
            left = torch.linalg.vector_norm(right - small @ weights)
            if bool((left <= goal) | (height <= 1e-14 * before)):
                used = step + 1
                break
            basis.append(product / height)
        return torch.stack(basis[:used]).t() @ weights, used
