"""`Losses`: the functions of a bilevel problem and their derivatives, as everything below a problem sees them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.nonsmooth import Nonsmooth

Loss: TypeAlias = Callable[..., Tensor]
"""``(params, hparams) -> scalar``, or ``(params, hparams, data) -> scalar``."""
Values: TypeAlias = list[Tensor | None]
"""What a loss gives and its gradients by params and hparams."""
Point: TypeAlias = Tree
"""(params, hparams)."""


@dataclass
class Purity:
    """Whether the losses of a problem have been looked at, and where, and what came, until a run has ended.

    Views of the problem share it.
    """

    known: bool = False
    first: tuple[Point, dict[str, Values]] | None = field(default=None, repr=False)


class SplitLoss(Protocol):
    """A loss as the composition of a model and a loss of the model's outputs, which Gauss-Newton products need."""

    def outputs(self, params: Any, hparams: Any, *batch: Any) -> list[Tree]:
        """Return what the model gives at each of the loss's calls of it, in their order."""

    def at_outputs(self, outputs: list[Tree], params: Any, hparams: Any, *batch: Any) -> Tensor:
        """Return the loss where each call of the model gives the next of `outputs`."""


class Losses:
    """An inner and an outer loss over trees of tensors; `bilevel.BilevelProblem` says what they mean."""

    inner_problem: type[Any]
    """The class of the bound problem; a structured problem names its own."""
    traced_inner: type[Any] | None = None
    """The class of the bound problem with recorded oracles; None where there is none."""
    traces: Any = None
    """The recordings of its losses."""
    inner_loss: Loss
    outer_loss: Loss
    optimality: Callable[[Tree, Tree], Tree] | None = None
    functions: tuple[Callable[..., Any] | None, ...] = ()
    """The functions as they were given: inner loss, outer loss, optimality map."""
    nonsmooth: Nonsmooth | None = None
    """The nonsmooth term that is added to the inner loss; None for none."""
    params: Tree = None
    data: Tree = None
    minibatch: Tree = ()
    """The mini-batch that `inner_loss` is evaluated on; an empty tree without a sampler."""
    batch: int | None = None
    """Number of members where this is a batch, else None."""
    detached: tuple[str, ...] = ()
    """Names of data that required gradients where the problem was made, which holds their values as constants."""
    wrong_third: str | None = None
    """What makes third derivatives of the inner loss by autograd wrong, for a message; None: nothing known."""
    module_loss: SplitLoss | None = None
    """The inner loss in two halves, model and loss of its outputs; None where it has no such halves."""
    derivatives_seen: dict[str, Any]
    """What has been found of the derivatives of the losses; views of this problem share it."""
    purity: Purity

    @cached_property
    def tested(self) -> bool:
        """Whether the losses and their derivatives are those of this package, whose tests look at them."""
        return not any(self.functions) and type(self).__module__.startswith("bilevel.problems.")

    @property
    def symmetric(self) -> bool:
        """Whether the Jacobian of the optimality map is a Hessian, hence symmetric."""
        return self.optimality is None

    @property
    def smooth(self) -> Any:
        """This problem without its nonsmooth term: a view, or the problem itself where it has none."""
        if self.nonsmooth is None:
            return self
        view = copy.copy(self)
        view.nonsmooth = None
        return view

    def member(self, index: int) -> Any:
        """Return one member of a batch as a problem of its own."""
        raise NotImplementedError

    def on_batch(self, batch: Tree) -> Losses:
        """Return a view whose inner loss is that of `batch`; without a sampler, the problem itself."""
        return self

    def on_step(self, index: int) -> Losses:
        """Return the view that inner step `index` sees: this problem, unless steps have batches of their own."""
        return self

    def sources(self) -> Sequence[tuple[str, Callable[[int], Tree]]]:
        """Return what hands data to the losses by an index, with how messages call it."""
        return []

    def trainable(self, params: Tree) -> Tree:
        """Return the part of params that inner solvers move: all of it, unless running statistics move beside it."""
        return params

    def gradient_graph(self, params: Tree, hparams: Tree) -> Tree:
        """Return the inner gradient (or the optimality map) with its autograd graph back to `params` and `hparams`."""
        if self.optimality is not None:
            return tree.matched(self.optimality(params, hparams), params, "optimality")
        # A start that requires no gradient still has to be a root of the gradient's graph.
        params = tree.tree_map(lambda leaf: leaf if leaf.requires_grad else leaf.detach().requires_grad_(), params)
        loss = self.inner_loss(params, hparams)
        return tree.rebuild(
            params, torch.autograd.grad(loss, tree.leaves(params), create_graph=True, materialize_grads=True)
        )

    def outer_value_and_grads(self, params: Tree, hparams: Tree) -> tuple[Tensor, Tree, Tree]:
        """Return the outer loss, of shape () or (batch,), and its partial gradients by `params` and `hparams`."""
        params, hparams = tree.attach(params), tree.attach(hparams)
        x, u = tree.leaves(params), tree.leaves(hparams)
        with torch.enable_grad():
            value = self.outer_loss(params, hparams)
            total = value if self.batch is None else value.sum()
        if not value.requires_grad:
            return value.detach(), tree.zeros_like(params), tree.zeros_like(hparams)
        result = torch.autograd.grad(total, x + u, allow_unused=True)
        # Zeros of a single number: there may be millions of hyperparameters, which few outer losses depend on.
        both = [
            leaf.new_zeros(()).expand_as(leaf) if part is None else part
            for part, leaf in zip(result, x + u, strict=True)
        ]
        return value.detach(), tree.rebuild(params, both[: len(x)]), tree.rebuild(hparams, both[len(x) :])
