"""The arguments of `hypergradient` and of the outer loop: one sentence for each mistake, before the work starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bilevel.base import Carry, InnerSolver
from bilevel.core import tree
from bilevel.core.options import shown_value, suggest
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem

SHOWN = 64
"""Steps in which a solver that stops by tolerance shows what it reads."""


def check_roles(problem: Any, solver: Any, estimator: Any) -> None:
    """Refuse arguments in the wrong order, and a class in the place of its instance, by a ValueError."""
    for value, kind in ((problem, BilevelProblem), (solver, InnerSolver), (estimator, HypergradEstimator)):
        if not isinstance(value, kind):
            if hasattr(value, "memories"):  # a StochasticMethod, which stands above
                name = type(value).__name__
                raise ValueError(
                    f"{name} is a method of single loops: SingleLoop(problem, {name}(), hparams).run(steps)."
                )
            got = shown_value(value) if isinstance(value, type | str) else type(value).__name__
            place, _, remedy = got.partition(": ")
            end = f": {remedy}." if remedy else "."
            if isinstance(value, str):
                words = "whose only string is 'auto'" if kind is HypergradEstimator else "of which none is a string"
                end = f", {words}{suggest(value, [f'{name}()' for name in _classes(kind)])}"
            raise ValueError(
                f"expected (problem, solver, estimator, hparams), got {place} in the place of {kind.__name__}{end}"
            )


def _classes(kind: type) -> list[str]:
    """Return the names of the classes below one."""
    below: list[type] = kind.__subclasses__()
    return [name for each in below for name in (each.__name__, *_classes(each))]


class _Still(InnerProblem):
    """An inner problem whose gradient is zero: a step of a solver shows there what it reads besides the gradient."""

    def _grad(self, params: Tree) -> Tree:
        return tree.zeros_like(params)


def read_by_steps(solver: InnerSolver, problem: BilevelProblem, params: Tree, hparams: Tree) -> list[bool]:
    """Return of every hyperparameter whether the inner solver reads it by itself, and not in the gradient alone.

    Steps from params are taken until all have been read, or the first has shown that none is; of no batch.
    """
    inner = _Still(problem, hparams)
    inner.hparams = tree.attach(hparams)
    roots = tree.leaves(inner.hparams)
    result = [False] * len(roots)
    if not solver.traits.differentiable:
        return result
    state = solver.init(inner, tree.detach(params))
    for _ in range(solver.steps or SHOWN):
        with torch.enable_grad():
            state = solver.step(inner, state)
        moved = [leaf for leaf in tree.leaves(state.variables) if leaf.requires_grad]
        if not moved:
            break
        ones = [torch.ones_like(leaf) for leaf in moved]
        parts = torch.autograd.grad(moved, roots, ones, allow_unused=True)
        result = [before or part is not None for before, part in zip(result, parts, strict=True)]
        params, memory = tree.detach(state.variables)
        state = replace(state, params=params, memory=memory)
        if all(result):
            break
    return result


def check_carry(carry: Any, solver: InnerSolver, start: Tree, trainable: Tree) -> None:
    """Refuse a warm start of another solver or another problem, whose cold start has other shapes.

    Raises:
        ValueError: for anything but a `Carry`, one that another class of solver left, or one of other shapes.
    """
    if not isinstance(carry, Carry):
        raise ValueError(f"`carry` must be the `carry` of an estimate, got {shown_value(carry)}.")
    check_origin("this carry", carry.solver, solver)
    for part, like in ((None if carry.state is None else carry.state.params, start), (carry.adjoint, trainable)):
        if part is not None and shapes(part) != shapes(like):
            raise ValueError(
                f"this carry is of another problem: it holds {_worded(part)}, the params here are {_worded(like)}."
            )


def check_origin(what: str, made_by: str, solver: InnerSolver) -> None:
    """Refuse, by a ValueError, the inner state of another class of solver; its name is empty where nobody knows."""
    if made_by and made_by != type(solver).__name__:
        raise ValueError(
            f"{what} is of the inner solver {made_by}, whose memory {type(solver).__name__} cannot go on with: "
            "start with params=estimate.params instead."
        )


def shapes(values: Tree) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and the shape of every leaf."""
    return sorted((name, tuple(leaf.shape)) for name, leaf in zip(tree.names(values), tree.leaves(values), strict=True))


def _worded(values: Tree) -> str:
    return ", ".join(f"{name or 'a Tensor'} of shape {shape}" for name, shape in shapes(values))
