"""The inner loop for rows, and the sweep back: every row stops, converges or fails by itself.

A row that has ended stands still, its state kept by `torch.where`, while others go on; so each ends with the state, the
residual and the verdict that it would have alone. It is not written as one with the loop of a single problem, which
decides by floats at every step: masks of one row would cost it more than the step of a small problem.

Back, each row differentiates its own last steps. Of row i, which took k_i steps, the last n_i are differentiated. To
it, a step of the loop is a step where ``k_i - n_i <= t < k_i``; after its end it stood still, so the step is the
identity, and before its tail the state is a constant. Between two ends of such ranges the rows that are swept do not
change, so the sweep is cut there.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Pullback, Variables
from bilevel.core import rows, tree
from bilevel.core.device import check_interval
from bilevel.core.status import GOOD, Status, StepFailure, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.judge import LOOK, InnerRun, failed_step, judge, not_finite
from bilevel.engine.kinks import FALLEN, STALLED, kinked
from bilevel.engine.tolerance import Floor, Goal, indices_of
from bilevel.oracles.inner_problem import InnerProblem

RowsVisit: TypeAlias = Callable[[InnerState, Tensor | None, int], object]
"""Is shown every state that a step starts from, which rows move (None: all do), and the end of the first run that has
converged, this step if none has."""


def run_rows(
    inner: InnerProblem, solver: InnerSolver, state: InnerState, visit: RowsVisit | None, at_least: int
) -> InnerRun:
    """Return the last states, each with its own residual and verdict; see `run_inner`."""
    return _Loop(inner, solver, state).run(visit, at_least)


def conclude_rows(
    inner: InnerProblem, solver: InnerSolver, first: InnerState, state: InnerState, taken: int
) -> InnerRun:
    """Return, as `run_rows` does, how `taken` steps from `first` to `state` end that it has not run."""
    loop = _Loop(inner, solver, first)
    loop.state, loop.taken = state, taken
    return loop.ended()


class _Loop:
    """The state of the loop: who moves, who has ended how."""

    def __init__(self, inner: InnerProblem, solver: InnerSolver, state: InnerState) -> None:
        (like, *_) = tree.leaves(state.params)
        size = len(like)
        self.inner, self.solver = inner, solver
        self.limit, self.tol = solver.limits(like.dtype)
        self.every = max(solver.traits.check_every, check_interval(like.device))
        self.runner = solver.for_rows(state)
        self.state = self.before = self.checkpoint = state
        self.goal = Goal(inner, solver, state, self.tol)
        self.taken = self.marked = 0
        self.moving = torch.ones(size, dtype=torch.bool, device=like.device)
        self.left, self.first_end = size, self.limit
        self.first, self.start = state, torch.empty(0)
        self.doubling, self.before_doubling = STALLED, torch.full((size,), math.inf, device=like.device)
        self.broken: dict[int, InnerState] = {}
        self.residuals, self.steps, self.verdicts = [math.nan] * size, [0] * size, [GOOD] * size
        self.counts: list[Counter[str]] = [Counter() for _ in range(size)]

    def run(self, visit: RowsVisit | None, at_least: int) -> InnerRun:
        """Take the steps."""
        size = len(self.moving)
        if self.tol is not None:
            self.start = self._residual(self.state)
        while self.taken < self.limit:
            if self.tol is not None and self.taken % self.every == 0:
                self._look(at_least)
            if self.left and self.taken - self.marked >= LOOK:
                self._fail(self.moving & ~torch.isfinite(rows.norms(self.state.params)))
                self.checkpoint, self.marked = self.state, self.taken
            if not self.left:
                break
            still = None if self.left == size else self.moving
            if visit is not None:
                visit(self.state, still, min(self.first_end, self.taken + 1))
            try:
                after = self.runner.step(self.inner, self.state)
            except StepFailure as failure:
                self._stop_all(failure)
                break
            self.before = self.state
            self.state = after if still is None else _kept(still, after, self.state)
            self.taken += 1
        return self.ended()

    def ended(self) -> InnerRun:
        """Judge the rows that used all steps, and return how all have ended."""
        if self.left:
            self._finish()
        for index, state in self.broken.items():
            self.state = replace(self.state, params=rows.with_row(self.state.params, index, state.params))
        run = InnerRun(self.state, self.residuals, self.steps, self.verdicts, self.counts, self.runner)
        return replace(run, warm=self._warm(run.usable))

    def _finish(self) -> None:
        """End the rows that used all steps."""
        residual = self._residual(self.state)
        if self.tol is None:
            self.start = self._residual(self.first)
        self._fail(self.moving & ~torch.isfinite(residual))
        if self.tol is not None:
            self._end(self.moving & self._reached(residual), residual)
        if self.left:
            self._judge(self.moving, residual)

    def _warm(self, usable: Tensor) -> InnerState:
        """Return the state for a warm start: where a row failed, the one that it started from."""
        state = self.state if bool(usable.all()) else _kept(usable, self.state, self.first)
        steps: int | Tensor = self.first.steps + self.taken
        ends = zip(self.steps, self.verdicts, strict=True)
        taken = [count if verdict.status.usable else 0 for count, verdict in ends]
        if isinstance(steps, Tensor) or any(count != self.taken for count in taken):
            steps = self.first.steps + torch.tensor(taken, device=usable.device, dtype=torch.float64)
        return replace(state, steps=steps)

    def _judge(self, mask: Tensor, residual: Tensor, floors: dict[int, Floor] | None = None) -> None:
        """Judge members that end above their tolerance."""
        first, start = self.first, self.start
        larger = (residual > start).cpu()
        start, residual = start.cpu(), residual.cpu()
        tol = self.goal.tol.cpu().tolist() if isinstance(self.goal.tol, Tensor) else self.goal.tol
        for index in indices_of(mask):
            # Only where a residual has grown does the verdict look at the member's curvature.
            inner = self.inner.member(index) if bool(larger[index]) else self.inner
            verdict = judge(
                inner,
                self.solver,
                first.row(index),
                self.state.row(index),
                float(start[index]),
                float(residual[index]),
                self.taken,
                rows.figure(tol, index),
                None if floors is None else floors[index],
            )
            self._record(index, float(residual[index]), self.taken, verdict)
        self._stand(mask)

    def _reached(self, residual: Tensor) -> Tensor:
        return self.goal.reached(residual, self.solver.params(self.state), self.moving)

    def _look(self, at_least: int) -> None:
        """End the members that have reached the tolerance or come to rest, and those whose residual is not finite."""
        residual = self._residual(self.state)
        broken = self.moving & ~torch.isfinite(residual)
        reached = torch.zeros_like(broken)
        if self.taken >= at_least:
            reached = self.moving & self.goal.below(residual, self.solver.params(self.state), self.moving)
        # One look for all: where nothing ends, the host waits no further.
        if bool((reached | broken).any()):
            if self.taken >= at_least:
                reached = self.moving & self._reached(residual)
            self._end(reached, residual)
            self._fail(broken)
        if self.left and self.taken >= at_least:
            floors = self.goal.floors(residual, self.taken, self.before, self.state, self.moving)
            if floors:
                mask = torch.zeros_like(self.moving)
                mask[list(floors)] = True
                self._judge(mask, residual, floors)
        if self.left and self.taken >= max(at_least, self.doubling):
            self._look_for_kinks(residual)

    def _look_for_kinks(self, residual: Tensor) -> None:
        """End the rows whose residual has hardly fallen since the last such look because their steps cross kinks."""
        ended = torch.zeros_like(self.moving)
        for index in indices_of(self.moving & (residual > FALLEN * self.before_doubling)):
            inner, state = self.inner.member(index), self.state.row(index)
            size = float(residual[index])
            kink = kinked(inner.problem, inner.hparams, self.solver, state, size, float(self.before_doubling[index]))
            if not kink.status.ok:
                self._record(index, size, self.taken, kink)
                ended[index] = True
        self._stand(ended)
        self.doubling, self.before_doubling = 2 * self.taken, residual

    def _end(self, mask: Tensor, residual: Tensor) -> None:
        residual = residual.cpu()
        for index in indices_of(mask):
            self.first_end = min(self.first_end, self.taken)
            verdict = GOOD if self.taken else self.goal.row(index).verdict(float(residual[index]), 0)
            self._record(index, float(residual[index]), self.taken, verdict)
        self._stand(mask)

    def _fail(self, mask: Tensor) -> None:
        """Name for each broken member the first step that is not finite, by running it alone from the last look."""
        if not bool(mask.any()):
            return
        for index in indices_of(mask):
            run = self._replayed(index)
            self._record(index, run.residual, run.steps, run.verdict)
            self.broken[index] = run.state
        self._stand(mask)

    def _replayed(self, index: int) -> InnerRun:
        begun = self.checkpoint.row(index)
        try:
            inner = self.inner.member(index)
            # Raises what hinders a member from being measured at all.
            self.solver.init(inner, begun.params)
            return not_finite(inner, self.solver, begun, self.marked, self.taken)
        except (ValueError, RuntimeError) as error:
            return InnerRun(begun, math.nan, self.marked, Verdict(Status.FAILED_STEP, str(error)))

    def _stop_all(self, failure: StepFailure) -> None:
        for index in indices_of(self.moving):
            self._record(index, math.nan, self.taken, failed_step(self.solver, self.taken, failure))
        self._stand(self.moving)

    def _record(self, index: int, residual: float, steps: int, verdict: Verdict) -> None:
        self.residuals[index], self.steps[index], self.verdicts[index] = residual, steps, verdict
        self.counts[index] = Counter(self.inner.counts) + self.inner.alone[index]

    def _stand(self, mask: Tensor) -> None:
        self.moving = self.moving & ~mask
        self.left = int(self.moving.sum())

    def _residual(self, state: InnerState) -> Tensor:
        return rows.norms(self.inner.grad(self.solver.params(state)))


def _kept(moving: Tensor, after: InnerState, before: InnerState) -> InnerState:
    """Return the state `after` in the rows that move, and `before` in the others."""
    return replace(
        after,
        params=rows.where(moving, after.params, before.params),
        memory=rows.where(moving, after.memory, before.memory),
    )


class RowStates:
    """The states of the longest tail that any member may still need; all of them where `tail` is None."""

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


def swept_rows(
    inner: InnerProblem, run: InnerRun, states: RowStates, length: Callable[[int], int]
) -> Callable[[Tree], Pullback]:
    """Return the pullback of the last steps of every row; `length` maps steps taken to steps differentiated."""
    tails = [min(length(count), count) for count in run.steps]
    # A failed row has no result: it is swept along with the others, and what comes of it is not used.
    good = [index for index, verdict in enumerate(run.verdict) if verdict.status.usable]
    ends = {index: (run.steps[index] - tails[index], run.steps[index]) for index in good}

    def pullback(cotangent: Tree) -> Pullback:
        verdict: Verdict = GOOD
        moving: Variables = (cotangent, tree.zeros_like(run.state.memory))
        total = tree.zeros_like(inner.hparams)
        counts: list[Counter[str]] = [Counter() for _ in tails]
        cuts = sorted({t for pair in ends.values() for t in pair})
        assert run.solver is not None
        try:
            for low, high in zip(reversed(cuts[:-1]), reversed(cuts[1:]), strict=True):
                swept = [ends.get(index, (low, high)) for index in range(len(tails))]
                mask = torch.tensor([start <= low and high <= end for start, end in swept], device=run.usable.device)
                before = Counter(inner.counts)
                moving, part = _sweep(inner, run.solver, states.between(low, high), moving, mask)
                total = tree.add(total, part)
                for count, swept_here in zip(counts, mask.cpu(), strict=True):
                    count.update(inner.counts - before if bool(swept_here) else ())
        except StepFailure as failure:
            verdict = failure.verdict
        return Pullback(total, steps=tails, verdict=verdict, counts=counts)

    return pullback


def _sweep(
    inner: InnerProblem, solver: InnerSolver, states: Sequence[InnerState], cotangent: Variables, mask: Tensor
) -> tuple[Variables, Tree]:
    """Sweep the members of the mask back over some steps that are the identity to the others."""
    if bool(mask.all()):
        return solver.sweep_vjp(inner, states, cotangent)
    if not bool(mask.any()):
        return cotangent, tree.zeros_like(inner.hparams)
    before, part = solver.sweep_vjp(inner, states, rows.where(mask, cotangent, 0.0))
    return rows.where(mask, before, cotangent), rows.where(mask, part, 0.0)
