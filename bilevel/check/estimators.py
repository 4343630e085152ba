"""Check of the estimators: against differences of outer losses after inner solves, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bilevel.base import Carry, HypergradEstimator, InnerSolver, InnerState
from bilevel.check.differences import derivative
from bilevel.check.report import Finding
from bilevel.check.solution import Solved
from bilevel.check.subject import Subject
from bilevel.core import tree
from bilevel.core.options import default_tolerance, describe
from bilevel.core.tree import Tree
from bilevel.engine.loop import begin, run_inner
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


def estimators(subject: Subject, solved: Solved, tail: int | None) -> list[Finding]:
    """Judge `Implicit`, `FullUnroll` and `TruncatedUnroll` on this problem with this inner solver.

    `Implicit` is judged at the inner solution, by differences of inner solves that converge. The unrolls are judged by
    differences of the user's own inner runs, which is what they differentiate.

    Args:
        subject: the problem.
        solved: its solution.
        tail: the recommended tail.

    Returns:
        A finding for each estimator.
    """
    directions = _directions(subject)
    converged: InnerSolver = subject.solver
    if subject.problem.symmetric:
        converged = QuasiNewton(tol=default_tolerance(subject.dtype), steps=500)
    truth = [_slope(subject, subject.problem, converged, solved.params, direction) for direction in directions]
    findings = [_implicit(subject, converged, solved, directions, truth)]
    if not subject.solver.traits.differentiable:
        return [
            *findings,
            Finding("unrolling", "not applicable", f"{type(subject.solver).__name__} has no derivative."),
        ]
    if solved.run.steps * tree.size(subject.start) > MOST_NUMBERS:
        return [*findings, Finding("unrolling", "not applicable", "the run is too long to store all its steps here.")]
    findings.append(_full(subject, solved, directions, truth))
    findings.append(_truncated(subject, solved, directions, truth, tail))
    return findings


def _directions(subject: Subject) -> list[Tree]:
    """Return the unit vectors of few hyperparameters, else random directions."""
    raveler = tree.Raveler(subject.hparams)
    if raveler.size <= MOST_DIRECTIONS:
        return raveler.units()
    return [subject.direction(subject.hparams, 800 + index) for index in range(MOST_DIRECTIONS)]


def _slope(
    subject: Subject, problem: BilevelProblem, solver: InnerSolver, start: Tree, direction: Tree
) -> tuple[float, float]:
    """Return the derivative of the outer loss after inner solves, along a direction, and its uncertainty."""
    return derivative(_objective(subject, problem, solver, start, direction), FIRST, LEVELS)


def _objective(
    subject: Subject, problem: BilevelProblem, solver: InnerSolver, start: Tree, direction: Tree
) -> Callable[[float], float]:
    """Return t -> the outer loss after an inner solve at hparams moved by t; measured step sizes are constants."""
    bind, solver = problem.bind, problem.augmented(solver)
    measured = begin(bind(subject.hparams), solver, start, Carry()).measured

    def function(t: float) -> float:
        hparams = tree.add(subject.hparams, direction, t)
        inner = bind(hparams)
        state: InnerState = replace(begin(inner, solver, start, Carry()), measured=measured)
        run = run_inner(inner, solver, state, at_least=1)
        with torch.no_grad():
            value = problem.outer_loss(solver.params(run.state), hparams)
        return float(value) if run.verdict.status.usable else math.nan

    return function


def _error(estimate: Tree, directions: Sequence[Tree], referee: Sequence[tuple[float, float]]) -> float:
    """Return the largest error along the directions, beyond the referee's own, relative to the largest derivative."""
    claimed = [float(tree.dot(estimate, direction)) for direction in directions]
    size = max(max(abs(p), abs(q)) for p, (q, _) in zip(claimed, referee, strict=True))
    gaps = [max(0.0, abs(p - q) - 10 * apart) for p, (q, apart) in zip(claimed, referee, strict=True)]
    if not math.isfinite(size):
        return math.inf
    return max(gaps) / size if size > 0 else 0.0


def _trusted(referee: Sequence[tuple[float, float]]) -> bool:
    largest = max(abs(value) for value, _ in referee)
    return all(math.isfinite(value) and apart <= 0.01 * largest for value, apart in referee)


def _allowed(subject: Subject) -> float:
    return max(1e-4, 1e5 * subject.eps)


def _taken(
    subject: Subject, problem: BilevelProblem, solver: InnerSolver, estimator: HypergradEstimator, start: Tree
) -> tuple[Tree | None, str, object]:
    """Return (hypergradient or None, the sentence about a failure, status)."""
    estimate = hypergradient(problem, solver, estimator, subject.hparams, start, check=False, on_failure="return")
    usable = estimate.status.usable
    return (estimate.hypergradient if usable else None), str(estimate.verdict), estimate.status


def _implicit(
    subject: Subject,
    solver: InnerSolver,
    solved: Solved,
    directions: Sequence[Tree],
    truth: Sequence[tuple[float, float]],
) -> Finding:
    name = "Implicit"
    linear_solver = CG() if subject.problem.symmetric else GMRES()
    result, message, _ = _taken(subject, subject.problem, solver, Implicit(linear_solver), solved.params)
    if result is None:
        return Finding(name, "fault", message)
    if not _trusted(truth):
        return Finding(name, "note", "differences of inner solves are too rough here to judge it.")
    error = _error(result, directions, truth)
    if error > _allowed(subject):
        return Finding(
            name,
            "fault",
            f"at the inner solution it differs from differences of inner solves by {error:.1e}: a derivative of the "
            "inner loss is wrong, or the solution jumps.",
            error,
        )
    theirs, message, _ = _taken(subject, subject.given, subject.solver, Implicit(linear_solver), subject.given_start)
    if theirs is None:
        return Finding(name, "note", f"right at the solution, but after your inner solver: {message}", error)
    off = _error(theirs, directions, truth)
    if off > 1e-2:
        why = subject.solver.bias_reason(subject.problem) or "the inner residual is not small: take more inner steps"
        return Finding(
            name,
            "note",
            f"right at the solution; with {describe(subject.solver)} it is {off:.1e} away from the truth, "
            f"because {why}.",
            off,
        )
    return Finding(name, "ok", "agrees with differences of inner solves; the error is after your inner solver.", off)


def _full(
    subject: Subject, solved: Solved, directions: Sequence[Tree], truth: Sequence[tuple[float, float]]
) -> Finding:
    name = "FullUnroll"
    result, message, _ = _taken(subject, subject.given, subject.solver, FullUnroll(), subject.given_start)
    if result is None:
        return Finding(name, "fault", message)
    off = _error(result, directions, truth)
    if _trusted(truth) and off <= _allowed(subject):
        return Finding(name, "ok", "agrees with differences of inner solves.", off)
    own = [_slope(subject, subject.given, subject.solver, subject.given_start, direction) for direction in directions]
    if not _trusted(own):
        return Finding(name, "note", "differences of your inner runs are too rough here to judge it.", off)
    error = _error(result, directions, own)
    if error > _allowed(subject):
        return Finding(
            name,
            "fault",
            f"differs from differences of your own inner runs by {error:.1e}: a derivative of the inner loss or of "
            "the step is wrong.",
            error,
        )
    return Finding(
        name,
        "note" if off > 1e-2 else "ok",
        f"agrees with differences of your own inner runs, whose result is {off:.1e} away from that of the inner "
        f"solution: {subject.solver.bias_reason(subject.problem) or 'more inner steps bring them together'}.",
        off,
    )


def _truncated(
    subject: Subject,
    solved: Solved,
    directions: Sequence[Tree],
    truth: Sequence[tuple[float, float]],
    tail: int | None,
) -> Finding:
    name = "TruncatedUnroll"
    if tail is None or not _trusted(truth):
        return Finding(name, "not applicable", "no tail to recommend, or no truth to compare it with.")
    used = min(tail, max(1, solved.run.steps))
    result, message, _ = _taken(subject, subject.given, subject.solver, TruncatedUnroll(tail=used), subject.given_start)
    if result is None:
        return Finding(name, "fault", message)
    off = _error(result, directions, truth)
    close = off <= 1e-2
    what = f"tail={used} of {solved.run.steps} steps is {off:.1e} away from the truth"
    if close:
        return Finding(name, "ok", f"{what}.", off)
    return Finding(name, "note", f"{what}: {2 * tail} steps with tail={tail} would be close to 1e-3.", off)
