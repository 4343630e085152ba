"""What is said of a hypergradient: differences that confirm it, its error, its certificate."""

from __future__ import annotations

from dataclasses import replace

from bilevel.base import Certificate, InnerSolver, Pullback, Solution
from bilevel.certify import ErrorEstimate, certify_error
from bilevel.core import rows
from bilevel.core.status import Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.attempt import Attempt, error_verdict
from bilevel.engine.derivatives import check_derivatives
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.kinks import ends_at_kink
from bilevel.oracles.problem import BilevelProblem

NOT_ASKED = ErrorEstimate(None, "none", "ask with certify=True")


def confirmed(estimator: HypergradEstimator, run: Run, solver: InnerSolver, result: Attempt, asked: bool) -> Attempt:
    """Return the attempt with what differences say of it: wrong derivatives fail, an end at a kink is a doubt."""
    problem, hparams, solved, verdict = run.problem, run.hparams, result.solved, result.verdict
    if not estimator.second_derivatives or not verdict.status.usable:
        return result
    wrong = check_derivatives(problem, hparams, solved.params, again=asked)
    if not wrong.status.ok:
        return replace(result, gradient=None, verdict=verdict.worse(wrong))
    kink = ends_at_kink(problem, hparams, solver, solved, run.params, asked or not verdict.status.ok, again=asked)
    return result if kink.status.ok else replace(result, verdict=kink)


def judged(
    problem: BilevelProblem, solver: InnerSolver, hparams: Tree, result: Attempt, certify: bool
) -> tuple[Attempt, ErrorEstimate]:
    """Return the attempt, in doubt where its error is large or cannot be told, and what can be said of the error."""
    pulled, status = result.pulled, result.verdict.status
    params, adjoint = result.solved.params, pulled.adjoint
    if certify and status.usable:
        error = _certified(solver, problem, hparams, params, result.gradient, adjoint)
    elif pulled.error is not None and status.ok:
        error = ErrorEstimate(pulled.error, "estimate", pulled.error_note)
    else:
        error = ErrorEstimate(None, "none", pulled.error_note) if pulled.error_note else NOT_ASKED
    if error.value is not None and status.ok:
        doubt = error_verdict(problem, hparams, params, result.gradient, adjoint, error.value)
        result = replace(result, verdict=result.verdict.worse(doubt))
    elif error.doubtful and status.ok:
        result = replace(result, verdict=Verdict(Status.INACCURATE, f"nothing is known of its error: {error.note}"))
    return result, error


def _certified(
    solver: InnerSolver, problem: BilevelProblem, hparams: Tree, params: Tree, gradient: Tree, adjoint: Tree
) -> ErrorEstimate:
    """Return `certify_error` of one problem, which compares with the inner solution, where that is what is tuned."""
    reason = solver.bias_reason(problem)
    if reason:
        return ErrorEstimate(None, "none", f"errors are those of the inner solution's derivative, but {reason}")
    return certify_error(problem.deterministic(), hparams, problem.trainable(params), gradient, adjoint)


def certificate(solved: Solution, pulled: Pullback, error: ErrorEstimate, index: int | None = None) -> Certificate:
    """Return the evidence of a problem, or of the row `index`."""
    value_error = rows.figure(pulled.value_error, index)
    return Certificate(
        inner_residual=rows.figure(solved.residual, index),
        adjoint_residual=rows.figure(pulled.residual, index),
        inner_steps=rows.figure(solved.steps, index),
        adjoint_steps=rows.figure(pulled.steps, index),
        error=error.value,
        error_kind=error.kind,
        error_note=error.note,
        error_lower=error.lower,
        components=error.components,
        corrected=error.corrected,
        corrected_error=error.corrected_error,
        signs=error.signs,
        value_error=None if value_error is None else float(value_error),
        measured=dict((solved.state if index is None else solved.state.row(index)).measured),
        form=solved.form,
    )
