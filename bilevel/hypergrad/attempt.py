"""One solve and one pullback: what `hypergradient` takes once, and a `target_error` as often as it needs to."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel import tree
from bilevel.base import Carry, HypergradEstimator, InnerSolver, Pullback, Solution
from bilevel.cost import Meter
from bilevel.hypergrad.not_finite import finite_gradient, finite_loss, not_finite_part
from bilevel.problem import BilevelProblem
from bilevel.status import Verdict
from bilevel.tree import Tree


@dataclass(frozen=True)
class Attempt:
    """A hypergradient, as far as it exists.

    Attributes:
        solved: the inner solution.
        pulled: its pullback at the gradient of the outer loss.
        outer_loss: the outer loss; NaN where the inner solve failed.
        gradient: the hypergradient, None where one of the halves failed.
        verdict: status of all of it.
    """

    solved: Solution
    pulled: Pullback
    outer_loss: float
    gradient: Tree
    verdict: Verdict

    def carry(self, solver: InnerSolver, *, ongoing: bool = False) -> Carry:
        """Return the warm start that it leaves."""
        return Carry(self.solved.state, self.pulled.adjoint, type(solver).__name__, ongoing)


def attempt(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    start: Tree,
    carry: Carry,
    meter: Meter,
) -> Attempt:
    """Solve, and pull the gradient of the outer loss back.

    Args:
        problem: the problem.
        solver: the inner solver.
        estimator: the estimator.
        hparams: hyperparameters, detached.
        start: where a cold start begins.
        carry: the warm start.
        meter: counts the work.

    Returns:
        The attempt; failure is a verdict.
    """
    solved = estimator.solve(problem, solver, hparams, start, carry, meter)
    value, gradient, pulled, verdict = float("nan"), None, Pullback(None), solved.verdict
    if solved.verdict.status.usable:
        meter.counts["outer"] += 1
        outer, by_params, by_hparams = problem.outer_value_and_grads(solved.params, hparams)
        value = float(outer)
        verdict = verdict.worse(finite_loss(value, lambda: problem.outer_loss(solved.params, hparams)))
    if verdict.status.usable:
        pulled = solved.pullback(by_params)
        verdict = verdict.worse(pulled.verdict)
        if pulled.verdict.status.usable:
            gradient = tree.add(by_hparams, pulled.hparams)
            verdict = verdict.worse(finite_gradient("the hypergradient of `hparams", gradient))
        if not verdict.status.usable:
            verdict = not_finite_part(problem, solved.params, hparams, by_params, by_hparams, pulled) or verdict
    return Attempt(solved, pulled, value, gradient, verdict)
