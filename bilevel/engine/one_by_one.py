"""`hypergradient` for members that run one after the other: each result is that of a single call, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bilevel.base import BatchEstimate, Carry, Estimate, InnerSolver, InnerState
from bilevel.core import rows, tree
from bilevel.core.cost import Cost
from bilevel.core.status import OnFailure, report
from bilevel.core.tree import Tree
from bilevel.engine.checks import check_carry
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.stacking import RowsProblem


def one_by_one(problem: BilevelProblem, why: str = "") -> RowsProblem:
    """Return a batch whose members run one after the other, and why they do not run side by side."""
    assert problem.batch is not None
    rows = RowsProblem([problem.member(index) for index in range(problem.batch)], why)
    rows.params = problem.params
    return rows


def loop_hypergradient(
    problem: BilevelProblem,
    single: Callable[..., Estimate],
    solver: InnerSolver,
    hparams: Tree,
    params: Tree,
    carry: Carry | None,
    check: bool,
    on_failure: OnFailure,
) -> BatchEstimate:
    """Return the hypergradients of all members, of which hparams, params and carry are stacked.

    ``single(problem, hparams=, params=, carry=, check=)`` is the `Estimate` of one, whose failure is returned, and
    reported when all are done. With `check`, inputs are looked at until a member is found that can be solved.

    Raises:
        ValueError: for shapes that do not fit; if no member can be solved, what the first one's check says.
    """
    assert problem.batch is not None
    start = problem.start(params)
    rows.check_rows("hparams", hparams, problem.batch)
    rows.check_rows("params", start, problem.batch)
    if check and carry is not None:
        check_carry(carry, solver, start, problem.trainable(start))

    def member(index: int, check: bool) -> Estimate:
        return single(
            problem.member(index),
            hparams=rows.row(hparams, index),
            params=rows.row(start, index),
            carry=None if carry is None else carry.row(index),
            check=check,
        )

    result: dict[int, Estimate] = {}
    errors: list[ValueError] = []
    for index in range(problem.batch):
        try:
            result[index] = member(index, check and not result)
        except ValueError as error:
            # A mistake in the call breaks every member; what breaks one of them alone becomes its verdict.
            if not check or result:
                raise
            errors.append(error)
    if not result:
        raise errors[0]
    estimates = [result[i] if i in result else member(i, False) for i in range(problem.batch)]
    estimate = _assembled(problem, solver, hparams, start, estimates)
    report(estimate.verdict, on_failure, estimate)
    return estimate


def _assembled(
    problem: BilevelProblem, solver: InnerSolver, hparams: Tree, start: Tree, estimates: Sequence[Estimate]
) -> BatchEstimate:
    """Return estimates of the members as that of a batch."""
    (like, *_) = tree.leaves(start)
    certificates = [each.certificate for each in estimates]
    if problem.why:
        note = {"rows": f"one after the other, as {problem.why}"}
        certificates = [replace(each, measured=dict(each.measured) | note) for each in certificates]
    costs = [each.cost for each in estimates]
    told = [(cost.peak_memory, cost.memory_kind) for cost in costs if cost.peak_memory is not None]
    peak, kind = max(told, default=(None, "none"))
    counts = sum((Counter(cost.counts) for cost in costs), start=Counter())
    cost = Cost(dict(counts), sum(each.seconds for each in costs), peak, kind)
    return BatchEstimate(
        torch.tensor([each.outer_loss for each in estimates], dtype=like.dtype, device=like.device),
        rows.stack([each.hypergradient for each in estimates]),
        rows.stack([each.params for each in estimates]),
        certificates,
        costs,
        cost,
        [each.verdict for each in estimates],
        joined(problem, solver, hparams, start, [each.carry for each in estimates]),
    )


def joined(problem: BilevelProblem, solver: InnerSolver, hparams: Tree, start: Tree, carries: Sequence[Carry]) -> Carry:
    """Return the warm starts of the members as one; a member without a state is at its start."""
    if all(carry.state is None for carry in carries):
        return Carry(solver=type(solver).__name__)

    def begun(index: int, params: Tree) -> InnerState:
        return solver.init(problem.member(index).bind(rows.row(hparams, index)), params)

    states = [each.state or begun(index, rows.row(start, index)) for index, each in enumerate(carries)]
    try:
        state = InnerState.stack(states)
    except (RuntimeError, TypeError, ValueError, KeyError):
        # Memory of other shapes in each member, such as the pairs of quasi-Newton steps: the iterates go on alone.
        state = InnerState.stack([begun(index, each.params) for index, each in enumerate(states)])
    known = [carry.adjoint for carry in carries if carry.adjoint is not None]
    adjoints = [tree.zeros_like(known[0]) if each.adjoint is None else each.adjoint for each in carries if known]
    return Carry(state, rows.stack(adjoints) if known else None, type(solver).__name__)
