"""A dense solve: Cholesky for a symmetric matrix, LU for any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import LinearSolution, LinearSolver, LinearSystem
from bilevel.core.device import to_floats
from bilevel.core.options import default_tolerance, is_int, option
from bilevel.core.status import GOOD, Status, Verdict


@dataclass(frozen=True)
class Direct(LinearSolver):
    """Factorisation of the dense matrix: Cholesky where A is symmetric, LU with pivoting where it is not.

    The matrix comes from the problem's closed form where it has one, else from `size` products. One step of iterative
    refinement removes most of the rounding. A symmetric A has to be positive definite unless the problem is stated by
    an optimality map, whose solution may be a saddle. Of a singular A the directions that b does not see are left
    alone: the smallest of all solutions is returned, and the verdict's detail says so.

    Args:
        max_size: largest size that is factored (memory: 8 ``size^2`` bytes, and as much again for the factor).

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> x = Direct().solve(lambda v: matrix @ v, torch.tensor([3.0, 3.0], dtype=torch.float64)).x
    >>> torch.allclose(x, torch.ones(2, dtype=torch.float64))
    True
    """

    max_size: int = option(10_000, "a positive int", is_int)

    rowwise = True

    @property
    def dense_factor(self) -> bool:
        return type(self) is Direct

    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        matvec, b = system.matvec, system.b
        size = b.shape[-1]
        if size > self.max_size:
            raise ValueError(
                f"`Direct.max_size` is {self.max_size:,} but the system has {size:,} unknowns: raise it, or use CG()."
            )
        if b.dim() > 1:
            return _solved_rows(system)
        if system.dense is None:
            identity = torch.eye(b.numel(), dtype=b.dtype, device=b.device)
            matrix = torch.stack([matvec(row) for row in identity], dim=1)
        else:
            matrix = system.dense()
        x, residual, verdict = _solved(matrix, matvec, b, system.definite)
        return LinearSolution(x, residual, 1, verdict)


def _solved_rows(system: LinearSystem) -> LinearSolution:
    assert system.dense is not None
    b, matrices = system.b, system.dense()
    factors, info = torch.linalg.cholesky_ex(matrices)
    x = torch.cholesky_solve(b[:, :, None], factors)[:, :, 0]
    x = x + torch.cholesky_solve((b - system.matvec(x))[:, :, None], factors)[:, :, 0]
    regular = (info == 0) & _far_from_singular(factors) & (system.definite is not False)
    regular = regular & (_symmetric(matrices) | (system.definite is True))
    x = torch.where(regular[:, None], x, 0.0)
    residuals = [float(value) for value in system.residual(x).cpu()]
    verdicts = [_judge(residual, b.dtype) for residual in residuals]
    for index, fits in enumerate(map(bool, regular.cpu())):
        if fits or not bool(b[index].any()):
            continue
        matrix = matrices[index]
        row, residuals[index], verdicts[index] = _solved(matrix, matrix.mv, b[index], system.definite)
        x[index] = row
    return LinearSolution(x, residuals, [1] * len(b), verdicts)


def _solved(
    matrix: Tensor, matvec: Callable[[Tensor], Tensor], b: Tensor, definite: bool | None
) -> tuple[Tensor, float, Verdict]:
    """Return (x, relative residual, verdict) of one system."""
    by_cholesky = definite is not False and (definite is True or bool(_symmetric(matrix)))
    if by_cholesky:
        factor, info = torch.linalg.cholesky_ex(matrix)
        apart = _far_from_singular(factor)
    else:
        factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
        apart = _pivots_apart(factor.diagonal().abs())
    finite, regular = to_floats([torch.isfinite(matrix).all(), (info == 0) & apart])
    if not finite:
        verdict = Verdict(Status.NOT_FINITE, "the dense Hessian holds NaN or infinite values")
        return torch.zeros_like(b), 1.0, verdict
    if not regular:
        return _solved_singular(matrix, matvec, b, by_cholesky)

    def solve(r: Tensor) -> Tensor:
        column = r[:, None]
        solved = torch.cholesky_solve(column, factor) if by_cholesky else torch.linalg.lu_solve(factor, pivots, column)
        return solved[:, 0]

    x = solve(b)
    x = x + solve(b - matvec(x))
    residual = float(torch.linalg.vector_norm(b - matvec(x)) / torch.linalg.vector_norm(b))
    return x, residual, _judge(residual, b.dtype)


def _solved_singular(
    matrix: Tensor, matvec: Callable[[Tensor], Tensor], b: Tensor, symmetric: bool
) -> tuple[Tensor, float, Verdict]:
    """Return the smallest solution of a singular system, where it has one."""
    unit = torch.finfo(b.dtype).eps
    if symmetric:
        values, left = torch.linalg.eigh(matrix)
        right, largest = left.t(), float(values.abs().max())
        smallest = float(values[0])
        detail = (
            f"the dense Hessian has the smallest eigenvalue {smallest:.3g} (the largest is {float(values[-1]):.3g})"
        )
        if smallest < -1e3 * unit * largest:
            verdict = Verdict(Status.NEGATIVE_CURVATURE, f"{detail}; a damping above {-smallest:.3g} would lift it")
            return torch.zeros_like(b), 1.0, verdict
    else:
        left, values, right = torch.linalg.svd(matrix)
        largest = float(values[0])
        detail = f"the dense Jacobian has the singular value {float(values[-1]):.3g} (the largest is {largest:.3g})"
    seen = values.abs() > len(values) * 10 * unit * largest
    x = right.t() @ (torch.where(seen, 1.0, 0.0) / torch.where(seen, values, 1.0) * (left.t() @ b))
    residual = float(torch.linalg.vector_norm(b - matvec(x)) / torch.linalg.vector_norm(b))
    if not residual <= 10 * default_tolerance(b.dtype):
        return x, residual, Verdict(Status.SINGULAR, detail)
    hidden = int((~seen).sum())
    return x, residual, Verdict(detail=f"{detail}: {hidden} singular direction(s), which the outer loss does not see")


def _symmetric(matrix: Tensor) -> Tensor:
    """Whether matrices are symmetric but for rounding, of shape ()  or (members,)."""
    apart = (matrix - matrix.mT).abs().amax((-2, -1))
    return apart <= 1e3 * torch.finfo(matrix.dtype).eps * matrix.abs().amax((-2, -1))


def _far_from_singular(factor: Tensor) -> Tensor:
    return _pivots_apart(factor.diagonal(dim1=-2, dim2=-1).square())


def _pivots_apart(pivots: Tensor) -> Tensor:
    """Whether no pivot is rounding beside the largest one."""
    return pivots.amin(-1) > pivots.shape[-1] * torch.finfo(pivots.dtype).eps * pivots.amax(-1)


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
