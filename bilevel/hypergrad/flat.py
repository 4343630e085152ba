"""Unrolls of runs on flat vectors, in reverse and in forward mode (see `bilevel.engine.lean`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch

from bilevel.base import Pullback, Solution
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.engine.estimator import Run
from bilevel.engine.lean import Stretches, flat_run, kernels_of
from bilevel.engine.loop import conclude
from bilevel.inner.multistep import LinearMultistep
from bilevel.oracles.kernels import Pushed


def unrolled(run: Run, length: Callable[[int], int], at_least: int = 1, kept: bool = True) -> Solution | None:
    """Return the solution of a run with the VJP of its last steps; arguments and None are those of `flat_run`."""
    inner = run.inner()
    flat = flat_run(inner, run.solver, run.begin(), length, at_least, kept)
    if flat is None:
        return None
    run.meter.sample()
    state, tail, size = flat.end.state, flat.tail, inner.problem.batch

    @torch.no_grad()
    def pullback(cotangent: Tree) -> Pullback:
        a = torch.zeros_like(flat.made.stacked(state))
        a.select(-2, 0).copy_(cotangent.reshape(a.select(-2, 0).shape))
        total: Tree = None
        for stretch, begin in reversed(flat.swept):
            if not kept:
                stretch.forward(begin, True)
            a, part = stretch.backward(a)
            if not kept:
                stretch.forget()
            total = part if total is None else tree.add(total, part)
        run.meter.counts["gradient"] += 0 if kept else tail
        run.meter.counts["vjp"] += tail
        if size is None:
            return Pullback(total, steps=tail)
        return Pullback(total, steps=[tail] * size, counts=[Counter(vjp=tail) for _ in range(size)])

    return flat.end.solution(state.params, pullback)


@torch.no_grad()
def pushed(run: Run) -> Solution | None:
    """Return the solution of a run with its derivative by all hyperparameters carried along; None as for `unrolled`.

    A run with a tolerance is made step by step, too.
    """
    inner, solver, steps = run.inner(), run.solver, run.solver.steps
    single = inner.problem.batch is None and solver.tol is None
    kernels = kernels_of(inner, solver) if single else None
    if kernels is None or steps is None:
        return None
    counts, raveler = run.meter.counts.copy(), tree.Raveler(run.hparams)
    first = run.begin()
    size = first.params.numel()
    both = Pushed(kernels, size)
    made = Stretches(both, cast(LinearMultistep, solver), first)
    s = made.stacked(first)
    s = torch.cat([s, s.new_zeros(s.shape[0], raveler.size * size)], dim=1)
    if made.point is not None:
        for stretch in made.between(0, steps):
            s = stretch.forward(s, False)
            both.parts.clear()  # memory must not grow with the steps
    if made.point is None or not bool(torch.isfinite(s.sum())):
        run.meter.counts.clear()
        run.meter.counts.update(counts)
        return None
    run.meter.counts["gradient"] += steps
    end = conclude(inner, solver, first, made.state(s[:, :size], steps), steps)
    end = replace(end, form=" and ".join(made.forms))
    run.meter.sample()
    run.meter.counts["jvp"] += steps * raveler.size
    tangents = s[0, size:].view(-1, size)

    @torch.no_grad()
    def pullback(cotangent: Tree) -> Pullback:
        return Pullback(raveler.unravel(torch.mv(tangents, cotangent.reshape(-1))), steps=steps)

    return end.solution(end.state.params, pullback)
