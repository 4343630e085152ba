"""Check of the estimators: against differences of outer losses after inner solves, and against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from bilevel.base import Estimate, InnerSolver
from bilevel.check.differences import derivative
from bilevel.check.report import Finding
from bilevel.check.solution import Solved
from bilevel.check.subject import Subject
from bilevel.core import tree
from bilevel.core.options import default_tolerance, describe
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator
from bilevel.engine.loop import run_inner
from bilevel.hypergrad import FullUnroll, Implicit, TruncatedUnroll, hypergradient
from bilevel.inner import QuasiNewton
from bilevel.linear import CG, GMRES
from bilevel.oracles.problem import BilevelProblem

MOST_DIRECTIONS = 4
"""Directions of hparams along which whole inner solves are compared."""
MOST_NUMBERS = 20_000_000
"""A full unroll that would store more numbers than this is left out."""
FIRST, LEVELS = 0.02, 5
"""The largest step of a difference of inner solves, and how many there are."""


@dataclass(frozen=True, eq=False)
class _Way:
    """A way to solve the inner problem, and the derivatives of the outer loss after it by differences."""

    problem: BilevelProblem
    solver: InnerSolver
    start: Tree
    hparams: Tree
    directions: Sequence[Tree]

    @cached_property
    def slopes(self) -> list[tuple[float, float]]:
        """The derivative along every direction, and its uncertainty; measured step sizes are constants."""
        bind, solver = self.problem.bind, self.problem.augmented(self.solver)
        measured = solver.init(bind(self.hparams), self.start).measured

        def outer_loss(direction: Tree, t: float) -> float:
            hparams = tree.add(self.hparams, direction, t)
            inner = bind(hparams)
            state = replace(solver.init(inner, self.start), measured=measured)
            run = run_inner(inner, solver, state, at_least=1)
            with torch.no_grad():
                value = self.problem.outer_loss(solver.params(run.state), hparams)
            return float(value) if run.verdict.status.usable else math.nan

        return [derivative(partial(outer_loss, direction), FIRST, LEVELS) for direction in self.directions]

    @property
    def trusted(self) -> bool:
        """Whether the differences are good enough to judge by."""
        largest = max(abs(value) for value, _ in self.slopes)
        return all(math.isfinite(value) and apart <= 0.01 * largest for value, apart in self.slopes)

    def error(self, estimate: Tree) -> float:
        """Return the largest error along the directions, beyond the differences' own, over the largest derivative."""
        claimed = [float(tree.dot(estimate, direction)) for direction in self.directions]
        size = max(max(abs(p), abs(q)) for p, (q, _) in zip(claimed, self.slopes, strict=True))
        gaps = [max(0.0, abs(p - q) - 10 * apart) for p, (q, apart) in zip(claimed, self.slopes, strict=True)]
        if not math.isfinite(size):
            return math.inf
        return max(gaps) / size if size > 0 else 0.0

    def estimate(self, estimator: HypergradEstimator) -> Estimate:
        """Return the estimate, which may have failed."""
        ours = self.problem, self.solver, estimator, self.hparams, self.start
        return hypergradient(*ours, check=False, on_failure="return")


def estimators(subject: Subject, solved: Solved, tail: int | None) -> list[Finding]:
    """Return a finding for each of `Implicit`, `FullUnroll` and `TruncatedUnroll` with the recommended tail.

    `Implicit` is judged at the inner solution, by differences of inner solves that converge. The unrolls are judged by
    differences of the user's own inner runs, which is what they differentiate.
    """
    where = subject.hparams, _directions(subject)
    converged: InnerSolver = subject.solver
    if subject.problem.symmetric:
        converged = QuasiNewton(tol=default_tolerance(subject.dtype), steps=500)
    truth = _Way(subject.problem, converged, solved.params, *where)
    own = _Way(subject.given, subject.solver, subject.given_start, *where)
    findings = [_implicit(subject, own, truth)]
    why = ""
    if not subject.solver.traits.differentiable:
        why = f"{type(subject.solver).__name__} has no derivative."
    elif solved.run.steps * tree.size(subject.start) > MOST_NUMBERS:
        why = "the run is too long to store all its steps here."
    if why:
        return [*findings, Finding("unrolling", "not applicable", why)]
    return [*findings, _full(subject, own, truth), _truncated(solved.run.steps, own, truth, tail)]


def _directions(subject: Subject) -> list[Tree]:
    """Return the unit vectors of few hyperparameters, else random directions."""
    raveler = tree.Raveler(subject.hparams)
    if raveler.size <= MOST_DIRECTIONS:
        return raveler.units()
    return [subject.direction(subject.hparams, 800 + index) for index in range(MOST_DIRECTIONS)]


def _allowed(subject: Subject) -> float:
    return max(1e-4, 1e5 * subject.eps)


def _implicit(subject: Subject, own: _Way, truth: _Way) -> Finding:
    name, estimator = "Implicit", Implicit(CG() if subject.problem.symmetric else GMRES())
    result = truth.estimate(estimator)
    if not result.status.usable:
        return Finding(name, "fault", str(result.verdict))
    if not truth.trusted:
        return Finding(name, "note", "differences of inner solves are too rough here to judge it.")
    error = truth.error(result.hypergradient)
    if error > _allowed(subject):
        sentence = (
            f"at the inner solution it differs from differences of inner solves by {error:.1e}: a derivative of the "
            "inner loss is wrong, or the solution jumps."
        )
        return Finding(name, "fault", sentence, error)
    theirs = own.estimate(estimator)
    if not theirs.status.usable:
        return Finding(name, "note", f"right at the solution, but after your inner solver: {theirs.verdict}", error)
    off = truth.error(theirs.hypergradient)
    if off > 1e-2:
        why = subject.solver.bias_reason(subject.problem) or "the inner residual is not small: take more inner steps"
        sentence = (
            f"right at the solution; with {describe(subject.solver)} it is {off:.1e} away from the truth, "
            f"because {why}."
        )
        return Finding(name, "note", sentence, off)
    return Finding(name, "ok", "agrees with differences of inner solves; the error is after your inner solver.", off)


def _full(subject: Subject, own: _Way, truth: _Way) -> Finding:
    name, result = "FullUnroll", own.estimate(FullUnroll())
    if not result.status.usable:
        return Finding(name, "fault", str(result.verdict))
    off = truth.error(result.hypergradient)
    if truth.trusted and off <= _allowed(subject):
        return Finding(name, "ok", "agrees with differences of inner solves.", off)
    if not own.trusted:
        return Finding(name, "note", "differences of your inner runs are too rough here to judge it.", off)
    error = own.error(result.hypergradient)
    if error > _allowed(subject):
        sentence = (
            f"differs from differences of your own inner runs by {error:.1e}: a derivative of the inner loss or of "
            "the step is wrong."
        )
        return Finding(name, "fault", sentence, error)
    sentence = (
        f"agrees with differences of your own inner runs, whose result is {off:.1e} away from that of the inner "
        f"solution: {subject.solver.bias_reason(subject.problem) or 'more inner steps bring them together'}."
    )
    return Finding(name, "note" if off > 1e-2 else "ok", sentence, off)


def _truncated(steps: int, own: _Way, truth: _Way, tail: int | None) -> Finding:
    name = "TruncatedUnroll"
    if tail is None or not truth.trusted:
        return Finding(name, "not applicable", "no tail to recommend, or no truth to compare it with.")
    used = min(tail, max(1, steps))
    result = own.estimate(TruncatedUnroll(tail=used))
    if not result.status.usable:
        return Finding(name, "fault", str(result.verdict))
    off = truth.error(result.hypergradient)
    what = f"tail={used} of {steps} steps is {off:.1e} away from the truth"
    if off <= 1e-2:
        return Finding(name, "ok", f"{what}.", off)
    return Finding(name, "note", f"{what}: {2 * tail} steps with tail={tail} would be close to 1e-3.", off)
