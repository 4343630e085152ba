"""Running statistics beside the inner variable: the oracles of a problem whose params hold both.

Params are the trainable parameters x and the running statistics b. The inner loss depends on x alone, so every oracle
works on x; b moves with each step by ``b <- (1 - m) b + m s(x, u)``, s the statistics of the step's batch. At a
solution x the statistics of the inner batch are at rest: ``b = s(x, u)``.

One step of a solver ``A`` and its VJP are

    x, memory <- A(x, memory, u),           b <- (1 - m) b + m s(x, u)
    x', u' <- (VJP of A) + m s(x, u)' b',   b' <- (1 - m) b'

so that an unroll differentiates the statistics of the whole run exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Variables
from bilevel.core import tree
from bilevel.core.autograd import pushforward
from bilevel.core.tree import Tree
from bilevel.networks.batch_norm import Tape
from bilevel.networks.functional import FunctionalModule
from bilevel.numerics.lanczos import Spectrum
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.tracing import TracedInner


class RunningStatistics:
    """How the running statistics of a problem move."""

    def __init__(self, functional: FunctionalModule) -> None:
        self._functional, self._layers = functional, functional.batch_norm
        self.recording = self._layers.recording

    def trainable(self, params: Tree) -> Tree:
        """Return the trainable part of params; what holds no statistics is returned as it is."""
        if len(params) == len(self._functional.params):
            return params
        return {name: params[name] for name in self._functional.params}

    def completed(self, params: Tree) -> Tree:
        """Return params with the module's own statistics where they hold none; ValueError where a parameter lacks."""
        start = self._functional.params | self._functional.statistics
        if missing := [name for name in self._functional.params if name not in params]:
            raise ValueError(f"`params` lacks the parameter {missing[0]!r} of the module.")
        return {name: params.get(name, value) for name, value in start.items()}

    def moved(self, params: Tree, tape: Tape) -> Tree:
        """Return the statistics of params after the recorded batches."""
        return self._layers.moved(self._of(params), tape)

    def after(self, problem: Any, params: Tree, hparams: Tree) -> Tree:
        """Return the statistics of params after a step of the problem from there, with their graph."""
        return self.moved(params, self.record(problem, self.trainable(params), hparams))

    def equilibrium(self, problem: Any, params: Tree, hparams: Tree) -> Tree:
        """Return params with statistics that the problem's batch no longer moves, with their graph."""
        x = self.trainable(params)
        return x | self._layers.equilibrium(self._of(params), self.record(problem, x, hparams))

    def record(self, problem: Any, x: Tree, hparams: Tree) -> Tape:
        """Run the inner loss and return what its layers saw."""
        with self.recording() as tape:
            problem.inner_loss(x, hparams)
        return tape

    def _of(self, params: Tree) -> Tree:
        return {name: params.get(name, value) for name, value in self._functional.statistics.items()}


class StatisticsInner(InnerProblem):
    """An inner problem whose params may hold running statistics: its oracles take them and work on the rest."""

    augmented = True
    _split: tuple[Tree, Tree] | None = None
    _seen: tuple[Tree, Tape] | None = None

    def trainable(self, params: Tree) -> Tree:
        """Return the trainable part of params, the same object as long as params are: kept gradients stay valid."""
        if self._split is None or self._split[0] is not params:
            x = self.problem.trainable(params)
            if x is params:
                return x
            self._split = (params, x)
        return self._split[1]

    def unmoved(self, before: Tree, after: Tree) -> bool:
        pairs = zip(*(tree.leaves(self.problem.trainable(each)) for each in (before, after)), strict=True)
        return all(old is new for old, new in pairs)

    def value(self, params: Tree) -> Tensor:
        return super().value(self.trainable(params))

    def grad(self, params: Tree) -> Tree:
        return super().grad(self.trainable(params))

    def linearize(self, params: Tree) -> Linearization:
        return super().linearize(self.trainable(params))

    def curvature(self, params: Tree) -> Spectrum:
        return super().curvature(self.trainable(params))

    def statistics_after(self, params: Tree) -> Tree:
        """Return the statistics after a step from params; where the last gradient was taken there, at no cost."""
        x = self.trainable(params)
        if self._seen is None or self._seen[0] is not x:
            self.counts["value"] += 1
            with torch.no_grad():
                self._seen = (x, self.problem.statistics.record(self.problem, x, self.hparams))
        return self.problem.statistics.moved(params, self._seen[1])

    def equilibrium(self, params: Tree) -> Tree:
        self.counts["value"] += 1
        with torch.no_grad():
            return self.problem.statistics.equilibrium(self.problem, params, self.hparams)

    def equilibrium_vjp(self, params: Tree, cotangent: Tree) -> tuple[Tree, Tree]:
        self.counts["gradient"] += 1
        x, hparams = tree.attach(self.trainable(params)), tree.attach(self.hparams)
        with torch.enable_grad():
            rest = self.problem.statistics.equilibrium(self.problem, x, hparams)
        roots = tree.leaves(x) + tree.leaves(hparams)
        moving = [(rest[name], part) for name, part in cotangent.items() if rest[name].requires_grad]
        products = torch.autograd.grad([b for b, _ in moving], roots, [c for _, c in moving], materialize_grads=True)
        cut = len(tree.leaves(x))
        return tree.rebuild(x, products[:cut]), tree.rebuild(hparams, products[cut:])

    def _forget(self) -> None:
        super()._forget()
        self._seen = None

    def _grad(self, params: Tree) -> Tree:
        with self.problem.statistics.recording() as tape:
            gradient = super()._grad(params)
        self._seen = (params, [(name, mean.detach(), variance.detach()) for name, mean, variance in tape])
        return gradient


class TracedStatisticsInner(TracedInner, StatisticsInner):
    """One with recorded oracles; the statistics of a step then take a look at the loss of their own."""


@dataclass(frozen=True)
class MovingStatistics(InnerSolver):
    """The steps of an inner solver, which sees the trainable part of params, and the move of the running statistics.

    The statistics are those of the batch at the iterate that the step starts from, as in a training loop.
    """

    solver: InnerSolver = field(kw_only=True)

    @property
    def title(self) -> str:
        return self.solver.title

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        return _joined(params, self.solver.init(inner, inner.trainable(params)))

    def cold_state(self, inner: InnerProblem, params: Tree) -> InnerState:
        return _joined(params, self.solver.cold_state(inner, inner.trainable(params)))

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        after = self.solver.step(inner, _part(inner, state))
        return _joined(_after(inner, state.params), after)

    def params(self, state: InnerState) -> Tree:
        solution = self.solver.params(state)
        return solution if solution is state.params else state.params | solution

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        return _joined(state.params, self.solver.warm_start(inner, _part(inner, state)))

    def bias_reason(self, problem: BilevelProblem) -> str:
        return self.solver.bias_reason(problem)

    def advice(self, state: InnerState, spectrum: Spectrum) -> str:
        return self.solver.advice(state, spectrum)

    def limits(self, dtype: torch.dtype) -> tuple[int, float | None]:
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
    return replace(state, params=inner.trainable(state.params))


def _joined(statistics: Tree, state: InnerState) -> InnerState:
    """Return the solver's state with the statistics, after the parameters."""
    return replace(state, params=state.params | {k: b for k, b in statistics.items() if k not in state.params})


def _graph(inner: InnerProblem, state: InnerState) -> tuple[Tree, Tree, Tree]:
    """Return (params, hparams, statistics after the step) with the graph between them."""
    before, hparams = tree.attach(state.params), tree.attach(inner.hparams)
    with torch.enable_grad():
        return before, hparams, inner.problem.statistics.after(inner.problem, before, hparams)


def _after(inner: InnerProblem, params: Tree) -> Tree:
    """Return the statistics after a step; inside an autograd graph, with their graph."""
    if isinstance(inner, StatisticsInner):  # inside a graph a `DifferentiableInner` stands for it
        return inner.statistics_after(params)
    inner.counts["value"] += 1
    return inner.problem.statistics.after(inner.problem, params, inner.hparams)
