"""Truncated unrolling that chooses its own tail, spends a budget, or extrapolates its sweep.

A sweep back over the last n states gives the derivatives ``U_1, ..., U_n`` of ever longer tails. For a linear multistep
solver it also gives, without a further product, the adjoint sums

    lam_n = - sum_j v_j,   v_j the cotangent of the inner gradient at the j-th step back     (lam_n -> H^-1 w)

whose differences are the powers of one matrix on a vector near the solution: reduced rank extrapolation of lam_n and of
the iterates gives ``g_RRE = -C(xh)' lam``, far closer to the limit than ``U_n`` where n is short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Pullback, Solution, Variables
from bilevel.core import tree
from bilevel.core.status import GOOD, StepFailure, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.estimator import Run
from bilevel.engine.extrapolation import (
    ADJOINT_ORDERS,
    OMEGA,
    SWEEP_ORDERS,
    Budget,
    Crossing,
    Record,
    best,
    counted,
    discount_doubt,
    reduced_rank,
    with_steps,
)
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import run_inner
from bilevel.inner.multistep import LinearMultistep
from bilevel.oracles.inner_problem import InnerProblem, Linearization

SAFEGUARDS = 6.0
"""Gradient-equivalents of a look at the extrapolated iterate (1), two adjoint residuals (4) and a cross product (1)."""
AT_LEAST = 50
"""Steps that a run with a tolerance takes in any case, so that a good warm start leaves something to differentiate."""
KEPT = SWEEP_ORDERS[-1] + 2


@dataclass(frozen=True)
class Tail:
    """What `TruncatedUnroll` asks for.

    Attributes:
        tail: differentiated steps, or None for the choice by the crossing rule or after the run.
        fraction: whether `tail` is a fraction of the steps.
        budget: gradient-equivalents, or None where the solver's own stopping rule ends the run.
        extrapolate: return ``g_RRE`` where it is safe.
    """

    tail: int | float | None
    budget: float | None
    extrapolate: bool

    def length(self, steps: int) -> int:
        """Return the longest tail among `steps`."""
        if self.tail is None:
            return steps
        return self.tail if isinstance(self.tail, int) else fraction_of(self.tail, steps)


def fraction_of(fraction: float, steps: int) -> int:
    """Return ``ceil(fraction * steps)``, at least one."""
    # 0.07 * 100 is a little above 7 in floating point.
    return max(1, -int(-(fraction * steps - 1e-9) // 1))


def solve(tail: Tail, run: Run) -> Solution:
    """Run the inner solver as the budget or its own rule says, and keep what the sweep will need.

    Args:
        tail: what is asked for.
        run: the inner solve.

    Returns:
        A solution whose pullback sweeps; with an accepted extrapolation, at the extrapolated iterate.
    """
    inner, solver = run.inner(), run.solver
    budget = None if tail.budget is None else Budget.of(tail.budget, inner)
    state = run.begin()
    record = Record(solver, state.params)
    end, length, exact = _forward(tail, inner, solver, state, record, budget)
    if budget is not None:
        end = discount_doubt(end, solver)
    run.meter.sample()
    choose = tail.tail is None and not exact and not tail.extrapolate
    wanted = (choose or tail.extrapolate) and end.verdict.status.usable
    point, note = _extrapolated(inner, record, end) if wanted else (None, "")
    sweep = Sweep(
        inner=inner,
        solver=solver,
        kept=record.tail(length),
        allowance=float("inf") if budget is None else max(budget.left(end.steps), OMEGA * length),
        choose=choose,
        extrapolate=tail.extrapolate,
        point=point,
        note=note if tail.extrapolate else "",
    )
    if tail.extrapolate and point is not None:
        return Solution(point.params, end.state, sweep, point.residual, end.steps, end.verdict)
    return end.solution(solver.params(end.state), sweep)


def _forward(
    tail: Tail, inner: InnerProblem, solver: InnerSolver, state: InnerState, record: Record, budget: Budget | None
) -> tuple[InnerRun, int, bool]:
    """Run forward; returns the run, the longest tail to sweep, and whether just that tail is wanted."""
    dtype = tree.leaves(state.params)[0].dtype
    reserve = SAFEGUARDS if tail.extrapolate else 0.0
    if tail.tail is None and budget is not None:
        rule = Crossing(record, budget, reserve)
        run = run_inner(
            inner, with_steps(solver, int(budget.left()), dtype), state, rule.visit, at_least=rule.full_unroll
        )
        crossed = record.last == run.steps
        record.close(run.state)
        return run, rule.n, crossed
    if budget is not None:
        full = int((budget.left() - reserve) / (1.0 + OMEGA))
        length = min(tail.length(full), full)
        if length < 1:
            raise ValueError(
                f"`TruncatedUnroll.budget` {budget.total:g} leaves {budget.left():g} gradient-equivalents after the "
                "measured step size: too few for one derivative step."
            )
        solver = with_steps(solver, int(budget.left() - reserve - OMEGA * length), dtype)
        at_least = length
    else:
        limit, _ = solver.limits(dtype)
        length = tail.length(limit)
        at_least = tail.tail if isinstance(tail.tail, int) else 1 if tail.tail is not None else min(limit, AT_LEAST)

    def visit(before: InnerState) -> bool:
        record.add(before)
        index = record.last - max(length, KEPT)
        record.drop(index, index + 1)
        # Looks at a tolerance may cost gradients of their own.
        return budget is not None and budget.left(record.last) - reserve <= OMEGA * length

    run = run_inner(inner, solver, state, visit, at_least=at_least)
    record.close(run.state)
    # How many steps a fraction means is known only after a run that stops by tolerance.
    length = tail.length(run.steps) if budget is None else length
    return run, length, tail.tail is not None


@dataclass(frozen=True)
class Point:
    """The extrapolated iterate, accepted.

    Attributes:
        params: xh.
        residual: ``|grad f(xh)|``, below that of the last iterate.
    """

    params: Tree
    residual: float


def _extrapolated(inner: InnerProblem, record: Record, run: InnerRun) -> tuple[Point | None, str]:
    """Return the extrapolated iterate where it is better than the last one, else the reason why not."""
    vectors = record.end(KEPT)
    if len(vectors) < 4:
        return None, "no extrapolation: the run is too short"
    params = record.unravel(best(reduced_rank(vectors, SWEEP_ORDERS)).vector)
    residual = float(tree.norm(inner.grad(params)))
    if residual < run.residual:
        return Point(params, residual), ""
    return None, (
        f"no extrapolation: the inner gradient {residual:.2e} at the extrapolated iterate is not below "
        f"{run.residual:.2e} at the last one (far from convergence, or at rounding)"
    )


@dataclass(frozen=True)
class Sweep:
    """The pullback: sweep back over the kept states, then choose or extrapolate.

    Attributes:
        inner: the bound problem.
        solver: the inner solver.
        kept: states that the differentiated steps start from, in forward order.
        allowance: gradient-equivalents for one pullback; a step that would exceed them is not taken.
        choose: return the tail that is closest to ``g_RRE`` instead of the longest.
        extrapolate: return ``g_RRE``.
        point: the extrapolated iterate, or None where it was refused.
        note: why it was refused.
    """

    inner: InnerProblem
    solver: InnerSolver
    kept: Sequence[InnerState]
    allowance: float = float("inf")
    choose: bool = False
    extrapolate: bool = False
    point: Point | None = None
    note: str = ""

    def __call__(self, cotangent: Tree) -> Pullback:
        """Pull back one cotangent."""
        swept = self._sweep(cotangent)
        plain = Pullback(swept.total, steps=swept.steps, verdict=swept.verdict, error_note=self.note)
        # Adam's or a user's step is no linear iteration, so its adjoint sums have no limit to extrapolate to.
        if not swept.verdict.status.ok or len(swept.adjoints) < 3 or not isinstance(self.solver, LinearMultistep):
            return plain
        adjoint = best(reduced_rank([*swept.adjoints], ADJOINT_ORDERS)).vector
        if self.choose:
            return self._closest(swept, adjoint)
        if not self.extrapolate or self.point is None:
            return plain
        return self._accept(swept, adjoint, cotangent, plain)

    def _sweep(self, cotangent: Tree) -> _Swept:
        tape = _Tape(self.inner)
        ravel_x, ravel_u = tree.Raveler(cotangent), tree.Raveler(self.inner.hparams)
        memory = tree.zeros_like(self.kept[-1].memory) if self.kept else ()
        moving: Variables = (cotangent, memory)
        swept = _Swept(tree.zeros_like(self.inner.hparams))
        remember = self.choose or (self.extrapolate and self.point is not None)
        start = counted(self.inner)
        limit = self.allowance - (SAFEGUARDS - 1.0 if remember and self.extrapolate else 0.0)
        if isinstance(self.solver, LinearMultistep) and not remember:
            # Each step is one `vjp`, so that what can be paid for is known before.
            most = (min(limit, OMEGA * len(self.kept)) + 1e-9) // OMEGA
            states = list(self.kept)[-max(1, int(most)) :]
            _, total = self.solver.sweep_vjp(self.inner, states, moving)
            return _Swept(total, len(states))
        most_expensive = 0.0
        for before in reversed(self.kept):
            spent = counted(self.inner) - start
            if spent + most_expensive > limit + 1e-9:
                break
            try:
                moving, part = self.solver.step_vjp(tape, before, moving)
            except StepFailure as failure:
                swept.verdict = failure.verdict
                return swept
            most_expensive = max(most_expensive, counted(self.inner) - start - spent)
            swept.total = tree.add(swept.total, part)
            swept.steps += 1
            if remember and tape.adjoint is not None:
                swept.adjoints.append(ravel_x.ravel(tape.adjoint))
            if self.choose:
                swept.totals.append(ravel_u.ravel(swept.total))
        return swept

    def _closest(self, swept: _Swept, adjoint: Tensor) -> Pullback:
        """Return the tail whose derivative is closest to the extrapolated one."""
        params = self.point.params if self.point is not None else self.solver.params(self.kept[-1])
        cross = self.inner.linearize(params).cross(tree.Raveler(params).unravel(adjoint))
        raveler = tree.Raveler(self.inner.hparams)
        distances = torch.linalg.vector_norm(torch.stack(swept.totals) + raveler.ravel(cross), dim=1)
        index = int(torch.argmin(distances))
        return Pullback(raveler.unravel(swept.totals[index]), steps=index + 1)

    def _accept(self, swept: _Swept, adjoint: Tensor, cotangent: Tree, plain: Pullback) -> Pullback:
        """Return ``g_RRE`` if extrapolation lowered the adjoint residual, else the plain tail with the reason."""
        assert self.point is not None
        point = self.inner.linearize(self.point.params)
        raveler = tree.Raveler(cotangent)

        def residual(vector: Tensor) -> float:
            return float(tree.norm(tree.add(cotangent, point.hvp(raveler.unravel(vector)), -1.0)))

        after, before = residual(adjoint), residual(swept.adjoints[-1])
        if not after < before:
            note = f"no extrapolation: it would raise the adjoint residual from {before:.2e} to {after:.2e}"
            return Pullback(plain.hparams, steps=plain.steps, error_note=note)
        solution = raveler.unravel(adjoint)
        size = float(tree.norm(cotangent))
        relative = after / size if size > 0 else 0.0
        return Pullback(tree.scale(-1.0, point.cross(solution)), solution, relative, swept.steps)


@dataclass
class _Swept:
    """What a sweep collects."""

    total: Tree
    steps: int = 0
    verdict: Verdict = GOOD
    adjoints: deque[Tensor] = field(default_factory=lambda: deque(maxlen=ADJOINT_ORDERS[-1] + 2))
    totals: list[Tensor] = field(default_factory=list)


class _Tape(InnerProblem):
    """The bound problem, which sums up the cotangents of its gradient that a sweep meets."""

    def __init__(self, inner: InnerProblem) -> None:
        super().__init__(inner.problem, inner.hparams, inner.counts)
        self._inner = inner
        self.adjoint: Tree = None

    def linearize(self, params: Tree) -> Linearization:
        """Return the linearization at `params`, which reports its cotangents here."""
        return _TapedPoint(self, self._inner.linearize(params))

    def _grad(self, params: Tree) -> Tree:
        return self._inner._grad(params)


class _TapedPoint(Linearization):
    """A linearization that reports the cotangents of its `vjp`."""

    inner: _Tape

    def __init__(self, tape: _Tape, point: Linearization) -> None:
        super().__init__(tape, point.params)
        self._point = point

    def _vjp(self, v: Tree) -> tuple[Tree, Tree]:
        tape = self.inner
        tape.adjoint = tree.scale(-1.0, v) if tape.adjoint is None else tree.add(tape.adjoint, v, -1.0)
        return self._point._vjp(v)

    def _hvp(self, v: Tree) -> Tree:
        return self._point._hvp(v)

    def _cross(self, v: Tree) -> Tree:
        return self._point._cross(v)

    def _hvp_vjp(self, v: Tree, w: Tree) -> tuple[Tree, Tree]:
        return self._point._hvp_vjp(v, w)

    def dense_hessian(self) -> Tensor:
        return self._point.dense_hessian()
