"""`Goal` for the members of a batch: every member ends as it would alone."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState
from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.options import Relative
from bilevel.core.status import Verdict
from bilevel.core.tree import Tree
from bilevel.engine.tolerance import AWAY, WINDOW, Floor, Goal, start_of, ways
from bilevel.oracles.inner_problem import InnerProblem


class BatchGoal:
    """The tolerances of the members of one run.

    Args:
        inner: the bound batch.
        solver: the inner solver.
        first: the first state.
        tol: a norm of the inner gradient; a `Relative` one is a share of the size of its parts; None for no end.
    """

    def __init__(self, inner: InnerProblem, solver: InnerSolver, first: InnerState, tol: float | None) -> None:
        self.inner, self.solver, self.first, self.given = inner, solver, first, tol
        (like, *_) = tree.leaves(first.params)
        self.share = float(tol) if isinstance(tol, Relative) else None
        self.tol = None if tol is None or self.share is not None else like.new_full((len(like),), tol)
        self.cold = torch.as_tensor(first.index == 0, device=like.device).expand(len(like))
        self.begun = solver.params(first)
        self.start = None if tol is None else start_of(inner, self.begun)
        self.best = like.new_full((len(like),), torch.inf)
        self.best_at = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        self.at, self.length = self.begun, self.best

    def below(self, residual: Tensor, params: Tree, moving: Tensor) -> Tensor:
        """Return which members may have a residual that is small enough: `reached` has to be asked about these alone.

        Args:
            residual: norms of the inner gradients at params.
            params: the iterates.
            moving: the members that have not ended.

        Returns:
            A mask, of which the host need not know to go on.
        """
        if self.given is None:
            return torch.zeros_like(moving)
        if self.tol is None:
            self._begin(residual, params, moving)
        assert self.tol is not None
        return residual <= self.tol

    def reached(self, residual: Tensor, params: Tree, moving: Tensor) -> Tensor:
        """Return which members have a residual that is small enough, of shape (members,).

        Args:
            residual: norms of the inner gradients at params.
            params: the iterates.
            moving: the members that have not ended.

        Returns:
            A mask.
        """
        reached = self.below(residual, params, moving)
        if self.share is None or self.tol is None:
            return reached
        away = members.norms(tree.add(params, self.at, -1.0)) > AWAY * self.length
        again = moving & reached & (residual > 0) & away
        if bool(again.any()):
            at, length = self.at, self.length
            parts = self._parts(params, again)
            self.at, self.length = members.where(again, params, at), torch.where(again, self.length, length)
            self.tol = torch.where(again, self.share * torch.where(parts > 0, parts, residual), self.tol)
            reached = residual <= self.tol
        return reached

    def _begin(self, residual: Tensor, params: Tree, moving: Tensor) -> None:
        """Set the tolerances of a share at the first iterates."""
        assert self.share is not None
        parts = self._parts(params, moving)
        known = self.cold & (parts == 0) & self.inner.problem.structure.quadratic
        self.length = torch.where(known, torch.inf, self.length)
        own = torch.where(self.cold | (parts == 0), residual, 0.0)
        self.tol = self.share * torch.maximum(parts, own)

    def _parts(self, params: Tree, asked: Tensor) -> Tensor:
        """Measure ``|H v|`` of the members that are asked for, to whom it is counted; 0 where there is none."""
        first, *others = ways(self.start, self.begun, params)
        way, length = first, members.norms(first)
        for other in others:
            size = members.norms(other)
            way, length = members.where(size > length, other, way), torch.maximum(size, length)
        self.at, self.length = params, length
        indices = _indices(asked & (length > 0))
        if not indices:
            return torch.zeros_like(length)
        before = self.inner.counts["hvp"]
        try:
            size = members.norms(self.inner.hvp_at(params, way))
        except (ValueError, RuntimeError):
            return torch.zeros_like(length)
        finally:
            self.inner.counts["hvp"] = before
        for index in indices:
            self.inner.alone[index]["hvp"] += 1
        return torch.where(torch.isfinite(size) & (length > 0), size, 0.0)

    def floors(
        self, residual: Tensor, taken: int, before: InnerState, state: InnerState, moving: Tensor
    ) -> dict[int, Floor]:
        """Return why members have come to rest, by their index."""
        better = residual < self.best
        self.best, self.best_at = torch.minimum(self.best, residual), torch.where(better, taken, self.best_at)
        if taken % WINDOW:
            return {}
        waited = taken - self.best_at
        found = {}
        for index in _indices(moving & (waited >= max(WINDOW, taken // 2))):
            old, new = (self.solver.params(each.row(index)) for each in (before, state))
            floor = self._alone(index).rest(float(residual[index]), int(waited[index]), old, new)
            if floor is not None:
                found[index] = floor
        return found

    def verdict(self, index: int, residual: float, taken: int) -> Verdict:
        """Return the verdict of a member that has reached its tolerance."""
        return self._alone(index).verdict(residual, taken)

    def _alone(self, index: int) -> Goal:
        goal = Goal(self.inner.member(index), self.solver, self.first.row(index), self.given)
        if goal.tol is None and self.tol is not None:
            goal.tol = float(self.tol[index])
        return goal


def _indices(mask: Tensor) -> list[int]:
    return [int(index) for index in torch.nonzero(mask.cpu())[:, 0]]
