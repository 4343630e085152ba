"""The tensors that a problem's functions hold without being given them: data, modules, buffers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from bilevel import tree
from bilevel.problem import BilevelProblem
from bilevel.tree import Tree

DEPTH = 5
"""How far functions, containers and modules are followed."""


def captured(problem: BilevelProblem) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the tensors that the functions of a problem refer to, each once.

    Args:
        problem: the problem; its own attributes count where its losses are methods.
    """
    seen: set[int] = set()
    for function in problem.functions:
        if function is not None:
            yield from _tensors("", function, DEPTH, seen)
    yield from _tensors("data", problem.data, DEPTH, seen)
    if not any(problem.functions):
        yield from _tensors("", vars(problem), DEPTH, seen)


def versions(problem: BilevelProblem) -> dict[str, int]:
    """Return how often each captured tensor has been written into."""
    return {name: tensor._version for name, tensor in captured(problem) if not tensor.is_inference()}


def check_captured(problem: BilevelProblem, params: Tree, hparams: Tree) -> None:
    """Refuse an inner problem that holds tensors that require gradients, which it would not get.

    Args:
        problem: the problem.
        params: a start.
        hparams: hyperparameters.

    Raises:
        ValueError: with the name of the first such tensor.
    """
    named, what = list(problem.detached), ""
    if not named:
        function = problem.inner_loss if problem.optimality is None else problem.optimality
        params, hparams = tree.detach(params), tree.detach(hparams)
        first = _graph(function(params, hparams))
        # A loss may make leaves of its own, for a derivative inside it: those are others in the next call.
        again = _graph(function(params, hparams)) if first else set()
        leaves = [node.variable for node in first & again if hasattr(node, "variable")]
        for name, each in captured(problem) if leaves else ():
            if each.grad_fn in first or any(each is leaf for leaf in leaves):
                named.append(name)
        what = f"a tensor of shape {tuple(leaves[0].shape)}" if leaves else ""
    if named or what:
        what = f"`{named[0]}`" if named else what
        raise ValueError(
            f"the inner problem holds {what}, which requires gradients, but `solution` is differentiated by hparams "
            "alone: hand it over as a hyperparameter, or detach it."
        )


def _graph(values: Tree) -> set[Any]:
    """Return the nodes of the autograd graph of some tensors."""
    found: set[Any] = set()
    nodes = [leaf.grad_fn for leaf in tree.leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return found


def _tensors(name: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen or depth == 0:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, part in _parts(value):
        yield from _tensors(f"{name}.{key}" if name else key, part, depth - 1, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function, a module or a container refers to."""
    if isinstance(value, nn.Module):
        yield from value.named_parameters()
        yield from value.named_buffers()
    elif isinstance(value, MethodType):
        yield from _parts(value.__func__)
    elif isinstance(value, partial):
        yield "", value.func
        yield from ((str(index), each) for index, each in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, FunctionType):
        with contextlib.suppress(ValueError):  # a variable of the closure that has no value yet
            names = inspect.getclosurevars(value)
            yield from names.nonlocals.items()
            yield from names.globals.items()
        yield from ((str(index), each) for index, each in enumerate(value.__defaults__ or ()))
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield from ((str(index), part) for index, part in enumerate(value))
