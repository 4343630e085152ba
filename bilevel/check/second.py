"""Checks of the second derivatives of the inner loss: whether they exist, are right, are symmetric, and see hparams."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.check.differences import derivative
from bilevel.check.losses import only_leaf, relative_error
from bilevel.check.report import Finding
from bilevel.check.subject import DIRECTIONS, Subject
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.nonfinite import first_not_finite_curvature

NAMED = 3
"""Components that a sentence names."""


def double_backward(subject: Subject) -> Finding:
    """Take one product with the Hessian and one with the cross derivative; an operation without them raises."""
    point = subject.problem.smooth.bind(subject.hparams).linearize(subject.start)
    v = subject.direction(subject.start, 0)
    point.hvp(v)
    point.cross(v)
    return Finding("double backward", "ok", "every operation of the inner loss can be differentiated twice.")


def second_derivatives(subject: Subject) -> Finding:
    """Compare both products with differences of the inner gradient, at two points."""
    worst, where = 0.0, ""
    for place, params in subject.points():
        point = subject.problem.smooth.bind(subject.hparams).linearize(params)
        for index in range(DIRECTIONS):
            v = subject.direction(params, 200 + index)
            for what, product, value in (
                ("params", point.hvp(v), params),
                ("hparams", point.cross(v), subject.hparams),
            ):
                for position, leaf in enumerate(tree.names(value)):
                    direction = only_leaf(subject.direction(value, 300 + 10 * position + index), position)
                    claimed = float(tree.dot(product, direction))
                    floor = 0.1 * float(tree.norm(product)) / tree.size(value) ** 0.5
                    measured = derivative(_gradient_along(subject, what, params, direction, v))
                    error = relative_error(claimed, *measured, floor)
                    if error > worst:
                        worst, where = error, f"`{what}{leaf}` {place}"
    if worst == float("inf") and (made := _endless(subject)):
        return Finding(
            "second derivatives", "fault", f"{made}; start elsewhere, or write it without that operation.", worst
        )
    # In single precision differences of a gradient are differences of rounded numbers.
    if worst <= 10 * subject.tolerance():
        return Finding("second derivatives", "ok", "agree with differences of the inner gradient.", worst)
    sentence = (
        f"the derivative of the inner gradient by {where} differs from differences of that gradient by {worst:.1e}: "
        "a backward is not differentiable itself (detached, `ctx` values, numpy), or a hyperparameter is detached."
    )
    return Finding("second derivatives", "fault", sentence, worst)


def _endless(subject: Subject) -> str:
    """Return which operation has no finite second derivative at one of the points."""
    for place, params in subject.points():

        def gradient(x: Tree = params) -> tuple[list[Tensor], list[Tensor]]:
            x, u = tree.attach(x), tree.attach(subject.hparams)
            return tree.leaves(subject.problem.gradient_graph(x, u)), tree.leaves(x) + tree.leaves(u)

        if made := first_not_finite_curvature(gradient):
            return made.replace("there", place)
    return ""


def _gradient_along(subject: Subject, what: str, params: Tree, direction: Tree, v: Tree) -> Callable[[float], float]:
    """Return t -> <v, inner gradient>, with one argument moved by t along a direction."""
    x, u, d, w = (subject.widened(each) for each in (params, subject.hparams, direction, v))

    def function(t: float) -> float:
        there = (tree.add(x, d, t), u) if what == "params" else (x, tree.add(u, d, t))
        with torch.enable_grad(), subject.wide():
            gradient = subject.problem.gradient_graph(*(tree.attach(each) for each in there))
        return float(tree.dot(tree.detach(gradient), w))

    return function


def symmetry(subject: Subject) -> Finding:
    """Compare <H v, w> with <v, H w> at two points."""
    if not subject.problem.symmetric:
        return Finding(
            "symmetry", "not applicable", "the Jacobian of an optimality map need not be symmetric: use GMRES."
        )
    worst = 0.0
    for _, params in subject.points():
        point = subject.problem.bind(subject.hparams).linearize(params)
        for index in range(DIRECTIONS):
            v, w = subject.direction(params, 400 + index), subject.direction(params, 500 + index)
            by_v, by_w = point.hvp(v), point.hvp(w)
            size = float(tree.norm(by_v) * tree.norm(w) + tree.norm(by_w) * tree.norm(v))
            apart = abs(float(tree.dot(by_v, w) - tree.dot(v, by_w)))
            worst = max(worst, apart / size if size > 0 else 0.0)
    if worst <= max(1e-9, 1e3 * subject.eps):
        return Finding("symmetry", "ok", "<H v, w> = <v, H w>.", worst)
    sentence = (
        f"the Hessian of the inner loss is not symmetric (relative difference {worst:.1e}), so what is called its "
        "gradient is the gradient of nothing: correct the backward, or state the map as `optimality=` and use GMRES."
    )
    return Finding("symmetry", "fault", sentence, worst)


# Influence ---------------------------------------------------------------------------------------------------------


def influence(subject: Subject, solution: Tree | None) -> Finding:
    """Look at which hyperparameters move the inner gradient: here, beside here, and at the solution if there is one."""
    raveler = tree.Raveler(subject.hparams)
    places = [(params, u) for _, params in subject.points() for u in (subject.hparams, subject.away[1])]
    if solution is not None:
        places.append((solution, subject.hparams))
    sizes = []
    for params, u in places:
        point = subject.problem.bind(u).linearize(params)
        products = [raveler.ravel(point.cross(subject.direction(params, 600 + index))).abs() for index in range(2)]
        sizes.append(torch.stack(products).amax(0))
    largest = torch.stack(sizes).nan_to_num().amax(0)
    if silent := _indices((largest == 0) & ~subject.read_by_steps):
        return _silent(subject, silent)
    if tuned := _indices(largest == 0):
        sentence = (
            f"{component_names(subject.hparams, tuned)} moves the steps of the inner solver, not the inner gradient: "
            "only estimators that differentiate the steps see it, such as FullUnroll."
        )
        return Finding("influence", "note", sentence, len(tuned))
    if solution is not None and (idle := _indices(sizes[-1] == 0)):
        sentence = (
            f"{component_names(subject.hparams, idle)} moves the inner gradient elsewhere, but not at the solution: "
            "its hypergradient there is what the outer loss says directly."
        )
        return Finding("influence", "note", sentence, len(idle))
    ratio = float(largest.min() / largest.max())
    if ratio < 1e-8:
        weakest = component_names(subject.hparams, [int(largest.argmin())])
        sentence = (
            f"{weakest} moves the inner gradient {1 / ratio:.0e} times less than the strongest: rescale the "
            "hyperparameters, such as by logarithms."
        )
        return Finding("influence", "note", sentence, ratio)
    return Finding("influence", "ok", "every hyperparameter moves the inner gradient.", ratio)


def _indices(mask: Tensor) -> list[int]:
    return [int(index) for index in torch.nonzero(mask)[:, 0]]


def _silent(subject: Subject, silent: list[int]) -> Finding:
    """Judge components without a derivative: detached, without effect, or in the outer loss alone."""
    detached, outer, nothing = [], [], []
    for index in silent:
        unit = tree.Raveler(subject.hparams).units()[index]
        _, _, by_hparams = subject.problem.outer_value_and_grads(subject.away[0], subject.hparams)
        if _moves(subject, unit):
            detached.append(index)
        elif not float(tree.dot(by_hparams, unit)):
            nothing.append(index)
        elif not _mixed(subject, unit):
            outer.append(index)
    if detached:
        verb = (
            "changes the inner gradient, but has no derivative: it is detached or turned into a number inside the loss"
        )
    elif nothing:
        verb = "has no influence on either loss: remove it, or look where it gets lost"
    elif outer:
        verb = (
            "has no influence on the inner problem and only adds to the outer loss, so that its best value needs no "
            "inner solution"
        )
    else:
        sentence = (
            f"{component_names(subject.hparams, silent)} has no influence on the inner problem, and acts through the "
            "outer loss alone: its hypergradient needs no inner derivative."
        )
        return Finding("influence", "note", sentence, len(silent))
    result = detached or nothing or outer
    return Finding("influence", "fault", f"{component_names(subject.hparams, result)} {verb}.", len(result))


def _moves(subject: Subject, unit: Tree) -> bool:
    """Whether the values of the inner gradient change along a direction of the hyperparameters."""
    params = subject.away[0]
    here = subject.gradient(params, subject.hparams)
    for size in (0.1, 1.0):
        there = subject.gradient(params, tree.add(subject.hparams, unit, size))
        apart = float(tree.norm(tree.add(there, here, -1.0)))
        if apart > 100 * subject.eps * float(tree.norm(here)):
            return True
    return False


def _mixed(subject: Subject, unit: Tree) -> bool:
    """Whether the outer gradient by params changes along a direction of the hyperparameters."""
    here, there = (
        subject.problem.outer_value_and_grads(subject.away[0], u)[1]
        for u in (subject.hparams, tree.add(subject.hparams, unit, 0.1))
    )
    return float(tree.norm(tree.add(there, here, -1.0))) > 100 * subject.eps * float(tree.norm(here))


def component_names(hparams: Tree, indices: list[int]) -> str:
    """Return the names of some components, a few of them written out."""
    labels = component_labels(hparams)
    named = ", ".join(f"`{labels[index]}`" for index in indices[:NAMED])
    return named + (f" (and {len(indices) - NAMED} more)" if len(indices) > NAMED else "")


def component_labels(hparams: Tree) -> list[str]:
    """Return a name for every scalar hyperparameter, in the order of `Raveler`."""
    labels = []
    for name, leaf in zip(tree.names(hparams), tree.leaves(hparams), strict=True):
        for flat in range(leaf.numel()):
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat), leaf.shape)] if leaf.dim() else []
            labels.append(f"hparams{name}" + (f"{index}" if index else ""))
    return labels
