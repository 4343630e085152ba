"""`check_problem`: everything about a problem that can make a hypergradient wrong, looked at before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.base import InnerSolver
from bilevel.check import determinism, losses, nonsmooth, second, solution
from bilevel.check.contraction import contraction
from bilevel.check.estimators import estimators
from bilevel.check.report import Finding, ProblemReport
from bilevel.check.subject import Subject
from bilevel.core import tree
from bilevel.core.options import default_tolerance
from bilevel.core.tree import Tree
from bilevel.engine.checks import check_roles
from bilevel.hypergrad import Implicit
from bilevel.inner import GradientDescent
from bilevel.oracles.autograd_errors import explain
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.validation import check_tensors

DEFAULT_STEPS = 2_000
"""Steps of the inner solver where the caller names none."""


def check_problem(
    problem: BilevelProblem,
    hparams: Tree,
    solver: InnerSolver | None = None,
    params: Tree = None,
    *,
    seed: int = 0,
) -> ProblemReport:
    """Examine a problem at some hyperparameters: the losses, their derivatives, the inner solution and the estimators.

    Every check uses values alone where it can (extrapolated central differences, float64 where the dtype is another and
    the losses allow it), so that it does not share the mistake that it looks for. Checks whose foundation is missing
    are "not applicable". The cost is a few hundred evaluations of the losses and some dozens of inner solves.

    Where inner steps see batches or draws of their own, or move running statistics, so do the runs of `solver`. All
    else is examined on the full batch, with the draws of what is no step and with the statistics at rest.

    Args:
        problem: the problem.
        hparams: where it is examined.
        solver: the inner solver; default ``GradientDescent(steps=2000, tol=...)`` with a measured step size.
        params: where the inner solver starts; default: the problem's start.
        seed: of the random points and directions, an int that is not negative.

    Returns:
        A `ProblemReport`; ``report.ok`` says whether there is no fault, and printing it shows all checks.

    Raises:
        ValueError: for arguments in the wrong places, and for a batch.

    >>> import torch
    >>> from bilevel import QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> check_problem(problem, torch.zeros(2, dtype=torch.float64)).ok
    True
    """
    solver = _default_solver(hparams) if solver is None else solver
    check_roles(problem, solver, Implicit())
    if problem.batch is not None:
        raise ValueError(f"`check_problem` takes one problem, got a batch of {problem.batch}: check batch.member(i).")
    return ProblemReport(examine(problem, solver, hparams, params, seed))


def _default_solver(hparams: Tree) -> InnerSolver:
    result = [leaf for leaf in tree.leaves(hparams) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return GradientDescent(steps=DEFAULT_STEPS, tol=10 * default_tolerance(result[0].dtype) if result else None)


def examine(
    problem: BilevelProblem,
    solver: InnerSolver,
    hparams: Tree,
    params: Tree,
    seed: int = 0,
    *,
    judge_estimators: bool = True,
) -> list[Finding]:
    """Make all checks of `check_problem`, whose arguments these are; those of the estimators may be left out."""
    try:
        check_tensors("hparams", hparams)
        subject = Subject(problem, solver, tree.detach(hparams), problem.start(params), seed)
    except ValueError as error:
        return [Finding("inputs", "fault", str(error))]
    findings = [_guarded("inputs", losses.inputs, subject)]
    if findings[0].verdict == "fault":
        return [*findings, _skipped("the inputs are refused")]
    findings.append(_guarded("determinism", determinism.determinism, subject))
    if findings[-1].verdict == "fault":
        return [*findings, _skipped("the losses are no functions of their arguments")]
    first = determinism.evaluation(subject)
    findings += [_guarded(f"{which} gradient", losses.gradients, subject, which) for which in ("inner", "outer")]
    precise = _guarded("precision", losses.precision, subject)
    findings += [_guarded("jumps", losses.jumps, subject), precise]
    # Differences of whole inner runs say nothing where the losses themselves have lost their digits.
    findings += _of_second_order(subject, judge_estimators and precise.verdict != "fault")
    # A state that moves slowly shows after some hundred calls.
    return [findings[0], determinism.still_the_same(first, subject), *findings[2:]]


def _of_second_order(subject: Subject, judge_estimators: bool) -> list[Finding]:
    """Check second derivatives, and what is built on them."""
    findings = [_guarded("double backward", second.double_backward, subject)]
    if findings[0].verdict == "fault":
        return [*findings, _skipped("the inner loss cannot be differentiated twice")]
    findings.append(_guarded("second derivatives", second.second_derivatives, subject))
    findings.append(_guarded("symmetry", second.symmetry, subject))
    solved, finding = _attempt("inner solve", solution.solve, subject)
    if solved is None:
        influence = _guarded("influence", second.influence, subject, None)
        return [*findings, finding, influence, _skipped("the inner solver fails")]
    findings += [solved.finding, _guarded("kinks", solution.kinks, subject, solved)]
    if subject.problem.nonsmooth is not None and solved.params is not None:
        findings.append(_guarded("proximal map", nonsmooth.proximal_map, subject, solved.params))
        if findings[-1].verdict == "fault":
            return [*findings, _skipped("the proximal map is wrong")]
    findings.append(_guarded("influence", second.influence, subject, solved.params))
    return findings + _at_the_solution(subject, solved, judge_estimators)


def _at_the_solution(subject: Subject, solved: solution.Solved, judge_estimators: bool) -> list[Finding]:
    """Check curvature, contraction and estimators."""
    if solved.params is None:
        finding = _guarded("curvature", solution.no_solution, subject, solved)
        return [finding, _skipped("no inner solution was found")]
    result, finding = _attempt("curvature", solution.curvature, subject, solved.params)
    if result is None:
        return [finding, _skipped("the curvature is unknown")]
    findings = [_guarded("curvature", solution.definiteness, subject, solved, result)]
    measured, finding = _attempt("contraction", contraction, subject, solved, result)
    findings.append(finding if measured is None else measured[0])
    if findings[0].verdict == "fault":
        return [*findings, _skipped("there is no strict minimum")]
    if not solved.run.verdict.status.usable:
        return [*findings, _skipped("the inner solver fails")]
    if not judge_estimators:
        return findings
    tail = None if measured is None else measured[1]
    judged, finding = _attempt("estimators", estimators, subject, solved, tail)
    return [*findings, *([finding] if judged is None else judged)]


def _guarded(name: str, check: Callable[..., Finding], *arguments: Any) -> Finding:
    """Make one check; an exception is its finding."""
    result, finding = _attempt(name, check, *arguments)
    return finding if result is None else result


def _attempt(name: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Finding]:
    """Return (result or None, the finding about the exception)."""
    try:
        return function(*arguments), Finding(name, "ok", "")
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        plain = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return None, Finding(name, "fault", explain(error, "a loss") or plain)


def _skipped(why: str) -> Finding:
    return Finding("the other checks", "not applicable", f"{why}.")
