"""Unrolled differentiation of linear multistep solvers on flat vectors: two kernels and one small product a step.

It computes what `step` and `sweep_vjp` of `bilevel.inner.multistep` compute, without a tree, a state or a closure
inside K steps. Steps with the same numbers on a quadratic are doubled (`bilevel.engine.affine`); all others are made
one after the other, on blocks of memory that are made once:

    forward    block k holds (g, [y,] s_1, ..., s_p):   g = grad(y),     (y+, s+) = F_k (g, y, s)
    back       block k holds (y', g', a_1, ..., a_p):   y' = H' g',      (g'-, a-) = B_k (y', g', a)

with ``F = [write, 0, mix]`` and ``B = [read, 0, mix']``, each under a row for the next y, or g', made of the others. y
is a row of its own unless the gradient is taken at one of the stored vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import groupby
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
        first = self.read[0]
        single = (first == 1.0).sum() == 1 == (first != 0).sum() and bool((self.read == first).all())
        self.at = int(first.argmax()) if single else None
        """Which stored vector the gradient is taken at; None for a combination of them."""
        self.blocks: Tensor | None = None
        self.places: Tensor | None = None

    def forward(self, s: Tensor, keep: bool) -> Tensor:
        p, m = s.shape
        own = int(self.at is None)
        blocks = s.new_empty(self.count + 1 if keep else 2, 1 + own + p, m)
        blocks[0, 1 + own :] = s
        if own:
            blocks[0, 1] = torch.mv(s.t(), torch.from_numpy(self.read[0]).to(s))
        places = self.kernels.places(self.count if keep else 1)
        slots = places.unbind(0)
        wholes, gradients = blocks.unbind(0), blocks[:, 0].unbind(0)
        points, nexts = blocks[:, 1 + (self.at or 0)].unbind(0), blocks[:, 1:].unbind(0)
        gradient, matrices, mm = self.kernels.gradient, self._forward(s), torch.mm
        if keep:
            for k in range(self.count):
                gradient(points[k], slots[k], gradients[k])
                mm(matrices[k], wholes[k], out=nexts[k + 1])
            self.blocks, self.places = blocks, places
        else:
            for k in range(self.count):
                here = k & 1
                gradient(points[here], slots[0], gradients[here])
                mm(matrices[k], wholes[here], out=nexts[1 - here])
        return blocks[self.count if keep else self.count & 1, 1 + own :].clone()

    def backward(self, a: Tensor) -> tuple[Tensor, Tree]:
        assert self.blocks is not None
        assert self.places is not None
        p, m = a.shape
        kernels = cast(Kernels, self.kernels)
        at = kernels.at(self.places).unbind(0)
        points = self.blocks[:, 1 + (self.at or 0)]
        matrices, product, mm = self._backward(a), kernels.product, torch.mm
        # The block of step k is at k + 1, so that the first step has one to write into.
        back = a.new_empty(self.count + 1, 2 + p, m)
        back[-1, 1] = torch.from_numpy(self.write[-1]).to(a) @ a
        back[-1, 2:] = a
        wholes, into, vectors, nexts = (each.unbind(0) for each in (back, back[:, 0], back[:, 1], back[:, 1:]))
        for k in range(self.count - 1, -1, -1):
            product(at[k], vectors[k + 1], into[k + 1])
            mm(matrices[k], wholes[k + 1], out=nexts[k])
        return back[0, 2:].clone(), kernels.cross(points[:-1], back[1:, 1])

    def forget(self) -> None:
        self.blocks = self.places = None

    def _forward(self, like: Tensor) -> list[Tensor]:
        """Return F of every step."""
        every = np.concatenate([self.write[:, :, None], self.mix], axis=2)
        if self.at is None:
            every = np.insert(every, 1, 0.0, axis=2)
            following = np.append(self.read[1:], np.zeros_like(self.read[:1]), axis=0)
            every = np.concatenate([following[:, None] @ every, every], axis=1)
        return _unbound(every, like)

    def _backward(self, like: Tensor) -> list[Tensor]:
        """Return B of every step."""
        none = np.zeros_like(self.read)[:, :, None]
        every = np.concatenate([self.read[:, :, None], none, self.mix.transpose(0, 2, 1)], axis=2)
        before = np.append(np.zeros_like(self.write[:1]), self.write[:-1], axis=0)
        return _unbound(np.concatenate([before[:, None] @ every, every], axis=1), like)


def _unbound(matrices: NDArray[np.float64], like: Tensor) -> list[Tensor]:
    return list(torch.from_numpy(matrices).to(like).unbind(0))


class Stretches:
    """What makes the steps of one run, as stretches that share powers."""

    def __init__(self, kernels: Stepped, solver: LinearMultistep, first: InnerState) -> None:
        self.kernels, self.solver, self.first = kernels, solver, first
        self.powers: dict[Coefficients, Powers] = {}

    def of(self, *parts: tuple[int, int]) -> list[list[Stretch]] | None:
        """Return the stretches of parts of the run; None where the solver's numbers depend on the iterate."""
        try:
            return [list(self.between(*part)) for part in parts]
        except (AttributeError, TypeError):  # they were asked for without one
            return None

    def between(self, low: int, high: int) -> Iterator[Stretch]:
        """Yield the steps low, ..., high - 1: stretches of equal steps that are doubled, and of all others.

        They are no longer than about the root of their number, so that a sweep can make one after the other again.
        """
        parts = ((numbers[0], count) for numbers, count in schedule(self.solver, (self.first,), low, high))
        for doubled, group in groupby(parts, lambda part: self._doubles(*part)):
            if doubled:
                for numbers, count in group:
                    yield from self._doubled(numbers, count)
                continue
            every = [numbers for numbers, count in group for _ in range(count)]
            longest = max(SHORTEST, math.isqrt(len(every)))
            for start in range(0, len(every), longest):
                yield Steps(self.kernels, every[start : start + longest])

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
    kernels = _kernels(run)
    if kernels is None:
        return None
    first, steps = run.begin(), run.solver.steps or 0
    tail, s = min(length(steps), steps), _flat(first)
    made = Stretches(kernels, cast(LinearMultistep, run.solver), first)
    parts = made.of((0, steps - tail), (steps - tail, steps))
    if parts is None:
        return None
    swept: list[tuple[Stretch, Tensor]] = []
    for stretch in parts[0]:
        s = stretch.forward(s, False)
    for stretch in parts[1]:
        swept.append((stretch, s))
        s = stretch.forward(s, True)
        if not kept:
            stretch.forget()
    sound = torch.isfinite(s.sum())
    for powers in made.powers.values():
        sound = sound & powers.finite
    if not bool(sound):
        return None
    end = _ended(run, first, s)

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
    kernels = _kernels(run)
    if kernels is None:
        return None
    first, steps, raveler = run.begin(), run.solver.steps or 0, tree.Raveler(run.hparams)
    s = _flat(first)
    size, s = s.shape[1], torch.cat([s, s.new_zeros(s.shape[0], raveler.size * s.shape[1])], dim=1)
    parts = Stretches(Pushed(kernels, size), cast(LinearMultistep, run.solver), first).of((0, steps))
    if parts is None:
        return None
    for stretch in parts[0]:
        s = stretch.forward(s, False)
    if not bool(torch.isfinite(s.sum())):
        return None
    end = _ended(run, first, s[:, :size])
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


def _flat(state: InnerState) -> Tensor:
    """Return the stored vectors, of shape (p, m)."""
    return torch.stack([vector.reshape(-1) for vector in (state.params, *state.memory)])


def _ended(run: Run, first: InnerState, s: Tensor) -> InnerRun:
    """Return how a run ends whose last stored vectors are s, (p, m)."""
    steps = run.solver.steps or 0
    run.meter.counts["gradient"] += steps
    params, *memory = [vector.clone().view_as(first.params) for vector in s]
    last = InnerState(params, tuple(memory), first.steps + steps, first.measured, earlier=first.earlier)
    end = conclude(run.inner(), run.solver, first, last, steps)
    run.meter.sample()
    return end
