"""Implicit differentiation of a batch: one linear system for each member, solved side by side."""

from __future__ import annotations

from collections import Counter

from bilevel.base import BatchPullback, BatchSolution, Carry, InnerSolver, LinearSolver
from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.cost import Meter
from bilevel.core.tree import Tree
from bilevel.engine.batch_loop import begin_batch, run_batch
from bilevel.hypergrad.batch_unroll import batch_solution
from bilevel.hypergrad.damping import damped, damped_matrix
from bilevel.oracles.problem import BilevelProblem


def solve(
    linear_solver: LinearSolver,
    damping: float,
    problem: BilevelProblem,
    solver: InnerSolver,
    hparams: Tree,
    params: Tree,
    carry: Carry,
    meter: Meter,
) -> BatchSolution:
    """Run the inner solver for all members, then solve ``(H_i + damping I) w_i = cotangent_i``.

    Args:
        linear_solver: one that runs batches.
        damping: added to the diagonals.
        problem: the batch.
        solver: the inner solver.
        hparams: hyperparameters.
        params: where a cold start begins.
        carry: the warm start.
        meter: counts the work.

    Returns:
        The solutions; the linear systems are solved in their pullback.
    """
    inner = problem.bind(hparams, meter.counts)
    run = run_batch(inner, solver, begin_batch(inner, solver, params, carry))
    meter.sample()
    solved = solver.params(run.state)

    def pullback(cotangent: Tree) -> BatchPullback:
        # A failed member has no cotangent, and so nothing to solve.
        cotangent = members.where(run.usable, cotangent, 0.0)
        # The run has looked at it, and counted it, unless a member failed and its params were put back.
        gradient = inner.grad(solved)
        before = Counter(meter.counts)
        point = inner.linearize(solved)
        solution = linear_solver.solve_batch(
            damped(point.hvp, damping),
            cotangent,
            carry.adjoint,
            dense=damped_matrix(point, damping),
            definite=problem.symmetric,
        )
        errors = members.dots(solution.x, gradient).abs()
        by_hparams = tree.scale(-1.0, point.cross(solution.x))
        meter.sample()
        work = Counter(meter.counts)
        work.subtract(before)
        longest = max(solution.steps)
        counts = [work - Counter(hvp=longest - steps) for steps in solution.steps]
        return BatchPullback(
            by_hparams, solution.steps, counts, solution.verdicts, solution.x, solution.residuals, value_errors=errors
        )

    return batch_solution(solver, run, pullback)
