"""Runs whose steps lead away from a solution, however slowly: expanding maps, concave directions, rotations that grow.

A residual that has grown over a run says little by itself: a contraction may grow at first (a momentum, a matrix that
is not normal), and so may the gradient of a network. So the run is continued for a while from its last state. Of a map,
whose steps should contract, it leads away where the residual goes on growing; of an inner loss only where it grows as
fast as before.
"""

from __future__ import annotations

import math

import torch

from bilevel import tree
from bilevel.base import InnerSolver, InnerState
from bilevel.oracles import InnerProblem
from bilevel.status import Status, StepFailure, Verdict

LEAST = 20
"""Further steps at least."""
MOST = 1_000
"""Further steps of a map, whose growth may be transient; the most for an inner loss."""
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
    """Return DIVERGED where further steps lead away from a solution, else the verdict.

    Args:
        verdict: what is said of the run without this look; a failure stays.
        inner: the bound problem.
        solver: the inner solver.
        last: the last state.
        residuals: those of the first and of the last state.
        steps: how many steps lie between them.

    Returns:
        The verdict. Only a residual that has grown is looked at; the further steps are counted.
    """
    start, end = residuals
    if not verdict.status.usable or not end > start or not steps or inner.problem.variation:
        return verdict
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
    further = MOST if contracts else min(max(LEAST, steps), MOST)
    followed: list[float] = []
    for taken in range(1, further + 1):
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
        third, fourth = (
            max(part) for part in (followed[further // 2 : 3 * further // 4], followed[3 * further // 4 :])
        )
        return (fourth / end, further) if fourth > third and fourth > end else (0.0, further)
    grown = followed[-1] / end
    return (grown, further) if math.log(grown) >= FASTER * rate * further else (0.0, further)


def _stands_still(inner: InnerProblem, solver: InnerSolver, before: InnerState, after: InnerState) -> bool:
    """Whether a step is rounding."""
    x, y = (inner.trainable(solver.params(state)) for state in (before, after))
    moved = float(tree.norm(tree.add(y, x, -1.0)))
    return moved <= ROUNDING * torch.finfo(tree.leaves(y)[0].dtype).eps * float(tree.norm(y))
