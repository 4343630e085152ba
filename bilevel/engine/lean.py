"""Unrolled differentiation of linear multistep solvers on flat vectors: two kernels and one small product a step.

It computes what `step` and `sweep_vjp` of `bilevel.inner.multistep` compute, without a tree, a state or a closure
inside K steps. Steps with the same numbers on a quadratic are doubled (`bilevel.engine.affine`); all others are made
one after the other, on blocks of memory that are made once:

    forward    block k holds (g, [y,] s_1, ..., s_p):    y = read's,   g = grad(y),   s+ = [write, mix] (g, s)
    back       block k holds (y', [g',] a_1, ..., a_p):  g' = write'a,   y' = H' g',   a- = [read, mix'] (y', a)

y is a row of its own unless the gradient is taken at one of the stored vectors, and g' unless it goes to one of them.
It is made of the rounded vectors, as the steps make it: made of those before them, by products of the numbers, it would
cost two digits where a momentum is near one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby, islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.base import InnerState
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.engine.affine import AT_ONCE, Doubled, Powers, Stretch, block, doubles
from bilevel.inner.coefficients import Coefficients, Numbers, ReadsIterateError, schedule
from bilevel.inner.multistep import LinearMultistep
from bilevel.oracles.kernels import Affine, Kernels, Pushed, Stepped

WIDE = 2**11
"""Numbers in params from which steps keep no more of themselves than a sweep needs."""
SHORTEST = 128
"""Steps that are one stretch at least, of which there are about as many as it has steps."""


class Steps(Stretch):
    """Steps one after the other, on the blocks that are drawn at the top of this file."""

    def __init__(self, kernels: Stepped, numbers: list[Coefficients], keeps_all: bool = True) -> None:
        self.kernels, self.count, self.keeps_all = kernels, len(numbers), keeps_all
        """`keeps_all`: whether all vectors stay, or only the points of gradients, which a sweep needs."""
        distinct = numbers[:1] if all(one is numbers[0] for one in numbers) else numbers
        self.read, self.write, self.mix = (
            np.array([getattr(each, name) for each in distinct]).repeat(self.count // len(distinct), axis=0)
            for name in ("read", "write", "mix")
        )
        self.read_at, self.written_to = _alone(self.read), _alone(self.write)
        """The stored vector at which all gradients are taken, and the one that they go to; None: a sum of several."""
        if self.read_at is not None and not bool((self.read[:, self.read_at] == 1.0).all()):
            self.read_at = None
        self.at_iterates = self.read_at == 0
        self.held: tuple[Any, Any] | None = None
        self.blocks: Tensor | None = None
        self.points: Tensor | None = None
        self.places: Any = None

    def forward(self, s: Tensor, keep: bool) -> Tensor:
        p, m = s.shape
        own = int(self.read_at is None)
        whole = keep and self.keeps_all
        # A block for each step, or two in turn; of step k the block, its vectors, and where y is, where it has a row.
        blocks = s.new_empty(self.count + 1 if whole else 2, 1 + own + p, m)
        blocks[0, 1 + own :] = s
        turns = 1 if whole else self.count
        wholes, vectors, sums = ([*part.unbind(0)] * turns for part in (blocks, blocks[:, 1 + own :], blocks[:, 1:2]))
        gradients, points = ([*self._shaped(part)] * turns for part in (blocks[:, 0], self._points(blocks)))
        apart = s.new_empty(self.count if keep and not whole else 0, m)
        copies, places = self._shaped(apart), self.kernels.places(self.count if keep else 1)
        slots = [*_each(places)] * (1 if keep else self.count)
        matrices, reads = self.held[0] if self.held else self._there(s)
        gradient, mm = self.kernels.gradient, torch.mm
        for k in range(self.count):
            if own:
                mm(reads[k], vectors[k], out=sums[k])
            point = copies[k].copy_(points[k]) if copies else points[k]
            gradient(point, slots[k], gradients[k])
            mm(matrices[k], wholes[k], out=vectors[k + 1])
        if keep:
            self.blocks, self.places = blocks, places
            self.points = self._points(blocks)[:-1] if whole else apart
        return vectors[self.count].clone()

    def backward(self, a: Tensor) -> tuple[Tensor, Tree]:
        assert self.points is not None
        p, m = a.shape
        kernels, own = cast(Kernels, self.kernels), int(self.written_to is None)
        at = _each(kernels.at(self.places))
        # The block of step k is at k + 1, so that the first step has one to write into.
        back = a.new_empty(self.count + 1, 1 + own + p, m)
        back[-1, 1 + own :] = a
        sums = back[:, 1 + (self.written_to or 0)]
        wholes, into, cotangents = back.unbind(0), self._shaped(back[:, 0]), self._shaped(sums)
        vectors, gathered = back[:, 1 + own :].unbind(0), back[:, 1:2].unbind(0) if own else ()
        matrices, writes, factors = self.held[1] if self.held else self._back(a)
        product, mm = kernels.product, torch.mm
        for k in range(self.count - 1, -1, -1):
            if own:
                mm(writes[k], vectors[k + 1], out=gathered[k + 1])
            product(at[k], cotangents[k + 1], into[k + 1])
            mm(matrices[k], wholes[k + 1], out=vectors[k])
        return vectors[0].clone(), kernels.cross(self.points, sums[1:] * factors)

    def hold(self, like: Tensor) -> None:
        """Make what is taken to the device now, and keep it: then steps can be captured as a CUDA graph."""
        self.held = self._there(like), self._back(like)

    def _there(self, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the matrices of the steps, and the weights of the points where they are asked for."""
        return _matrices(self.write, self.mix, self.read, self.read_at, like)

    def _back(self, like: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | float]:
        """Return the same of the steps back, and the factors of the gradients' cotangents."""
        factors = np.ones(self.count) if self.written_to is None else self.write[:, self.written_to]
        read = factors[:, None] * self.read
        matrices, writes = _matrices(read, self.mix.transpose(0, 2, 1), self.write, self.written_to, like)
        return matrices, writes, _factors(factors, like)

    def vectors(self, after: int) -> Tensor:
        assert self.blocks is not None
        return self.blocks[after, -self.read.shape[1] :]

    def residuals(self, after: range) -> Tensor:
        assert self.blocks is not None
        # The gradients at the iterates are there where steps are made of them, but for the last one.
        gradients, place, size = self.blocks[:, 0], self.kernels.places(1)[0], self.kernels.size
        if not self.at_iterates:
            gradients = torch.empty_like(gradients)
        shaped = self._shaped(gradients)
        for k in (self.count,) if self.at_iterates else after:
            self.kernels.gradient(self.vectors(k)[0].view(self.kernels.shape), place, shaped[k])
        return torch.linalg.vector_norm(gradients[after.start : after.stop : after.step, :size], dim=1)

    def cut(self, low: int, high: int) -> None:
        self.count = high - low
        self.read, self.write, self.mix = (each[low:high] for each in (self.read, self.write, self.mix))
        if self.blocks is not None and self.points is not None:
            self.blocks, self.points = self.blocks[low : high + 1], self.points[low:high]
            self.places = self.places[low:high]

    def forget(self) -> None:
        self.blocks = self.points = self.places = None

    def _points(self, blocks: Tensor) -> Tensor:
        """Return where the gradients of blocks are taken."""
        return blocks[:, 1 + (self.read_at or 0)]

    def _shaped(self, rows: Tensor) -> Sequence[Tensor]:
        """Return rows one by one, as the kernels take them."""
        return torch.unflatten(rows, 1, self.kernels.shape).unbind(0)


class Descents(Steps):
    """Steps of gradient descent: kernels write iterates in place of gradients."""

    def forward(self, s: Tensor, keep: bool) -> Tensor:
        rows = s.new_empty(self.count + 1 if keep else 2, s.shape[1])
        rows[0] = s[0]
        places = self.kernels.places(self.count if keep else 1)
        points, slots, times = self._shaped(rows), _each(places), 1 if keep else self.count
        points, slots, descend = [*points] * times, [*slots] * times, self.kernels.descend
        for x, place, h, out in zip(points, slots, self._lengths(), points[1:], strict=False):
            descend(x, place, h, out)
        if keep:
            self.blocks, self.points, self.places = rows[:, None], rows[:-1], places
        return rows[self.count if keep else self.count & 1][None].clone()

    def backward(self, a: Tensor) -> tuple[Tensor, Tree]:
        assert self.points is not None
        kernels = cast(Kernels, self.kernels)
        back = a.new_empty(self.count + 1, a.shape[1])
        back[-1] = a[0]
        rows, at, ascend = self._shaped(back), _each(kernels.at(self.places)), kernels.ascend
        for place, h, v, out in zip(at[::-1], self._lengths()[::-1], rows[:0:-1], rows[-2::-1], strict=True):
            ascend(place, v, h, out)
        factors = self.held[1][2] if self.held else _factors(self.write[:, 0], a)
        return back[:1], kernels.cross(self.points, back[1:].mul_(factors))

    def _lengths(self) -> list[float]:
        return cast(list[float], (-self.write[:, 0]).tolist())


def steps(kernels: Stepped, numbers: list[Coefficients], keeps_all: bool = True, with_residuals: bool = False) -> Steps:
    """Return the steps of some numbers; `with_residuals`: whether those of their iterates are asked for."""
    descents = not with_residuals and all(one.read == (1.0,) and one.mix == ((1.0,),) for one in numbers)
    return (Descents if descents else Steps)(kernels, numbers, keeps_all)


def longest(count: int, size: int) -> int:
    """Return into stretches of how many so many steps on vectors of `size` numbers are cut."""
    return max(SHORTEST if size < WIDE else 1, math.isqrt(count))


def _alone(weights: NDArray[np.float64]) -> int | None:
    """Return the only index, the same in all steps, of a weight that is not zero; None where there are several."""
    used = np.flatnonzero((weights != 0).any(axis=0))
    return int(used[0]) if len(used) == 1 else None


def _each(places: Any) -> Sequence[Any]:
    """Return the places, made one by one only where they hold something."""
    if isinstance(places, list):
        return places
    return places.unbind(0) if places.numel() else [places] * len(places)


def _matrices(
    first: NDArray[np.float64], mix: NDArray[np.float64], row: NDArray[np.float64], alone: int | None, like: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``[first, mix]`` of each step, and `row` where its sum has a place in the block, between the two."""
    between = np.zeros((*first.shape, int(alone is None)))
    matrices = _unbound(np.concatenate([first[:, :, None], between, mix], axis=2), like)
    return matrices, _unbound(row[:, None, :], like) if alone is None else []


def _unbound(matrices: NDArray[np.float64], like: Tensor) -> list[Tensor]:
    if bool((matrices == matrices[0]).all()):
        return [torch.from_numpy(matrices[0]).to(like)] * len(matrices)
    return list(torch.from_numpy(matrices).to(like).unbind(0))


def _factors(each: NDArray[np.float64], like: Tensor) -> Tensor | float:
    return float(each[0]) if bool((each == each[0]).all()) else torch.from_numpy(each).to(like)[:, None]


class Plan:
    """How the steps of one run are made: as which stretches, which share powers; of `rows`, all by doubling."""

    def __init__(
        self, kernels: Kernels, solver: LinearMultistep, first: InnerState, rows: int | None, directions: int
    ) -> None:
        self.solver, self.first, self.rows = solver, first, rows
        lead = 0 if rows is None else 1
        self.raveler = tree.Raveler(first.params, batched=bool(lead))
        s = torch.stack([self.raveler.ravel(vector) for vector in (first.params, *first.memory)], dim=lead)
        kernels = kernels.within(s)
        self.basis = kernels.basis
        s = s if self.basis is None else s @ self.basis
        self.size = s.shape[-1]
        self.with_residuals = solver.limits(s.dtype)[1] is not None
        self.keeps_all = self.size < WIDE or self.with_residuals
        self.kernels: Stepped = Pushed(kernels, self.size) if directions else kernels
        self.begin = torch.cat([s, s.new_zeros(s.shape[0], directions * self.size)], dim=1) if directions else s
        """The stored vectors at the start, ([rows,] p, m), and beside them their derivatives in so many directions."""
        self.powers: dict[Numbers, list[Powers]] = {}
        self.forms: dict[str, None] = {}
        """How the steps were made, in order."""
        self.starts: tuple[InnerState, ...] = (InnerState(None, (), first.steps, first.measured),)
        """What the numbers of the steps are made of: of rows that differ, those of each."""
        if rows is not None and first.measured:
            each = ({name: values[row] for name, values in first.measured.items()} for row in range(rows))
            self.starts = tuple(InnerState(None, (), first.steps, measured) for measured in each)

    @cached_property
    def point(self) -> Tensor | None:
        """Where the first step takes its gradient; None where the solver's numbers are known only with its iterates."""
        try:
            ((numbers, *_), _) = next(schedule(self.solver, self.starts, 0, 1))
        except ReadsIterateError:
            return None
        point: Tensor = tree.weighted_sum(numbers.reads, (self.first.params, *self.first.memory))
        return point

    def fits(self, limit: int, tail: int) -> bool:
        """Whether all steps can be made so, `tail` of them last: rows where each has numbers and all steps double."""
        if self.rows is None or self.point is None:
            return self.point is not None
        values = [value for start in self.starts for value in start.measured.values()]
        known = isinstance(self.first.steps, int) and all(map(math.isfinite, values)) and not self.with_residuals
        parts = (schedule(self.solver, self.starts, *span) for span in ((0, limit - tail), (limit - tail, limit)))
        return known and all(self._doubles(*part) for part in chain.from_iterable(parts))

    def state(self, s: Tensor, taken: int) -> InnerState:
        """Return the state after so many steps, whose vectors are s, ([rows,] p, m)."""
        first = self.first
        s = s[..., : self.size] if self.basis is None else s[..., : self.size] @ self.basis.to(s).t()
        vectors = s.movedim(-2, 0).unbind(0)
        dtype = tree.leaves(first.params)[0].dtype
        params, *memory = [self.raveler.unravel(vector.to(dtype, copy=True)) for vector in vectors]
        return InnerState(params, tuple(memory), first.steps + taken, first.measured, earlier=first.earlier)

    def between(self, low: int, high: int, short: bool = False) -> Iterator[Stretch]:
        """Yield the steps low, ..., high - 1: stretches of equal steps that are doubled, and of all others.

        Those of other steps, and where `short` is asked for all, are no longer than about the root of their number, so
        that a sweep can make one after the other again; none is made before it is asked for.
        """
        most = longest(high - low, self.size)
        parts = schedule(self.solver, self.starts, low, high)
        for doubled, group in groupby(parts, lambda part: self._doubles(*part)):
            self.forms["doubled" if doubled else self.kernels.form] = None
            if doubled:
                for numbers, count in group:
                    yield from self._doubled(numbers, count, short)
                    low += count
                continue
            every = (numbers[0] for numbers, count in group for _ in range(count))
            while some := list(islice(every, most)):
                yield steps(self.kernels.from_step(low), some, self.keeps_all, self.with_residuals)
                low += len(some)

    def _doubles(self, numbers: Numbers, count: int) -> bool:
        affine = self.kernels.affine
        return affine is not None and doubles(affine[0].shape[-1], self._norm, numbers, count, lambda: self._least)

    @cached_property
    def _norm(self) -> float:
        """The Frobenius norm of H: one look at the device."""
        assert self.kernels.affine is not None
        return float(torch.linalg.vector_norm(self.kernels.affine[0], dim=(-2, -1)).max())

    @cached_property
    def _least(self) -> float:
        """The smallest eigenvalue of H; none below zero, where steps diverge."""
        assert self.kernels.affine is not None
        return max(0.0, float(torch.linalg.eigvalsh(self.kernels.affine[0].double()).min()))

    def _doubled(self, numbers: Numbers, count: int, short: bool) -> Iterator[Doubled]:
        if numbers not in self.powers:
            groups = [slice(low, low + AT_ONCE) for low in range(0, self.rows or 0, AT_ONCE)]
            kernels = cast(Affine, self.kernels)
            some = [Powers(kernels.some(g), numbers[g] if len(numbers) > 1 else numbers) for g in groups]
            self.powers[numbers] = some or [Powers(self.kernels, numbers)]
        powers = self.powers[numbers]
        rows = block(count, powers[0].size)
        longest = max(rows, math.isqrt(count)) if short else count
        for start in range(0, count, longest):
            yield Doubled(powers, min(longest, count - start), rows)
