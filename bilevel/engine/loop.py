"""The inner loop that every estimator owns: run an inner solver, stop, look at the residual, notice failure."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bilevel.base import Carry, InnerSolver, InnerState
from bilevel.core import tree
from bilevel.core.device import check_interval, to_floats
from bilevel.core.status import StepFailure, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.expansion import watched
from bilevel.engine.judge import LOOK, InnerRun, judge, not_finite
from bilevel.engine.kinks import FALLEN, STALLED, kinked
from bilevel.engine.rows_loop import run_rows
from bilevel.engine.tolerance import Goal
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
    """Run the solver to its tolerance or its number of steps.

    Args:
        inner: the bound problem.
        solver: the inner solver.
        state: the first state.
        visit: is shown every state that a step starts from; a result of True ends the run there, before the step. Of
            rows, it is also given what `RowsVisit` says, and ends nothing.
        at_least: steps to take even where the tolerance is reached before.
        record: let autograd record the steps; otherwise a step's graph is dropped, whatever its tensors require.

    Returns:
        The last state, its own residual (never that of an iterate before it), and a verdict.
    """
    with torch.set_grad_enabled(record):
        if inner.problem.batch is not None:
            return run_rows(inner, solver, state, visit, at_least)
        return _run(solver.own_problem(inner), solver, state, visit, at_least)


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
    taken, marked, doubling, before_doubling = 0, 0, STALLED, math.inf
    goal, floor = Goal(inner, solver, first, tol), None
    # The first look at the tolerance takes this gradient; without one it is no part of a budget.
    start = None if tol is None else _norm(inner, solver, first)
    try:
        while taken < limit:
            if tol is not None and taken % every == 0:
                residual = _residual(inner, solver, state)
                if not math.isfinite(residual):
                    return not_finite(inner, solver, checkpoint, marked, taken)
                if taken >= at_least:
                    if goal.reached(residual, solver.params(state)):
                        return InnerRun(state, residual, taken, goal.verdict(residual, taken))
                    floor = goal.floor(residual, taken, solver.params(before), solver.params(state))
                    if floor is not None:
                        break
                if taken >= doubling:
                    if residual > FALLEN * before_doubling and not inner.augmented:
                        kink = kinked(
                            inner.problem, tree.detach(inner.hparams), solver, state, residual, before_doubling
                        )
                        if not kink.status.ok:
                            return InnerRun(state, residual, taken, kink)
                    doubling, before_doubling = 2 * taken, residual
            if taken - marked >= LOOK:
                if not bool(torch.isfinite(tree.norm(state.params))):
                    return not_finite(inner, solver, checkpoint, marked, taken)
                checkpoint, marked = state, taken
            if visit is not None and visit(state) is True:
                break
            before, state = state, solver.step(inner.on_step(state.index), state)
            taken += 1
            # A solver that hands back the same params says that no step helps: the rounding floor.
            if tol is not None and taken >= at_least and inner.unmoved(before.params, state.params):
                floor = goal.unmoved_floor(_residual(inner, solver, state), inner.trainable(solver.params(state)))
                break
    except StepFailure as failure:
        name = solver.title
        verdict = Verdict(failure.verdict.status, f"{name} at step {taken + 1}: {failure.verdict.detail}")
        return InnerRun(state, float("nan"), taken, verdict)
    # At the start by a copy: the gradient of the last state, which estimators look at before and after, stays at hand.
    begun, residual = to_floats([
        _norm(copy.copy(inner), solver, first) if start is None else start,
        _norm(inner, solver, state),
    ])
    if not math.isfinite(residual):
        return not_finite(inner, solver, checkpoint, marked, taken)
    if goal.reached(residual, solver.params(state)):
        return InnerRun(state, residual, taken, goal.verdict(residual, taken))
    verdict = judge(inner, solver, first, state, begun, residual, taken, goal.tol, floor)
    return InnerRun(state, residual, taken, watched(verdict, inner, solver, state, (begun, residual), taken))


def conclude(inner: InnerProblem, solver: InnerSolver, first: InnerState, state: InnerState, taken: int) -> InnerRun:
    """Judge a run of a number of steps that did not go through `run_inner`; the residual is that of its last state.

    Args:
        inner: the bound problem.
        solver: the inner solver, whose steps lead from `first` to `state`.
        first: the first state.
        state: the last state.
        taken: how many steps lie between them.

    Returns:
        The state with its residual and a verdict, as `run_inner` gives them.
    """
    inner = solver.own_problem(inner)
    start, residual = to_floats([_norm(inner, solver, each) for each in (first, state)])
    if not math.isfinite(residual):
        return not_finite(inner, solver, first, 0, taken)
    verdict = judge(inner, solver, first, state, start, residual, taken)
    return InnerRun(state, residual, taken, watched(verdict, inner, solver, state, (start, residual), taken))


def _residual(inner: InnerProblem, solver: InnerSolver, state: InnerState) -> float:
    return float(_norm(inner, solver, state))


def _norm(inner: InnerProblem, solver: InnerSolver, state: InnerState) -> Tensor:
    return tree.norm(inner.grad(solver.params(state))).detach()
