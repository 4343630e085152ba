"""The numbers of a step of a linear multistep method, and of members that have step sizes of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.base import InnerState
from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.rows import Weight
from bilevel.inner.coefficient_step import CoefficientStep

Numbers: TypeAlias = tuple[tuple[int, float], ...]
Pairs: TypeAlias = tuple[tuple[int, Weight], ...]
AHEAD = 64
"""Steps whose coefficients are made at once, at least; then as many again as there are."""


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one step; constants of the differentiation.

    Make them once for each set of values (``functools.lru_cache``): the sparse forms that the sweeps use are prepared
    here, because a step of a small problem takes little longer than the Python around it.

    Args:
        read: p weights of the point where the gradient is evaluated.
        mix: p rows of p weights, the new vectors from the old.
        write: p weights of the gradient in the new vectors.
    """

    read: tuple[float, ...]
    mix: tuple[tuple[float, ...], ...]
    write: tuple[float, ...]
    reads: Numbers = field(init=False, repr=False)
    writes: Numbers = field(init=False, repr=False)
    rows: tuple[Numbers, ...] = field(init=False, repr=False)
    columns: tuple[Numbers, ...] = field(init=False, repr=False)

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
            object.__setattr__(self, name, value)


def _nonzero(weights: Sequence[float]) -> Numbers:
    return tuple((index, weight) for index, weight in enumerate(weights) if weight != 0)


@dataclass(frozen=True)
class BatchCoefficients:
    """The numbers of one step; those that differ by member are tensors of shape (members,)."""

    reads: Pairs
    writes: Pairs
    rows: tuple[Pairs, ...]
    columns: tuple[Pairs, ...]

    @classmethod
    def of(cls, each: Sequence[Coefficients], like: Tensor) -> BatchCoefficients:
        """Return the numbers of all members, those that agree as floats."""

        def joined(values: Sequence[float]) -> Weight:
            agree = all(value == values[0] for value in values)
            return values[0] if agree else torch.tensor(values, dtype=like.dtype, device=like.device)

        def pairs(vectors: Sequence[Sequence[float]]) -> Pairs:
            weights = enumerate(joined(values) for values in zip(*vectors, strict=True))
            return tuple((index, weight) for index, weight in weights if isinstance(weight, Tensor) or weight != 0)

        count = range(len(each[0].read))
        return cls(
            reads=pairs([one.read for one in each]),
            writes=pairs([one.write for one in each]),
            rows=tuple(pairs([(*one.mix[j], one.write[j]) for one in each]) for j in count),
            columns=tuple(pairs([(*(row[i] for row in one.mix), one.read[i]) for one in each]) for i in count),
        )


@dataclass(frozen=True)
class MemberwiseMultistep(CoefficientStep):
    """The steps of a linear multistep method, with the coefficients of each member.

    Args:
        of: the method's `coefficients` of one member.
        settled: whether they no longer change after the first step.
        state: the state of the batch, whose measured numbers are used.
    """

    of: Callable[[InnerState], Coefficients] = field(kw_only=True)
    settled: bool = field(kw_only=True)
    state: InnerState = field(kw_only=True, repr=False)
    numbers: list[BatchCoefficients] = field(default_factory=list, kw_only=True, repr=False, compare=False)

    weighted_sum = staticmethod(members.weighted_sum)

    def coefficients(self, state: InnerState) -> BatchCoefficients:
        """Return the numbers of the step that starts from `state`."""
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
        self.numbers.extend(BatchCoefficients.of(each, like) for each in zip(*tables, strict=True))
