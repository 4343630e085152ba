"""The solution that a problem's own closed form, or dense steps on the host, have found, as estimators return it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bilevel.base import InnerState, Pullback, Solution
from bilevel.core.tree import Tree
from bilevel.engine.estimator import Run
from bilevel.oracles.structure import Exact


def solution_of(exact: Exact, run: Run, pullback: Callable[[Tree], Pullback], form: str) -> Solution:
    """Return the solution with its counts; cotangents other than the outer loss's are pulled back by `pullback`."""
    for kind, count in exact.counts.items():
        run.meter.counts[kind] += count
    pulled = Pullback(
        exact.hypergradient,
        exact.adjoint,
        exact.adjoint_residual,
        exact.adjoint_steps,
        value_error=exact.value_error,
    )

    def state() -> InnerState:
        cold = run.solver.cold_state(run.inner(), exact.params)
        return InnerState(cold.params, cold.memory, exact.steps) if exact.steps else cold

    made: Any = state  # when it is first read
    outer = (exact.outer_loss, pulled)
    return Solution(exact.params, made, pullback, exact.residual, exact.steps, outer=outer, form=form)
