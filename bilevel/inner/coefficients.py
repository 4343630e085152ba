"""The step that all linear multistep methods share, forwards and backwards, and its numbers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Traits, Variables
from bilevel.core import rows, tree
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem

Number: TypeAlias = Any
"""A float; of rows that differ, a tensor of shape (rows,)."""
Pairs: TypeAlias = tuple[tuple[int, Number], ...]
AHEAD = 64
"""Steps whose coefficients are made at once, at least; then as many again as there are."""


@dataclass(frozen=True)
class CoefficientStep(InnerSolver):
    """A step made of the numbers that `coefficients` returns, and its hand-written VJP and JVP."""

    traits = Traits(rowwise=True)
    weighted_sum: ClassVar[Callable[..., Tree]] = staticmethod(tree.weighted_sum)
    """How vectors are combined; with coefficients for each member, row by row."""

    @abstractmethod
    def coefficients(self, state: InnerState) -> Any:
        """Return the numbers of the step that starts from `state`: (index, weight) pairs, zeros left out.

        They are `reads` (of the point where the gradient is evaluated), `writes` (of the gradient in the new vectors),
        `rows` (the new vectors from the old and the gradient) and `columns` (the same, transposed).
        """

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        numbers, weighted_sum = self.coefficients(state), self.weighted_sum
        vectors = (state.params, *state.memory)
        terms = (*vectors, inner.grad(weighted_sum(numbers.reads, vectors)))
        params, *memory = [weighted_sum(row, terms) for row in numbers.rows]
        return state.moved(params, tuple(memory))

    def step_vjp(
        self, inner: InnerProblem, state: InnerState, cotangent: Variables, see: Callable[[Tree], None] | None = None
    ) -> tuple[Variables, Tree]:
        """Pull a cotangent back through one step by one `vjp` call; `see` is shown the cotangent of the gradient."""
        numbers, weighted_sum = self.coefficients(state), self.weighted_sum
        after = (cotangent[0], *cotangent[1])
        point = inner.linearize(weighted_sum(numbers.reads, (state.params, *state.memory)))
        by_gradient = weighted_sum(numbers.writes, after)
        if see is not None:
            see(by_gradient)
        by_point, by_hparams = point.vjp(by_gradient)
        terms = (*after, by_point)
        params, *memory = [weighted_sum(column, terms) for column in numbers.columns]
        return (params, tuple(memory)), by_hparams

    def step_jvp(
        self, inner: InnerProblem, state: InnerState, tangents: Sequence[Variables], hparams_tangents: Sequence[Tree]
    ) -> list[Variables]:
        numbers, weighted_sum = self.coefficients(state), self.weighted_sum
        point = inner.linearize(weighted_sum(numbers.reads, (state.params, *state.memory)))
        results: list[Variables] = []
        for (by_params, by_memory), hparams_tangent in zip(tangents, hparams_tangents, strict=True):
            before = (by_params, *by_memory)
            terms = (*before, point.jvp(weighted_sum(numbers.reads, before), hparams_tangent))
            params, *memory = [weighted_sum(row, terms) for row in numbers.rows]
            results.append((params, tuple(memory)))
        return results


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one step, of rows tensors of shape (rows,) where they differ; constants of the differentiation.

    Make them once for each set of values (``functools.lru_cache``): the sparse forms that the sweeps use are prepared
    here.

    Args:
        read: p weights of the point where the gradient is evaluated.
        mix: p rows of p weights, the new vectors from the old.
        write: p weights of the gradient in the new vectors.
    """

    read: tuple[Number, ...]
    mix: tuple[tuple[Number, ...], ...]
    write: tuple[Number, ...]
    reads: Pairs = field(init=False, repr=False)
    writes: Pairs = field(init=False, repr=False)
    rows: tuple[Pairs, ...] = field(init=False, repr=False)
    columns: tuple[Pairs, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = tuple(_nonzero((*row, weight)) for row, weight in zip(self.mix, self.write, strict=True))
        transposed = zip(*self.mix, strict=True)
        columns = tuple(_nonzero((*column, weight)) for column, weight in zip(transposed, self.read, strict=True))
        for name, value in (
            ("reads", _nonzero(self.read)),
            ("writes", _nonzero(self.write)),
            ("rows", rows),
            ("columns", columns),
        ):
            object.__setattr__(self, name, value)  # frozen: what follows from the fields is set once, here

    @classmethod
    def of_rows(cls, each: Sequence[Coefficients], like: Tensor) -> Coefficients:
        """Return the numbers of rows, from those of each: what agrees as one, the rest in the dtype of `like`."""

        def joined(rows: Sequence[tuple[Number, ...]]) -> tuple[Number, ...]:
            columns = list(zip(*rows, strict=True))
            return tuple(c[0] if all(weight == c[0] for weight in c) else like.new_tensor(c) for c in columns)

        mix = tuple(joined(rows) for rows in zip(*[one.mix for one in each], strict=True))
        return cls(joined([one.read for one in each]), mix, joined([one.write for one in each]))


def _nonzero(weights: Sequence[Number]) -> Pairs:
    return tuple((index, weight) for index, weight in enumerate(weights) if isinstance(weight, Tensor) or weight != 0)


@dataclass(frozen=True)
class RowwiseMultistep(CoefficientStep):
    """The steps of a linear multistep method whose `coefficients` are `of`, with those of each member.

    `settled` says whether they no longer change after the first step; the measured numbers are those of `state`.
    """

    of: Callable[[InnerState], Coefficients] = field(kw_only=True)
    settled: bool = field(kw_only=True)
    state: InnerState = field(kw_only=True, repr=False)
    numbers: list[Coefficients] = field(default_factory=list, kw_only=True, repr=False, compare=False)

    weighted_sum = staticmethod(rows.weighted_sum)

    def coefficients(self, state: InnerState) -> Coefficients:
        index = min(state.steps, 1) if self.settled else state.steps
        while index >= len(self.numbers):
            self._extend(2 if self.settled else max(AHEAD, len(self.numbers)))
        return self.numbers[index]

    def _extend(self, count: int) -> None:
        """Make the numbers of further steps, member by member: each method's table is then made once for a member."""
        (like, *_) = tree.leaves(self.state.params)
        steps = range(len(self.numbers), len(self.numbers) + count)
        states = [self.state.row(index) for index in range(len(like))]
        measured = [all(math.isfinite(value) for value in state.measured.values()) for state in states]
        donor = states[measured.index(True)]
        tables = []
        for state, ok in zip(states, measured, strict=True):
            table = [self.of(replace(state if ok else donor, steps=step)) for step in steps]
            # A member without numbers of its own must not go on with another's: its first step makes it NaN.
            tables.append(table if ok else [replace(one, write=(math.nan,) * len(one.write)) for one in table])
        self.numbers.extend(Coefficients.of_rows(each, like) for each in zip(*tables, strict=True))


Numbers: TypeAlias = tuple[Coefficients, ...]
"""The numbers of one step: of all elements of a batch alike, or one for each."""
Part: TypeAlias = tuple[Numbers, int]
"""Steps that share their numbers, and how many they are."""


class ReadsIterateError(ValueError):
    """Coefficients that depend on the iterate: those of no linear method."""


def schedule(solver: CoefficientStep, states: Sequence[InnerState], first: int, last: int) -> Iterator[Part]:
    """Yield the numbers of the steps first, ..., last - 1, equal neighbours as one with their count.

    They are asked for without an iterate; ReadsIterateError says that they depend on it.
    """

    def numbers(index: int) -> Numbers:
        at = [InnerState(None, (), state.steps + index, state.measured) for state in states]
        try:
            return tuple(map(solver.coefficients, at))
        except (AttributeError, TypeError) as error:
            raise ReadsIterateError(
                f"{type(solver).__name__}.coefficients fails without an iterate ({error}), and with one they are those "
                "of no linear method: use FullUnroll()."
            ) from error

    def settled(index: int) -> bool:
        return solver.traits.stationary_from is not None and states[0].steps + index >= solver.traits.stationary_from

    index, here = first, numbers(first)
    while index < last:
        end, following = last if settled(index) else index + 1, here
        while end < last and (following := numbers(end)) == here:
            end = last if settled(end) else end + 1
        yield here, end - index
        index, here = end, following
