"""Runs whose steps lead away from a solution, however slowly: expanding maps, concave directions, rotations that grow.

A residual that has grown over a run says little by itself: a contraction may grow at first (a momentum, a matrix that
is not normal), and so may the gradient of a network, or that of a loss with several minima on the way from a maximum.
So the run is continued for a while from its last state. Of a map, whose steps should contract, it leads away where the
residual goes on growing; of an inner loss only where it grows as fast as before at every further step.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bilevel.base import InnerSolver, InnerState
from bilevel.core import tree
from bilevel.core.status import Status, StepFailure, Verdict
from bilevel.oracles.inner_problem import InnerProblem

FURTHER = 1_000
"""Further steps, as growth may be transient; of an inner loss, one with a smaller residual ends them."""
AWAY = 1e3
"""Growth of an inner loss's residual over them below which it may still be on the way from a maximum to a minimum."""
ROUNDING = 1e4
"""Rounding units of params below which steps are rounding."""
FASTER = 0.9
"""Share of the growth per step so far from which on an inner loss's residual still grows as fast."""


def watched(
    verdict: Verdict,
    inner: InnerProblem,
    solver: InnerSolver,
    last: InnerState,
    residuals: tuple[float, float],
    steps: int,
) -> Verdict:
    """Return DIVERGED where further steps lead away from a solution, else the verdict of the run; a failure stays.

    `residuals` are those of the first and of the last state, `steps` apart. Only where they have grown are further
    steps taken, which are none of the run's cost.
    """
    start, end = residuals
    if not verdict.status.usable or not end > start or not steps or inner.problem.variation:
        return verdict
    # Neither counted nor recorded, whatever the run itself is.
    inner = inner.problem.bind(tree.detach(inner.hparams))
    params, memory = tree.detach(last.variables)
    last = replace(last, params=params, memory=memory, point=None)
    try:
        with torch.no_grad():
            grown, further = _continued(inner, solver, last, start, end, steps)
    except StepFailure:
        return verdict
    if not grown:
        return verdict
    detail = (
        f"{solver.title} leads away from a solution: its residual grew from {start:.3g} to {end:.3g} by step {steps}, "
        f"and by a factor of {grown:.3g} in {further} further steps"
    )
    return Verdict(Status.DIVERGED, detail)


def _continued(
    inner: InnerProblem, solver: InnerSolver, state: InnerState, start: float, end: float, steps: int
) -> tuple[float, int]:
    """Return by how much the residual grows further, and in how many steps; 0 where it does not go on growing."""
    contracts = not inner.problem.symmetric
    rate = math.log(end / start) / steps if start > 0 else math.inf
    followed: list[float] = []
    for taken in range(1, FURTHER + 1):
        before, state = state, solver.step(inner.on_step(state.index), state)
        if taken == 1 and _stands_still(inner, solver, before, state):
            return 0.0, taken
        residual = float(tree.norm(inner.grad(solver.params(state))))
        followed.append(residual)
        # One step with less is enough for a loss; a map may rotate.
        if residual < (start if contracts else end):
            return 0.0, taken
        if not math.isfinite(residual) or residual > end / torch.finfo(tree.leaves(state.params)[0].dtype).eps:
            return math.inf, taken
    if contracts:
        third, fourth = (max(followed[FURTHER // 2 : 3 * FURTHER // 4]), max(followed[3 * FURTHER // 4 :]))
        return (fourth / end, FURTHER) if fourth > third and fourth > end else (0.0, FURTHER)
    grown = followed[-1] / end
    return (grown, FURTHER) if grown >= AWAY and math.log(grown) >= FASTER * rate * FURTHER else (0.0, FURTHER)


def _stands_still(inner: InnerProblem, solver: InnerSolver, before: InnerState, after: InnerState) -> bool:
    """Whether a step is rounding."""
    x, y = (inner.trainable(solver.params(state)) for state in (before, after))
    moved = float(tree.norm(tree.add(y, x, -1.0)))
    return moved <= ROUNDING * torch.finfo(tree.leaves(y)[0].dtype).eps * float(tree.norm(y))
