"""One solve and one pullback: what `hypergradient` takes once, and a `target_error` as often as it needs to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.base import Carry, InnerSolver, Pullback, Solution
from bilevel.core import tree
from bilevel.core.device import to_floats
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.not_finite import finite_gradient, finite_loss, not_finite_part
from bilevel.oracles.problem import BilevelProblem

FAR = 5e-4
"""Share of the outer loss by which it may differ from its value at the inner solution; `scripts/studies/far.py` shows
of how many hypergradients that are off by 5 % to 50 % it says OK."""
NOT_SOLVED = "params are not the inner solution"
"""How the doubt about the outer loss begins."""
WRONG = 0.5
"""Relative error ``|p - dF/du| / |dF/du|`` of a hypergradient p above which it is in doubt; `scripts/studies/far.py`
with --certified shows of how many that are off by 5 % to 50 % it says OK."""
SHARE = 1e-3
"""Share of the parts of a hypergradient up to which an error above the hypergradient itself is left: where the parts
cancel, as they do at the outer optimum, their sum may be as small as one likes."""


@dataclass(frozen=True)
class Attempt:
    """A hypergradient, as far as it exists, with its status."""

    solved: Solution
    pulled: Pullback
    outer_loss: float  # NaN where the inner solve failed
    gradient: Tree  # None where one of the halves failed
    verdict: Verdict

    def carry(self, solver: InnerSolver, *, ongoing: bool = False) -> Carry:
        """Return the warm start that it leaves."""
        return Carry(self.solved.state, self.pulled.adjoint, type(solver).__name__, ongoing)


def attempt(estimator: HypergradEstimator, run: Run, kept: bool = True) -> Attempt:
    """Return what solving, and pulling the gradient of the outer loss back, gives; failure is a verdict.

    Without `kept`, the solution goes before the pullback, whose memory it would add to; the result is without it.
    """
    problem, hparams = run.problem, run.hparams
    solved = estimator.solve(run)
    value, gradient, pulled, verdict = float("nan"), None, Pullback(None), solved.verdict
    if solved.verdict.status.usable:
        run.meter.counts["outer"] += 1
        outer, by_params, by_hparams = problem.outer_value_and_grads(solved.params, hparams)
        value = float(outer)
        verdict = verdict.worse(finite_loss(value, lambda: problem.outer_loss(solved.params, hparams)))
    if verdict.status.usable:
        if not kept:
            solved = replace(solved, params=None, state=replace(solved.state, params=None, memory=None))
        pulled = solved.pullback(by_params)
        verdict = verdict.worse(pulled.verdict)
        if pulled.verdict.status.usable:
            gradient = tree.add(by_hparams, pulled.hparams)
            verdict = verdict.worse(finite_gradient("the hypergradient of `hparams", gradient))
            doubt, pulled = far_from_solution(value, solved.params, by_params, pulled)
            verdict = verdict.worse(doubt)
        if kept and not verdict.status.usable:
            verdict = not_finite_part(problem, solved.params, hparams, by_params, by_hparams, pulled) or verdict
    return Attempt(solved, pulled, value, gradient, verdict)


def far_from_solution(value: float, params: Tree, by_params: Tree, pulled: Pullback) -> tuple[Verdict, Pullback]:
    """Return a doubt where the outer loss is far from its value at the inner solution, at which the formula holds.

    The pullback comes back with that error as a number.

    Far is a share of the outer loss, or of what it changes over the whole of params where that is larger.
    """
    if pulled.value_error is None:
        return GOOD, pulled
    parts = [(a * b).abs().sum() for a, b in zip(tree.leaves(params), tree.leaves(by_params), strict=True)]
    error, *changes = to_floats([pulled.value_error, *parts])
    return value_verdict(value, abs(error), sum(changes)), replace(pulled, value_error=error)


def value_verdict(value: float, error: float, change: float) -> Verdict:
    """Judge an outer loss that is `error` away from its value at the inner solution."""
    if not error > FAR * max(abs(value), change):
        return GOOD
    detail = f"{NOT_SOLVED}: there the outer loss, {value:.3g}, would differ by about {error:.1e}"
    return Verdict(Status.INACCURATE, detail)


def only_the_value(verdict: Verdict) -> bool:
    """Whether a verdict doubts nothing but the outer loss: how far off it is, `Pullback.value_error` says."""
    return verdict.status is Status.INACCURATE and verdict.detail.startswith(NOT_SOLVED)


def error_verdict(
    problem: BilevelProblem, hparams: Tree, params: Tree, gradient: Tree, adjoint: Tree, error: float
) -> Verdict:
    """Return a doubt where a hypergradient p may be off by more than half of the exact one, ``error > |p| / 3``.

    Not where the hypergradient is small because its parts cancel and the error is small beside those: their size is
    that of ``C' (s a)``, with the adjoint vector a and signs s that let nothing cancel but by chance. And not where the
    gradient of the outer loss is zero but for rounding, as where the outer loss is fitted: where half of the digits of
    params change it by as many times itself as the error is larger than those parts.

    `error` is a bound or an estimate of the distance to the exact hypergradient; `adjoint` may be None.
    """
    size = float(tree.norm(gradient))
    if not error > WRONG / (1.0 + WRONG) * size:
        return GOOD
    parts = size
    if adjoint is not None:
        mixed = tree.tree_map(_mixed, adjoint)
        parts = max(size, float(tree.norm(problem.bind(hparams).linearize(params).cross(mixed))))
        if error <= SHARE * parts:
            return GOOD
    if error <= parts * _rounding(problem, hparams, params):
        return GOOD
    return Verdict(Status.INACCURATE, f"the error of the hypergradient may be {error:.1e}, and its norm is {size:.1e}")


def _mixed(leaf: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(leaf.numel())
    return leaf * torch.randint(0, 2, leaf.shape, generator=generator).mul(2).sub(1).to(leaf)


def _rounding(problem: BilevelProblem, hparams: Tree, params: Tree) -> float:
    """Return by how many times itself the outer gradient by params changes with half of their digits."""
    moved = tree.tree_map(lambda leaf: leaf * (1.0 + torch.finfo(leaf.dtype).eps ** 0.5), params)
    here, there = (problem.outer_value_and_grads(x, hparams)[1] for x in (params, moved))
    size, change = to_floats([tree.norm(here), tree.norm(tree.add(there, here, -1.0))])
    return change / size if size > 0 else 0.0
