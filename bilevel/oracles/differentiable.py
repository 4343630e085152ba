"""The inner problem inside an autograd graph: for solvers whose steps autograd differentiates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem, Linearization


class DifferentiableInner(InnerProblem):
    """An inner problem inside an autograd graph: what an inner solver's `step` sees when it is differentiated.

    The hyperparameters require gradients, and are equal in value to the bound ones. With `graph` the loss itself is
    differentiated (any order, the graph holds every operation); else the gradient is one node whose backward is the
    `vjp` oracle (once, the graph holds params alone).
    """

    def __init__(self, inner: InnerProblem, hparams: Tree, graph: bool = False) -> None:
        super().__init__(inner.problem, hparams, inner.counts)
        self.hparams = hparams
        self._inner = inner
        self._graph = graph
        self.augmented = inner.augmented
        # Itself not by a reference: the graph would then live on until the garbage collector comes.
        self._smooth = None if inner.smooth is inner else DifferentiableInner(inner.smooth, hparams, graph)

    @property
    def smooth(self) -> InnerProblem:
        return self._smooth or self

    def prox(self, v: Tree, step: Tensor, hparams: Tree = None) -> Tree:
        return self._inner.prox(v, step, self.hparams)

    def trainable(self, params: Tree) -> Tree:
        return self._inner.trainable(params)

    def grad(self, params: Tree) -> Tree:
        if self._smooth is not None:  # a residual, which no proximal step differentiates
            return self._inner.grad(tree.detach(params))
        return super().grad(self.trainable(params))

    def residual(self, params: Tree) -> Tree:
        if self.knows(params):
            return self.grad(params)
        self._forget()
        self.counts["gradient"] += 1
        return self._inner._grad(tree.detach(self.trainable(params)))

    def value(self, params: Tree) -> Tensor:
        self.counts["value"] += 1
        return self.problem.inner_loss(params, self.hparams)

    def on_step(self, index: int) -> InnerProblem:
        inner = self._inner.on_step(index)
        return self if inner is self._inner else DifferentiableInner(inner, self.hparams, self._graph)

    def hvp_at(self, params: Tree, v: Tree) -> Tree:
        return self._inner.hvp_at(params, v)

    def confirm(self, params: Tree) -> None:
        self._inner.confirm(tree.detach(params))

    def linearize(self, params: Tree) -> Linearization:
        """Refuse: second-order oracles are not differentiated by autograd."""
        raise ValueError(
            "an inner solver whose step uses second derivatives cannot be differentiated by autograd: "
            "use Implicit or FullUnroll(memory='iterates'); a solver of your own must define `step_vjp` for the latter."
        )

    def _grad(self, params: Tree) -> Tree:
        if self._graph:
            return self.problem.gradient_graph(params, self.hparams)
        x = tree.leaves(params)
        gradients = _OracleGradient.apply(  # type: ignore[no-untyped-call]
            self._inner, params, len(x), *x, *tree.leaves(self.hparams)
        )
        return tree.rebuild(params, gradients)


class _OracleGradient(torch.autograd.Function):
    """The inner gradient as one autograd node: forward is `grad`, backward is `vjp`."""

    @staticmethod
    def forward(ctx: Any, inner: InnerProblem, like: Tree, cut: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        params = tree.rebuild(like, [tensor.detach() for tensor in tensors[:cut]])
        ctx.inner, ctx.params = inner, params
        # The call was counted by the differentiable problem. A copy, as autograd marks what a Function returns.
        return tuple(gradient.clone() for gradient in tree.leaves(inner._grad(params)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        point = ctx.inner.linearize(ctx.params)
        by_params, by_hparams = point.vjp(tree.rebuild(ctx.params, cotangents))
        return (None, None, None, *tree.leaves(by_params), *tree.leaves(by_hparams))
