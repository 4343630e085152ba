"""Options of a solver that are functions of the hyperparameters: the optimizer's own hyperparameters are tuned too.

Such a function takes ``(hparams)``, or ``(hparams, step)`` for an option that changes from step to step, and returns

    a 0-d Tensor                         one number for all params
    a tree of Tensors shaped as params   one for each leaf; every Tensor broadcasts to its leaf

It is called anew in every step, so that differentiating the step differentiates it, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.core import tree
from bilevel.core.options import require_arguments
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem

Option: TypeAlias = float | Callable[..., Tree]
"""A number, or a function of the hyperparameters (and the step)."""


def takes_step(function: Callable[..., Any]) -> bool:
    """Return whether an option is a function of ``(hparams, step)``, and not of ``(hparams)`` alone.

    >>> takes_step(lambda hparams: hparams.exp()), takes_step(lambda hparams, step: hparams[step])
    (False, True)
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        # Some functions written in C do not say.
        return False
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len([each for each in parameters if each.kind in named]) > 1


def check_function(what: str, function: Callable[..., Any]) -> None:
    """Refuse a function that takes neither ``(hparams)`` nor ``(hparams, step)``; ValueError says what it takes."""
    require_arguments(what, function, "hparams", *(("step",) if takes_step(function) else ()))


def values_at(what: str, option: Callable[..., Any], inner: InnerProblem, step: int, params: Tree) -> list[Tensor]:
    """Return an option for every leaf of params, in a shape that broadcasts to the leaf; of a batch, of each member.

    Raises:
        ValueError: for anything but Tensors that broadcast to params and share their dtype and device, and for a
            function that has no value for this step.
    """

    def function(hparams: Tree) -> Tree:
        return option(hparams, step) if takes_step(option) else option(hparams)

    batch = inner.problem.batch
    try:
        result = function(inner.hparams) if batch is None else torch.func.vmap(function)(inner.hparams)
    except IndexError as error:
        raise ValueError(f"`{what}` has no value for step {step} of the solve, counted from 0: {error}.") from error
    names, leaves = tree.names(params), tree.leaves(params)
    return [
        _fitted(what, name, value, leaf, batch is not None)
        for name, value, leaf in zip(names, _spread(what, result, params), leaves, strict=True)
    ]


def check_range(what: str, values: list[Tensor], below_one: bool) -> None:
    """Refuse negative values, or also those not `below_one`; on an accelerator this waits for them."""
    for value in values:
        low, high = float(value.detach().amin()), float(value.detach().amax())
        if below_one and not (low >= 0 and high < 1):
            got = high if low >= 0 else low
            raise ValueError(
                f"`{what}` must lie in [0, 1), got {got:.4g} at these hyperparameters: the sigmoid of a hyperparameter "
                "always does."
            )
        if not low >= 0:
            raise ValueError(
                f"`{what}` must not be negative, got {low:.4g} at these hyperparameters: the exponential of a "
                "hyperparameter never is."
            )


def _spread(what: str, result: Any, params: Tree) -> list[Any]:
    """Return what a function returned, once for each leaf of params."""
    if isinstance(result, Tensor):
        return [result] * len(tree.leaves(params))
    try:
        return tree.leaves(pytree.tree_map(lambda _, value: value, params, result))
    except (ValueError, AttributeError, TypeError):
        got = type(result).__name__
        if tree.leaves(result) != [result]:
            given, wanted = tree.names(result), tree.names(params)
            lacking = ", ".join(name for name in wanted if name not in given)
            more = ", ".join(name for name in given if name not in wanted)
            faults = [f"lacks {lacking}"] * bool(lacking) + [f"has {more}, which no step moves,"] * bool(more)
            got = f"a tree that {' and '.join(faults)}" if faults else "a tree of another order or nesting"
        raise ValueError(
            f"`{what}` must return a Tensor or a tree of Tensors shaped as params, got {got.rstrip(',')}."
        ) from None


def _fitted(what: str, name: str, value: Any, leaf: Tensor, batched: bool) -> Tensor:
    """Return a value in a shape that broadcasts to its leaf."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"`{what}` must return a Tensor or a tree of Tensors shaped as params, got {type(value).__name__}: "
            "a number has no derivative by the hyperparameters."
        )
    if (value.dtype, value.device) != (leaf.dtype, leaf.device):
        raise ValueError(
            f"`{what}` returns {value.dtype} on {value.device}, but `params{name}` is {leaf.dtype} on {leaf.device}: "
            "they must share dtype and device."
        )
    shape, wanted = (each.shape[1:] if batched else each.shape for each in (value, leaf))
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    if len(shape) > len(wanted) or any(size not in (1, whole) for size, whole in pairs):
        raise ValueError(
            f"`{what}` returns a Tensor of shape {tuple(shape)} for `params{name}` of shape {tuple(wanted)}, to which "
            "it does not broadcast."
        )
    return value.reshape(len(leaf), *(1,) * (len(wanted) - len(shape)), *shape) if batched else value
