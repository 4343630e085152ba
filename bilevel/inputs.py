"""What can be known of params, hparams and losses before the work starts, and the sentence about each mistake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel import tree
from bilevel.tree import Tree


def check_trees(params: Tree, hparams: Tree) -> None:
    """Refuse trees that cannot be worked on.

    Args:
        params: inner variable.
        hparams: outer variable.

    Raises:
        ValueError: one sentence for leaves that are no tensors, empty or not floating, NaN or infinite values, and for
            dtypes or devices that differ.
    """
    found = []
    for what, value in (("params", params), ("hparams", hparams)):
        check_tensors(what, value)
        for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True):
            if not leaf.is_floating_point():
                raise ValueError(f"`{what}{name}` must have a floating dtype, got {leaf.dtype}.")
            if leaf.numel() == 0:
                raise ValueError(f"`{what}{name}` is empty, of shape {tuple(leaf.shape)}.")
            found.append((what, name, leaf))
    dtype, device = found[0][2].dtype, found[0][2].device
    for what, name, leaf in found:
        if leaf.dtype != dtype or leaf.device != device:
            raise ValueError(
                f"`{what}{name}` is {leaf.dtype} on {leaf.device}, but params are {dtype} on {device}: "
                "params and hparams must share dtype and device."
            )
    for what, name, leaf in found:
        if leaf.is_meta:
            raise ValueError(f"`{what}{name}` is on the meta device and holds no values.")
        if not tree.is_finite(leaf):
            raise ValueError(f"`{what}{name}` holds NaN or infinite values.")


def check_tensors(what: str, value: Tree) -> None:
    """Refuse a tree whose leaves are not tensors, or that has none.

    Args:
        what: how messages call the tree.
        value: the tree.

    Raises:
        ValueError: in one sentence.
    """
    found = tree.leaves(value)
    if not found:
        raise ValueError(f"`{what}` holds no tensors.")
    # Every outer step comes here; the names take longer than the look.
    if all(isinstance(leaf, Tensor) for leaf in found):
        return
    for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True):
        if not isinstance(leaf, Tensor):
            remedy = ": torch.as_tensor makes one" if hasattr(leaf, "__array__") or isinstance(leaf, Real) else ""
            raise ValueError(f"`{what}{name}` must be a Tensor, got {type(leaf).__name__}{remedy}.")


def check_scalar(what: str, loss: Callable[..., Tensor], params: Tree, hparams: Tree) -> Tensor:
    """Evaluate a loss at the start and refuse what is no finite scalar Tensor."""
    try:
        value = loss(params, hparams)
    except RuntimeError as error:
        first = tree.leaves(params)[0]
        raise ValueError(
            f"`{what}` fails at the start, with params of {first.dtype} on {first.device}: {error} "
            "(do its data have the same dtype and device, and shapes that fit?)"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dim() != 0:
        got = f"a Tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{what}` must return a scalar Tensor (shape ()), got {got}.")
    if not torch.isfinite(value):
        raise ValueError(f"`{what}` is {float(value.detach())} at the start: are there NaN in the data or the start?")
    unused = not value.requires_grad
    if what == "inner_loss" and not unused:
        by_params = torch.autograd.grad(value, tree.leaves(params), retain_graph=True, allow_unused=True)
        unused = all(part is None for part in by_params)
    if unused:
        of = "`params`" if what == "inner_loss" else "`params` nor on `hparams`"
        raise ValueError(f"`{what}` does not depend on {of}: is the computation detached?")
    return value


Reads: TypeAlias = Callable[[Any, Tree, Tree], Sequence[bool]]
"""(problem, params, hparams) -> of every hyperparameter, whether the inner solver reads it by itself."""


def check_influence(
    what: str, gradient: Tree, outer: Tensor, hparams: Tree, reads: Callable[[], Sequence[bool]] | None = None
) -> None:
    """Refuse hyperparameters whose hypergradient would be a silent zero.

    Args:
        what: how messages call the function behind the gradient.
        gradient: the inner gradient, or the optimality map, with its graph.
        outer: the outer loss with its graph.
        hparams: hyperparameters that require gradients.
        reads: says of every hyperparameter whether the inner solver reads it by itself; asked where the losses do not.

    Raises:
        ValueError: with the first hyperparameter that has no influence.
    """
    u = tree.leaves(hparams)
    moving = [leaf for leaf in tree.leaves(gradient) if leaf.requires_grad]
    ones = [torch.ones_like(leaf) for leaf in moving]
    by_inner = torch.autograd.grad(moving, u, ones, allow_unused=True) if moving else [None] * len(u)
    by_outer = torch.autograd.grad(outer, u, allow_unused=True) if outer.requires_grad else [None] * len(u)
    inner = [part is not None for part in by_inner]
    if reads is not None and not all(inner):
        inner = [loss or solver for loss, solver in zip(inner, reads(), strict=True)]
    for name, moves, direct in zip(tree.names(hparams), inner, by_outer, strict=True):
        if not moves and (direct is None or not any(inner)):
            raise ValueError(
                f"the gradient of `{what}` does not depend on `hparams{name}`: its hypergradient would be a "
                "silent zero. Is the hyperparameter detached, or turned into a number, inside the loss?"
            )


def check_tensor(name: str, value: Tree, shape: tuple[int, ...], like: Tensor, owner: str, source: str) -> None:
    """Refuse what is no tensor of a shape, and of the dtype and device of the data.

    Args:
        name: how messages call the value.
        value: the value.
        shape: the shape that it must have.
        like: a tensor of the right dtype and device.
        owner: what has this shape, such as a class with its options.
        source: how messages call that which `like` stands for.

    Raises:
        ValueError: in one sentence.
    """
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{name}` of {owner} must be a Tensor of shape {shape}, got {got}.")
    if (value.dtype, value.device) != (like.dtype, like.device):
        raise ValueError(
            f"`{name}` is {value.dtype} on {value.device}, but {source} is {like.dtype} on {like.device}: "
            "they must share dtype and device."
        )
