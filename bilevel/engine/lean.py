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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import groupby, islice
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.base import InnerState, Pullback, Solution
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.engine.affine import Doubled, Powers, Stretch, block, doubles
from bilevel.engine.estimator import Run
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import conclude
from bilevel.engine.recurrence import schedule
from bilevel.inner.coefficients import Coefficients
from bilevel.inner.multistep import LinearMultistep
from bilevel.oracles.kernels import Kernels, Pushed, Stepped

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
        self.blocks: Tensor | None = None
        self.places: Tensor | None = None

    def forward(self, s: Tensor, keep: bool) -> Tensor:
        p, m = s.shape
        own = int(self.looked is None)
        blocks = s.new_empty(self.count + 1 if keep else 2, 1 + own + p, m)
        blocks[0, 1 + own :] = s
        places = self.kernels.places(self.count if keep else 1)
        slots = places.unbind(0)
        wholes, gradients, points = blocks.unbind(0), blocks[:, 0].unbind(0), self._points(blocks).unbind(0)
        vectors, looks = blocks[:, 1 + own :].unbind(0), blocks[:, 1:2].unbind(0)
        rows = np.insert(self.mix, [0] * own, 0.0, axis=2)
        matrices = _unbound(np.concatenate([self.write[:, :, None], rows], axis=2), s)
        reads = _unbound(self.read[:, None, :], s) if own else []
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
        at = kernels.at(self.places).unbind(0)
        # The block of step k is at k + 1, so that the first step has one to write into.
        back = a.new_empty(self.count + 1, 1 + own + p, m)
        back[-1, 1 + own :] = a
        sums = back[:, 1 + (self.written or 0)]
        wholes, into, cotangents = back.unbind(0), back[:, 0].unbind(0), sums.unbind(0)
        vectors, gathered = back[:, 1 + own :].unbind(0), back[:, 1:2].unbind(0)
        factors = np.ones(self.count) if self.written is None else self.write[:, self.written]
        columns = np.insert(self.mix.transpose(0, 2, 1), [0] * own, 0.0, axis=2)
        matrices = _unbound(np.concatenate([factors[:, None, None] * self.read[:, :, None], columns], axis=2), a)
        writes = _unbound(self.write[:, None, :], a) if own else []
        product, mm = kernels.product, torch.mm
        for k in range(self.count - 1, -1, -1):
            if own:
                mm(writes[k], vectors[k + 1], out=gathered[k + 1])
            product(at[k], cotangents[k + 1], into[k + 1])
            mm(matrices[k], wholes[k + 1], out=vectors[k])
        same = bool((factors == factors[0]).all())
        pulled = sums[1:] * (float(factors[0]) if same else torch.from_numpy(factors).to(a)[:, None])
        return vectors[0].clone(), kernels.cross(self._points(self.blocks)[:-1], pulled)

    def forget(self) -> None:
        self.blocks = self.places = None

    def _points(self, blocks: Tensor) -> Tensor:
        """Return where the gradients of blocks are taken."""
        return blocks[:, 1 + (self.looked or 0)]


def _alone(weights: NDArray[np.float64]) -> int | None:
    """Return the only index, the same in all steps, of a weight that is not zero; None where there are several."""
    used = np.flatnonzero((weights != 0).any(axis=0))
    return int(used[0]) if len(used) == 1 else None


def _unbound(matrices: NDArray[np.float64], like: Tensor) -> list[Tensor]:
    return list(torch.from_numpy(matrices).to(like).unbind(0))


class Stretches:
    """What makes the steps of one run, as stretches that share powers."""

    def __init__(self, kernels: Stepped, solver: LinearMultistep, first: InnerState) -> None:
        self.kernels, self.solver, self.first = kernels, solver, first
        self.powers: dict[Coefficients, Powers] = {}
        self.forms: dict[str, None] = {}
        """How the steps were made, in order."""

    @property
    def known(self) -> bool:
        """Whether the solver's numbers are known before its iterates are."""
        try:
            return bool(next(schedule(self.solver, (self.first,), 0, 1)))
        except (AttributeError, TypeError):  # they were asked for without one
            return False

    def between(self, low: int, high: int) -> Iterator[Stretch]:
        """Yield the steps low, ..., high - 1: stretches of equal steps that are doubled, and of all others.

        They are no longer than about the root of their number, so that a sweep can make one after the other again; none
        is made before it is asked for.
        """
        longest = max(SHORTEST, math.isqrt(high - low))
        parts = ((numbers[0], count) for numbers, count in schedule(self.solver, (self.first,), low, high))
        for doubled, group in groupby(parts, lambda part: self._doubles(*part)):
            self.forms["doubled" if doubled else self.kernels.form] = None
            if doubled:
                for numbers, count in group:
                    yield from self._doubled(numbers, count)
                continue
            every = (numbers for numbers, count in group for _ in range(count))
            while some := list(islice(every, longest)):
                yield Steps(self.kernels, some)

    def _doubles(self, numbers: Coefficients, count: int) -> bool:
        affine = self.kernels.affine
        return affine is not None and doubles(affine[0].shape[0], self._norm, numbers, count)

    @cached_property
    def _norm(self) -> float:
        """The Frobenius norm of H: one look at the device."""
        assert self.kernels.affine is not None
        return float(torch.linalg.vector_norm(self.kernels.affine[0]))

    def _doubled(self, numbers: Coefficients, count: int) -> Iterator[Doubled]:
        if numbers not in self.powers:
            self.powers[numbers] = Powers(self.kernels, numbers)
        powers = self.powers[numbers]
        rows = block(count, powers.size)
        longest = max(rows, math.isqrt(count))
        for start in range(0, count, longest):
            yield Doubled(cast(Kernels, self.kernels), powers, numbers, min(longest, count - start), rows)


@torch.no_grad()
def unrolled(run: Run, length: Callable[[int], int], kept: bool = True) -> Solution | None:
    """Return the solution of a run with the VJP of its last steps; None where it has to be made step by step.

    That is a solver that is not linear multistep or takes its steps itself, one with a tolerance, a problem without
    kernels, and a run that overflows, which steps can name.

    Args:
        run: the run.
        length: steps taken -> steps differentiated.
        kept: whether their iterates are kept, or made again on the way back, stretch by stretch, to the same bits.
    """
    kernels, counts = _kernels(run), run.meter.counts.copy()
    if kernels is None:
        return None
    first, steps = run.begin(), run.solver.steps or 0
    tail, s = min(length(steps), steps), _flat(first)
    made = Stretches(kernels, cast(LinearMultistep, run.solver), first)
    if not made.known:
        return _back_to(counts, run)
    swept: list[tuple[Stretch, Tensor]] = []
    for stretch in made.between(0, steps - tail):
        s = stretch.forward(s, False)
    for stretch in made.between(steps - tail, steps):
        swept.append((stretch, s))
        s = stretch.forward(s, True)
        if not kept:
            stretch.forget()
    sound = torch.isfinite(s.sum())
    for powers in made.powers.values():
        sound = sound & powers.finite
    if not bool(sound):
        return _back_to(counts, run)
    end = _ended(run, first, s, made)

    @torch.no_grad()
    def pullback(cotangent: Tree) -> Pullback:
        a = torch.zeros_like(s)
        a[0] = cotangent.reshape(-1)
        total: Tree = None
        for stretch, begin in reversed(swept):
            if not kept:
                stretch.forward(begin, True)
            a, part = stretch.backward(a)
            if not kept:
                stretch.forget()
            total = part if total is None else tree.add(total, part)
        run.meter.counts["gradient"] += 0 if kept else tail
        run.meter.counts["vjp"] += tail
        return Pullback(total, steps=tail)

    return end.solution(end.state.params, pullback)


@torch.no_grad()
def pushed(run: Run) -> Solution | None:
    """Return the solution of a run with its derivative by all hyperparameters carried along; None as for `unrolled`."""
    kernels, counts = _kernels(run), run.meter.counts.copy()
    if kernels is None:
        return None
    first, steps, raveler = run.begin(), run.solver.steps or 0, tree.Raveler(run.hparams)
    s = _flat(first)
    size, s = s.shape[1], torch.cat([s, s.new_zeros(s.shape[0], raveler.size * s.shape[1])], dim=1)
    both = Pushed(kernels, size)
    made = Stretches(both, cast(LinearMultistep, run.solver), first)
    if not made.known:
        return _back_to(counts, run)
    for stretch in made.between(0, steps):
        s = stretch.forward(s, False)
        both.parts.clear()  # memory must not grow with the steps
    if not bool(torch.isfinite(s.sum())):
        return _back_to(counts, run)
    end = _ended(run, first, s[:, :size], made)
    run.meter.counts["jvp"] += steps * raveler.size
    tangents = s[0, size:].view(-1, size)

    @torch.no_grad()
    def pullback(cotangent: Tree) -> Pullback:
        return Pullback(raveler.unravel(torch.mv(tangents, cotangent.reshape(-1))), steps=steps)

    return end.solution(end.state.params, pullback)


def _kernels(run: Run) -> Kernels | None:
    """Return the kernels of a run that its solver's numbers describe; None for another."""
    solver = run.solver
    if solver.steps is None or solver.tol is not None or not solver.follows_coefficients:
        return None
    return run.inner().kernels()


def _back_to(counts: Counter[str], run: Run) -> Solution | None:
    """Return None, with what a run has counted in vain taken back: its steps count it again."""
    run.meter.counts.clear()
    run.meter.counts.update(counts)
    return None


def _flat(state: InnerState) -> Tensor:
    """Return the stored vectors, of shape (p, m)."""
    return torch.stack([vector.reshape(-1) for vector in (state.params, *state.memory)])


def _ended(run: Run, first: InnerState, s: Tensor, made: Stretches) -> InnerRun:
    """Return how a run ends whose last stored vectors are s, (p, m)."""
    steps = run.solver.steps or 0
    run.meter.counts["gradient"] += steps
    params, *memory = [vector.clone().view_as(first.params) for vector in s]
    last = InnerState(params, tuple(memory), first.steps + steps, first.measured, earlier=first.earlier)
    end = conclude(run.inner(), run.solver, first, last, steps)
    run.meter.sample()
    return replace(end, form=" and ".join(made.forms))
