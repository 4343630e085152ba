"""How a run of inner steps has ended: a verdict from its residuals, and the step that first was not finite."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Pullback, Solution
from bilevel.core import tree
from bilevel.core.status import GOOD, Status, StepFailure, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.tolerance import Floor, Goal
from bilevel.oracles.inner_problem import InnerProblem

LOOK = 64
"""Steps between two looks at whether the iterate is finite."""
GROWTH = 10.0
"""A residual that ends above this multiple of where it began makes us look for divergence."""
DIVERGED = 1e4
"""A residual that ends above this multiple of where it began is called divergence, whatever the reason."""


@dataclass(frozen=True)
class InnerRun:
    """How an inner solve ended; of rows, with a sequence of each figure.

    Attributes:
        state: the last state.
        residual: norm of the inner gradient at the last iterate.
        steps: steps taken.
        verdict: status with its sentence.
        counts: of rows, the oracle calls that each took part in.
        solver: of rows, what took the steps, with the coefficients of each.
        warm: of rows, the state for a warm start: where a row failed, the one that it started from.
        form: how the steps were made.
    """

    state: InnerState
    residual: Any
    steps: Any
    verdict: Any = GOOD
    counts: Sequence[Counter[str]] = ()
    solver: InnerSolver | None = None
    warm: InnerState | None = None
    form: str = "step by step"

    @property
    def usable(self) -> Tensor:
        """Which rows have a result, of shape (rows,)."""
        device = tree.leaves(self.state.params)[0].device
        return torch.tensor([verdict.status.usable for verdict in self.verdict], device=device)

    def solution(self, params: Tree, pullback: Callable[[Tree], Pullback]) -> Solution:
        """Return what an estimator hands back: the params of the last state, and the VJP there."""
        state = self.warm or self.state
        return Solution(params, state, pullback, self.residual, self.steps, self.verdict, self.counts, self.form)


def judge(
    inner: InnerProblem,
    solver: InnerSolver,
    first: InnerState,
    last: InnerState,
    start: float,
    residual: float,
    steps: int,
    tol: float | None = None,
    floor: Floor | None = None,
) -> Verdict:
    """Return the verdict of a run that ended finite and above its tolerance.

    `start` and `residual` are the norms of the inner gradient at the first and at the last state; `floor` says why the
    run has come to rest, None where it took all its steps.
    """
    if residual > GROWTH * start and not near_rounding(inner, solver, last, residual):
        # Of a map there is no Hessian to ask, and it may grow for long before it contracts.
        advice = _advice(inner, solver, first) if inner.problem.symmetric else ""
        if advice or residual > DIVERGED * start:
            detail = (
                f"{solver.title} diverges: the inner gradient norm grew from {start:.3g} to {residual:.3g} "
                f"by step {steps}{advice}"
            )
            return Verdict(Status.DIVERGED, detail)
    if tol is None:
        return GOOD
    if floor is None:
        detail = f"{solver.title} stopped after {steps} steps at the inner residual {residual:.2e}, above tol={tol:.1e}"
        return Verdict(Status.INNER_NOT_CONVERGED, detail)
    at = f"at the inner residual {residual:.2e}, above tol={tol:.1e}, after {steps} steps: {floor.detail}"
    if floor.attained and solver.tol is None:
        return Verdict(detail=f"{solver.title} is at the rounding floor, {at}")
    what = "is at the rounding floor" if floor.attained else "stands still"
    remedy = "a larger tol or float64" if floor.attained else "a larger step size, another start or float64"
    return Verdict(Status.INNER_NOT_CONVERGED, f"{solver.title} {what} {at}; {remedy} helps")


def near_rounding(inner: InnerProblem, solver: InnerSolver, last: InnerState, residual: float) -> bool:
    """Whether a residual that has grown is small beside the parts of the gradient: it began near rounding."""
    # The product that tells judges the run and is none of its cost: a budget has no room for it.
    uncounted = copy.copy(inner)
    uncounted.counts = Counter()
    goal = Goal(uncounted, solver, last, None)
    return residual <= goal.eps**0.5 * goal.parts(goal.first)


def _advice(inner: InnerProblem, solver: InnerSolver, state: InnerState) -> str:
    """Return the solver's clause about an option that the curvature at `state` forbids, else an empty string."""
    try:
        spectrum = inner.curvature(solver.params(state))
    except (ValueError, RuntimeError):
        # A user's update may have no Hessian to measure; the verdict stands without advice.
        return ""
    clause = solver.advice(state, spectrum)
    return f"; {clause}" if clause else ""


def not_finite(inner: InnerProblem, solver: InnerSolver, checkpoint: InnerState, marked: int, taken: int) -> InnerRun:
    """Replay from the last state known to be finite, to name the first step that is not."""
    state, step = checkpoint, marked
    while step < taken and bool(torch.isfinite(tree.norm(inner.grad(solver.params(state))))):
        state, step = solver.step(inner.on_step(state.index), state), step + 1
        if not bool(torch.isfinite(tree.norm(state.params))):
            break
    gradient = inner.grad(solver.params(state))
    where = _broken("params", state.params) or _broken("the inner gradient of params", gradient) or "the residual"
    advice = _advice(inner, solver, checkpoint)
    status = Status.DIVERGED if advice else Status.NOT_FINITE
    verb = "diverges" if advice else "failed"
    detail = f"{solver.title} {verb}: {where} is not finite at step {step}{advice}"
    return InnerRun(state, float("nan"), step, Verdict(status, detail))


def failed_step(solver: InnerSolver, taken: int, failure: StepFailure) -> Verdict:
    """Return the verdict of a run whose solver cannot go on after so many steps."""
    return Verdict(failure.verdict.status, f"{solver.title} at step {taken + 1}: {failure.verdict.detail}")


def _broken(what: str, values: Tree) -> str:
    """Name the first leaf that is not finite, or return an empty string."""
    for name, leaf in zip(tree.names(values), tree.leaves(values), strict=True):
        if not tree.is_finite(leaf):
            return f"{what}{name}"
    return ""
