"""Whether a run has ended at a kink: steps that cross jumps of the inner gradient to and fro, and so never settle.

Where the inner loss has a kink (an L1 penalty, a hinge, a maximum), iterates of a smooth method chatter around it: the
gradient stays as large as its jump, and neither the steps nor the implicit function theorem see how the solution moves.
On the segment of one more step, cut into m pieces, let

    V(m) = sum_j |g(x_{j+1}) - g(x_j)|^2

Of a smooth gradient ``V(m) = V(1) / m``, of jumps ``V(m) = V(1)``, and of rounding noise ``V(m) = m V(1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from bilevel.base import InnerSolver, InnerState, Solution
from bilevel.core import rows, tree
from bilevel.core.device import to_floats
from bilevel.core.status import GOOD, Status, StepFailure, Verdict
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem

STEPS = 8
"""Further steps that are looked at."""
FALLEN = 0.2
"""A gradient that falls to this share of itself in one of them says that the run is on its way."""
STALLED = 1000
"""Steps after which, and after each doubling of which, a run whose gradient has hardly fallen is looked at."""
CHANGED = 0.3
"""How much of the gradient's norm a step has to change before its segment is looked at."""
LOW = 1e-3
"""The share of the gradient at a cold start below which kinks count only where params change their sign."""
SHORT = 20
"""Steps up to which a run is too short to say that it does not settle."""
PIECES, LEVELS = 16, 3
JUMPY = (0.2, 2.0)
"""The range of ``V(PIECES) / V(1)`` that jumps alone have."""
PROBE = 1e-3
"""Length of the segment along the gradient, relative to params, where a solver takes no step."""
LONG = 200
"""Steps from which on the look is cheap beside the run."""
RISEN = 3.0
"""Shorter runs of a problem that was smooth are looked at where the gradient is so much larger than it was then."""


@dataclass(frozen=True)
class Seen:
    """What the last look at a problem has found, the norm of the inner gradient there, and the steps that led there."""

    verdict: Verdict
    residual: float
    steps: int


def kinked(
    problem: BilevelProblem, hparams: Tree, solver: InnerSolver, state: InnerState, residual: float, start: float
) -> Verdict:
    """Return NOT_SMOOTH where jumps of the gradient keep a run from settling at `state`, else `GOOD`.

    It looks at a few further steps, which are not counted. `residual` is the norm of the inner gradient there, `start`
    that at a cold start. A network of ReLUs has kinks everywhere, which a run on its way crosses: where params have
    several leaves, of which one is a matrix, those alone count at which params change their sign (an L1 penalty).
    """
    inner = problem.deterministic().bind(hparams)
    state = replace(state, params=tree.detach(problem.trainable(state.params)), point=None)
    with torch.no_grad():
        leaves = tree.leaves(state.params)
        network = problem.module_loss is not None or (len(leaves) > 1 and any(leaf.dim() > 1 for leaf in leaves))
        if not _chatters(inner, solver, state, not network and residual >= LOW * start):
            return GOOD
    return Verdict(
        Status.NOT_SMOOTH,
        f"{solver.title} does not settle: its steps cross kinks of the inner loss, at which the inner gradient "
        f"of norm {residual:.2g} jumps by as much",
    )


def _chatters(inner: InnerProblem, solver: InnerSolver, state: InnerState, anywhere: bool) -> bool:
    x = solver.params(state)
    eps = torch.finfo(tree.leaves(x)[0].dtype).eps
    gradient = inner.grad(x)
    first, moved = float(tree.norm(gradient)), False
    if not first > 0:
        return False
    for _ in range(STEPS):
        try:
            state = solver.step(inner, state)
        except (StepFailure, ValueError):
            break
        there = solver.params(state)
        step, following = tree.add(there, x, -1.0), inner.grad(there)
        jump = tree.add(following, gradient, -1.0)
        taken, size, left, change = to_floats([tree.norm(each) for each in (step, x, following, jump)])
        # Closer together than that all differences are rounding.
        if not taken > eps ** (2 / 3) * size:
            break
        moved = True
        if not left > FALLEN * first:
            return False
        if change > CHANGED * first and _jumps(inner, x, step, CHANGED * first, anywhere):
            return True
        x, gradient = there, following
    length = float(tree.norm(x)) or 1.0
    return not moved and _jumps(inner, x, tree.scale(-PROBE * length / first, gradient), CHANGED * first, anywhere)


def _jumps(inner: InnerProblem, x: Tree, step: Tree, least: float, anywhere: bool) -> bool:
    """Return whether the gradient changes by jumps on the segment from x to x + step, and by at least `least`.

    The piece with the largest change is cut again: a steep slope shows there that it is none. Jumps count `anywhere`,
    or in those components alone whose params change their sign.
    """

    def gradient(at: Tree) -> Tree:
        there = inner.grad(at)
        return there if anywhere else tree.tree_map(lambda g, sign: g * sign, there, signs)

    signs = tree.tree_map(lambda leaf, move: (leaf * (leaf + move) <= 0).to(leaf), x, step)
    for _ in range(LEVELS):
        if not float(tree.norm(tree.add(gradient(tree.add(x, step)), gradient(x), -1.0))) > least:
            return False
        values = [gradient(tree.add(x, step, piece / PIECES)) for piece in range(PIECES + 1)]
        pairs = [(values[0], values[-1]), *pairwise(values)]
        whole, *changes = to_floats([tree.norm(tree.add(b, a, -1.0)) for a, b in pairs])
        if not JUMPY[0] <= sum(change**2 for change in changes) / whole**2 <= JUMPY[1]:
            return False
        x, step, least = tree.add(x, step, changes.index(max(changes)) / PIECES), tree.scale(1 / PIECES, step), 0.0
    return True


def ends_at_kink(
    problem: BilevelProblem,
    hparams: Tree,
    solver: InnerSolver,
    solved: Solution,
    start: Tree,
    doubtful: bool,
    again: bool = False,
) -> Verdict:
    """Return what `kinked` says where a run stands that no tolerance has ended; `GOOD` where the look is too expensive.

    A problem (no batch) is looked at after its first run, and again where a kink has been found, after long runs, where
    the gradient is larger than it was, and with `again`; after short runs only where they are `doubtful`, or evidence
    is asked for. `start` are the params of a cold start.
    """
    residual, steps = solved.residual, solved.steps
    quadratic = problem.tested and problem.structure.quadratic and problem.nonsmooth is None
    if (steps < SHORT and not doubtful) or not steps or quadratic:
        return GOOD
    state = solved.state
    _, tol = solver.limits(tree.leaves(state.params)[0].dtype)
    if tol is not None and residual <= tol:
        return GOOD
    seen: Seen | None = problem.derivatives_seen.get("kinks")
    smooth = seen is not None and seen.verdict.status.ok and residual <= RISEN * seen.residual
    # A shorter run may have ended on its way to the kink.
    if seen is not None and smooth and steps <= seen.steps and steps < LONG and not again:
        return GOOD
    begun = float(tree.norm(problem.bind(hparams).grad(start)))
    verdict = kinked(problem, hparams, solver, state, residual, begun)
    problem.derivatives_seen["kinks"] = Seen(verdict, residual, steps)
    return verdict


def members_at_kinks(
    problem: BilevelProblem,
    hparams: Tree,
    solver: InnerSolver,
    solved: Solution,
    verdicts: Sequence[Verdict],
    start: Tree,
) -> list[Verdict]:
    """Return the verdicts of a batch after the look: at the first usable member, and at others where there is cause."""
    result, cause = list(verdicts), None
    for index, verdict in enumerate(verdicts):
        if not verdict.status.usable or not (cause is None or cause or not verdict.status.ok):
            continue
        u, x = rows.row(hparams, index), rows.row(start, index)
        further = cause is not None  # members may be one problem, which the first look has found smooth
        kink = ends_at_kink(problem.member(index), u, solver, solved.row(index), x, further, further)
        cause = not kink.status.ok if cause is None else cause
        result[index] = verdict if kink.status.ok else kink
    return result
