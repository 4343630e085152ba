"""Gradient descent with a step size for each variable: ``x <- x - D^-1 grad(x)`` with a diagonal D."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bilevel.base import InnerSolver, InnerState, Traits
from bilevel.core import rows, tree
from bilevel.core.options import is_positive, option, or_auto
from bilevel.core.tree import Tree
from bilevel.inner.multistep import of_each_row
from bilevel.oracles.inner_problem import InnerProblem


@dataclass(frozen=True)
class PreconditionedGradientDescent(InnerSolver):
    """Gradient descent preconditioned by a diagonal D above the Hessian: ``x <- x - D^-1 grad(x)``.

    The inner loss falls in every step, as ``H <= D``. Linear models know ``D_j = L + p_j``, with L the largest
    curvature of the data part and p_j the penalty of weight j: a penalty that shrinks one weight to zero slows no other
    one, where `GradientDescent` has to take ``1 / (L + max p)`` for all. Any other problem has ``D = L I`` with its
    measured curvature, and so the steps of ``GradientDescent(step_size="auto")``.

    D is made at the start of each solve; like a measured step size, it is a constant of the differentiation.

    Args:
        step_size: 1/L, a positive number, or "auto": from the problem, or measured at the start of each solve.

    >>> PreconditionedGradientDescent(tol=1e-8)
    PreconditionedGradientDescent(steps=None, tol=1e-08, step_size='auto')
    """

    step_size: float | str = option("auto", "a positive number or 'auto'", or_auto(is_positive))

    traits = Traits(rowwise=True)

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        return InnerState(params, (self._inverse(inner, params),))

    def cold_state(self, inner: InnerProblem, params: Tree) -> InnerState:
        return InnerState(params, (tree.zeros_like(params),))

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Go on from the iterate, with D at the present hyperparameters."""
        return replace(state, memory=(self._inverse(inner, state.params),))

    def max_step_size(self, state: InnerState, curvature: float) -> float:
        return 2.0 / curvature

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        (inverse,) = state.memory
        pairs = zip(*map(tree.leaves, (state.params, inverse, inner.grad(state.params))), strict=True)
        params = tree.rebuild(state.params, [x.addcmul(share, gradient, value=-1.0) for x, share, gradient in pairs])
        return state.moved(params, state.memory)

    def _inverse(self, inner: InnerProblem, params: Tree) -> Tree:
        """Return D^-1, shaped as params; of a batch, that of each row, NaN where it has none."""
        if inner.problem.batch is None:
            return self._of_one(inner, params)
        each = of_each_row(inner, params, self._of_one)
        nothing = tree.scale(math.nan, params)
        return rows.stack([rows.row(nothing, index) if one is None else one for index, one in enumerate(each)])

    def _of_one(self, inner: InnerProblem, params: Tree) -> Tree:
        largest = inner.majorizer(params, None if self.step_size == "auto" else 1.0 / float(self.step_size))
        if self.step_size == "auto" and not all(
            bool((leaf > 0).all()) and tree.is_finite(leaf) for leaf in tree.leaves(largest)
        ):
            raise ValueError(
                f"{type(self).__name__} measured a curvature that is not positive and finite, so no step size follows: "
                "give `step_size` a number, add a penalty to the inner loss, or take QuasiNewton()."
            )
        return tree.tree_map(lambda leaf: 1.0 / leaf, largest)
