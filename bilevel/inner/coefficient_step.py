"""The step that all linear multistep methods share, forwards and backwards: see `bilevel.inner.multistep`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bilevel.base import InnerSolver, InnerState, Traits, Variables
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem


@dataclass(frozen=True)
class CoefficientStep(InnerSolver):
    """A step made of the numbers that `coefficients` returns, and its hand-written VJP and JVP."""

    traits = Traits(rowwise=True)
    weighted_sum: ClassVar[Callable[..., Tree]] = staticmethod(tree.weighted_sum)
    """How vectors are combined; with coefficients for each member, row by row."""

    @abstractmethod
    def coefficients(self, state: InnerState) -> Any:
        """Return the numbers of the step that starts from `state`: (index, weight) pairs, zeros left out.

        Returns:
            `reads` (of the point where the gradient is evaluated), `writes` (of the gradient in the new vectors),
            `rows` (the new vectors from the old and the gradient) and `columns` (the same, transposed).
        """

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        numbers, weighted_sum = self.coefficients(state), self.weighted_sum
        vectors = (state.params, *state.memory)
        terms = (*vectors, inner.grad(weighted_sum(numbers.reads, vectors)))
        params, *memory = [weighted_sum(row, terms) for row in numbers.rows]
        return state.moved(params, tuple(memory))

    def step_vjp(self, inner: InnerProblem, state: InnerState, cotangent: Variables) -> tuple[Variables, Tree]:
        """Pull a cotangent back through one step by one `vjp` oracle call."""
        numbers, weighted_sum = self.coefficients(state), self.weighted_sum
        after = (cotangent[0], *cotangent[1])
        point = inner.linearize(weighted_sum(numbers.reads, (state.params, *state.memory)))
        by_point, by_hparams = point.vjp(weighted_sum(numbers.writes, after))
        terms = (*after, by_point)
        params, *memory = [weighted_sum(column, terms) for column in numbers.columns]
        return (params, tuple(memory)), by_hparams

    def step_jvp(
        self, inner: InnerProblem, state: InnerState, tangents: Sequence[Variables], hparams_tangents: Sequence[Tree]
    ) -> list[Variables]:
        """Push tangents forward through one step: one linearization, one `jvp` for each direction."""
        numbers, weighted_sum = self.coefficients(state), self.weighted_sum
        point = inner.linearize(weighted_sum(numbers.reads, (state.params, *state.memory)))
        results: list[Variables] = []
        for (by_params, by_memory), hparams_tangent in zip(tangents, hparams_tangents, strict=True):
            before = (by_params, *by_memory)
            terms = (*before, point.jvp(weighted_sum(numbers.reads, before), hparams_tangent))
            params, *memory = [weighted_sum(row, terms) for row in numbers.rows]
            results.append((params, tuple(memory)))
        return results
