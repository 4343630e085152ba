"""One solve and one pullback: what `hypergradient` takes once, and a `target_error` as often as it needs to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel import tree
from bilevel.base import Carry, HypergradEstimator, InnerSolver, Pullback, Solution
from bilevel.cost import Meter
from bilevel.hypergrad.not_finite import finite_gradient, finite_loss, not_finite_part
from bilevel.problem import BilevelProblem
from bilevel.status import Status, Verdict
from bilevel.tree import Tree

SHARE = 1e-3
"""Share of the parts of a hypergradient up to which an error above the hypergradient itself is left: where the parts
cancel, as they do at the outer optimum, their sum may be as small as one likes."""


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


def doubted(found: Attempt, error: float | None, problem: BilevelProblem, hparams: Tree) -> Attempt:
    """Return the attempt with a doubt where its error may be as large as the hypergradient.

    Not where the hypergradient is small because its parts cancel and the error is small beside those: their size is
    that of ``C' (s a)``, with the adjoint vector a and signs s that let nothing cancel but by chance.

    Args:
        found: the attempt.
        error: a bound or an estimate of the distance to the exact hypergradient; None for no figure.
        problem: the problem.
        hparams: hyperparameters.
    """
    size = float(tree.norm(found.gradient)) if found.gradient is not None else 0.0
    if error is None or not found.verdict.status.ok or not error > size:
        return found
    parts = size
    if found.pulled.adjoint is not None:
        adjoint = tree.tree_map(_mixed, found.pulled.adjoint)
        parts = float(tree.norm(problem.bind(hparams).linearize(found.solved.params).cross(adjoint)))
    if error <= SHARE * parts:
        return found
    detail = f"the error of the hypergradient may be {error:.1e}, and its norm is {size:.1e}"
    return replace(found, verdict=Verdict(Status.INACCURATE, detail))


def _mixed(leaf: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(leaf.numel())
    return leaf * torch.randint(0, 2, leaf.shape, generator=generator).mul(2).sub(1).to(leaf)
