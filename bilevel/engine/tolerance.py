"""When a run of inner steps ends: at its tolerance, or where rounding leaves nothing to gain. Neither has a unit.

A default tolerance is a share of the size of the parts that cancel in the gradient at a solution, ``|H v|``: v is the
iterate, or its way from the start where that is longer. For a quadratic loss that starts at zero it is the gradient
norm of the start, which is then taken; where a loss saturates, ``|H v|`` falls with the parts and the start's does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState
from bilevel.core import rows, tree
from bilevel.core.device import to_floats
from bilevel.core.options import Relative, default_tolerance
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem

AWAY = 0.1
"""Share of v by which params may move before ``|H v|`` is measured anew."""
WINDOW, LONG_WINDOW = 64, 1_024
"""Steps without a smaller residual: where steps are rounding of params; where only the loss cannot tell them apart."""
ROUNDING = 16.0
"""Rounding units of params below which a step is rounding."""


def ways(problem_start: Tree, first: Tree, params: Tree) -> list[Tree]:
    """Return the candidates for v: params, and the ways to them from both starts."""
    return [params, *[tree.add(params, start, -1.0) for start in (first, problem_start) if start is not None]]


def start_of(inner: InnerProblem, like: Tree) -> Tree:
    """Return the trainable part of the problem's own start, or None where it has none that fits."""
    if inner.problem.params is None:
        return None
    start = inner.trainable(inner.problem.start())
    shapes = [[leaf.shape for leaf in tree.leaves(each)] for each in (start, like)]
    return start if shapes[0] == shapes[1] else None


@dataclass
class Floor:
    """A run that has come to rest above its tolerance: what stands still, and whether no residual can be smaller."""

    detail: str
    attained: bool


class Goal:
    """The tolerance of one run, or of each row of a batch, and what it has to know to judge it.

    Figures (residuals, lengths, what is reached) are a number each; of rows, a tensor of shape (rows,).

    Args:
        inner: the bound problem.
        solver: the inner solver.
        first: the first state.
        tol: a norm of the inner gradient; a `Relative` one is a share of the size of its parts; None for no end.
    """

    def __init__(self, inner: InnerProblem, solver: InnerSolver, first: InnerState, tol: float | None) -> None:
        self.inner, self.solver, self.begun, self.given = inner, solver, first, tol
        self.share = float(tol) if isinstance(tol, Relative) else None
        self.tol: Any = None
        self._set(None if isinstance(tol, Relative) else tol)
        self.first = inner.trainable(solver.params(first))
        self.cold = first.index == 0
        (like, *_) = tree.leaves(self.first)
        self.eps = torch.finfo(like.dtype).eps
        rows = inner.problem.batch is not None
        self.best: Any = like.new_full((len(like),), math.inf) if rows else math.inf
        self.best_at: Any = torch.zeros(len(like), dtype=torch.int64, device=like.device) if rows else 0
        self.start: Tree = None if tol is None else start_of(inner, self.first)
        self.at, self.length = self.first, self.best
        """Where ``|H v|`` was measured, and the length of v; infinite where it needs no further look."""

    def below(self, residual: Any, params: Tree, moving: Any = True) -> Any:
        """Return whether the residual at params may be small enough: `reached` has to be asked where it may.

        It is a bool; of rows, of which `moving` have not ended, a mask, of which the host need not know to go on.
        """
        if self.given is None:
            return moving & False
        if self.tol is None:
            self._begin(residual, self.inner.trainable(params), moving)
        return residual <= self.tol

    def reached(self, residual: Any, params: Tree, moving: Any = True) -> Any:
        """Return whether the residual at params is small enough to end the run; the arguments are those of `below`."""
        reached = self.below(residual, params, moving) if self.tol is None else residual <= self.tol
        if reached is False or self.share is None:
            return reached
        x = self.inner.trainable(params)
        again = moving & reached & (residual > 0) & (self._norm(tree.add(x, self.at, -1.0)) > AWAY * self.length)
        if _any(again):
            at, length, parts = self.at, self.length, self.parts(x, again)
            self.at, self.length = _pick(again, x, at), _pick(again, self.length, length)
            self._set(_pick(again, self.share * _pick(parts > 0, parts, residual), self.tol))
            reached = residual <= self.tol
        return reached

    def _begin(self, residual: Any, x: Tree, moving: Any) -> None:
        """Set the tolerance of a share at the first iterate."""
        assert self.share is not None
        # A budget, which alone gives both, has no room for products: the start's gradient has to do.
        parts = self.parts(x, moving) if self.solver.steps is None else 0.0
        # A quadratic loss that starts where its v is zero: the gradient there is ``-H v`` at the solution.
        known = self.cold & (parts == 0) & self.inner.problem.structure.quadratic
        self.length = _pick(known, math.inf, self.length)
        own = _pick(self.cold | (parts == 0), residual, 0.0)
        self._set(self.share * _pick(own > parts, own, parts))

    def _set(self, tol: Any) -> None:
        self.tol = self.inner.tolerance = tol

    def _norm(self, x: Tree) -> Any:
        return float(tree.norm(x)) if self.inner.problem.batch is None else rows.norms(x)

    def parts(self, x: Tree, asked: Any = True) -> Any:
        """Return ``|H v|`` at the trainable params x; 0 where v is zero, or the loss has no such product.

        Of rows, those count whose figure is `asked` for, and to them the product is counted.
        """
        candidates = ways(self.start, self.first, x)
        one = self.inner.problem.batch is None
        lengths = to_floats(list(map(tree.norm, candidates))) if one else [rows.norms(way) for way in candidates]
        way: Tree = candidates[0]
        length: Any = lengths[0]
        for other, size in zip(candidates[1:], lengths[1:], strict=True):
            way, length = _pick(size > length, other, way), _pick(size > length, size, length)
        self.at, self.length = x, length
        asked = asked & (length > 0) & (length < math.inf)
        nothing = 0.0 if one else torch.zeros_like(length)
        indices = [] if one else indices_of(asked)
        if not indices and asked is not True:
            return nothing
        before = self.inner.counts["hvp"]
        try:
            size = self._norm(self.inner.hvp_at(x, way))
        except (ValueError, RuntimeError):
            return nothing
        finally:
            if not one:
                self.inner.counts["hvp"] = before
        for index in indices:
            self.inner.alone[index]["hvp"] += 1
        return _pick((length > 0) & (size < math.inf), size, 0.0)

    def row(self, index: int) -> Goal:
        """Return the goal of one row as that of a problem of its own."""
        goal = Goal(self.inner.member(index), self.solver, self.begun.row(index), self.given)
        if self.tol is not None:
            goal._set(float(self.tol[index]) if isinstance(self.tol, Tensor) else self.tol)
        return goal

    def verdict(self, residual: float, taken: int) -> Verdict:
        """Return the verdict of a run that has reached its tolerance; a start that is small in a unit alone is none."""
        if taken or self.share is not None or not self.cold or residual == 0:
            return GOOD
        if residual <= default_tolerance(tree.leaves(self.first)[0].dtype) * self.parts(self.first):
            return GOOD
        detail = (
            f"{self.solver.title} took no step: the inner gradient norm {residual:.2e} at the start is below "
            f"tol={self.tol:.1e}; leave `tol` out, or give one below the size of the gradient"
        )
        return Verdict(Status.INNER_NOT_CONVERGED, detail)

    def note_best(self, residual: float, taken: int) -> bool:
        """Note a residual that is smaller than all before it, and return whether it is."""
        if not residual < self.best:
            return False
        self.best, self.best_at = residual, taken
        return True

    def floor(self, residual: float, taken: int, before: Tree, params: Tree) -> Floor | None:
        """Return why the run has come to rest after its last step, from `before` to params; None where it has not."""
        if self.note_best(residual, taken):
            return None
        waited = taken - self.best_at
        if taken % WINDOW or waited < max(WINDOW, taken // 2):
            return None
        return self.rest(residual, waited, before, params)

    def floors(
        self, residual: Tensor, taken: int, before: InnerState, state: InnerState, moving: Tensor
    ) -> dict[int, Floor]:
        """Return why rows have come to rest, by their index; the arguments are those of `floor`, as states."""
        better = residual < self.best
        self.best, self.best_at = torch.minimum(self.best, residual), torch.where(better, taken, self.best_at)
        if taken % WINDOW:
            return {}
        waited = taken - self.best_at
        result = {}
        for index in indices_of(moving & (waited >= max(WINDOW, taken // 2))):
            old, new = (self.solver.params(each.row(index)) for each in (before, state))
            floor = self.row(index).rest(float(residual[index]), int(waited[index]), old, new)
            if floor is not None:
                result[index] = floor
        return result

    def rest(self, residual: float, waited: int, before: Tree, params: Tree) -> Floor | None:
        """Look whether a run whose residual has not become smaller for `waited` steps has come to rest."""
        x = self.inner.trainable(params)
        moved = tree.add(x, self.inner.trainable(before), -1.0)
        step, *lengths = to_floats([tree.norm(each).detach() for each in (moved, *ways(self.start, self.first, x))])
        if step <= ROUNDING * self.eps * max(lengths):
            return self.unmoved_floor(residual, x)
        # Ripples of a momentum are long; and a small step size is no floor.
        if waited >= LONG_WINDOW and self._below_rounding_of_the_loss(x, residual * step):
            return Floor("the loss cannot tell its steps apart", True)
        return None

    def unmoved_floor(self, residual: float, x: Tree) -> Floor:
        """Judge a run whose steps no longer move the trainable params x."""
        attained = residual <= self.eps**0.5 * self.parts(x) or self._below_rounding_of_the_loss(x, 0.0)
        return Floor("its steps no longer change params", attained)

    def _below_rounding_of_the_loss(self, x: Tree, decrease: float) -> bool:
        """Whether the loss can see neither a decrease nor what is to be gained along the gradient."""
        if self.inner.problem.optimality is not None:
            return False
        value = abs(float(self.inner.value(x)))
        if decrease > self.eps * value:
            return False
        gradient = self.inner.grad(x)
        length = float(tree.norm(gradient))
        if length == 0:
            return True
        unit = tree.scale(1.0 / length, gradient)
        try:
            curvature = float(tree.dot(unit, self.inner.hvp_at(x, unit)))
        except (ValueError, RuntimeError):
            return False
        return curvature > 0 and length * (length / curvature) <= self.eps * value


def _pick(mask: Any, x: Any, y: Any) -> Any:
    """Return x where the mask holds, else y: trees or figures, of rows those of each."""
    if not isinstance(mask, Tensor):
        return x if mask else y
    return torch.where(mask, x, y) if isinstance(x, float) else rows.where(mask, x, y)


def _any(mask: Any) -> bool:
    return bool(mask.any()) if isinstance(mask, Tensor) else mask


def indices_of(mask: Tensor) -> list[int]:
    """Return the rows of a mask, by one look at it."""
    return [int(index) for index in torch.nonzero(mask.cpu())[:, 0]]
