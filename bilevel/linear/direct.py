"""A dense Cholesky solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import BatchLinearSolution, BatchLinearSystem, LinearSolution, LinearSolver, LinearSystem
from bilevel.options import is_int, require
from bilevel.status import GOOD, Status, Verdict


@dataclass(frozen=True)
class Direct(LinearSolver):
    """Cholesky factorisation of the dense matrix; for symmetric positive definite A.

    The matrix comes from the problem's closed form where it has one, else from `size` products. One step of iterative
    refinement removes most of the rounding.

    Args:
        max_size: largest size that is factored (memory: 8 ``size^2`` bytes, and as much again for the factor).

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> x = Direct().solve(lambda v: matrix @ v, torch.tensor([3.0, 3.0], dtype=torch.float64)).x
    >>> torch.allclose(x, torch.ones(2, dtype=torch.float64))
    True
    """

    max_size: int = 10_000

    needs_symmetry = True

    def __post_init__(self) -> None:
        require(self, "max_size", "a positive int", is_int(self.max_size))

    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        """Factor and solve, with one step of iterative refinement.

        Args:
            system: the system; its start and its tolerance are not used.

        Returns:
            The solution.

        Raises:
            ValueError: if the system is larger than `max_size`.
        """
        matvec, b = system.matvec, system.b
        self._check_size(b.numel())
        if system.dense is None:
            identity = torch.eye(b.numel(), dtype=b.dtype, device=b.device)
            matrix = torch.stack([matvec(row) for row in identity], dim=1)
        else:
            matrix = system.dense()
        factor, info = torch.linalg.cholesky_ex(matrix)
        if bool(info):
            return LinearSolution(torch.zeros_like(b), 1.0, 1, _indefinite(matrix))
        x = torch.cholesky_solve(b[:, None], factor)[:, 0]
        x = x + torch.cholesky_solve((b - matvec(x))[:, None], factor)[:, 0]
        residual = float(torch.linalg.vector_norm(b - matvec(x)) / torch.linalg.vector_norm(b))
        return LinearSolution(x, residual, 1, _judge(residual, b.dtype))

    def solve_rows(self, system: BatchLinearSystem) -> BatchLinearSolution:
        """Factor and solve all members at once, with one step of iterative refinement.

        Args:
            system: the systems; start and tolerance are not used.

        Returns:
            The solutions.

        Raises:
            ValueError: if a system is larger than `max_size`.
        """
        b = system.b
        self._check_size(b.shape[1])
        matrices = system.dense()
        factors, info = torch.linalg.cholesky_ex(matrices)
        x = torch.cholesky_solve(b[:, :, None], factors)[:, :, 0]
        x = x + torch.cholesky_solve((b - system.matvec(x))[:, :, None], factors)[:, :, 0]
        x = torch.where((info == 0)[:, None], x, 0.0)
        residuals = [float(value) for value in system.residuals(x).cpu()]
        verdicts = [
            _indefinite(matrices[index]) if broken else _judge(residuals[index], b.dtype)
            for index, broken in enumerate(map(bool, info.cpu()))
        ]
        return BatchLinearSolution(x, residuals, [1] * len(b), verdicts)

    def _check_size(self, size: int) -> None:
        if size > self.max_size:
            raise ValueError(
                f"`Direct.max_size` is {self.max_size:,} but the system has {size:,} unknowns: raise it, or use CG()."
            )


def _judge(residual: float, dtype: torch.dtype) -> Verdict:
    if residual != residual:
        return Verdict(Status.NOT_FINITE, "the dense Hessian holds NaN")
    if residual > torch.finfo(dtype).eps ** (1 / 3):
        detail = (
            f"Direct ends at the relative residual {residual:.2e}: the matrix is not symmetric, or too "
            f"ill-conditioned for {dtype}"
        )
        return Verdict(Status.LINEAR_NOT_CONVERGED, detail)
    return GOOD


def _indefinite(matrix: Tensor) -> Verdict:
    """Say why a matrix has no Cholesky factor."""
    if not bool(torch.isfinite(matrix).all()):
        return Verdict(Status.NOT_FINITE, "the dense Hessian holds NaN or infinite values")
    values = torch.linalg.eigvalsh(matrix)
    smallest, largest = float(values[0]), float(values[-1])
    detail = f"the dense Hessian has the smallest eigenvalue {smallest:.3g} (the largest is {largest:.3g})"
    if smallest >= -1e3 * torch.finfo(matrix.dtype).eps * max(abs(largest), abs(smallest)):
        return Verdict(Status.SINGULAR, detail)
    return Verdict(Status.NEGATIVE_CURVATURE, f"{detail}; a damping above {-smallest:.3g} would lift it")
