"""How fast inner steps approach the solution, and the step size and the tail that follow from it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bilevel.base import InnerState
from bilevel.check.report import Finding
from bilevel.check.solution import Curvature, Solved
from bilevel.check.subject import Subject
from bilevel.core import tree
from bilevel.core.status import StepFailure
from bilevel.core.tree import Tree

TARGET = 1e-3
"""The relative error of a truncated unroll that the recommended tail is for."""
ROUNDS = 100
"""Steps over which a contraction is measured."""


def contraction(subject: Subject, solved: Solved, result: Curvature) -> tuple[Finding, int | None]:
    """Return how fast steps that start beside the solution approach it, and the tail that reaches `TARGET`."""
    name = "contraction"
    if not math.isfinite(result.largest) or result.smallest <= 0:
        return Finding(name, "not applicable", "the solution is no strict minimum, so steps need not contract."), None
    l, L = result.smallest, result.largest  # noqa: E741 (the field's names of the ends of the spectrum)
    advice = (
        f"condition number {L / l:.3g}; the fastest fixed step of gradient descent is 2/(l+L) = {2 / (l + L):.3g}, "
        f"a safe one 1/L = {1 / L:.3g}"
    )
    step_size = _step_size(subject, solved.run.state)
    limit = subject.solver.max_step_size(solved.run.state, L)
    if limit is not None and step_size is not None and step_size > limit * (1 + 1e-6):
        sentence = (
            f"step_size={step_size:.3g} is above the stability limit {limit:.3g} at the solution, so the step map "
            f"does not contract; {advice}."
        )
        return Finding(name, "fault", sentence, step_size), None
    # The solution is known to this distance; closer than that there is nothing to measure.
    blur = 100 * (solved.residual / l + subject.eps * float(tree.norm(solved.params)))
    rates = [_rate(subject, solved, tree.scale(size, result.ends), blur) for size in (1e-2, 1e-3)]
    if any(rate is None for rate in rates):
        return Finding(name, "not applicable", f"no steps to measure beside the solution; {advice}."), None
    fast, slow = sorted(rate for rate in rates if rate is not None)
    # A step map that is linear near the solution has one rate; a method of other make (Adam) has none.
    if slow >= 1:
        if abs(slow - fast) < 0.05 * slow:
            sentence = f"steps that start beside the solution move away by {slow:.3g} each; {advice}."
            return Finding(name, "fault", sentence, slow), None
        return Finding(name, "note", f"steps do not settle at the solution; {advice}.", slow), None
    tail = max(1, math.ceil(math.log(TARGET) / math.log(max(slow, 1e-12))))
    sentence = (
        f"each step shrinks the distance to the solution by {slow:.4g}, so tail={tail} of at least {2 * tail} steps "
        f"brings a truncated unroll to {TARGET:.0e} of the truth; {advice}."
    )
    return Finding(name, "ok", sentence, slow), tail


def _step_size(subject: Subject, state: InnerState) -> float | None:
    given = getattr(subject.solver, "step_size", None)
    value = state.measured.get("step_size") if isinstance(given, str) else given
    return float(value) if isinstance(value, int | float) else None


def _rate(subject: Subject, solved: Solved, offset: Tree, blur: float) -> float | None:
    """Return the mean factor of a step's distance to the solution over the second half of a run that starts beside it.

    The slowest modes belong to the ends of the spectrum, so a start along these shows them from the first step on.
    """
    inner = subject.problem.bind(subject.hparams)
    solution, solver = solved.params, subject.solver
    scale = max(1.0, float(tree.norm(solution)))
    state = solver.init(inner, tree.add(solution, offset, scale))
    # Constants of the map as the user's run had them; curvature measured here would be that of another point.
    state = replace(state, measured=solved.run.state.measured or state.measured)
    distances = []
    try:
        with torch.no_grad():
            for _ in range(ROUNDS):
                state = solver.step(inner.on_step(state.index), state)
                distances.append(float(tree.norm(tree.add(solver.params(state), solution, -1.0))))
                if not distances[-1] > blur:
                    break
    except (StepFailure, ValueError):
        return None
    kept = [scale * float(tree.norm(offset)), *distances]
    last = next((index for index, distance in enumerate(kept) if not distance > blur), len(kept)) - 1
    if last < 1:
        return 0.0 if distances[0] <= blur < 1e-3 * kept[0] else None
    half = last // 2
    return float((kept[last] / kept[half]) ** (1.0 / (last - half)))
