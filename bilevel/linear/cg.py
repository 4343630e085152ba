"""Conjugate gradients (Hestenes & Stiefel 1952)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import LinearSolution, LinearSolver, LinearSystem
from bilevel.core.device import check_interval, to_floats
from bilevel.core.options import is_int, is_positive, option, optional, require
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.numerics.conjugate_gradients import conjugate_gradients, conjugate_gradients_of_rows

ROUNDING = 1e3
"""Rounding units of the largest curvature below which a negative one says nothing."""
MOST = 2_000
"""Steps up to which the smallest curvature of a failed run is computed."""


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients for a symmetric positive definite A; returns the last iterate.

    The error falls in every step in the norm ``sqrt(e' A e)``. A problem that has a preconditioner hands it on; the
    residual is that of the system itself in any case. A direction p with ``p' A p <= 0`` stops the run and is reported
    with its curvature. With ``check_every > 1`` iterations after the end are computed and dropped, so that an
    accelerator need not be waited for in every step; the result is the same.

    Args:
        tol: relative residual ``|b - A x| / |b|`` to reach; default ``eps ** (2/3)`` (3.7e-11 in float64).
        max_steps: most iterations; default 10 times the size, at least 100.
        check_every: iterations between two looks at the result; default 1 on the CPU and 8 elsewhere.
        steps: take exactly so many iterations, in place of `tol` and `max_steps`: an approximation by design, whose
            residual is reported and judged by nobody. It ends before only where the residual is rounding.

    >>> matrix = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    >>> CG().solve(lambda v: matrix @ v, torch.tensor([2.0, 4.0], dtype=torch.float64)).x
    tensor([1., 1.], dtype=torch.float64)
    """

    tol: float | None = option(None, "a positive number or None", optional(is_positive))
    max_steps: int | None = option(None, "a positive int or None", optional(is_int))
    check_every: int | None = option(None, "a positive int or None", optional(is_int))
    steps: int | None = option(None, "a positive int or None", optional(is_int))

    requires = frozenset({"symmetric"})
    rowwise = True

    @property
    def dense_factor(self) -> bool:
        return type(self) is CG and self.steps is None and self.max_steps is None

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.steps is None or (self.tol is None and self.max_steps is None)
        require(self, "steps", "None where `tol` or `max_steps` is given", alone)

    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        if system.b.dim() > 1:
            return self._solve_rows(system)
        b, matvec = system.b, system.matvec
        tol, limit = self._goal(system.tol, b)
        goal = tol**2 * float(torch.dot(b, b))
        run = conjugate_gradients(
            matvec, *system.start(), lambda run: not run.rr > goal, limit, self.check_every, system.precondition
        )
        # The recursive residual drifts from the true one; the evidence is the true one.
        asked = [b - matvec(run.x)]
        curvature = 1.0 if run.negative is None else run.negative
        # Of a run that has failed the scale of A is looked at together with the residual.
        if curvature <= 0 or (self.steps is None and run.rr > goal):
            asked.append(matvec(b))
        size = torch.linalg.vector_norm(b)
        residual, *scales = to_floats([torch.linalg.vector_norm(each) / size for each in asked])
        smallest = floor = 0.0
        if curvature <= 0 or (self.steps is None and residual > 10 * tol):
            # What is rounding beside the other curvatures is no curvature.
            largest = scales[0] if scales else float(torch.linalg.vector_norm(matvec(b)) / size)
            floor = ROUNDING * torch.finfo(b.dtype).eps * largest
            known = system.precondition is None and run.steps <= MOST
            smallest = run.spectrum()[0] if known else math.inf
        verdict = self._judge(residual, tol, run.steps, curvature, smallest, floor)
        return LinearSolution(run.x, residual, run.steps, verdict)

    def _solve_rows(self, system: LinearSystem) -> LinearSolution:
        every = self.check_every or check_interval(system.b.device)
        tol, limit = self._goal(system.tol, system.b[0])
        goals = tol**2 * torch.linalg.vecdot(system.b, system.b)
        run = conjugate_gradients_of_rows(system.matvec, *system.start(), goals, limit, every)
        x, steps, *curvatures = run
        # One transfer each, not one for every member.
        residuals = [float(value) for value in system.residual(x).cpu()]
        taken = [int(count) for count in steps.cpu()]
        floors = ROUNDING * torch.finfo(system.b.dtype).eps * curvatures[2]
        # One transfer for all of them.
        result = torch.stack((*curvatures[:2], floors), dim=1).cpu().unbind()
        verdicts = [
            self._judge(residual, tol, count, *(float(number) for number in numbers))
            for residual, count, numbers in zip(residuals, taken, result, strict=True)
        ]
        return LinearSolution(x, residuals, taken, verdicts)

    def _goal(self, tol: float, b: Tensor) -> tuple[float, int]:
        """Return the relative residual at which to stop, and the most steps, for a right-hand side like b."""
        if self.steps is None:
            return tol, self.max_steps or max(100, 10 * b.numel())
        return float(torch.finfo(b.dtype).eps), self.steps

    def _judge(
        self, residual: float, tol: float, steps: int, curvature: float, smallest: float, floor: float
    ) -> Verdict:
        """Judge a run by its residual, its last and its smallest curvature; what is below `floor` is rounding."""
        if curvature <= 0 and math.isfinite(curvature):
            detail = f"CG met the curvature {curvature:.3g} after {steps} steps (relative residual {residual:.2e})"
            # Rounding alone makes a singular direction look negative: no damping of that size would help.
            if -curvature <= floor:
                if math.isfinite(residual) and residual <= 10 * tol:
                    return Verdict(detail=f"{detail}: a singular direction, which the outer loss does not see")
                return Verdict(Status.SINGULAR, detail)
            return Verdict(Status.NEGATIVE_CURVATURE, f"{detail}; a damping above {-curvature:.3g} would lift it")
        if not math.isfinite(residual) or not math.isfinite(curvature):
            return Verdict(Status.NOT_FINITE, f"CG met a NaN or infinite product after {steps} steps")
        # Rounding may leave the true residual a little above the recursive one.
        if self.steps is None and residual > 10 * tol and smallest <= floor:
            detail = f"CG stopped after {steps} steps at the relative residual {residual:.2e}"
            return Verdict(
                Status.SINGULAR, f"{detail}: the smallest curvature that it met, {smallest:.3g}, is rounding"
            )
        if self.steps is None and residual > 10 * tol:
            return Verdict(
                Status.LINEAR_NOT_CONVERGED,
                f"CG stopped after {steps} steps at the relative residual {residual:.2e}, above tol={tol:.1e}",
            )
        return GOOD
