"""Checks of the two losses and of their first derivatives: nothing here needs an inner solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from bilevel.check.differences import HALVINGS, PIECES, derivative, largest_jump
from bilevel.check.nonsmooth import near_kink
from bilevel.check.report import Finding
from bilevel.check.subject import DIRECTIONS, Subject
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.engine.checks import read_by_steps
from bilevel.oracles.nonfinite import first_not_finite_slope
from bilevel.oracles.purity import referred_to

UNTRUSTED = 0.1
"""A difference whose own uncertainty is above this share of it decides nothing."""
KINK = 1e-3
"""A jump of the gradient below this share of its norm at the start is none."""
JUMP = 1e-6
"""A jump below this share of the largest value is rounding."""


def inputs(subject: Subject) -> Finding:
    """Look at trees, dtypes, devices and values, as every call of `hypergradient` does."""
    subject.given.check(subject.given_start, subject.hparams, partial(read_by_steps, subject.solver))
    if slope := _endless_slope(subject):
        return Finding("inputs", "fault", slope)
    like = tree.leaves(subject.start)[0]
    odd = [
        f"`{name}` is {tensor.dtype} on {tensor.device}"
        for name, tensor in referred_to(subject.given).tensors.items()
        if tensor.is_floating_point() and (tensor.dtype, tensor.device) != (like.dtype, like.device)
    ]
    if odd:
        sentence = (
            f"{odd[0]}, but params are {like.dtype} on {like.device}: torch converts or refuses at every call; "
            f"move it once{_others(odd)}."
        )
        return Finding("inputs", "note", sentence, len(odd))
    for name, leaf in zip(tree.names(subject.hparams), tree.leaves(subject.hparams), strict=True):
        largest = float(leaf.abs().max())
        if largest > 30:
            sentence = (
                f"`hparams{name}` holds a number as large as {largest:.3g}: as a logarithm that is beyond what the "
                "dtype resolves, and as it stands it needs large steps: change the scale."
            )
            return Finding("inputs", "note", sentence, largest)
    return Finding("inputs", "ok", "trees, shapes, dtypes, devices and values fit.")


def _endless_slope(subject: Subject) -> str:
    """Return a sentence about a loss that is finite at the start while its gradient is not, else an empty string."""
    for which in ("inner", "outer"):
        if which == "inner" and subject.problem.optimality is not None:
            continue
        params, hparams = tree.attach(subject.start), tree.attach(subject.hparams)
        roots = {"params": params} if which == "inner" else {"params": params, "hparams": hparams}
        with torch.enable_grad():
            value = subject.loss(which)(params, hparams)
        for what, root in roots.items():
            parts = torch.autograd.grad(value, tree.leaves(root), retain_graph=True, allow_unused=True)
            for name, part in zip(tree.names(root), parts, strict=True):
                if part is not None and not tree.is_finite(part):
                    return (
                        f"the gradient of the {which} loss by `{what}{name}` is not finite at the start: "
                        f"{first_not_finite_slope(value, tree.leaves(root))}; start elsewhere, or add a small number "
                        "inside of it."
                    )
    return ""


def _others(result: list[str]) -> str:
    return f" (and {len(result) - 1} more)" if len(result) > 1 else ""


def gradients(subject: Subject, which: str) -> Finding:
    """Compare the gradient of a loss with differences of its values, along random directions at two points."""
    name = f"{which} gradient"
    if which == "inner" and subject.problem.optimality is not None:
        return Finding(name, "not applicable", "the problem is stated by an optimality map.")
    worst, where = 0.0, ""
    for place, params in subject.points():
        for what, value, gradient in _partial_gradients(subject, which, params):
            for leaf, error in _leaf_errors(subject, which, what, params, value, gradient):
                if error > worst:
                    worst, where = error, f"`{what}{leaf}` {place}"
    if worst <= subject.tolerance():
        return Finding(name, "ok", "agrees with differences of the loss's values.", worst)
    sentence = (
        f"the gradient of the {which} loss by {where} differs from differences of its values by {worst:.1e}: a "
        "hand-written backward is wrong, a part is detached or turned into a number, or the dtype cancels digits."
    )
    return Finding(name, "fault", sentence, worst)


def _partial_gradients(subject: Subject, which: str, params: Tree) -> list[tuple[str, Tree, Tree]]:
    if which == "inner":
        return [("params", params, subject.smooth_gradient(params, subject.hparams))]
    _, by_params, by_hparams = subject.problem.outer_value_and_grads(params, subject.hparams)
    return [("params", params, by_params), ("hparams", subject.hparams, by_hparams)]


def _leaf_errors(
    subject: Subject, which: str, what: str, params: Tree, value: Tree, gradient: Tree
) -> list[tuple[str, float]]:
    """Return the relative error of the derivative along random directions of each leaf."""
    errors = []
    length = float(tree.norm(gradient))
    for position, leaf in enumerate(tree.names(value)):
        worst = 0.0
        for index in range(DIRECTIONS):
            direction = only_leaf(subject.direction(value, 10 * position + index), position)
            along = float(tree.dot(gradient, direction))
            function = _along(subject, which, what, params, direction)
            error = relative_error(along, *derivative(function), 0.1 * length / tree.size(value) ** 0.5)
            worst = max(worst, error)
        errors.append((leaf, worst))
    return errors


def _along(subject: Subject, which: str, what: str, params: Tree, direction: Tree) -> Callable[[float], float]:
    """Return t -> the loss, with one of its arguments moved by t along a direction."""
    x, u, d = (subject.widened(each) for each in (params, subject.hparams, direction))
    loss = subject.loss(which)

    def function(t: float) -> float:
        with torch.no_grad(), subject.wide():
            value = loss(tree.add(x, d, t), u) if what == "params" else loss(x, tree.add(u, d, t))
        return float(value)

    return function


def only_leaf(values: Tree, position: int) -> Tree:
    """Return the tree with zeros in every leaf but one."""
    leaves = [leaf if index == position else torch.zeros_like(leaf) for index, leaf in enumerate(tree.leaves(values))]
    return tree.rebuild(values, leaves)


def relative_error(claimed: float, measured: float, uncertainty: float, floor: float) -> float:
    """Return how far a claimed derivative is from a measured one, relative to the larger of them and to a floor.

    The error is zero where the uncertainty of the measurement is too large to decide.
    """
    size = max(abs(claimed), abs(measured), floor)
    if not math.isfinite(claimed):
        return math.inf
    if size == 0 or not uncertainty <= UNTRUSTED * size:
        return 0.0
    return max(0.0, abs(claimed - measured) - 10 * uncertainty) / size


def jumps(subject: Subject) -> Finding:
    """Search both losses for jumps along random segments of params and of hparams."""
    for which in ("inner", "outer"):
        if which == "inner" and subject.problem.optimality is not None:
            continue
        for what in ("params", "hparams"):
            jump, size = largest_jump(_segment(subject, which, what))
            if jump > JUMP * size:
                sentence = (
                    f"the {which} loss jumps by {jump:.2g} as {what} move (rounding, argmax, a comparison, a count), "
                    "and its derivative does not see that: use a smooth stand-in, such as a sigmoid or softmax."
                )
                return Finding("jumps", "fault", sentence, jump)
    return Finding("jumps", "ok", "both losses are continuous along random segments.", 0.0)


def _segment(subject: Subject, which: str, what: str) -> Callable[[float], tuple[float, float]]:
    """Return t -> (loss, slope) on the way from the start to the point beside it, of one argument."""
    loss, index = subject.loss(which), ("params", "hparams").index(what)
    start, hparams, b = (subject.widened(each) for each in (subject.start, subject.hparams, subject.away[index]))
    a = (start, hparams)[index]
    chord = tree.add(b, a, -1.0)

    def function(t: float) -> tuple[float, float]:
        point = tree.attach(tree.add(a, chord, t))
        with torch.enable_grad(), subject.wide():
            value = loss(point, hparams) if what == "params" else loss(start, point)
            if not value.requires_grad:
                return float(value), 0.0
            slopes = torch.autograd.grad(value, tree.leaves(point), materialize_grads=True)
        return float(value.detach()), float(tree.dot(tree.rebuild(point, slopes), chord))

    return function


def kinks(subject: Subject, reached: Tree) -> Finding:
    """Search the inner gradient for jumps on the way from the start to where the inner solver ended: never a fault."""
    if subject.problem.nonsmooth is not None:
        return near_kink(subject, reached)
    x, chord = subject.start, tree.add(reached, subject.start, -1.0)

    def gradient(t: float) -> Tree:
        return subject.gradient(tree.add(x, chord, t), subject.hparams)

    size = float(tree.norm(gradient(0.0)))
    ends, result = [index / PIECES for index in range(PIECES + 1)], 0.0
    values = [gradient(t) for t in ends]
    changes = [float(tree.norm(tree.add(b, a, -1.0))) for a, b in pairwise(values)]
    piece = changes.index(max(changes))
    (a, b), (at_a, at_b) = ends[piece : piece + 2], values[piece : piece + 2]
    for _ in range(HALVINGS):
        middle = (a + b) / 2
        at_middle = gradient(middle)
        left, right = (float(tree.norm(tree.add(at_middle, end, -1.0))) for end in (at_a, at_b))
        result = max(left, right)
        (a, at_a, b, at_b) = (a, at_a, middle, at_middle) if left > right else (middle, at_middle, b, at_b)
    if not result > KINK * size:
        return Finding("kinks", "ok", "the inner gradient is continuous from the start to the end of the run.", result)
    sentence = (
        f"the inner loss has a kink on the way of the run: the inner gradient jumps there by {result:.2g}, beside its "
        f"norm {size:.2g} at the start; derivatives see no kink, so a solution at one needs a proximal step "
        "(give the term as `nonsmooth=` and take FISTA) or a smooth stand-in."
    )
    return Finding("kinks", "note", sentence, result)


def precision(subject: Subject) -> Finding:
    """Compare the inner gradient with the same operations in float64."""
    if not subject.widens or subject.problem.optimality is not None:
        why = "the problem is in float64." if subject.dtype == torch.float64 else "the losses do not run in float64."
        return Finding("precision", "not applicable", why)
    worst = 0.0
    for _, params in subject.points():
        roots, hparams = tree.attach(subject.widened(params)), subject.widened(subject.hparams)
        with subject.wide():
            loss = subject.problem.inner_loss(roots, hparams)
            exact = torch.autograd.grad(loss, tree.leaves(roots), materialize_grads=True)
        ours = tree.leaves(subject.smooth_gradient(params, subject.hparams))
        size = float(tree.norm(list(exact)))
        apart = float(tree.norm([a.double() - b for a, b in zip(ours, exact, strict=True)]))
        worst = max(worst, apart / size if size > 0 else 0.0)
    allowed = 2e3 * subject.eps
    if worst <= allowed:
        return Finding("precision", "ok", f"the inner gradient in {subject.dtype} agrees with float64.", worst)
    sentence = (
        f"the inner gradient in {subject.dtype} is off by {worst:.1e} from the same operations in float64 "
        "(cancellation): use float64, center the data, or write it with logsumexp, log1p, expm1 and the like."
    )
    return Finding("precision", "fault", sentence, worst)
