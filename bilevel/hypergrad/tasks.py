"""`hypergradient` of tasks that share nothing but the hyperparameters: side by side, some at a time, or one by one.

The hypergradient of their mean is the mean of theirs. How many are solved at once follows from what a step of one holds
(`Separate.at_once`), and changes no number but by rounding. Where anything is to be said of the result, all are solved
again at once, as any other problem is, so that it is said of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch

from bilevel.base import Carry, Estimate, InnerSolver, InnerState
from bilevel.base.estimate import made_later
from bilevel.core import tree
from bilevel.core.cost import Meter
from bilevel.core.status import GOOD, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.attempt import Attempt, attempt
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.hypergrad.evidence import certificate, confirmed, judged
from bilevel.oracles.graph import NotRecordedError
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.separate import Separate, in_words
from bilevel.oracles.tracing import replaying

WORTH = 20
"""Steps of all runs from which the gain of a recording is larger than the time that it takes."""


@dataclass(frozen=True)
class TaskRuns:
    """The runs of tasks, `at_once` of which are solved at a time.

    Attributes:
        tasks: the tasks.
        rule: the estimator.
        whole: the run of all of them.
        at_once: how many.
        moving: whether their starts move with the hyperparameters.
        recorded: whether their gradients are replayed, where they can be recorded.
    """

    tasks: Separate
    rule: HypergradEstimator
    whole: Run
    at_once: int
    moving: bool = False
    recorded: bool = False

    def __iter__(self) -> Iterator[tuple[Run, float]]:
        """Yield each run with its share of all tasks."""
        count = self.tasks.count
        parts = -(-count // self.at_once)
        ends = [count * part // parts for part in range(parts + 1)]
        one = self
        for low, high in pairwise(ends):
            yield one.some(low, high), (high - low) / count
            # Counted in calls for all tasks, of which each run makes a part; as is the memory.
            one = self.uncounted if low == 0 else one

    def some(self, low: int, high: int) -> Run:
        """Return the run of the tasks low, ..., high - 1."""
        if self.moving:
            assert self.tasks.moving is not None
            problem = self.tasks.moving(low)
            return replace(self.whole, problem=problem, params=problem.moving_start(self.whole.hparams))
        state = self.whole.carry.state
        if state is not None:
            params, memory = (_rows(part, low, high) for part in state.variables)
            state = replace(state, params=params, memory=memory)
        carry, problem = replace(self.whole.carry, state=state), self.tasks.some(low, high)
        start = tree.tree_map(lambda leaf: leaf[low:high], self.whole.params)
        start = start if problem.purity.known else tree.copied(start)
        return replace(self.whole, problem=problem, params=start, carry=carry)

    @property
    def uncounted(self) -> TaskRuns:
        """The same runs, of which nothing is counted."""
        return replace(self, whole=replace(self.whole, meter=Meter(torch.device("cpu"), memory=False)))

    def ends(self) -> list[InnerState]:
        """Return the last states of all, made anew."""
        return [self.rule.solve(run).state for run, _ in replace(self.uncounted, moving=False)]

    def failed(self) -> Verdict:
        """Return the verdict of the first task that fails by itself, with its number."""
        for index in range(self.tasks.count):
            verdict = attempt(self.rule, self.some(index, index + 1)).verdict
            if not verdict.status.usable:
                return replace(verdict, detail=f"task {index}: {verdict.detail}")
        return GOOD


def task_runs(rule: HypergradEstimator, whole: Run, own_start: bool) -> TaskRuns | None:
    """Return the runs of the tasks of a problem where solver and estimator treat each by itself, else None.

    `own_start` says that a cold start begins where the problem says.
    """
    solver, leaves = whole.solver, tree.leaves(whole.params)
    if not (rule.taskwise and solver.traits.rowwise) or (tasks := whole.problem.separate()) is None:
        return None
    steps, tol = solver.limits(leaves[0].dtype)
    if tol is not None:
        return None  # that of all together
    at_once = tasks.at_once(steps, leaves[0].device)
    # The graph of one task saves the way forward again; where it is no larger than one iterate of all, it may.
    if at_once > 1 or not solver.traits.multistep or tasks.nbytes > tree.nbytes(whole.params):
        # An estimator that takes no rows is asked for what it holds.
        recorded = at_once > 1 and rule.rowwise and whole.problem.traces.with_run_of(steps) >= WORTH
        return TaskRuns(tasks, rule, whole, at_once, recorded=recorded)
    graph = rule.by_graph()
    moving = own_start and whole.carry.state is None and graph is not rule and tasks.moving is not None
    return TaskRuns(tasks, graph, whole, at_once, moving)


def tasks_hypergradient(runs: TaskRuns, solver: InnerSolver) -> Estimate | None:
    """Return the estimate of all tasks, or None where anything is to be said of it but that it is well."""
    estimate = _estimate(runs, solver)
    if estimate is None:
        runs.whole.meter.counts.clear()  # all at once count again
    return estimate


def _estimate(runs: TaskRuns, solver: InnerSolver) -> Estimate | None:
    total: Tree = None
    ends: list[InnerState] = []
    why = ""
    loss = square = 0.0
    for run, share in runs:
        if runs.recorded:
            problem, why = replaying(run.problem, run.hparams)
            run = replace(run, problem=problem)
        result = attempt(runs.rule, run, kept=total is None or runs.at_once > 1)
        if result.solved.state.measured:
            return None  # what a solver measures is that of all
        if total is None:
            result = confirmed(runs.rule, run, solver, result, asked=False)
            result, error = judged(run.problem, solver, run.hparams, result, certify=False)
        if not _confirms(run, result):
            return None
        if result.verdict != GOOD:
            return None
        loss, square = loss + share * result.outer_loss, square + float(result.solved.residual) ** 2
        total = _with(total, share, result.gradient)
        evidence = certificate(replace(result.solved, form=_form(run, result.solved.form, why)), result.pulled, error)
        if runs.at_once > 1:
            ends.append(result.solved.state)
        del result  # with it goes what it holds for another pullback
    how = in_words(runs.tasks.count, runs.at_once)
    evidence = replace(evidence, inner_residual=square**0.5, measured={"tasks": how})

    @cache
    def state() -> InnerState:
        last = ends or runs.ends()
        params, memory = (_joined(parts) for parts in zip(*(each.variables for each in last), strict=True))
        return replace(last[0], params=params, memory=memory)

    later = {
        "certificate": lambda: evidence,
        "params": lambda: tree.copied(solver.params(state())),
        "carry": lambda: Carry(state(), None, type(solver).__name__),
    }
    cost = runs.whole.meter.read()
    return made_later(later, outer_loss=loss, hypergradient=total, cost=cost, verdict=GOOD)


def named(runs: TaskRuns | None, result: Attempt) -> Attempt:
    """Return a failed attempt of all tasks with the number of a task that fails by itself, where one does."""
    if runs is None or result.verdict.status.usable:
        return result
    return replace(result, verdict=runs.failed().worse(result.verdict))


def _confirms(run: Run, result: Attempt) -> bool:
    # What the losses hold may have been replaced since they were recorded, and not every task need show it.
    inner: Any = run.inner()
    if inner.form == InnerProblem.form or not result.verdict.status.usable:
        return True
    end = inner.trainable(run.solver.params(result.solved.state))
    try:
        inner.halves.confirm(end, inner.grad(end), InnerProblem(run.problem, run.hparams)._grad(end))
    except NotRecordedError:
        run.problem.traces.made.clear()
        return False
    return True


def _form(run: Run, form: str, why: str) -> str:
    if form != InnerProblem.form:
        return form
    return f"{form}, as the loss is not recorded: {why}" if why else run.inner().form


def _with(total: Tree, share: float, part: Tree) -> Tree:
    if total is None:
        return tree.scale(share, part)
    for into, leaf in zip(tree.leaves(total), tree.leaves(part), strict=True):
        into.add_(leaf, alpha=share)
    return total


def _rows(x: Tree, low: int, high: int) -> Tree:
    return tree.tree_map(lambda leaf: leaf[low:high].clone(), x)


def _joined(parts: tuple[Tree, ...]) -> Tree:
    return tree.tree_map(lambda *leaves: torch.cat(leaves), *parts)
