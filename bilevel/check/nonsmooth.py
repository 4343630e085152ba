"""What is checked of a nonsmooth term: its proximal map, and whether the solution stands near a kink."""

from __future__ import annotations

import torch

from bilevel.check.report import Finding
from bilevel.check.subject import Subject
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.proximal_inner import moved_by, safe_step

NEAR = 1e-3
"""Share by which what the proximal map is given has to change before the support does."""


MISSED = 1e-2
"""Share of ``|p - v|^2 / 2s`` by which another point has to be better than the proximal point p of v."""


def proximal_map(subject: Subject, reached: Tree) -> Finding:
    """Compare ``r(p) + |p - v|^2 / 2s`` at p = prox(v, s) with its values at proximal points of other v and s."""
    inner, term = subject.problem.bind(subject.hparams), subject.problem.nonsmooth
    assert term is not None
    step = safe_step(inner, reached)
    moved, worst = moved_by(reached, step, inner.smooth.grad(reached)), 0.0
    for v in (moved, tree.scale(3.0, moved)):

        def objective(p: Tree, v: Tree = v) -> tuple[float, float]:
            away = float(tree.norm(tree.add(p, v, -1.0)) ** 2 / (2.0 * step))
            return float(term.value(p, subject.hparams)) + away, away

        value, away = objective(inner.prox(v, step))
        others = [inner.prox(v, scale * step) for scale in (0.5, 0.9, 1.1, 2.0)]
        others += [inner.prox(tree.scale(scale, v), step) for scale in (0.5, 0.9, 1.1, 2.0)]
        rounding = 1e3 * torch.finfo(subject.dtype).eps * abs(value)
        gap = value - min(objective(p)[0] for p in others)
        worst = max(worst, (gap - rounding) / away if away > 0 else 0.0)
    what = type(term).__name__
    if worst > MISSED:
        sentence = (
            f"`{what}.prox` is not the proximal map of `{what}.value`: another point makes value(p) + |p - v|^2 / (2 "
            "step) smaller, so inner solutions and hypergradients are wrong: correct one of the two."
        )
        return Finding("proximal map", "fault", sentence, worst)
    return Finding("proximal map", "ok", f"the proximal map of {what} minimises what it should.", worst)


def near_kink(subject: Subject, reached: Tree) -> Finding:
    """Compare the support with those of proximal steps from points a little nearer to zero, and a little farther."""
    inner, term = subject.problem.bind(subject.hparams), subject.problem.nonsmooth
    assert term is not None
    step = safe_step(inner, reached)
    moved = moved_by(reached, step, inner.smooth.grad(reached))

    def support(scale: float) -> torch.Tensor:
        after = term.support(inner.prox(tree.scale(scale, moved), step))
        return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(after)])

    inside, changed = support(1.0), (support(1.0 - NEAR) != support(1.0 + NEAR))
    count, total, near = int(inside.sum()), len(inside), int(changed.sum())
    what = type(term).__name__
    if not near:
        sentence = f"the support holds {count} of {total} variables, and no kink of {what} is near."
        return Finding("kinks", "ok", sentence, 0)
    sentence = (
        f"the solution stands at a kink of {what}, or near one: {near} of {total} variables are about to enter or "
        "leave the support, so that the hypergradient is that of one side and holds for small steps alone."
    )
    return Finding("kinks", "note", sentence, near)
