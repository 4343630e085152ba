"""A user's own map: ``x <- update(x, hparams)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.base import InnerSolver, InnerState, Traits
from bilevel.core import tree
from bilevel.core.options import require_arguments
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem

AT_REST = 1e-6
"""Share of params that a step changes, from which on the map has come to rest."""
MISSED = 0.01
"""Share of its parts from which on the inner gradient is not zero there."""


@dataclass(frozen=True)
class FixedPoint(InnerSolver):
    """Iterates ``update(params, hparams)``, which should contract in params, until ``|x - update(x)|`` is small.

    Unrolling differentiates the update by autograd. Implicit differentiation uses the problem: state it with
    ``BilevelProblem.from_fixed_point(update, ...)`` unless the fixed point is the minimiser of its inner loss. A fixed
    point where the inner gradient is not zero is reported as INACCURATE.

    Args:
        update: a function ``(params, hparams) -> params`` in torch operations.

    >>> FixedPoint(lambda x, u: 0.5 * x + u, steps=10).steps
    10
    """

    update: Callable[[Tree, Tree], Tree]

    traits = Traits(proximal=True)  # the map may hold a proximal step

    def __post_init__(self) -> None:
        super().__post_init__()
        require_arguments("FixedPoint.update", self.update, "params", "hparams")

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        # The graph is kept only where the step is differentiated.
        recording = torch.is_grad_enabled()
        new: Any = self._updated(state.params, inner.hparams)
        new = tree.matched(new, state.params, "FixedPoint.update")
        return state.moved(new if recording else tree.detach(new))

    def _updated(self, params: Tree, hparams: Tree) -> Tree:
        """Call the update, which may use autograd itself."""
        with torch.enable_grad():
            return self.update(params, hparams)

    def own_problem(self, inner: InnerProblem) -> InnerProblem:
        """Return the problem of the map itself, whose residual is ``|x - update(x)|``."""
        if inner.augmented:
            return inner
        problem = BilevelProblem.from_fixed_point(self._updated, lambda params, hparams: tree.dot(params, params))
        own = problem.bind(inner.hparams, inner.counts)
        # With the graph of hyperparameters that require gradients.
        own.hparams = inner.hparams
        return own

    def misses(self, inner: InnerProblem, state: InnerState, residual: float) -> str:
        """Say where the map has come to rest while the inner gradient is not small beside its parts ``H x``."""
        params = state.params
        if not 0 <= residual < AT_REST * float(tree.norm(params)):
            return ""
        try:
            gradient, parts = tree.norm(inner.grad(params)), tree.norm(inner.linearize(params).hvp(params))
        except (ValueError, RuntimeError):
            # A loss without second derivatives: `Implicit` refuses it, and unrolling needs none.
            return ""
        if not bool(gradient > MISSED * parts):
            return ""
        return (
            f"FixedPoint rests where the inner gradient norm is {float(gradient):.3g} (its parts are "
            f"{float(parts):.3g}): the fixed point of `update` does not solve the inner problem; state it by "
            "BilevelProblem.from_fixed_point(update, ...)"
        )
