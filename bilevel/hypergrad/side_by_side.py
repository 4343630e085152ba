"""`hypergradient` for a batch: all members in one run, each with its own evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bilevel.base import BatchEstimate, Carry, Pullback, Solution, verdict_of
from bilevel.certify import ErrorEstimate
from bilevel.core import rows, tree
from bilevel.core.cost import Cost, Meter
from bilevel.core.status import OnFailure, Status, Verdict, report
from bilevel.core.tree import Tree
from bilevel.engine.attempt import Attempt, value_verdict
from bilevel.engine.derivatives import check_members
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.kinks import members_at_kinks
from bilevel.engine.not_finite import finite_loss
from bilevel.engine.one_by_one import one_by_one
from bilevel.hypergrad.evidence import certificate, judged
from bilevel.oracles import batching as batches
from bilevel.oracles.batching import Rows
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.stacking import RowsProblem


def as_batch(problem: BilevelProblem, batch: int | None, rows: Rows = "auto") -> BilevelProblem:
    """Return the problem, or a batch already, as a batch of the size that was asked for.

    Raises:
        ValueError: for a size that is no positive int, or another than the problem's own; for what is no problem.
    """
    batches.check_rows_option(rows)
    if not isinstance(problem, BilevelProblem):
        raise ValueError(f"a batch needs a BilevelProblem in the first place, got {type(problem).__name__}.")
    if batch is not None:
        batches.check_size(batch)
    if problem.batch is not None and batch not in (None, problem.batch):
        raise ValueError(f"`batch` is {batch}, but the problem holds {problem.batch} members.")
    if rows == "loop" and not problem.one_by_one:
        if problem.batch is not None:
            return one_by_one(problem)
        if batch is None:
            raise ValueError("rows='loop' is for a batch: give `batch=`, the number of members, too.")
        return RowsProblem([problem] * batch)
    return problem if batch is None or problem.batch is not None else problem.batched(batch)


def rows_hypergradient(estimator: HypergradEstimator, run: Run, certify: bool, on_failure: OnFailure) -> BatchEstimate:
    """Return the hypergradients of all members, whose failures are reported when all are done: see `hypergradient`."""
    problem, solver, hparams, start, meter = run.problem, run.solver, run.hparams, run.params, run.meter
    solved = estimator.solve(run)
    value, by_params, by_hparams = problem.outer_value_and_grads(solved.params, hparams)
    meter.counts["outer"] += 1
    losses = value.cpu()
    verdicts = [
        verdict.worse(finite_loss(float(loss))) if verdict.status.usable else verdict
        for verdict, loss in zip(solved.verdict, losses, strict=True)
    ]
    reached = [verdict.status.usable for verdict in verdicts]
    pulled = solved.pullback(by_params)
    gradient = tree.add(by_hparams, pulled.hparams)
    verdicts = _with_gradient(verdicts, pulled, gradient)
    if estimator.second_derivatives:
        good = [verdict.status.usable for verdict in verdicts]
        # Members share their losses, and so a mistake in them.
        wrong = check_members(problem, hparams, solved.params, good, certify)
        verdicts = [verdict.worse(wrong) for verdict in verdicts]
        verdicts = members_at_kinks(problem, hparams, solver, solved, verdicts, start)
    verdicts, pulled = _far_from_solution(verdicts, value, solved.params, by_params, pulled)
    usable = torch.tensor([verdict.status.usable for verdict in verdicts], device=value.device)
    gradient = rows.where(usable, gradient, float("nan"))
    costs, cost = _costs(solved, pulled, reached, meter)
    value = torch.where(
        torch.tensor([v.status.usable for v in solved.verdict], device=value.device), value, float("nan")
    )
    certificates = []
    for index, verdict in enumerate(verdicts):
        error, at = ErrorEstimate(None, "none", pulled.error_note or "ask with certify=True"), pulled
        if certify and verdict.status.usable:
            u, p = (rows.row(each, index) for each in (hparams, gradient))
            attempt = Attempt(solved.row(index), pulled.row(index), float(losses[index]), p, verdict)
            attempt, error = judged(problem.member(index), solver, u, attempt, certify)
            verdicts[index] = attempt.verdict
        if not solved.verdict[index].status.usable:
            at = Pullback(None)
        certificates.append(certificate(solved, at, error, index))
    following = _following(solved, pulled, usable, run.carry, type(solver).__name__)
    estimate = BatchEstimate(
        value, gradient, tree.copied(solved.params), certificates, costs, cost, verdicts, following
    )
    report(verdict_of(verdicts), on_failure, estimate)
    return estimate


def _with_gradient(verdicts: Sequence[Verdict], pulled: Pullback, gradient: Tree) -> list[Verdict]:
    """Return the verdicts after the pullback."""
    result = []
    leaves = [torch.isfinite(leaf).reshape(len(leaf), -1).all(dim=1).cpu() for leaf in tree.leaves(gradient)]
    for index, verdict in enumerate(verdicts):
        if verdict.status.usable:
            verdict = verdict.worse(rows.figure(pulled.verdict, index))
        if verdict.status.usable:
            for name, finite in zip(tree.names(gradient), leaves, strict=True):
                if not bool(finite[index]):
                    detail = f"the hypergradient of `hparams{name}` is not finite"
                    verdict = verdict.worse(Verdict(Status.NOT_FINITE, detail))
        result.append(verdict)
    return result


def _far_from_solution(
    verdicts: Sequence[Verdict], losses: Tensor, params: Tree, by_params: Tree, pulled: Pullback
) -> tuple[list[Verdict], Pullback]:
    """Return the verdicts with a doubt where a member's outer loss is far from that at its inner solution.

    The pullback comes back with these errors as numbers.
    """
    if pulled.value_error is None:
        return list(verdicts), pulled
    changes = rows.dots(tree.tree_map(torch.abs, params), tree.tree_map(torch.abs, by_params))
    stacked = torch.stack([losses, pulled.value_error, changes], dim=1).cpu()
    figures = [(float(loss), float(error), float(change)) for loss, error, change in stacked]
    judged = [
        verdict.worse(value_verdict(loss, abs(error), change)) if verdict.status.ok else verdict
        for verdict, (loss, error, change) in zip(verdicts, figures, strict=True)
    ]
    return judged, replace(pulled, value_error=[error for _, error, _ in figures])


def _costs(solved: Solution, pulled: Pullback, reached: Sequence[bool], meter: Meter) -> tuple[list[Cost], Cost]:
    """Return the cost of each member, and of all; `reached` says which have come to the pullback."""
    read, size = meter.read(), len(solved.counts)
    counts = []
    for index, forward in enumerate(solved.counts):
        outer = Counter(outer=1) if solved.verdict[index].status.usable else Counter()
        counts.append(forward + outer + (pulled.counts[index] if reached[index] and pulled.counts else Counter()))
    costs = [Cost(dict(each), read.seconds / size, None, "shared by a batch") for each in counts]
    return costs, replace(read, counts=dict(sum(counts, start=Counter())))


def _following(solved: Solution, pulled: Pullback, usable: Tensor, carry: Carry, solver: str) -> Carry:
    """Return the warm start for the next call: of a member whose pullback failed, the adjoint that it had."""
    adjoint = pulled.adjoint
    if adjoint is not None and not bool(usable.all()):
        before = tree.zeros_like(adjoint) if carry.adjoint is None else carry.adjoint
        adjoint = rows.where(usable, adjoint, before)
    return Carry(solved.state, adjoint, solver)
