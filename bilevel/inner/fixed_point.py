"""A user's own map: ``x <- update(x, hparams)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel import tree
from bilevel.base import InnerSolver, InnerState
from bilevel.options import require_arguments
from bilevel.oracles import InnerProblem
from bilevel.tree import Tree


@dataclass(frozen=True)
class FixedPoint(InnerSolver):
    """Iterates ``update(params, hparams)``, which should contract in params.

    Unrolling differentiates the update by autograd. Implicit differentiation uses the problem: state it with
    ``BilevelProblem.from_fixed_point(update, ...)`` unless the fixed point is the minimiser of its inner loss.

    Args:
        update: a function ``(params, hparams) -> params`` in torch operations.
        steps: number of steps; see `InnerSolver`.
        tol: residual tolerance; see `InnerSolver`.

    >>> FixedPoint(lambda x, u: 0.5 * x + u, steps=10).steps
    10
    """

    update: Callable[[Tree, Tree], Tree]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_arguments("FixedPoint.update", self.update, "params", "hparams")

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Apply the update."""
        # The update may use autograd itself; its graph is kept only where the step is differentiated.
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            new: Any = self.update(state.params, inner.hparams)
        new = tree.matched(new, state.params, "FixedPoint.update")
        return state.moved(new if recording else tree.detach(new))
