"""An inner solver whose states hold running statistics besides what it moves.

With x the trainable part, b the running statistics and s those of the step's batch, one step and its VJP are

    x, memory <- A(x, memory, u),           b <- (1 - m) b + m s(x, u)
    x', u' <- (VJP of A) + m s(x, u)' b',   b' <- (1 - m) b'

so that an unroll differentiates the statistics of the whole run exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from bilevel.base import InnerSolver, InnerState, Variables
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.lanczos import Spectrum
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.linearization import pushforward
from bilevel.oracles.problem import BilevelProblem


def with_statistics(problem: BilevelProblem, solver: InnerSolver) -> InnerSolver:
    """Return the solver that runs a problem: the given one, unless running statistics move beside it."""
    if problem.statistics is None:
        return solver
    return MovingStatistics(solver=solver, steps=solver.steps, tol=solver.tol)


@dataclass(frozen=True)
class MovingStatistics(InnerSolver):
    """The steps of an inner solver, each with the move of the running statistics.

    The statistics are those of the batch at the iterate that the step starts from, as in a training loop.

    Args:
        solver: it sees the trainable part of params alone.
    """

    solver: InnerSolver = field(kw_only=True)

    @property
    def title(self) -> str:
        """The name of the solver."""
        return self.solver.title

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        """Return the state before the first step."""
        return _joined(params, self.solver.init(inner, inner.trainable(params)))

    def at_rest(self, inner: InnerProblem, params: Tree) -> InnerState:
        """Return a state for a later warm start."""
        return _joined(params, self.solver.at_rest(inner, inner.trainable(params)))

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Take one step."""
        after = self.solver.step(inner, _part(inner, state))
        return _joined(inner.statistics_after(state.params), after)

    def params(self, state: InnerState) -> Tree:
        """Return the solution with the statistics."""
        solution = self.solver.params(state)
        return solution if solution is state.params else state.params | solution

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Keep what the solver keeps, and the statistics."""
        return _joined(state.params, self.solver.warm_start(inner, _part(inner, state)))

    def off_solution(self, problem: BilevelProblem) -> str:
        """Return the solver's reason."""
        return self.solver.off_solution(problem)

    def advice(self, state: InnerState, spectrum: Spectrum) -> str:
        """Return the solver's clause."""
        return self.solver.advice(state, spectrum)

    def limits(self, dtype: torch.dtype) -> tuple[int, float | None]:
        """Return (most steps, tolerance or None)."""
        return self.solver.limits(dtype)

    def sweep_vjp(
        self, inner: InnerProblem, states: Sequence[InnerState], cotangent: Variables
    ) -> tuple[Variables, Tree]:
        """Pull a cotangent back through all steps; one that leaves the statistics out, by the solver's own sweep."""
        by_params, by_memory = cotangent
        x = inner.trainable(by_params)
        if any(bool(part.any()) for name, part in by_params.items() if name not in x):
            return super().sweep_vjp(inner, states, cotangent)
        (x, by_memory), total = self.solver.sweep_vjp(inner, [_part(inner, state) for state in states], (x, by_memory))
        return (by_params | x, by_memory), total

    def step_vjp(self, inner: InnerProblem, state: InnerState, cotangent: Variables) -> tuple[Variables, Tree]:
        """Pull a cotangent back through one step."""
        by_params, by_memory = cotangent
        x = inner.trainable(by_params)
        (x, by_memory), total = self.solver.step_vjp(inner, _part(inner, state), (x, by_memory))
        inner.counts["gradient"] += 1
        before, hparams, after = _graph(inner, state)
        roots = tree.leaves(before) + tree.leaves(hparams)
        products = torch.autograd.grad(
            list(after.values()), roots, [by_params[name] for name in after], materialize_grads=True
        )
        cut = len(before)
        moved = tree.rebuild(before, products[:cut])
        return (moved | tree.add(inner.trainable(moved), x), by_memory), tree.add(
            total, tree.rebuild(hparams, products[cut:])
        )

    def step_jvp(
        self, inner: InnerProblem, state: InnerState, tangents: Sequence[Variables], hparams_tangents: Sequence[Tree]
    ) -> list[Variables]:
        """Push tangents forward through one step."""
        parts = [(inner.trainable(by_params), by_memory) for by_params, by_memory in tangents]
        results = self.solver.step_jvp(inner, _part(inner, state), parts, hparams_tangents)
        before, hparams, after = _graph(inner, state)
        push = pushforward(tree.leaves(after), tree.leaves(before) + tree.leaves(hparams))
        joined: list[Variables] = []
        for (by_params, _), by_hparams, (x, by_memory) in zip(tangents, hparams_tangents, results, strict=True):
            inner.counts["gradient"] += 1
            moved = tree.rebuild(after, push(tree.leaves(by_params) + tree.leaves(by_hparams)))
            joined.append((x | moved, by_memory))
        return joined


def _part(inner: InnerProblem, state: InnerState) -> InnerState:
    """Return the state that the solver sees."""
    return replace(state, params=inner.trainable(state.params))


def _joined(statistics: Tree, state: InnerState) -> InnerState:
    """Return the solver's state with the statistics, after the parameters."""
    return replace(state, params=state.params | {k: b for k, b in statistics.items() if k not in state.params})


def _graph(inner: InnerProblem, state: InnerState) -> tuple[Tree, Tree, Tree]:
    """Return (params, hparams, statistics after the step) with the graph between them."""
    before, hparams = tree.attach(state.params), tree.attach(inner.hparams)
    with torch.enable_grad():
        return before, hparams, inner.problem.statistics.after(inner.problem, before, hparams)
