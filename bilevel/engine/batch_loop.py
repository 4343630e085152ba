"""The inner loop for a batch: every member stops, converges or fails by itself.

A member that has ended stands still, its state kept by `torch.where`, while others go on; so each ends with the state,
the residual and the verdict that it would have alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bilevel.base import Carry, InnerSolver, InnerState
from bilevel.core import device as look
from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.status import GOOD, Status, StepFailure, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.batch_tolerance import BatchGoal
from bilevel.engine.expansion import watched
from bilevel.engine.loop import LOOK, InnerRun, judge, not_finite
from bilevel.engine.tolerance import Floor
from bilevel.oracles.inner_problem import InnerProblem


@dataclass
class BatchRun:
    """How the inner solves of a batch ended, an entry for each member.

    Attributes:
        solver: the solver that took the steps.
        first: the state before the first step.
        state: the last states.
        taken: steps of the loop: those of the member that moved longest.
        residuals: norms of the inner gradient at the last iterates.
        steps: steps taken.
        counts: oracle calls that the member took part in.
        verdicts: statuses.
    """

    solver: InnerSolver
    first: InnerState
    state: InnerState
    taken: int = 0
    residuals: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    counts: list[Counter[str]] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def usable(self) -> Tensor:
        """Which members have a result, of shape (members,)."""
        device = tree.leaves(self.state.params)[0].device
        return torch.tensor([verdict.status.usable for verdict in self.verdicts], device=device)

    def carry_state(self) -> InnerState:
        """Return the state for a warm start: where a member failed, the one that it started from."""
        usable = self.usable
        params, memory = self.state.variables
        if not bool(usable.all()):
            params = members.where(usable, params, self.first.params)
            memory = members.where(usable, memory, self.first.memory)
        steps: int | Tensor = self.first.steps + self.taken
        taken = [
            count if verdict.status.usable else 0 for count, verdict in zip(self.steps, self.verdicts, strict=True)
        ]
        if isinstance(steps, Tensor) or any(count != self.taken for count in taken):
            steps = self.first.steps + torch.tensor(taken, device=usable.device, dtype=torch.float64)
        return replace(self.state, params=params, memory=memory, steps=steps)


def begin_batch(inner: InnerProblem, solver: InnerSolver, params: Tree, carry: Carry) -> InnerState:
    """Return the first state of all members: warm where the carry holds one, else cold at `params`.

    Raises:
        ValueError: for a solver whose step would mix members.
    """
    if not solver.traits.rowwise:
        raise ValueError(
            f"{type(solver).__name__} does not run batches: use GradientDescent or another linear multistep method, or "
            "SGD, Adam, AdamW or RMSprop (a solver of your own says `traits = Traits(rowwise=True)` where its step "
            "mixes no rows), or take rows='loop'."
        )
    if carry.state is None:
        return solver.init(inner, params)
    state = solver.warm_start(inner, carry.state)
    return replace(state, earlier=carry.state.index - state.steps)


Visit = Callable[[InnerState, Tensor | None, int], object]
"""Is shown every state that a step starts from, which members move (None: all do), and the end of the first run that
has converged, this step if none has."""


def run_batch(
    inner: InnerProblem, solver: InnerSolver, state: InnerState, visit: Visit | None = None, *, at_least: int = 0
) -> BatchRun:
    """Run the solver until every member has reached the tolerance or the number of steps.

    Args:
        inner: the bound batch.
        solver: the inner solver.
        state: the first state, from `begin_batch`.
        visit: see `Visit`.
        at_least: steps to take even where a tolerance is reached before.

    Returns:
        The last states, each with its own residual and verdict.
    """
    loop = _Loop(inner, solver, state)
    with torch.no_grad():
        loop.run(visit, at_least)
        loop.judge()
    return loop.result


class _Loop:
    """The state of the loop: who moves, who has ended how."""

    def __init__(self, inner: InnerProblem, solver: InnerSolver, state: InnerState) -> None:
        (like, *_) = tree.leaves(state.params)
        size = len(like)
        self.inner, self.solver = inner, solver
        self.limit, self.tol = solver.limits(like.dtype)
        self.every = max(solver.traits.check_every, look.steps_between(like.device))
        self.runner = solver.for_members(state)
        self.state = self.before = self.checkpoint = state
        self.goal = BatchGoal(inner, solver, state, self.tol)
        self.taken = self.marked = 0
        self.moving = torch.ones(size, dtype=torch.bool, device=like.device)
        self.left, self.first_end = size, self.limit
        self.start = torch.empty(0)
        self.broken: dict[int, InnerState] = {}
        blank: list[Counter[str]] = [Counter() for _ in range(size)]
        self.result = BatchRun(self.runner, state, state, 0, [float("nan")] * size, [0] * size, blank, [GOOD] * size)

    def run(self, visit: Visit | None, at_least: int) -> None:
        """Take the steps."""
        size = len(self.moving)
        if self.tol is not None:
            self.start = self._residual(self.state)
        while self.taken < self.limit:
            if self.tol is not None and self.taken % self.every == 0:
                self._look(at_least)
            if self.left and self.taken - self.marked >= LOOK:
                broken = self.moving & ~torch.isfinite(members.norms(self.state.params))
                if bool(broken.any()):
                    self._fail(broken)
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
        self.result.taken = self.taken

    def judge(self) -> None:
        """Look at the residuals of the members that used all steps, and judge them."""
        if self.left:
            residual = self._residual(self.state)
            if self.tol is None:
                self.start = self._residual(self.result.first)
            broken = self.moving & ~torch.isfinite(residual)
            if bool(broken.any()):
                self._fail(broken)
            if self.tol is not None:
                self._end(self.moving & self._reached(residual), residual)
        if self.left:
            self._judge(self.moving, residual)
        for index, state in self.broken.items():
            params = members.with_row(self.state.params, index, state.params)
            self.state = replace(self.state, params=params)
        self.result.state = self.state

    def _judge(self, mask: Tensor, residual: Tensor, floors: dict[int, Floor] | None = None) -> None:
        """Judge members that end above their tolerance."""
        first, start = self.result.first, self.start
        larger = (residual > start).cpu()
        start, residual = start.cpu(), residual.cpu()
        tol = None if self.goal.tol is None else self.goal.tol.cpu()
        for index in self._indices(mask):
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
                None if tol is None else float(tol[index]),
                None if floors is None else floors[index],
            )
            if bool(larger[index]):
                ends = float(start[index]), float(residual[index])
                verdict = watched(verdict, inner, self.solver, self.state.row(index), ends, self.taken)
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

    def _end(self, mask: Tensor, residual: Tensor) -> None:
        residual = residual.cpu()
        for index in self._indices(mask):
            self.first_end = min(self.first_end, self.taken)
            verdict = GOOD if self.taken else self.goal.verdict(index, float(residual[index]), 0)
            self._record(index, float(residual[index]), self.taken, verdict)
        self._stand(mask)

    def _fail(self, mask: Tensor) -> None:
        """Name for each broken member the first step that is not finite, by running it alone from the last look."""
        for index in self._indices(mask):
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
            return InnerRun(begun, float("nan"), self.marked, Verdict(Status.FAILED_STEP, str(error)))

    def _stop_all(self, failure: StepFailure) -> None:
        detail = f"{type(self.solver).__name__} at step {self.taken + 1}: {failure.verdict.detail}"
        for index in self._indices(self.moving):
            self._record(index, float("nan"), self.taken, Verdict(failure.verdict.status, detail))
        self._stand(self.moving)

    def _record(self, index: int, residual: float, steps: int, verdict: Verdict) -> None:
        result = self.result
        result.residuals[index], result.steps[index], result.verdicts[index] = residual, steps, verdict
        result.counts[index] = Counter(self.inner.counts) + self.inner.alone[index]

    def _stand(self, mask: Tensor) -> None:
        self.moving = self.moving & ~mask
        self.left = int(self.moving.sum())

    def _residual(self, state: InnerState) -> Tensor:
        return members.norms(self.inner.grad(self.solver.params(state)))

    @staticmethod
    def _indices(mask: Tensor) -> list[int]:
        return [int(index) for index in torch.nonzero(mask.cpu())[:, 0]]


def _kept(moving: Tensor, after: InnerState, before: InnerState) -> InnerState:
    """Return the state after a step in which some members stand still."""
    return replace(
        after,
        params=members.where(moving, after.params, before.params),
        memory=members.where(moving, after.memory, before.memory),
    )
