"""Restarted GMRES (Saad & Schultz 1986), for matrices that are not symmetric."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import LinearSolution, LinearSolver, LinearSystem
from bilevel.core import tree
from bilevel.core.device import check_interval, to_floats
from bilevel.core.options import is_int, is_positive, option, optional
from bilevel.core.status import GOOD, Status, Verdict

ROUNDING = 1e3
"""Rounding units of the largest curvature below which a negative one says nothing."""


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Minimises ``|b - A x|`` over a growing Krylov space, restarted when the space is full.

    Works for any invertible A, symmetric or not, definite or not. Of a Hessian, which should be positive definite, it
    reports negative curvature where its Krylov space holds some. Memory: ``restart`` vectors.

    Args:
        tol: relative residual to reach; default ``eps ** (2/3)`` (3.7e-11 in float64).
        max_steps: most products in all; default 10 times the size, at least 100.
        restart: size of the Krylov space.

    >>> matrix = torch.tensor([[0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)
    >>> x = GMRES().solve(lambda v: matrix @ v, torch.tensor([2.0, -1.0], dtype=torch.float64)).x
    >>> torch.allclose(x, torch.ones(2, dtype=torch.float64))
    True
    """

    tol: float | None = option(None, "a positive number or None", optional(is_positive))
    max_steps: int | None = option(None, "a positive int or None", optional(is_int))
    restart: int = option(50, "a positive int", is_int)

    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        matvec, b, tol = system.matvec, system.b, system.tol
        limit = self.max_steps or max(100, 10 * b.numel())
        scale = torch.linalg.vector_norm(b)
        x, r = system.start()
        residual, steps = float(torch.linalg.vector_norm(r) / scale), 0
        smallest, largest = math.inf, 0.0
        while residual > tol and steps < limit:
            before = residual
            update, small = self._cycle(matvec, r, tol * scale, min(self.restart, limit - steps, b.numel()))
            steps += len(small)
            if system.definite and bool(torch.isfinite(small).all()):
                ends = torch.linalg.eigvalsh((small + small.t()) / 2)
                smallest, largest = min(smallest, float(ends[0])), max(largest, float(ends.abs().max()))
            x = x + update
            r = b - matvec(x)
            residual = float(torch.linalg.vector_norm(r) / scale)
            if not residual < 0.99 * before:  # stagnation, or NaN
                break
        if residual != residual:
            verdict = Verdict(Status.NOT_FINITE, f"GMRES met a NaN or infinite product after {steps} steps")
        elif smallest < -ROUNDING * torch.finfo(b.dtype).eps * largest:
            detail = f"GMRES met the curvature {smallest:.3g} within {steps} steps (relative residual {residual:.2e})"
            lift = f"a damping above {-smallest:.3g} would lift it"
            verdict = Verdict(Status.NEGATIVE_CURVATURE, f"{detail}; {lift}")
        elif residual > 10 * tol and smallest <= ROUNDING * torch.finfo(b.dtype).eps * largest:
            detail = f"GMRES met the curvature {smallest:.3g} (the largest is {largest:.3g})"
            verdict = Verdict(Status.SINGULAR, f"{detail} and ends at the relative residual {residual:.2e}")
        elif residual > 10 * tol:
            verdict = Verdict(
                Status.LINEAR_NOT_CONVERGED,
                f"GMRES stopped after {steps} steps at the relative residual {residual:.2e}, above tol={tol:.1e}",
            )
        else:
            verdict = GOOD
        return LinearSolution(x, residual, steps, verdict)

    def _cycle(self, matvec: Callable[[Tensor], Tensor], r: Tensor, goal: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return (update, A in the Krylov basis, on the CPU) of one Arnoldi cycle that starts from the residual r."""
        length = torch.linalg.vector_norm(r)
        basis = [r / length]
        hessenberg = r.new_zeros(size + 1, size)
        every = check_interval(r.device)
        start, enough = to_floats([length, goal])
        target = torch.zeros(size + 1, dtype=r.dtype)
        target[0] = start
        seen, weights = 0, None
        for step in range(size):
            product = matvec(basis[step])
            stacked = torch.stack(basis)
            for _ in range(2):
                overlap = stacked @ product
                product = product - stacked.t() @ overlap
                hessenberg[: step + 1, step].add_(overlap)
            hessenberg[step + 1, step] = tree.vector_norm(product)
            basis.append(product / hessenberg[step + 1, step])
            if (step + 1) % every and step + 1 < size:
                continue
            # One look for all steps since the last; those after the end are dropped.
            host = hessenberg[: step + 2, : step + 1].cpu()
            while seen <= step and weights is None:
                seen += 1
                small = host[: seen + 1, :seen]
                weights = _least_squares(small, target[: seen + 1], enough, last=seen == size)
            if weights is not None:
                break
        assert weights is not None
        return torch.stack(basis[:seen]).t() @ weights.to(r.device), host[:seen, :seen]


def _least_squares(hessenberg: Tensor, target: Tensor, goal: float, last: bool) -> Tensor | None:
    """Return the weights of the basis that minimise the residual, or None where more vectors should come first.

    All is on the CPU: `hessenberg` of shape (used + 1, used) and `target`, the residual that the cycle started from, in
    the basis. `last` says that there is no room for more vectors. Weights are NaN where a product was not finite.
    """
    column = hessenberg[:, -1]
    height = float(column[-1])
    if not math.isfinite(height):
        return torch.full_like(column[1:], float("nan"))
    weights = torch.linalg.pinv(hessenberg) @ target
    # The column is as long as the product was: the space is closed where its last entry is only rounding.
    closed = height <= 50 * torch.finfo(column.dtype).eps * float(tree.vector_norm(column))
    if last or closed or float(torch.linalg.vector_norm(target - hessenberg @ weights)) <= goal:
        return weights
    return None
