"""A run on flat vectors: of a number of steps, or to a tolerance, where it ends as with a look at every step.

`Run.solve` and the unrolls ask `flat_run` first; `bilevel.hypergrad.flat_unroll` goes back over its `Tail`. Which form
the steps take, and where it is refused, is drawn in `bilevel.engine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import numpy as np
import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState
from bilevel.core import tree
from bilevel.core.device import check_interval
from bilevel.engine.affine import Stretch
from bilevel.engine.judge import InnerRun
from bilevel.engine.lean import Plan, longest
from bilevel.engine.loop import Looks, conclude, ended
from bilevel.inner.coefficients import ReadsIterateError
from bilevel.inner.multistep import LinearMultistep
from bilevel.oracles.graph import NotRecordedError
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.recorded_kernels import recorded

CHUNK, FEWEST, FIRST, LONGEST = 16_384, 32, 256, 512
"""A run to a tolerance makes at first so many numbers at once, but so many steps at least, and at most; later."""


class Tail:
    """The last steps of a run, by stretches, each with the vectors that it begins from."""

    def __init__(self) -> None:
        self.stretches: list[tuple[Stretch, Tensor]] = []

    @property
    def count(self) -> int:
        """The steps."""
        return sum(stretch.count for stretch, _ in self.stretches)

    def forget_before(self, count: int) -> None:
        """Drop the stretches before the last `count` steps."""
        spare = self.count - count
        while self.stretches and spare >= self.stretches[0][0].count:
            spare -= self.stretches.pop(0)[0].count

    def cut(self, count: int) -> None:
        """Leave the last `count` steps alone."""
        self.forget_before(count)
        if (spare := self.count - count) > 0:
            first, _ = self.stretches[0]
            first.cut(spare, first.count)


@dataclass
class Flat:
    """A run on flat vectors: how it has ended, and the steps that are differentiated."""

    end: InnerRun
    tail: Tail
    last: Tensor
    """The stored vectors at the end, ([rows,] p, m), and what is carried along with them."""
    basis: Tensor | None
    """That of the kernels."""


class _NotFiniteError(Exception):
    """Steps that overflow: one after the other they say which of them does."""


@torch.no_grad()
def flat_run(
    inner: InnerProblem,
    solver: InnerSolver,
    first: InnerState,
    length: Callable[[int], int] = lambda steps: 0,
    at_least: int = 0,
    kept: bool = True,
    directions: int = 0,
) -> Flat | None:
    """Return a run from a first state on flat vectors; None where it has to be made step by step.

    That is one of a solver that is not linear multistep or takes its steps itself, one of a problem without kernels,
    and one that overflows, which steps can name.

    Args:
        inner: the bound problem.
        solver: the inner solver.
        first: the first state.
        length: steps taken -> last steps that are to be differentiated.
        at_least: steps to take even where the tolerance is reached before.
        kept: whether their iterates are kept, or made again on the way back, stretch by stretch, to the same bits.
        directions: hyperparameters whose derivatives are carried along: forward mode; of rows, none.
    """
    if not solver.follows_coefficients:
        return None
    limit, tol = solver.limits(tree.leaves(first.params)[0].dtype)
    kernels, recording, tail = inner.kernels(), None, min(length(limit), limit)
    if kernels is None and not (tol and inner.problem.variation):
        size = tree.size(first.params)
        held = tail if kept else longest(tail, size)
        if tol and held:  # whole stretches, of which the end is not known
            held = min(limit, held + longest(LONGEST, size))
        kernels = recording = recorded(inner, first.params, first.index, limit, held, forward=directions > 0)
    if kernels is None or (directions and inner.problem.batch is not None):
        return None
    counts, found = inner.counts.copy(), None
    plan = Plan(kernels, cast(LinearMultistep, solver), first, inner.problem.batch, directions)
    try:
        if plan.fits(limit, tail):
            run = _by_count if tol is None else _to_tolerance
            found = run(inner, plan, limit, length, at_least, kept)
            if recording is not None:
                end = found.end.state.params
                recording.confirm(plan.raveler.ravel(end), plan.raveler.ravel(inner.grad(end)))
    except NotRecordedError as reason:
        found, inner.refused = None, str(reason)
    except (_NotFiniteError, ReadsIterateError):  # numbers that are not known in advance at a later step
        pass
    if found is None:  # its steps count it again
        inner.counts.clear()
        inner.counts.update(counts)
        return None
    form = " and ".join(plan.forms) or found.end.form
    return replace(found, end=replace(found.end, form=form))


def _by_count(
    inner: InnerProblem, plan: Plan, steps: int, length: Callable[[int], int], at_least: int, kept: bool
) -> Flat:
    idle, s, tail = steps - min(length(steps), steps), plan.begin, Tail()
    for stretch in plan.between(0, idle):
        s = stretch.forward(s, False)
    for stretch in plan.between(idle, steps, short=not kept):
        tail.stretches.append((stretch, s))
        s = stretch.forward(s, True)
        if not kept:
            stretch.forget()
    sound = torch.isfinite(s.sum())
    for powers in chain.from_iterable(plan.powers.values()):
        sound = sound & powers.finite
    if not bool(sound):
        raise _NotFiniteError
    inner.counts["gradient"] += steps
    end = conclude(inner, plan.solver, plan.first, plan.state(s, steps), steps)
    return Flat(end, tail, s, plan.basis)


def _to_tolerance(
    inner: InnerProblem, plan: Plan, limit: int, length: Callable[[int], int], at_least: int, kept: bool
) -> Flat:
    """Make steps by chunks, and look at all residuals of a stretch at once: at those that steps would look at."""
    solver, first, s, tail = plan.solver, plan.first, plan.begin, Tail()
    _, tol = solver.limits(s.dtype)
    assert tol is not None
    every = max(solver.traits.check_every, check_interval(s.device))
    looks = Looks(inner, solver, first, tol, at_least)
    end, taken, at_iterates = looks.end_at(float(looks.start), 0, first, first), 0, True
    equal = plan.kernels.affine is not None and solver.traits.stationary_from is not None
    chunk = min(FIRST, max(2 * FEWEST, CHUNK // s.numel())) if equal else FEWEST
    while end is None and taken < limit:
        for stretch in plan.between(taken, min(limit, taken + chunk)):
            tail.stretches.append((stretch, s))
            s = stretch.forward(s, True)
            # Not after the last of all steps, whose end is looked at anyway.
            after = range(every - taken % every, stretch.count + (taken + stretch.count < limit), every)
            end = _first_end(looks, plan, stretch, taken, after)
            s = s if end is None else stretch.vectors(stretch.count).to(s.dtype)
            taken, at_iterates = taken + stretch.count, at_iterates and stretch.at_iterates
            tail.forget_before(length(limit))
            if not kept:
                stretch.forget()
            if end is not None:
                break
        chunk = min(2 * chunk, LONGEST)
    # A look takes a gradient of its own, unless the step from there takes the same one.
    own = 0 if at_iterates else len(range(every, taken, every))
    # The first look has counted the gradient of the first step, where that is taken at the very params.
    known = taken > 0 and plan.point is first.params
    inner.counts["gradient"] += taken + own - known
    if end is None:
        end = looks.conclude(plan.state(s, taken), taken)
        if not math.isfinite(end.residual):
            raise _NotFiniteError
    inner.grad(end.state.params)
    end = ended(inner, solver, end)
    tail.cut(min(length(max(taken, 1)), taken))
    return Flat(end, tail, s.clone(), plan.basis)  # a view would hold all steps


def _first_end(looks: Looks, plan: Plan, stretch: Stretch, taken: int, after: range) -> InnerRun | None:
    """Return how the run ends in a stretch, which is then cut there; None where it goes on."""
    residuals = stretch.residuals(after).cpu().numpy() if after else np.empty(0)
    for index in looks.that_may_end(residuals, taken + np.array(after)):
        count, residual = after[index], float(residuals[index])
        if not math.isfinite(residual):
            raise _NotFiniteError
        states = [plan.state(stretch.vectors(k), taken + k) for k in (count - 1, count)]
        if (end := looks.end_at(residual, taken + count, *states)) is not None:
            stretch.cut(0, count)
            return end
    return None
