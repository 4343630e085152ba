"""Unrolled differentiation of a batch: every member differentiates its own last steps.

Of member i, which took k_i steps, the last n_i are differentiated. To it, a step of the loop is a step where
``k_i - n_i <= t < k_i``; after its end it stood still, so the step is the identity, and before its tail the state is a
constant. Between two ends of such ranges the members that are swept do not change, so the sweep is cut there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from bilevel.base import BatchPullback, BatchSolution, Carry, InnerSolver, InnerState, Variables
from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.cost import Meter
from bilevel.core.status import GOOD, StepFailure
from bilevel.core.tree import Tree
from bilevel.engine.batch_loop import BatchRun, begin_batch, run_batch
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem

Length = Callable[[int], int]
"""Steps taken -> steps differentiated."""


def reverse(
    problem: BilevelProblem,
    solver: InnerSolver,
    hparams: Tree,
    params: Tree,
    carry: Carry,
    meter: Meter,
    length: Length | None,
    at_least: int,
) -> BatchSolution:
    """Store the states of all members, then sweep back.

    Args:
        problem: the batch.
        solver: the inner solver.
        hparams: hyperparameters.
        params: where a cold start begins.
        carry: the warm start.
        meter: counts the work.
        length: says how many of some steps are differentiated; None: all.
        at_least: steps to take in any case.

    Returns:
        The solutions; the states are kept for their pullback.
    """
    inner = problem.bind(hparams, meter.counts)
    state = begin_batch(inner, solver, params, carry)
    kept = _Kept(None if length is None else length(solver.limits(tree.leaves(state.params)[0].dtype)[0]))
    run = run_batch(inner, solver, state, kept.visit, at_least=at_least)
    meter.sample()
    tails = [count if length is None else min(length(count), count) for count in run.steps]
    # A failed member has no result: it is swept along with the others, and its row is not used.
    good = [index for index, verdict in enumerate(run.verdicts) if verdict.status.usable]
    ends = {index: (run.steps[index] - tails[index], run.steps[index]) for index in good}

    def pullback(cotangent: Tree) -> BatchPullback:
        verdicts = [GOOD] * len(tails)
        moving: Variables = (cotangent, tree.zeros_like(run.state.memory))
        total = tree.zeros_like(hparams)
        counts: list[Counter[str]] = [Counter() for _ in tails]
        cuts = sorted({t for pair in ends.values() for t in pair})
        try:
            for low, high in zip(reversed(cuts[:-1]), reversed(cuts[1:]), strict=True):
                swept = [ends.get(index, (low, high)) for index in range(len(tails))]
                mask = torch.tensor([start <= low and high <= end for start, end in swept], device=run.usable.device)
                before = Counter(inner.counts)
                moving, part = _sweep(inner, run.solver, kept.between(low, high), moving, mask)
                total = tree.add(total, part)
                for count, swept_here in zip(counts, mask.cpu(), strict=True):
                    count.update(inner.counts - before if bool(swept_here) else ())
        except StepFailure as failure:
            verdicts = [failure.verdict] * len(tails)
        return BatchPullback(total, tails, counts, verdicts)

    return batch_solution(solver, run, pullback)


def _sweep(
    inner: InnerProblem, solver: InnerSolver, states: Sequence[InnerState], cotangent: Variables, mask: Tensor
) -> tuple[Variables, Tree]:
    """Sweep the members of the mask back over some steps that are the identity to the others."""
    if bool(mask.all()):
        return solver.sweep_vjp(inner, states, cotangent)
    if not bool(mask.any()):
        return cotangent, tree.zeros_like(inner.hparams)
    before, part = solver.sweep_vjp(inner, states, members.where(mask, cotangent, 0.0))
    return members.where(mask, before, cotangent), members.where(mask, part, 0.0)


class _Kept:
    """The states of the longest tail that any member may still need.

    Args:
        tail: the longest tail, or None for all states.
    """

    def __init__(self, tail: int | None) -> None:
        self._tail = tail
        self._states: deque[InnerState] = deque()
        self._dropped = 0

    def visit(self, state: InnerState, moving: Tensor | None, end: int) -> None:
        """Keep a state, and drop those that come before every member's tail, the earliest of which ends at `end`."""
        self._states.append(state)
        while self._tail is not None and self._dropped < end - self._tail:
            self._states.popleft()
            self._dropped += 1

    def between(self, low: int, high: int) -> list[InnerState]:
        """Return the states that the steps low, ..., high - 1 start from."""
        return list(islice(self._states, low - self._dropped, high - self._dropped))


def forward(
    problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry, meter: Meter
) -> BatchSolution:
    """Carry one tangent for each scalar hyperparameter of a member along, the same one for all members."""
    inner = problem.bind(hparams, meter.counts)
    state = begin_batch(inner, solver, params, carry)
    runner = solver.for_members(state)
    raveler = members.Raveler(hparams)
    directions = raveler.units()
    zero: Variables = (tree.zeros_like(state.params), tree.zeros_like(state.memory))
    tangents: list[Variables] = [zero] * len(directions)

    def push(before: InnerState, moving: Tensor | None, end: int) -> None:
        after = runner.step_jvp(inner, before, tangents, directions)
        if moving is not None:
            after = [members.where(moving, new, old) for new, old in zip(after, tangents, strict=True)]
        tangents[:] = after

    run = run_batch(inner, solver, state, push, at_least=1)
    meter.sample()

    def pullback(cotangent: Tree) -> BatchPullback:
        flat = members.Raveler(cotangent).ravel(cotangent)
        products = [torch.linalg.vecdot(members.Raveler(x).ravel(x), flat) for x, _ in tangents]
        blank: list[Counter[str]] = [Counter() for _ in run.steps]
        return BatchPullback(raveler.unravel(torch.stack(products, dim=1)), run.steps, blank, [GOOD] * len(blank))

    return batch_solution(solver, run, pullback)


def batch_solution(solver: InnerSolver, run: BatchRun, pullback: Callable[[Tree], BatchPullback]) -> BatchSolution:
    """Return what an estimator hands back for a batch."""
    state = run.carry_state()
    return BatchSolution(
        solver.params(run.state),
        state,
        pullback,
        run.residuals,
        run.steps,
        run.counts,
        run.verdicts,
    )
