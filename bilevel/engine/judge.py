"""How a run of inner steps has ended: a verdict from its residuals, and the step that first was not finite.

A residual that has grown over a run says little by itself: a contraction may grow at first (a momentum, a matrix that
is not normal), and so may the gradient of a network, or that of a loss with several minima on the way from a maximum.
So the run is continued for a while from its last state. Of a map, whose steps should contract, it leads away from a
solution where the residual goes on growing; of an inner loss only where it grows as fast as before at every further
step.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

FURTHER = 1_000
"""Further steps, as growth may be transient; of an inner loss, one with a smaller residual ends them."""
AWAY = 1e3
"""Growth of an inner loss's residual over them below which it may still be on the way from a maximum to a minimum."""
ROUNDING = 1e4
"""Rounding units of params below which steps are rounding."""
FASTER = 0.9
"""Share of the growth per step so far from which on an inner loss's residual still grows as fast."""


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
    verdict = _above_tolerance(solver, residual, steps, tol, floor)
    return _watched(verdict, inner, solver, last, start, residual, steps)


def _above_tolerance(
    solver: InnerSolver, residual: float, steps: int, tol: float | None, floor: Floor | None
) -> Verdict:
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


def _watched(
    verdict: Verdict, inner: InnerProblem, solver: InnerSolver, last: InnerState, start: float, end: float, steps: int
) -> Verdict:
    """Return DIVERGED where further steps lead away from a solution, else the verdict of the run; a failure stays.

    Only where the residual has grown are further steps taken, which are none of the run's cost.
    """
    if not verdict.status.usable or not end > start or not steps or inner.problem.variation:
        return verdict
    # Neither counted nor recorded, whatever the run itself is.
    inner = inner.problem.bind(tree.detach(inner.hparams))
    params, memory = tree.detach(last.variables)
    last = replace(last, params=params, memory=memory, point=None)
    try:
        with torch.no_grad():
            grown, further = _continued(inner, solver, last, start, end, steps)
    except StepFailure:
        return verdict
    if not grown:
        return verdict
    detail = (
        f"{solver.title} leads away from a solution: its residual grew from {start:.3g} to {end:.3g} by step {steps}, "
        f"and by a factor of {grown:.3g} in {further} further steps"
    )
    return Verdict(Status.DIVERGED, detail)


def _continued(
    inner: InnerProblem, solver: InnerSolver, state: InnerState, start: float, end: float, steps: int
) -> tuple[float, int]:
    """Return by how much the residual grows further, and in how many steps; 0 where it does not go on growing."""
    contracts = not inner.problem.symmetric
    rate = math.log(end / start) / steps if start > 0 else math.inf
    followed: list[float] = []
    for taken in range(1, FURTHER + 1):
        before, state = state, solver.step(inner.on_step(state.index), state)
        if taken == 1 and _stands_still(inner, solver, before, state):
            return 0.0, taken
        residual = float(tree.norm(inner.grad(solver.params(state))))
        followed.append(residual)
        # One step with less is enough for a loss; a map may rotate.
        if residual < (start if contracts else end):
            return 0.0, taken
        if not math.isfinite(residual) or residual > end / torch.finfo(tree.leaves(state.params)[0].dtype).eps:
            return math.inf, taken
    if contracts:
        third, fourth = (max(followed[FURTHER // 2 : 3 * FURTHER // 4]), max(followed[3 * FURTHER // 4 :]))
        return (fourth / end, FURTHER) if fourth > third and fourth > end else (0.0, FURTHER)
    grown = followed[-1] / end
    return (grown, FURTHER) if grown >= AWAY and math.log(grown) >= FASTER * rate * FURTHER else (0.0, FURTHER)


def _stands_still(inner: InnerProblem, solver: InnerSolver, before: InnerState, after: InnerState) -> bool:
    """Whether a step is rounding."""
    x, y = (inner.trainable(solver.params(state)) for state in (before, after))
    moved = float(tree.norm(tree.add(y, x, -1.0)))
    return moved <= ROUNDING * torch.finfo(tree.leaves(y)[0].dtype).eps * float(tree.norm(y))


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
