"""Unrolls of runs on flat vectors, in reverse and in forward mode (see `bilevel.engine.flat`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from bilevel.base import Pullback, Solution
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.engine.estimator import Run
from bilevel.engine.flat import flat_run


def unrolled(run: Run, length: Callable[[int], int], at_least: int = 1, kept: bool = True) -> Solution | None:
    """Return the solution of a run with the VJP of its last steps; arguments and None are those of `flat_run`."""
    inner = run.inner()
    flat = flat_run(inner, run.solver, run.begin(), length, at_least, kept)
    if flat is None:
        return None
    run.meter.sample()
    state, tail, size = flat.end.state, flat.tail.count, inner.problem.batch

    @torch.no_grad()
    def pullback(cotangent: Tree) -> Pullback:
        a = torch.zeros_like(flat.last)
        along = tree.Raveler(cotangent, batched=size is not None).ravel(cotangent)
        a.select(-2, 0).copy_(along if flat.basis is None else along @ flat.basis)
        total: Tree = None
        for stretch, begin in reversed(flat.tail.stretches):
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


def pushed(run: Run) -> Solution | None:
    """Return the solution of a run with its derivative by all hyperparameters carried along; None as for `flat_run`."""
    inner, raveler = run.inner(), tree.Raveler(run.hparams)
    flat = flat_run(inner, run.solver, run.begin(), at_least=1, directions=raveler.size)
    if flat is None:
        return None
    run.meter.sample()
    params, steps = flat.end.state.params, flat.end.steps
    inner.counts["jvp"] += steps * raveler.size
    size = flat.last.shape[1] // (1 + raveler.size)
    tangents = flat.last[0, size:].view(-1, size)

    @torch.no_grad()
    def pullback(cotangent: Tree) -> Pullback:
        along = tree.Raveler(cotangent).ravel(cotangent)
        along = along if flat.basis is None else along @ flat.basis
        return Pullback(raveler.unravel(torch.mv(tangents, along)), steps=steps)

    return flat.end.solution(params, pullback)
