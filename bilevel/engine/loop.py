"""The inner loop that every estimator runs: steps, looks at the residual, the end, a failure."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.base import Carry, InnerSolver, InnerState
from bilevel.core import tree
from bilevel.core.device import check_interval, to_floats
from bilevel.core.status import StepFailure
from bilevel.core.tree import Tree
from bilevel.engine.judge import LOOK, InnerRun, failed_step, judge, not_finite
from bilevel.engine.kinks import FALLEN, STALLED, kinked
from bilevel.engine.rows_loop import conclude_rows, run_rows
from bilevel.engine.tolerance import WINDOW, Floor, Goal
from bilevel.oracles.inner_problem import InnerProblem


def begin(inner: InnerProblem, solver: InnerSolver, params: Tree, carry: Carry) -> InnerState:
    """Return the first state: warm where the carry holds one, else cold at `params`."""
    if carry.state is not None and carry.ongoing:
        return carry.state
    if carry.state is not None:
        state = solver.warm_start(inner, carry.state)
        # Whatever a solver does with its step count, a sampled problem goes on to fresh batches.
        return replace(state, earlier=carry.state.index - state.steps)
    return solver.init(inner, params)


def run_inner(
    inner: InnerProblem,
    solver: InnerSolver,
    state: InnerState,
    visit: Callable[..., object] | None = None,
    *,
    at_least: int = 0,
    record: bool = False,
) -> InnerRun:
    """Return what `Run.solve` does, for a problem, a solver and a first state of the caller's own.

    With `record`, autograd records the steps; else a step's graph is dropped, whatever its tensors require.
    """
    with torch.set_grad_enabled(record):
        if inner.problem.batch is not None:
            return ended(inner, solver, run_rows(inner, solver, state, visit, at_least))
        return ended(inner, solver, _run(solver.own_problem(inner), solver, state, visit, at_least))


def ended(inner: InnerProblem, solver: InnerSolver, run: InnerRun) -> InnerRun:
    """Return a run, however it ends, after a look at what its oracles have taken on trust; every run comes by here."""
    sound = math.isfinite(run.residual) if run.warm is None else bool(run.usable.any())
    if sound:
        inner.confirm(solver.params(run.warm or run.state))
    return run


class Looks:
    """The looks at the residual of one run, any of which may end it: at its tolerance, at its floor, at a kink."""

    def __init__(self, inner: InnerProblem, solver: InnerSolver, first: InnerState, tol: float, at_least: int) -> None:
        self.inner, self.solver, self.first, self.at_least = inner, solver, first, at_least
        self.goal = Goal(inner, solver, first, tol)
        # The first look takes this gradient; without a tolerance it is no part of a budget.
        self.start = _norm(inner, solver, first)
        self.doubling, self.before_doubling = STALLED, math.inf

    def that_may_end(self, residuals: NDArray[np.float64], taken: NDArray[np.int64]) -> Iterator[int]:
        """Yield which of some looks, after so many steps each, may end the run; those before it are then done."""
        low = 0
        while low < len(taken):
            asked = taken[low:] >= self.at_least
            seen = np.where(asked, residuals[low:], math.inf)
            waits = (taken[low:] % WINDOW != 0) | (seen < np.minimum.accumulate(np.append(self.goal.best, seen))[:-1])
            above = False if self.goal.tol is None else residuals[low:] > self.goal.tol
            may_end = asked & ~(above & waits) | (taken[low:] >= self.doubling) | ~np.isfinite(residuals[low:])
            count = int(may_end.argmax()) if may_end.any() else len(seen)
            if count:
                index = int(seen[:count].argmin())
                self.goal.note_best(float(seen[index]), int(taken[low + index]))
            low += count + 1
            if low <= len(taken):
                yield low - 1

    def end_at(self, residual: float, taken: int, before: InnerState, state: InnerState) -> InnerRun | None:
        """Return how the run ends at a state, one step after `before`, with a finite residual; None: it does not."""
        inner, solver = self.inner, self.solver
        if taken >= self.at_least:
            if self.goal.reached(residual, solver.params(state)):
                return InnerRun(state, residual, taken, self.goal.verdict(residual, taken))
            floor = self.goal.floor(residual, taken, solver.params(before), solver.params(state))
            if floor is not None:
                return self.conclude(state, taken, floor=floor)
        if taken >= self.doubling:
            if residual > FALLEN * self.before_doubling and not inner.augmented:
                kink = kinked(inner.problem, tree.detach(inner.hparams), solver, state, residual, self.before_doubling)
                if not kink.status.ok:
                    return InnerRun(state, residual, taken, kink)
            self.doubling, self.before_doubling = 2 * taken, residual
        return None

    def conclude(
        self,
        state: InnerState,
        taken: int,
        checkpoint: tuple[InnerState, int] | None = None,
        floor: Floor | None = None,
    ) -> InnerRun:
        """Return how the run ends that goes no further."""
        checkpoint = checkpoint or (state, taken)
        return _ended(self.inner, self.solver, self.first, state, taken, checkpoint, self.start, self.goal, floor)


def _run(
    inner: InnerProblem,
    solver: InnerSolver,
    state: InnerState,
    visit: Callable[[InnerState], object] | None,
    at_least: int,
) -> InnerRun:
    device, dtype = tree.leaves(state.params)[0].device, tree.leaves(state.params)[0].dtype
    limit, tol = solver.limits(dtype)
    every = max(solver.traits.check_every, check_interval(device))
    first = checkpoint = before = state
    taken, marked, floor, start = 0, 0, None, None
    looks = None if tol is None else Looks(inner, solver, first, tol, at_least)
    try:
        while taken < limit:
            if looks is not None and taken % every == 0:
                residual = float(_norm(inner, solver, state))
                if not math.isfinite(residual):
                    return not_finite(inner, solver, checkpoint, marked, taken)
                if (end := looks.end_at(residual, taken, before, state)) is not None:
                    return end
            if taken - marked >= LOOK:
                if not bool(torch.isfinite(tree.norm(state.params))):
                    return not_finite(inner, solver, checkpoint, marked, taken)
                checkpoint, marked = state, taken
            if visit is not None and visit(state) is True:
                break
            before, state = state if looks else before, solver.step(inner.on_step(state.index), state)
            taken += 1
            if taken == 1 and looks is None and inner.knows(solver.params(first)):
                start = _norm(inner, solver, first)
            # A solver that hands back the same params says that no step helps: the rounding floor.
            if looks is not None and taken >= at_least and inner.unmoved(before.params, state.params):
                residual = float(_norm(inner, solver, state))
                floor = looks.goal.unmoved_floor(residual, inner.trainable(solver.params(state)))
                break
    except StepFailure as failure:
        return InnerRun(state, math.nan, taken, failed_step(solver, taken, failure))
    if looks is None:
        # A look at the end, as where the first step takes another gradient.
        inner.counts["gradient"] += start is not None
        return _ended(inner, solver, first, state, taken, (checkpoint, marked), start)
    return looks.conclude(state, taken, (checkpoint, marked), floor)


def conclude(inner: InnerProblem, solver: InnerSolver, first: InnerState, state: InnerState, taken: int) -> InnerRun:
    """Return, as `run_inner` does, how `taken` steps from `first` to `state` end that it has not run."""
    if inner.problem.batch is not None:
        return ended(inner, solver, conclude_rows(inner, solver, first, state, taken))
    return ended(inner, solver, _ended(solver.own_problem(inner), solver, first, state, taken, (first, 0)))


def _ended(
    inner: InnerProblem,
    solver: InnerSolver,
    first: InnerState,
    state: InnerState,
    taken: int,
    checkpoint: tuple[InnerState, int],
    start: Tensor | None = None,
    goal: Goal | None = None,
    floor: Floor | None = None,
) -> InnerRun:
    """Judge the end of a run; the checkpoint is the last state known to be finite, with its step."""
    # At the start by a copy: the gradient of the last state, which estimators look at before and after, stays at hand.
    begun, residual = to_floats([
        _norm(copy.copy(inner), solver, first) if start is None else start,
        _norm(inner, solver, state),
    ])
    if not math.isfinite(residual):
        return not_finite(inner, solver, *checkpoint, taken)
    if goal is not None and goal.reached(residual, solver.params(state)):
        return InnerRun(state, residual, taken, goal.verdict(residual, taken))
    verdict = judge(inner, solver, first, state, begun, residual, taken, goal.tol if goal else None, floor)
    return InnerRun(state, residual, taken, verdict)


def _norm(inner: InnerProblem, solver: InnerSolver, state: InnerState) -> Tensor:
    return tree.norm(inner.residual(solver.params(state))).detach()
