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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby, islice
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.base import InnerSolver, InnerState
from bilevel.core import tree
from bilevel.core.device import check_interval
from bilevel.core.tree import Tree
from bilevel.engine.affine import AT_ONCE, Doubled, Powers, Stretch, block, doubles
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import Looks, conclude
from bilevel.engine.recurrence import Numbers, schedule
from bilevel.inner.coefficients import Coefficients
from bilevel.inner.multistep import LinearMultistep
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.kernels import Affine, Kernels, Pushed, Stepped

CHUNK, FIRST, LONGEST = 16_384, 256, 512
"""A run to a tolerance makes at first so many numbers at once, but no more than so many steps; later, and at most."""
SHORTEST = 64
"""Steps that are one stretch at least, of which there are about as many as it has steps."""


class Steps(Stretch):
    """Steps one after the other."""

    def __init__(self, kernels: Stepped, numbers: list[Coefficients]) -> None:
        self.kernels, self.count = kernels, len(numbers)
        self.read, self.write, self.mix = (
            np.array([getattr(each, name) for each in numbers]) for name in ("read", "write", "mix")
        )
        self.looked, self.written = _alone(self.read), _alone(self.write)
        """The stored vector that the gradient is taken at, and the one that it goes to; None: several."""
        if self.looked is not None and not bool((self.read[:, self.looked] == 1.0).all()):
            self.looked = None
        self.at_iterates = self.looked == 0
        self.held: tuple[Any, Any] | None = None
        self.blocks: Tensor | None = None
        self.places: Tensor | None = None

    def forward(self, s: Tensor, keep: bool) -> Tensor:
        p, m = s.shape
        own = int(self.looked is None)
        blocks = s.new_empty(self.count + 1 if keep else 2, 1 + own + p, m)
        blocks[0, 1 + own :] = s
        places = self.kernels.places(self.count if keep else 1)
        slots = _each(places)
        wholes, gradients, points = blocks.unbind(0), blocks[:, 0].unbind(0), self._points(blocks).unbind(0)
        vectors, looks = blocks[:, 1 + own :].unbind(0), blocks[:, 1:2].unbind(0) if own else ()
        matrices, reads = self.held[0] if self.held else self._there(s)
        gradient, mm, last = self.kernels.gradient, torch.mm, 0
        for k in range(self.count):
            last, place = (k + 1, slots[k]) if keep else (1 - (k & 1), slots[0])
            here = k if keep else k & 1
            if own:
                mm(reads[k], vectors[here], out=looks[here])
            gradient(points[here], place, gradients[here])
            mm(matrices[k], wholes[here], out=vectors[last])
        if keep:
            self.blocks, self.places = blocks, places
        return vectors[last].clone()

    def backward(self, a: Tensor) -> tuple[Tensor, Tree]:
        assert self.blocks is not None
        assert self.places is not None
        p, m = a.shape
        kernels, own = cast(Kernels, self.kernels), int(self.written is None)
        at = _each(kernels.at(self.places))
        # The block of step k is at k + 1, so that the first step has one to write into.
        back = a.new_empty(self.count + 1, 1 + own + p, m)
        back[-1, 1 + own :] = a
        sums = back[:, 1 + (self.written or 0)]
        wholes, into, cotangents = back.unbind(0), back[:, 0].unbind(0), sums.unbind(0)
        vectors, gathered = back[:, 1 + own :].unbind(0), back[:, 1:2].unbind(0) if own else ()
        matrices, writes, factors = self.held[1] if self.held else self._back(a)
        product, mm = kernels.product, torch.mm
        for k in range(self.count - 1, -1, -1):
            if own:
                mm(writes[k], vectors[k + 1], out=gathered[k + 1])
            product(at[k], cotangents[k + 1], into[k + 1])
            mm(matrices[k], wholes[k + 1], out=vectors[k])
        return vectors[0].clone(), kernels.cross(self._points(self.blocks)[:-1], sums[1:] * factors)

    def hold(self, like: Tensor) -> None:
        """Make what is taken to the device now, and keep it: then steps can be captured as a CUDA graph."""
        self.held = self._there(like), self._back(like)

    def _there(self, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the matrices of the steps, and the weights of the points where they are asked for."""
        own = int(self.looked is None)
        rows = np.insert(self.mix, [0] * own, 0.0, axis=2)
        matrices = _unbound(np.concatenate([self.write[:, :, None], rows], axis=2), like)
        return matrices, _unbound(self.read[:, None, :], like) if own else []

    def _back(self, like: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor | float]:
        """Return the same of the steps back, and the factors of the gradients' cotangents."""
        own = int(self.written is None)
        factors = np.ones(self.count) if self.written is None else self.write[:, self.written]
        columns = np.insert(self.mix.transpose(0, 2, 1), [0] * own, 0.0, axis=2)
        matrices = _unbound(np.concatenate([factors[:, None, None] * self.read[:, :, None], columns], axis=2), like)
        same = bool((factors == factors[0]).all())
        writes = _unbound(self.write[:, None, :], like) if own else []
        return matrices, writes, float(factors[0]) if same else torch.from_numpy(factors).to(like)[:, None]

    def vectors(self, after: int) -> Tensor:
        assert self.blocks is not None
        return self.blocks[after, -self.read.shape[1] :]

    def residuals(self, after: range) -> Tensor:
        assert self.blocks is not None
        # The gradients at the iterates are there where steps are made of them, but for the last one.
        gradients, place, size = self.blocks[:, 0], self.kernels.places(1)[0], self.kernels.size
        if not self.at_iterates:
            gradients = torch.empty_like(gradients)
        for k in (self.count,) if self.at_iterates else after:
            self.kernels.gradient(self.vectors(k)[0], place, gradients[k])
        return torch.linalg.vector_norm(gradients[after.start : after.stop : after.step, :size], dim=1)

    def cut(self, low: int, high: int) -> None:
        self.count = high - low
        self.read, self.write, self.mix = (each[low:high] for each in (self.read, self.write, self.mix))
        if self.blocks is not None and self.places is not None:
            self.blocks, self.places = self.blocks[low : high + 1], self.places[low:high]

    def forget(self) -> None:
        self.blocks = self.places = None

    def _points(self, blocks: Tensor) -> Tensor:
        """Return where the gradients of blocks are taken."""
        return blocks[:, 1 + (self.looked or 0)]


def _alone(weights: NDArray[np.float64]) -> int | None:
    """Return the only index, the same in all steps, of a weight that is not zero; None where there are several."""
    used = np.flatnonzero((weights != 0).any(axis=0))
    return int(used[0]) if len(used) == 1 else None


def _each(places: Tensor) -> Sequence[Tensor]:
    """Return the places, made one by one only where they hold something."""
    return places.unbind(0) if places.numel() else [places] * len(places)


def _unbound(matrices: NDArray[np.float64], like: Tensor) -> list[Tensor]:
    return list(torch.from_numpy(matrices).to(like).unbind(0))


class Stretches:
    """What makes the steps of one run, as stretches that share powers; of `rows` side by side, all by doubling."""

    def __init__(
        self, kernels: Kernels, solver: LinearMultistep, first: InnerState, rows: int | None, directions: int
    ) -> None:
        self.solver, self.first, self.rows = solver, first, rows
        lead = 0 if rows is None else 1
        s = torch.stack([v.reshape(*v.shape[:lead], -1) for v in (first.params, *first.memory)], dim=lead)
        kernels = kernels.within(s)
        self.basis = kernels.basis
        s = s if self.basis is None else s @ self.basis
        self.size = s.shape[-1]
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
        except (AttributeError, TypeError):  # they were asked for without one
            return None
        point: Tensor = tree.weighted_sum(numbers.reads, (self.first.params, *self.first.memory))
        return point

    @property
    def numbered(self) -> bool:
        """Whether every row has numbers, and all are at the same step."""
        values = [value for start in self.starts for value in start.measured.values()]
        return isinstance(self.first.steps, int) and all(map(math.isfinite, values))

    def doubled(self, low: int, high: int) -> bool:
        """Whether the steps low, ..., high - 1 are doubled, all of them."""
        return all(self._doubles(*part) for part in schedule(self.solver, self.starts, low, high))

    def state(self, s: Tensor, taken: int) -> InnerState:
        """Return the state after so many steps, whose vectors are s, ([rows,] p, m)."""
        first = self.first
        s = s[..., : self.size] if self.basis is None else s[..., : self.size] @ self.basis.t()
        vectors = s.movedim(-2, 0).unbind(0)
        params, *memory = [vector.to(first.params.dtype, copy=True).view_as(first.params) for vector in vectors]
        return InnerState(params, tuple(memory), first.steps + taken, first.measured, earlier=first.earlier)

    def between(self, low: int, high: int, short: bool = False) -> Iterator[Stretch]:
        """Yield the steps low, ..., high - 1: stretches of equal steps that are doubled, and of all others.

        Those of other steps, and where `short` is asked for all, are no longer than about the root of their number, so
        that a sweep can make one after the other again; none is made before it is asked for.
        """
        longest = max(SHORTEST, math.isqrt(high - low))
        parts = schedule(self.solver, self.starts, low, high)
        for doubled, group in groupby(parts, lambda part: self._doubles(*part)):
            self.forms["doubled" if doubled else self.kernels.form] = None
            if doubled:
                for numbers, count in group:
                    yield from self._doubled(numbers, count, short)
                continue
            every = (numbers[0] for numbers, count in group for _ in range(count))
            while some := list(islice(every, longest)):
                yield Steps(self.kernels, some)

    def _doubles(self, numbers: Numbers, count: int) -> bool:
        affine = self.kernels.affine
        return affine is not None and doubles(affine[0].shape[-1], self._norm, numbers, count)

    @cached_property
    def _norm(self) -> float:
        """The Frobenius norm of H: one look at the device."""
        assert self.kernels.affine is not None
        return float(torch.linalg.vector_norm(self.kernels.affine[0], dim=(-2, -1)).max())

    def _doubled(self, numbers: Numbers, count: int, short: bool) -> Iterator[Doubled]:
        if numbers not in self.powers:
            groups = [slice(low, low + AT_ONCE) for low in range(0, self.rows or 0, AT_ONCE)]
            self.powers[numbers] = (
                [Powers(self.kernels.some(g), numbers[g] if len(numbers) > 1 else numbers) for g in groups]
                if isinstance(self.kernels, Affine) and groups
                else [Powers(self.kernels, numbers)]
            )
        powers = self.powers[numbers]
        rows = block(count, powers[0].size)
        longest = max(rows, math.isqrt(count)) if short else count
        for start in range(0, count, longest):
            yield Doubled(powers, min(longest, count - start), rows)


@dataclass
class Flat:
    """A run on flat vectors: how it has ended, and its last steps, each stretch with what it begins from."""

    end: InnerRun
    swept: list[tuple[Stretch, Tensor]]
    last: Tensor
    """The stored vectors at the end, ([rows,] p, m), and what is carried along with them."""
    basis: Tensor | None
    """That of the kernels."""

    @property
    def tail(self) -> int:
        """The steps that are differentiated."""
        return sum(stretch.count for stretch, _ in self.swept)


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
    kernels, size = inner.kernels() if solver.follows_coefficients else None, inner.problem.batch
    if kernels is None:
        return None
    counts = inner.counts.copy()
    made = Stretches(kernels, cast(LinearMultistep, solver), first, size, directions)
    limit, tol = solver.limits(first.params.dtype)
    found, possible = None, made.point is not None
    if possible and size is not None:
        tail, possible = min(length(limit), limit), tol is None and not directions and made.numbered
        possible = possible and made.doubled(0, limit - tail) and made.doubled(limit - tail, limit)
    if possible:
        taken = _by_count if tol is None else _to_tolerance
        found = taken(inner, made, limit, length, at_least, kept)
    if found is None:  # its steps count it again
        inner.counts.clear()
        inner.counts.update(counts)
        return None
    form = " and ".join(made.forms) or found.end.form
    return replace(found, end=replace(found.end, form=form))


def _by_count(
    inner: InnerProblem, made: Stretches, steps: int, length: Callable[[int], int], at_least: int, kept: bool
) -> Flat | None:
    tail, s = min(length(steps), steps), made.begin
    swept: list[tuple[Stretch, Tensor]] = []
    for stretch in made.between(0, steps - tail):
        s = stretch.forward(s, False)
    for stretch in made.between(steps - tail, steps, short=not kept):
        swept.append((stretch, s))
        s = stretch.forward(s, True)
        if not kept:
            stretch.forget()
    sound = torch.isfinite(s.sum())
    for powers in chain.from_iterable(made.powers.values()):
        sound = sound & powers.finite
    if not bool(sound):
        return None
    inner.counts["gradient"] += steps
    state = made.state(s, steps)
    return Flat(conclude(inner, made.solver, made.first, state, steps), swept, s, made.basis)


def _to_tolerance(
    inner: InnerProblem, made: Stretches, limit: int, length: Callable[[int], int], at_least: int, kept: bool
) -> Flat | None:
    """Make steps by chunks, and look at all residuals of a stretch at once: at those that steps would look at."""
    solver, first, s = made.solver, made.first, made.begin
    _, tol = solver.limits(s.dtype)
    assert tol is not None
    every = max(solver.traits.check_every, check_interval(s.device))
    looks, most = Looks(inner, solver, first, tol, at_least), length(limit)
    swept: list[tuple[Stretch, Tensor]] = []
    end, taken, held = looks.end(float(looks.start), 0, first, first), 0, 0
    equal = made.kernels.affine is not None and solver.traits.stationary_from is not None
    chunk = min(FIRST, max(SHORTEST, CHUNK // s.numel())) if equal else SHORTEST // 2
    while end is None and taken < limit:
        for stretch in made.between(taken, min(limit, taken + chunk)):
            swept.append((stretch, s))
            s = stretch.forward(s, True)
            held += stretch.count
            while len(swept) > 1 and held - swept[0][0].count - stretch.count >= most:
                held -= swept.pop(0)[0].count
            after = range(every - taken % every, stretch.count + (taken + stretch.count < limit), every)
            for count, residual in zip(after, stretch.residuals(after).cpu().tolist() if after else (), strict=True):
                if looks.passes(residual, taken + count):
                    continue
                if not math.isfinite(residual):
                    return None
                states = [made.state(stretch.vectors(k), taken + k) for k in (count - 1, count)]
                if (end := looks.end(residual, taken + count, *states)) is not None:
                    stretch.cut(0, count)
                    s = stretch.vectors(count).to(s.dtype)
                    break
            taken += stretch.count
            if not kept:
                stretch.forget()
            if end is not None:
                break
        chunk = min(2 * chunk, LONGEST)
    # A look takes a gradient of its own, unless the step from there takes the same one.
    own = 0 if all(stretch.at_iterates for stretch, _ in swept) else len(range(every, taken, every))
    inner.counts["gradient"] += taken + own - (taken > 0 and made.point is first.params)
    if end is None:
        end = looks.last(made.state(s, taken), taken)
        if not math.isfinite(end.residual):
            return None
    inner.grad(end.state.params)
    tail = min(length(max(taken, 1)), taken)
    spare = sum(stretch.count for stretch, _ in swept) - tail
    last = s.clone()  # a view would hold all steps
    while swept and spare >= swept[0][0].count:
        spare -= swept.pop(0)[0].count
    if spare:
        swept[0][0].cut(spare, swept[0][0].count)
    return Flat(end, swept, last, made.basis)
