"""`hypergradient`: the call in which problem, inner solver and estimator meet."""

from __future__ import annotations

from functools import partial
from typing import overload

import torch

from bilevel import tree
from bilevel.base import BatchEstimate, Carry, Certificate, Estimate, HypergradEstimator, InnerSolver, Pullback
from bilevel.certify import ErrorEstimate, certify_error
from bilevel.cost import Meter
from bilevel.hypergrad.arguments import check_carry, check_roles, read_by_steps
from bilevel.hypergrad.batch_api import as_batch, batch_hypergradient, finite_loss
from bilevel.problem import BilevelProblem
from bilevel.status import GOOD, OnFailure, Status, Verdict, report
from bilevel.tree import Tree


@overload
def hypergradient(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    params: Tree = None,
    *,
    batch: None = None,
    carry: Carry | None = None,
    certify: bool = False,
    check: bool = True,
    on_failure: OnFailure = "raise",
) -> Estimate: ...
@overload
def hypergradient(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    params: Tree = None,
    *,
    batch: int,
    carry: Carry | None = None,
    certify: bool = False,
    check: bool = True,
    on_failure: OnFailure = "raise",
) -> BatchEstimate: ...
def hypergradient(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    params: Tree = None,
    *,
    batch: int | None = None,
    carry: Carry | None = None,
    certify: bool = False,
    check: bool = True,
    on_failure: OnFailure = "raise",
) -> Estimate | BatchEstimate:
    """Return the gradient of ``F(u) = outer_loss(params*(u), u)`` with its evidence.

        dF/du = d outer/du + (d params*/du)' d outer/d params

    Args:
        problem: the two losses.
        solver: the inner solver.
        estimator: how the solution map is differentiated.
        hparams: where the gradient is taken.
        params: where the inner solver starts; default: the problem's start.
        batch: number of members to run side by side as one problem. Every leaf of `hparams` then has this leading
            dimension; `params` may have it too, and is the same for all members otherwise. A problem that is a batch
            already (`BilevelProblem.batched`, `bilevel.stack`) needs none.
        carry: the warm start, from the `carry` of an earlier estimate; it takes the place of `params`.
        certify: bound the distance to the exact hypergradient where a proof exists, and estimate it elsewhere (see
            `bilevel.certify.certify_error`).
        check: look at the inputs first; a loop that has done so once may leave it out.
        on_failure: what to do with a result that cannot be used: "raise", "warn" or "return".

    Returns:
        An `Estimate` with status, residuals, error estimate and cost; for a batch, a `BatchEstimate`: a sequence of
        them, in which a failed member spoils no other.

    Raises:
        ValueError: for inputs that cannot work, in one sentence.

    >>> from bilevel import GradientDescent, Implicit, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> u = torch.zeros(2, dtype=torch.float64)
    >>> estimate = hypergradient(problem, GradientDescent(), Implicit(), u)
    >>> torch.allclose(estimate.hypergradient, problem.exact_hypergradient(u))
    True
    >>> many = hypergradient(problem, GradientDescent(), Implicit(), torch.stack([u, u + 0.1]), batch=2)
    >>> torch.allclose(many[0].hypergradient, estimate.hypergradient)
    True
    """
    if batch is not None:
        problem = as_batch(problem, batch)
    hparams, start = prepare(problem, solver, estimator, hparams, params, check)
    carry = Carry() if carry is None else carry
    if check:
        check_carry(carry, solver, start)
    if problem.batch is not None:
        return batch_hypergradient(problem, solver, estimator, hparams, start, carry, certify, on_failure)
    meter = Meter(tree.leaves(start)[0].device, memory=estimator.measures_memory)
    solved = estimator.solve(problem, solver, hparams, start, carry, meter)
    value, gradient, pulled, verdict = float("nan"), None, Pullback(None), solved.verdict
    if solved.verdict.status.usable:
        meter.counts["outer"] += 1
        outer, by_params, by_hparams = problem.outer_value_and_grads(solved.params, hparams)
        value = float(outer)
        verdict = verdict.worse(finite_loss(value))
    if verdict.status.usable:
        pulled = solved.pullback(by_params)
        verdict = verdict.worse(pulled.verdict)
        if pulled.verdict.status.usable:
            gradient = tree.add(by_hparams, pulled.hparams)
            verdict = verdict.worse(_finite_gradient(gradient))
    if gradient is None:
        gradient = tree.tree_map(lambda leaf: torch.full_like(leaf, float("nan")), hparams)
    cost = meter.read()
    error = ErrorEstimate(None, "none", pulled.error_note or "ask with certify=True")
    if certify and verdict.status.usable:
        error = certify_error(problem, hparams, solved.params, gradient, pulled.adjoint)
    elif pulled.error is not None and verdict.status.ok:
        error = ErrorEstimate(pulled.error, "estimate", pulled.error_note)
    certificate = Certificate(
        inner_residual=solved.residual,
        adjoint_residual=pulled.residual,
        inner_steps=solved.steps,
        adjoint_steps=pulled.steps,
        **error.fields(),
        measured=dict(solved.state.measured),
    )
    following = Carry(solved.state, pulled.adjoint, type(solver).__name__) if verdict.status.usable else carry
    estimate = Estimate(value, gradient, solved.params, certificate, cost, verdict, following)
    report(verdict, on_failure, estimate)
    return estimate


def prepare(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    params: Tree,
    check: bool,
) -> tuple[Tree, Tree]:
    """Return detached hyperparameters and start, after a look at everything that can be known before the work starts.

    Args:
        problem: the problem.
        solver: the inner solver.
        estimator: the estimator.
        hparams: hyperparameters.
        params: where the inner solver starts, or None for the problem's start.
        check: whether to look.

    Returns:
        (hparams, start).

    Raises:
        ValueError: for arguments in the wrong order, or a class in the place of its instance; the problem's and the
            estimator's checks raise their own.
    """
    check_roles(problem, solver, estimator)
    start = problem.start(params)
    if check:
        estimator.check(problem, solver, hparams)
        problem.check(start, hparams, partial(read_by_steps, solver) if estimator.differentiates_steps else None)
    return tree.detach(hparams), start


def _finite_gradient(gradient: Tree) -> Verdict:
    """Report a hypergradient that is not finite."""
    for name, leaf in zip(tree.names(gradient), tree.leaves(gradient), strict=True):
        if not tree.is_finite(leaf):
            return Verdict(Status.NOT_FINITE, f"the hypergradient of `hparams{name}` is not finite")
    return GOOD
