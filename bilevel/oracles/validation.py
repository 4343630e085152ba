"""What can be known of params, hparams and losses before the work starts, and the sentence about each mistake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.autograd import graph_nodes
from bilevel.core.tree import Tree
from bilevel.oracles import ranks
from bilevel.oracles.autograd_errors import check_second_derivatives, explained
from bilevel.oracles.losses import Losses
from bilevel.oracles.nonfinite import first_not_finite
from bilevel.oracles.purity import looked_at, referred_to

NO_PARAMS = "`inner_loss` does not depend on `params`: is the computation detached?"
NO_PARAMS_NOR_HPARAMS = "`outer_loss` does not depend on `params` nor on `hparams`: is the computation detached?"


def check_trees(params: Tree, hparams: Tree) -> None:
    """Refuse trees with leaves that are no finite floating tensors, that are empty, or of several dtypes or devices."""
    result = []
    for what, value in (("params", params), ("hparams", hparams)):
        check_tensors(what, value)
        for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True):
            if not leaf.is_floating_point():
                raise ValueError(f"`{what}{name}` must have a floating dtype, got {leaf.dtype}.")
            if leaf.numel() == 0:
                raise ValueError(f"`{what}{name}` is empty, of shape {tuple(leaf.shape)}.")
            result.append((what, name, leaf))
    dtype, device = result[0][2].dtype, result[0][2].device
    for what, name, leaf in result:
        if leaf.dtype != dtype or leaf.device != device:
            raise ValueError(
                f"`{what}{name}` is {leaf.dtype} on {leaf.device}, but params are {dtype} on {device}: "
                "params and hparams must share dtype and device."
            )
    for what, name, leaf in result:
        if leaf.is_meta:
            raise ValueError(f"`{what}{name}` is on the meta device and holds no values.")
        if not tree.is_finite(leaf):
            raise ValueError(f"`{what}{name}` holds NaN or infinite values.")


def check_tensors(what: str, value: Tree) -> None:
    """Refuse a tree, which messages call `what`, whose leaves are not tensors, or that has none."""
    result = tree.leaves(value)
    if not result:
        raise ValueError(f"`{what}` holds no tensors.")
    # Every outer step comes here; the names take longer than the look.
    if all(isinstance(leaf, Tensor) for leaf in result):
        return
    for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True):
        if not isinstance(leaf, Tensor):
            remedy = ": torch.as_tensor makes one" if hasattr(leaf, "__array__") or isinstance(leaf, Real) else ""
            raise ValueError(f"`{what}{name}` must be a Tensor, got {type(leaf).__name__}{remedy}.")


def check_scalar(what: str, loss: Callable[..., Tensor], params: Tree, hparams: Tree) -> Tensor:
    """Evaluate a loss at the start and refuse what is no finite scalar Tensor."""
    try:
        with explained(f"`{what}`"):
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
        made = first_not_finite(lambda: loss(params, hparams))
        raise ValueError(
            f"`{what}` is {float(value.detach())} at the start: "
            f"{f'{made}.' if made else 'are there NaN in the data or the start?'}"
        )
    if not value.requires_grad:
        raise ValueError(NO_PARAMS if what == "inner_loss" else NO_PARAMS_NOR_HPARAMS)
    return value


def partial_gradients(what: str, loss: Tensor, roots: Tree, graph: bool = False) -> list[Tensor | None]:
    """Return the gradient of a loss by each leaf, None for a leaf not in its graph; with its own `graph` on demand."""
    with explained(f"`{what}`"):
        return list(torch.autograd.grad(loss, tree.leaves(roots), allow_unused=True, create_graph=graph))


def check_use(by_inner: list[Tensor | None], by_outer: list[Tensor | None], params: Tree) -> None:
    """Refuse params that cannot move, or whose motion nobody sees; `by_inner` and `by_outer` are the losses' gradients.

    A leaf counts as used where it is in the graph of a loss: its gradient may be zero at the start.

    Raises:
        ValueError: for an inner loss that uses no params, else with the first leaf that neither loss uses.
    """
    if all(part is None for part in by_inner):
        raise ValueError(NO_PARAMS)
    for name, inner, outer in zip(tree.names(params), by_inner, by_outer, strict=True):
        if inner is None and outer is None:
            raise ValueError(
                f"`params{name}` is used by neither loss: leave it out of `params`, or in a module freeze it by "
                "requires_grad_(False)."
            )


Reads: TypeAlias = Callable[[Any, Tree, Tree], Sequence[bool]]
"""(problem, params, hparams) -> of every hyperparameter, whether the inner solver reads it by itself."""


def check_influence(
    what: str,
    gradient: Tree,
    by_outer: list[Tensor | None],
    params: Tree,
    hparams: Tree,
    reads: Callable[[], Sequence[bool]] | None = None,
) -> None:
    """Refuse hyperparameters whose hypergradient would be a silent zero, after one product of second derivatives.

    `gradient` is the inner one with its graph back to params and hparams, which require gradients, `by_outer` that of
    the outer loss by hparams. `reads` says of every hyperparameter whether the inner solver reads it by itself.

    Raises:
        DerivativeError: for a gradient that cannot be differentiated.
        ValueError: with the first hyperparameter that has no influence.
    """
    x, u = tree.leaves(params), tree.leaves(hparams)
    moving = [leaf for leaf in tree.leaves(gradient) if leaf.requires_grad]
    ones = [torch.ones_like(leaf) for leaf in moving]
    # Nothing is read of the part by params, but it shows before the work what an HVP would run into.
    with explained(f"`{what}`"):
        both = torch.autograd.grad(moving, x + u, ones, allow_unused=True) if moving else [None] * len(x + u)
    inner = [part is not None for part in both[len(x) :]]
    if reads is not None and not all(inner):
        inner = [loss or solver for loss, solver in zip(inner, reads(), strict=True)]
    for name, moves, direct in zip(tree.names(hparams), inner, by_outer, strict=True):
        if not moves and (direct is None or not any(inner)):
            raise ValueError(
                f"the gradient of `{what}` does not depend on `hparams{name}`: its hypergradient would be a "
                "silent zero. Is the hyperparameter detached, or turned into a number, inside the loss?"
            )


def check_losses(problem: Losses, params: Tree, hparams: Tree, reads: Reads | None = None) -> None:
    """Look at the losses of a single problem; see `BilevelProblem.check`."""
    with ranks.agreement(problem) as together:
        check_trees(params, hparams)
        with looked_at(problem, params, hparams, together):
            # Copies: whatever the losses do to their arguments, the caller's stay.
            _check_losses(problem, tree.attach(tree.copied(params)), tree.attach(tree.copied(hparams)), reads)


def _check_losses(problem: Losses, params: Tree, hparams: Tree, reads: Reads | None) -> None:
    what = "inner_loss" if problem.optimality is None else "optimality"
    with torch.enable_grad(), explained(f"`{what}`"):
        if problem.optimality is None:
            inner = check_scalar("inner_loss", problem.inner_loss, params, hparams)
            check_second_derivatives("`inner_loss`", inner)
        outer = check_scalar("outer_loss", problem.outer_loss, params, hparams)
        # Running statistics are used by whom they concern.
        x = problem.trainable(params)
        by_outer, cut = partial_gradients("outer_loss", outer, (x, hparams)), len(tree.leaves(x))
        if problem.optimality is None:
            by_inner = partial_gradients("inner_loss", inner, x, graph=True)
            check_use(by_inner, by_outer[:cut], x)
            gradient = [part for part in by_inner if part is not None]
        else:
            gradient = problem.gradient_graph(x, hparams)
        if problem.nonsmooth is not None:
            problem.nonsmooth.check(params, hparams)
            gradient = [*tree.leaves(gradient), check_scalar("nonsmooth.value", problem.nonsmooth.value, x, hparams)]
        check_influence(what, gradient, by_outer[cut:], x, hparams, reads and partial(reads, problem, x, hparams))


def fits(value: Tree, shape: tuple[int, ...], like: Tensor) -> bool:
    """Whether a value is a finite tensor of a shape, and of the dtype and device of `like`."""
    same = isinstance(value, Tensor) and value.shape == shape
    return same and value.dtype == like.dtype and value.device == like.device and tree.is_finite(value)


def check_tensor(name: str, value: Tree, shape: tuple[int, ...], like: Tensor, owner: str, source: str) -> None:
    """Refuse what is no tensor of a shape, and of the dtype and device of `like`, which messages call `source`."""
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{name}` of {owner} must be a Tensor of shape {shape}, got {got}.")
    if (value.dtype, value.device) != (like.dtype, like.device):
        raise ValueError(
            f"`{name}` is {value.dtype} on {value.device}, but {source} is {like.dtype} on {like.device}: "
            "they must share dtype and device."
        )


def check_captured(problem: Losses, params: Tree, hparams: Tree) -> None:
    """Refuse an inner problem that holds tensors that require gradients, which it would not get."""
    named, what = list(problem.detached), ""
    if not named:
        function = problem.inner_loss if problem.optimality is None else problem.optimality
        params, hparams = tree.detach(params), tree.detach(hparams)
        first = _graph(function(params, hparams))
        # A loss may make leaves of its own, for a derivative inside it: those are others in the next call.
        again = _graph(function(params, hparams)) if first else set()
        leaves = [node.variable for node in first & again if hasattr(node, "variable")]
        for name, each in referred_to(problem).tensors.items() if leaves else ():
            if each.grad_fn in first or any(each is leaf for leaf in leaves):
                named.append(name)
        what = f"a tensor of shape {tuple(max(leaves, key=Tensor.numel).shape)}" if leaves else ""
    if named or what:
        what = f"`{named[0]}`" if named else what
        raise ValueError(
            f"the inner problem holds {what}, which requires gradients, but `solution` is differentiated by hparams "
            "alone: hand it over as a hyperparameter, or detach it."
        )


def _graph(values: Tree) -> set[Any]:
    return set(graph_nodes(leaf for leaf in tree.leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad))
