"""`hypergradient`: the call in which problem, inner solver and estimator meet."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import overload

import torch

from bilevel.base import BatchEstimate, Carry, Certificate, Estimate, InnerSolver, InnerState
from bilevel.base.estimate import made_later
from bilevel.certify import ErrorEstimate
from bilevel.core import tree
from bilevel.core.cost import Cost, Meter
from bilevel.core.status import GOOD, OnFailure, Verdict, report
from bilevel.core.tree import Tree
from bilevel.engine.attempt import Attempt, attempt
from bilevel.engine.checks import check_carry, check_roles, read_by_steps
from bilevel.engine.derivatives import looked_through
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.one_by_one import loop_hypergradient, one_by_one
from bilevel.hypergrad.auto import as_estimator
from bilevel.hypergrad.evidence import certificate, confirmed, judged
from bilevel.hypergrad.side_by_side import as_batch, rows_hypergradient
from bilevel.hypergrad.target_error import TargetErrorLoop, check_target
from bilevel.hypergrad.tasks import named, task_runs, tasks_hypergradient
from bilevel.oracles.autograd_errors import DerivativeError, explained
from bilevel.oracles.batching import NotSideBySide, Rows
from bilevel.oracles.exact import Exact
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.purity import confirm


# The signature for each kind of result: type checkers know by `batch` which of the two they get.
@overload
def hypergradient(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator | str,
    hparams: Tree,
    params: Tree = None,
    *,
    batch: None = None,
    rows: Rows = "auto",
    carry: Carry | None = None,
    certify: bool = False,
    target_error: float | None = None,
    check: bool = True,
    on_failure: OnFailure = "raise",
) -> Estimate: ...
@overload
def hypergradient(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator | str,
    hparams: Tree,
    params: Tree = None,
    *,
    batch: int,
    rows: Rows = "auto",
    carry: Carry | None = None,
    certify: bool = False,
    target_error: float | None = None,
    check: bool = True,
    on_failure: OnFailure = "raise",
) -> BatchEstimate: ...
@explained()
def hypergradient(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator | str,
    hparams: Tree,
    params: Tree = None,
    *,
    batch: int | None = None,
    rows: Rows = "auto",
    carry: Carry | None = None,
    certify: bool = False,
    target_error: float | None = None,
    check: bool = True,
    on_failure: OnFailure = "raise",
) -> Estimate | BatchEstimate:
    """Return the gradient of ``F(u) = outer_loss(params*(u), u)`` with its evidence.

        dF/du = d outer/du + (d params*/du)' d outer/d params

    Args:
        problem: the two losses.
        solver: the inner solver.
        estimator: how the solution map is differentiated; "auto" for `Auto()`.
        hparams: where the gradient is taken.
        params: where the inner solver starts; default: the problem's start.
        batch: number of members to run side by side as one problem. Every leaf of `hparams` then has this leading
            dimension; `params` may have it too, and is the same for all members otherwise. A problem that is a batch
            already (`BilevelProblem.batched`, `bilevel.stack`) needs none.
        rows: how the members of a batch run: "auto" side by side, or one after the other, with a note in
            `certificate.measured`, where loss, solver or estimator take one problem at a time; "loop" one after the
            other: each result is that of a single call bit for bit.
        carry: the warm start, from the `carry` of an earlier estimate; it takes the place of `params`.
        certify: bound the distance to the exact hypergradient where a proof exists, and estimate it elsewhere (see
            `bilevel.certify.certify_error`).
        target_error: the largest relative error ``|p - dF/du| / |dF/du|`` that is accepted, in (0, 1), such as 1e-3.
            Tolerances follow from the certificate, which proves or estimates that the target is reached; where it
            cannot, the status is TARGET_NOT_REACHED. A `tol` that was given stays the smallest, `steps` the most.
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
    rule: HypergradEstimator = as_estimator(estimator)
    check_roles(problem, solver, rule)
    if batch is not None or rows != "auto":
        problem = as_batch(problem, batch, rows)
    if problem.batch is not None and not problem.one_by_one:
        alone = rule.one_by_one(solver) if target_error is None else "each has a `target_error` of its own to reach"
        problem = one_by_one(problem, alone) if alone else problem
    if problem.one_by_one:
        options = {"certify": certify, "target_error": target_error, "on_failure": "return"}
        single = partial(hypergradient, solver=solver, estimator=rule, **options)
        return loop_hypergradient(problem, single, solver, hparams, params, carry, check, on_failure)
    if target_error is not None:
        check_target(target_error, problem, solver, rule, certify)
    elif not certify and problem.batch is None and looked_through(problem):
        # What the checks below say of other arguments and results, nobody has to say of these.
        quick = _at_once(rule, problem, solver, hparams, params, carry, check)
        if quick is not None:
            return quick
    used, given, start = prepare(problem, solver, rule, hparams, params, check)
    if check and carry is not None:
        check_carry(carry, solver, start, problem.trainable(start))
    memory = rule.measures_memory or problem.batch is not None
    meter = Meter(tree.leaves(start)[0].device, memory=memory)
    # The caller's tensors are its own: whatever a loss or a solver does, it does to copies.
    warm = Carry() if carry is None else carry.copied()
    run = Run(problem, used, given, start if params is None else tree.copied(start), warm, meter)
    runs = None if certify or target_error is not None else task_runs(rule, run, params is None)
    if runs is not None and (estimate := tasks_hypergradient(runs, solver)) is not None:
        if check:
            confirm(problem)
        return estimate
    run = replace(run, params=tree.copied(start))
    if problem.batch is not None:
        try:
            together = rows_hypergradient(rule, run, certify, on_failure)
        except NotSideBySide as reason:
            looped = one_by_one(problem, str(reason))
            return hypergradient(
                looped, solver, rule, hparams, params, carry=carry, certify=certify, check=False, on_failure=on_failure
            )
        if check:
            confirm(problem)
        return together
    error = None
    if target_error is None:
        result = named(runs, attempt(rule, run))
    else:
        result, error = TargetErrorLoop(rule, run, target_error).run()
    cost = run.meter.read()
    result = confirmed(rule, run, solver, result, asked=certify or target_error is not None)
    if error is None:
        result, error = judged(problem, solver, given, result, certify)
    if check:
        confirm(problem)
    estimate = _estimate(solver, given, result, error, cost, warm)
    report(result.verdict, on_failure, estimate)
    return estimate


def _at_once(
    rule: HypergradEstimator,
    problem: BilevelProblem,
    solver: InnerSolver,
    hparams: Tree,
    params: Tree,
    carry: Carry | None,
    check: bool,
) -> Estimate | None:
    """Return the estimate that arrays on the host give, or None where the usual way has to be taken."""
    name = type(solver).__name__
    if torch.is_inference_mode_enabled() or (carry is not None and carry.solver not in ("", name)):
        return None
    if check:
        rule.check(problem, solver, hparams)
    begun = perf_counter()
    exact = rule.at_once(problem, solver, hparams, params, carry)
    if exact is None:
        return None
    x = exact.params.clone()  # the caller's may change; the warm start does not

    def warm() -> Carry:
        # Binding takes longer than all else here.
        memory = () if solver.dense_newton else solver.cold_state(problem.bind(hparams), x).memory
        return Carry(InnerState(x, memory, exact.steps, cache=exact.cache), exact.adjoint, name)

    verdict = Verdict(detail=exact.detail) if exact.detail else GOOD
    return made_later(
        {"certificate": partial(_certificate, exact), "carry": warm},
        outer_loss=exact.outer_loss,
        hypergradient=exact.hypergradient,
        params=exact.params,
        cost=Cost({**exact.counts, "outer": 1}, perf_counter() - begun),
        verdict=verdict,
    )


def _certificate(exact: Exact) -> Certificate:
    return Certificate(
        exact.residual,
        exact.adjoint_residual,
        exact.steps,
        exact.adjoint_steps,
        value_error=exact.value_error,
        form=exact.form,
    )


def _estimate(
    solver: InnerSolver, hparams: Tree, result: Attempt, error: ErrorEstimate, cost: Cost, carry: Carry
) -> Estimate:
    """Return the estimate of an attempt; `carry` is the warm start that it was given, and leaves where it fails."""
    solved, pulled, gradient = result.solved, result.pulled, result.gradient
    if gradient is None:
        gradient = tree.tree_map(lambda leaf: torch.full_like(leaf, float("nan")), hparams)
    following = result.carry(solver) if result.verdict.status.usable else carry
    x = tree.copied(solved.params)
    return Estimate(result.outer_loss, gradient, x, certificate(solved, pulled, error), cost, result.verdict, following)


def prepare(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    params: Tree,
    check: bool,
) -> tuple[InnerSolver, Tree, Tree]:
    """Return the solver that runs the problem, a copy of hparams, and the start, after a look at both if `check`.

    Raises:
        ValueError: what the checks of the problem and of the estimator raise.
        DerivativeError: a ValueError, for an inner loss without the second derivatives that the estimator takes.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "torch.inference_mode() is on, under which nothing has derivatives: use torch.no_grad() there."
        )
    hparams, start = tree.copied(hparams), problem.start(params)
    if check:
        start = tree.copied(start)
        estimator.check(problem, solver, hparams)
        reads = partial(read_by_steps, solver) if estimator.differentiates_steps else None
        try:
            problem.check(start, hparams, reads)
        except DerivativeError:
            if estimator.second_derivatives:
                raise
    return problem.augmented(solver), hparams, start
