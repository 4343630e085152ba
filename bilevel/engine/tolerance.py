"""When a run of inner steps ends: at its tolerance, or where rounding leaves nothing to gain. Neither has a unit.

A default tolerance is a share of the size of the parts that cancel in the gradient at a solution, ``|H v|``: v is the
iterate, or its way from the start where that is longer. For a quadratic loss that starts at zero it is the gradient
norm of the start, which is then taken; where a loss saturates, ``|H v|`` falls with the parts and the start's does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bilevel.base import InnerSolver, InnerState
from bilevel.core import device as look
from bilevel.core import tree
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
    """Return the candidates for v: params, and the ways to them from the starts."""
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
    """A run that has come to rest above its tolerance.

    Attributes:
        detail: what stands still.
        attained: whether the residual is as small as rounding lets it be.
    """

    detail: str
    attained: bool


class Goal:
    """The tolerance of one run, and what it has to know to judge it.

    Args:
        inner: the bound problem.
        solver: the inner solver.
        first: the first state.
        tol: a norm of the inner gradient; a `Relative` one is a share of the size of its parts; None for no end.
    """

    def __init__(self, inner: InnerProblem, solver: InnerSolver, first: InnerState, tol: float | None) -> None:
        self.inner, self.solver = inner, solver
        self.share = float(tol) if isinstance(tol, Relative) else None
        self.tol = inner.tolerance = None if isinstance(tol, Relative) else tol
        self.first = inner.trainable(solver.params(first))
        self.cold = not first.index
        (like, *_) = tree.leaves(self.first)
        self.eps = torch.finfo(like.dtype).eps
        self.best, self.best_at = math.inf, 0
        self.start: Tree = None
        self.measured_at: tuple[Tree, float] | None = None
        """Where ``|H v|`` was measured, and the length of v; None where it needs no further look."""
        if tol is not None:
            self.start = start_of(inner, self.first)

    def reached(self, residual: float, params: Tree) -> bool:
        """Whether the residual at params is small enough.

        Args:
            residual: norm of the inner gradient at params.
            params: as `InnerSolver.params` gives them.

        Returns:
            True where the run ends.
        """
        if self.share is None:
            return self.tol is not None and residual <= self.tol
        x = self.inner.trainable(params)
        if self.tol is None:
            # A budget, which alone gives both, has no room for products: the start's gradient has to do.
            parts = self.parts(x) if self.solver.steps is None else 0.0
            # A quadratic loss that starts where its v is zero: the gradient there is ``-H v`` at the solution.
            if self.cold and parts == 0 and self.inner.problem.structure.quadratic:
                self.measured_at = None
            self._set(max(parts, residual if self.cold or parts == 0 else 0.0))
        assert self.tol is not None
        if not residual <= self.tol or residual == 0:
            return residual <= self.tol
        if self.measured_at is not None:
            at, length = self.measured_at
            if float(tree.norm(tree.add(x, at, -1.0))) > AWAY * length:
                parts = self.parts(x)
                self._set(parts if parts > 0 else residual)
        return residual <= self.tol

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

    def _set(self, scale: float) -> None:
        assert self.share is not None
        self.tol = self.share * scale
        self.inner.tolerance = self.tol

    def parts(self, x: Tree) -> float:
        """Measure ``|H v|`` at the trainable params x; 0 where v is zero, or the loss has no such product."""
        candidates = ways(self.start, self.first, x)
        lengths = look.numbers([tree.norm(way) for way in candidates])
        length = max(lengths)
        way = candidates[lengths.index(length)]
        self.measured_at = (x, length)
        if not 0 < length < math.inf:
            return 0.0
        try:
            size = float(tree.norm(self.inner.hvp_at(x, way)))
        except (ValueError, RuntimeError):
            return 0.0
        return size if math.isfinite(size) else 0.0

    def floor(self, residual: float, taken: int, before: Tree, params: Tree) -> Floor | None:
        """Return why the run has come to rest, or None where it has not.

        Args:
            residual: norm of the inner gradient at params.
            taken: steps so far.
            before: params before the last step.
            params: after it.
        """
        if residual < self.best:
            self.best, self.best_at = residual, taken
            return None
        waited = taken - self.best_at
        if taken % WINDOW or waited < max(WINDOW, taken // 2):
            return None
        return self.rest(residual, waited, before, params)

    def rest(self, residual: float, waited: int, before: Tree, params: Tree) -> Floor | None:
        """Look whether a run whose residual has not become smaller for `waited` steps has come to rest."""
        x = self.inner.trainable(params)
        moved = tree.add(x, self.inner.trainable(before), -1.0)
        step, *lengths = look.numbers([tree.norm(each) for each in (moved, *ways(self.start, self.first, x))])
        if step <= ROUNDING * self.eps * max(lengths):
            return self.at_rest(residual, x)
        # Ripples of a momentum are long; and a small step size is no floor.
        if waited >= LONG_WINDOW and self._below_rounding_of_the_loss(x, residual * step):
            return Floor("the loss cannot tell its steps apart", True)
        return None

    def at_rest(self, residual: float, x: Tree) -> Floor:
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
