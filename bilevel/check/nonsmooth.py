"""Whether the solution of a problem with a nonsmooth term stands near a kink, where its support changes."""

from __future__ import annotations

import torch

from bilevel.check.report import Finding
from bilevel.check.subject import Subject
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.proximal_inner import moved_by, safe_step

NEAR = 1e-3
"""Share by which what the proximal map is given has to change before the support does."""


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
