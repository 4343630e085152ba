"""NaN and infinity in what the inner solution is turned into: which part made them, and which operation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.base import Pullback
from bilevel.core import tree
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.oracles.nonfinite import first_not_finite, first_not_finite_curvature, first_not_finite_slope
from bilevel.oracles.problem import BilevelProblem


def finite_loss(value: float, again: Callable[[], object] | None = None) -> Verdict:
    """Return a verdict about an outer loss that is not finite; `again` computes it again, to name the operation."""
    if math.isfinite(value):
        return GOOD
    made = first_not_finite(again) if again is not None else ""
    return Verdict(Status.NOT_FINITE, f"the outer loss is {value} at the inner solution{f': {made}' if made else ''}")


def finite_gradient(what: str, gradient: Tree, why: str = "") -> Verdict:
    """Return a verdict about the first leaf that is not finite: "{what}{name of the leaf}` is not finite{why}"."""
    for name, leaf in zip(tree.names(gradient), tree.leaves(gradient), strict=True):
        if not tree.is_finite(leaf):
            return Verdict(Status.NOT_FINITE, f"{what}{name}` is not finite{why}")
    return GOOD


def not_finite_part(
    problem: BilevelProblem, params: Tree, hparams: Tree, by_params: Tree, by_hparams: Tree, pulled: Pullback
) -> Verdict | None:
    """Return a verdict about the part that was not finite first, or None if all were: an outer gradient, a pullback."""
    start = "the gradient of the outer loss by"
    for what, part in (("params", by_params), ("hparams", by_hparams)):
        if finite_gradient("", part) is not GOOD:
            slope = _outer_slope(problem, params, hparams)
            return finite_gradient(f"{start} `{what}", part, f" at the inner solution: {slope}" if slope else "")
    return not_finite_pullback(problem, params, hparams, pulled)


def not_finite_pullback(problem: BilevelProblem, params: Tree, hparams: Tree, pulled: Pullback) -> Verdict | None:
    """Return a verdict about a finite cotangent's pullback that is not, and what made it so; None if it is."""
    status, detail = pulled.verdict.status, pulled.verdict.detail
    finite = pulled.hparams is None or finite_gradient("", pulled.hparams) is GOOD
    if finite if status.usable else status is not Status.NOT_FINITE:
        return None
    made = _inner_curvature(problem, params, hparams)
    if not status.usable:
        return Verdict(status, f"{detail}: {made}") if made else None
    look = made or "look at the inner loss's derivatives"
    return finite_gradient("the pullback to `hparams", pulled.hparams, f", though the outer gradient is: {look}")


def _inner_curvature(problem: BilevelProblem, params: Tree, hparams: Tree) -> str:
    """Return which operation has no finite second derivative, at the solution or at the problem's own start."""
    rest = problem.deterministic()
    for x in (params, problem.params):
        if x is None:
            continue

        def gradient(x: Tree = x) -> tuple[list[Tensor], list[Tensor]]:
            attached, u = tree.attach(problem.trainable(x)), tree.attach(hparams)
            return tree.leaves(rest.gradient_graph(attached, u)), tree.leaves(attached) + tree.leaves(u)

        if made := first_not_finite_curvature(gradient):
            return made
    return ""


def _outer_slope(problem: BilevelProblem, params: Tree, hparams: Tree) -> str:
    params, hparams = tree.attach(params), tree.attach(hparams)
    with torch.enable_grad():
        value = problem.outer_loss(params, hparams)
    return first_not_finite_slope(value, tree.leaves(params) + tree.leaves(hparams)) if value.requires_grad else ""
