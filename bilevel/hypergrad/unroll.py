"""Unrolled differentiation: the derivative of the iterate, not of the solution.

With one inner step ``x_{k+1} = A(x_k, u)``, ``A_k = dA/dx`` and ``B_k = dA/du`` at step k:

    forward    X_{k+1} = A_k X_k + B_k
    reverse    w_K = w;   for k = K-1, ..., K-N:   u' += B_k' w_{k+1},   w_k = A_k' w_{k+1}

N = K is the full unroll; N < K the truncated one (late start), which differentiates the last N steps as if the state
at step K - N did not depend on u: its whole state, momentum included, is a constant. Both directions compute the same
number. (Mehmood et al. 2026, sections 2 and 4; Scieur et al. 2022.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Pullback, Solution, Variables
from bilevel.core import rows, tree
from bilevel.core.autograd import edges, vector_jacobian
from bilevel.core.declared import deprecated_options
from bilevel.core.options import option, require
from bilevel.core.status import StepFailure
from bilevel.core.tree import Tree
from bilevel.engine.checkpointing import CheckpointedStates
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import run_inner
from bilevel.engine.rows_loop import RowStates, swept_rows
from bilevel.hypergrad.adaptive_unroll import AdaptiveUnroll
from bilevel.hypergrad.flat_unroll import pushed, unrolled
from bilevel.hypergrad.tail import check_length, is_tail, length_of, refuse_fixed
from bilevel.oracles.differentiable import DifferentiableInner
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class FullUnroll(HypergradEstimator):
    """Differentiate every inner step; at least one is taken, however good the start.

    Args:
        mode: "reverse" (cost independent of the number of hyperparameters) or "forward" (memory independent of the
            number of steps, one `jvp` for each step and hyperparameter: for few hyperparameters).
        memory: in reverse mode, "iterates" stores the inner states and linearises again on the way back (one state for
            each step); "checkpoint" stores about 2 sqrt(steps) of them and takes the steps between again, to the same
            numbers bit for bit (one more inner run of work); "graph" lets autograd record every operation of the losses
            as they are written, closed-form oracles aside (faster for large nets, much more memory).

    >>> FullUnroll(mode="forward")
    FullUnroll(mode='forward', memory='iterates')
    """

    mode: str = option("reverse", "'reverse' or 'forward'", ("reverse", "forward").__contains__)
    memory: str = option(
        "iterates", "'iterates', 'checkpoint' or 'graph'", ("iterates", "checkpoint", "graph").__contains__
    )

    requires = frozenset({"differentiable_steps"})
    taskwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # Forward mode keeps neither, so what is asked for besides is a misunderstanding.
        stored = self.mode == "reverse" or self.memory == "iterates"
        require(self, "memory", "'iterates' (the default) where mode='forward'", stored)

    @property
    def differentiates_steps(self) -> bool:
        return True

    @property
    def rowwise(self) -> bool:
        return self.memory == "iterates"

    def by_graph(self) -> HypergradEstimator:
        return GRAPH if self.rowwise and self.mode == "reverse" else self

    def at_tolerance(self, tol: float) -> FullUnroll:
        """Return itself: the inner tolerance is all there is."""
        return self

    def solve(self, run: Run) -> Solution:
        if self.mode == "forward":
            return pushed(run) or _forward(run)
        if self.memory == "graph":
            return _graph(run)
        if self.memory == "iterates":
            return _unrolled(run, lambda steps: steps, 1)
        if (flat := unrolled(run, lambda steps: steps, kept=False)) is not None:
            return flat
        kept = CheckpointedStates(run.inner(), run.solver, run.meter.sample)
        return _reverse(run, run.solve(kept.append, at_least=1), kept)


@dataclass(frozen=True)
class TruncatedUnroll(HypergradEstimator):
    """Differentiate the last inner steps alone.

    Only the states of the tail are kept. Starting the derivative late removes most of the curse of unrolling: the error
    of a long unroll that began far from the solution (Mehmood et al. 2026, Theorem 8).

    Args:
        tail: number of last steps that are differentiated (an int), or their fraction of the steps (a float in (0, 1]).
            With a tolerance, at least `tail` steps are taken (one, for a fraction): a warm start that is already good
            enough would leave nothing to differentiate, and a hypergradient of zero.
        budget: deprecated, as ``tail="auto"`` is: `AdaptiveUnroll`.
        extrapolate: deprecated: `AdaptiveUnroll`.

    >>> TruncatedUnroll(tail=0.5).length(100)
    50
    """

    tail: int | float | str
    budget: float | None = None
    extrapolate: bool = False

    requires = frozenset({"differentiable_steps"})

    def __post_init__(self) -> None:
        if self.successor is not None:
            deprecated_options(self, self.successor)
            return
        require(self, "tail", "a positive int (steps) or a float in (0, 1] (fraction)", is_tail(self.tail))

    @property
    def successor(self) -> AdaptiveUnroll | None:
        """The estimator that deprecated options stand for."""
        if self.tail == "auto" or self.budget is not None or self.extrapolate is not False:
            return AdaptiveUnroll(self.budget, self.tail, self.extrapolate)
        return None

    @property
    def differentiates_steps(self) -> bool:
        return self.successor is None or self.successor.differentiates_steps

    @property
    def rowwise(self) -> bool:
        return self.successor is None

    @property
    def taskwise(self) -> bool:
        return self.successor is None

    def length(self, steps: int) -> int:
        """Return the number of differentiated steps among `steps`; for "auto" the most there can be."""
        return length_of(self.tail, steps)

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Refuse a tail longer than the run, too; ValueError says so."""
        if self.successor is not None:
            return self.successor.check(problem, solver, hparams)
        super().check(problem, solver, hparams)
        check_length(self, solver)

    def at_tolerance(self, tol: float) -> HypergradEstimator:
        """Return itself for a fraction, which grows with the run; ValueError for a tail of a fixed length."""
        if self.successor is not None:
            return self.successor.at_tolerance(tol)
        refuse_fixed(self.tail)
        return self

    def solve(self, run: Run) -> Solution:
        if self.successor is not None:
            return self.successor.solve(run)
        return _unrolled(run, self.length, self.tail if isinstance(self.tail, int) else 1)


def _unrolled(run: Run, length: Callable[[int], int], at_least: int) -> Solution:
    """Run the solver, keep the states of the tail (`length`: steps taken -> steps differentiated), and sweep back."""
    if (flat := unrolled(run, length, at_least)) is not None:
        return flat
    most = length(run.solver.limits(tree.leaves(run.params)[0].dtype)[0])
    if run.problem.batch is not None:
        states = RowStates(most)
        end = run.solve(states.visit, at_least=at_least)
        run.meter.sample()
        return end.solution(run.solver.params(end.state), swept_rows(run.inner(), end, states, length))
    # How many steps a fraction means is known only after a run that stops by tolerance.
    kept: deque[InnerState] = deque(maxlen=most)
    end = run.solve(kept.append, at_least=at_least)
    while len(kept) > length(max(end.steps, 1)):
        kept.popleft()
    return _reverse(run, end, kept)


def _reverse(run: Run, end: InnerRun, kept: Sequence[InnerState]) -> Solution:
    """Sweep back over the states that a run has kept."""
    run.meter.sample()
    inner, solver = run.inner(), run.solver

    def pullback(cotangent: Tree) -> Pullback:
        try:
            _, total = solver.sweep_vjp(inner, kept, (cotangent, tree.zeros_like(end.state.memory)))
        except StepFailure as failure:
            return Pullback(tree.zeros_like(inner.hparams), steps=len(kept), verdict=failure.verdict)
        return Pullback(total, steps=len(kept))

    return end.solution(solver.params(end.state), pullback)


@dataclass(frozen=True)
class _Graph(HypergradEstimator):
    """`FullUnroll` with ``memory="graph"``, whose graph goes while it is swept: for one pullback."""

    @property
    def differentiates_steps(self) -> bool:
        return True

    def solve(self, run: Run) -> Solution:
        return _graph(run, again=False)


GRAPH = _Graph()


def _graph(run: Run, again: bool = True) -> Solution:
    """Let autograd record the whole run; `again`: whether its pullback may be called more than once."""
    inner, solver, hparams = run.inner(), run.solver, tree.attach(run.inner().hparams)
    recorded = DifferentiableInner(inner, hparams, graph=True)
    moving = run.problem.moving_start(hparams)
    first = run.begin() if moving is None else solver.cold_state(recorded, moving)
    end = run_inner(recorded, solver, first, at_least=1, record=True)
    run.meter.sample()
    result, roots, steps = edges(tree.leaves(solver.params(end.state))), tree.leaves(hparams), end.steps

    def pullback(cotangent: Tree) -> Pullback:
        # The recorded graph calls no oracle on the way back; its work is one VJP for each step.
        inner.counts["vjp"] += steps
        products = vector_jacobian(result, roots, tree.leaves(cotangent), retain_graph=again)
        return Pullback(tree.rebuild(hparams, products), steps=steps)

    params, memory = tree.detach(end.state.variables)
    end = replace(end, state=replace(end.state, params=params, memory=memory))
    return end.solution(solver.params(end.state), pullback)


def _forward(run: Run) -> Solution:
    """Carry one tangent for each scalar hyperparameter along with the run; of rows, the same one for all."""
    inner, solver, size, state = run.inner(), run.solver, run.problem.batch, run.begin()
    raveler = rows.raveler(inner.hparams, size)
    directions = raveler.units()
    zero: Variables = (tree.zeros_like(state.params), tree.zeros_like(state.memory))
    tangents: list[Variables] = [zero] * len(directions)
    runner = solver if size is None else solver.for_rows(state)

    def push(before: InnerState, moving: Tensor | None = None, end: int = 0) -> None:
        after = runner.step_jvp(inner.on_step(before.index), before, tangents, directions)
        if moving is not None:
            after = [rows.where(moving, new, old) for new, old in zip(after, tangents, strict=True)]
        tangents[:] = after

    end = run_inner(inner, solver, state, push, at_least=1)
    run.meter.sample()

    def pullback(cotangent: Tree) -> Pullback:
        products = torch.stack([rows.dot(by_params, cotangent, size) for by_params, _ in tangents], dim=-1)
        return Pullback(raveler.unravel(products), steps=end.steps)

    return end.solution(solver.params(end.state), pullback)
