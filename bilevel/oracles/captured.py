"""The tensors that a problem's functions hold without being given them: data, modules, buffers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bilevel.core import tree
from bilevel.core.autograd import graph_nodes
from bilevel.core.tree import Tree
from bilevel.oracles.losses import Losses
from bilevel.oracles.purity import referred_to


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
