"""The oracles of an inner problem: bind -> linearize -> vjp.

`InnerProblem` is the inner loss at fixed hyperparameters, `Linearization` its gradient linearised at one point. Inner
solvers, reverse sweeps and linear solvers need nothing else. Both count every call and delegate to hooks (`_grad`,
`_hvp`, ...): the default hooks use autograd; a problem with structure overrides them with its closed form, and nothing
that calls an oracle can tell the difference.

With the inner gradient ``g(x, u)``, ``H = dg/dx`` and ``C = dg/du``:

    hvp(v) = H' v        cross(v) = C' v        vjp(v) = (H' v, C' v)        jvp(dx, du) = H dx + C du

For a problem stated by an optimality map (``optimality=``) read that map for ``g``; otherwise ``H' = H``.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.lanczos import Spectrum, lanczos
from bilevel.oracles.linearization import Linearization as Linearization
from bilevel.oracles.linearization import Preconditioner as Preconditioner
from bilevel.oracles.vjp_sum import ProductSum

if TYPE_CHECKING:
    from bilevel.oracles.problem import BilevelProblem


class InnerProblem:
    """The inner problem at fixed hyperparameters; it lives for one solve.

    Work that depends on `hparams` alone belongs into a subclass's constructor.

    Args:
        problem: the bilevel problem.
        hparams: hyperparameters; they are detached.
        counts: where calls are counted.
    """

    linearization: type[Linearization] = Linearization
    convex = False
    """Whether the loss is known to be convex: then a step that lowers the gradient norm is progress by itself."""

    def __init__(self, problem: BilevelProblem, hparams: Tree, counts: Counter[str] | None = None) -> None:
        self.problem: Any = problem
        self.hparams = tree.detach(hparams)
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.alone: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.tolerance: Any = None
        """The residual at which the run of steps ends that goes on, where it is known: what a step may stop at, too."""
        self._last: tuple[Tree, Tree] | None = None
        self._last_value: tuple[Tree, Tensor] | None = None

    def value(self, params: Tree) -> Tensor:
        """Return the inner loss, a 0-d tensor; where the last gradient came with it, nothing is computed or counted."""
        if self._last_value is not None and self._last_value[0] is params:
            return self._last_value[1]
        self.counts["value"] += 1
        return self._value(params)

    def grad(self, params: Tree) -> Tree:
        """Return the gradient of the inner loss (or the optimality map), shaped as `params`.

        The last result is kept, so that looking at the residual of an iterate and then stepping from it costs one
        gradient. Treat both `params` and the result as read-only.
        """
        if self._last is None or self._last[0] is not params:
            self.counts["gradient"] += 1
            self._last = (params, self._grad(params))
        return self._last[1]

    def linearize(self, params: Tree) -> Linearization:
        """Return the gradient linearised at `params`."""
        return self.linearization(self, params)

    def hvp_at(self, params: Tree, v: Tree) -> Tree:
        """Return ``H' v`` at params; nothing of it is recorded by autograd."""
        with torch.no_grad():
            return self.linearize(tree.detach(params)).hvp(tree.detach(v))

    def product_sum(self) -> ProductSum:
        """Return what sums ``C' v`` over the points of a reverse sweep; a bilinear problem returns a `BilinearSum`."""
        return ProductSum(self)

    def on_step(self, index: int) -> InnerProblem:
        """Return the problem that step `index` sees: this one, or a view of it with the step's own batch and draws.

        Everything else (residuals, curvature, linear solves) is evaluated here, on the sampler's full batch.
        """
        problem = self.problem.on_step(index)
        if problem is self.problem:
            return self
        view = copy.copy(self)
        view.problem = problem
        view._forget()
        return view

    def trainable(self, params: Tree) -> Tree:
        """Return the part of params that inner solvers move: all of it, but for running statistics."""
        trainable: Tree = self.problem.trainable(params)
        return trainable

    def unmoved(self, before: Tree, after: Tree) -> bool:
        """Whether a step has handed back what it was given: it says that no step helps."""
        return before is after

    def statistics_after(self, params: Tree) -> Tree:
        """Return the running statistics after a step from params, of a problem that has them."""
        self.counts["value"] += 1
        return self.problem.statistics.after(self.problem, params, self.hparams)

    def at_rest(self, params: Tree) -> Tree:
        """Return params at a solution: running statistics are then a function of the trainable part."""
        return params

    def at_rest_vjp(self, params: Tree, cotangent: Tree) -> tuple[Tree, Tree]:
        """Return the VJP of that function: cotangents of the trainable part and of hparams (None: no dependence)."""
        return cotangent, None

    def curvature(self, params: Tree) -> Spectrum:
        """Return the ends of the spectrum of the Hessian at `params`; the default is Lanczos on the HVP."""
        point = self.linearize(params)
        raveler = tree.Raveler(params)
        return lanczos(lambda v: raveler.ravel(point.hvp(raveler.unravel(v))), raveler.ravel(params))

    def member(self, index: int) -> InnerProblem:
        """Return one member of a batch as an inner problem of its own, whose calls go to ``alone[index]``."""
        inner: InnerProblem = self.problem.member(index).bind(members.row(self.hparams, index), self.alone[index])
        return inner

    def differentiable(self, hparams: Tree, graph: bool = False) -> DifferentiableInner:
        """Return this problem with a gradient that autograd can differentiate.

        Args:
            hparams: hyperparameters that require gradients, equal in value to the bound ones.
            graph: differentiate the loss itself (any order, the graph holds every operation) instead of making the
                gradient one node whose backward is the `vjp` oracle (once, the graph holds params alone).
        """
        return DifferentiableInner(self, hparams, graph)

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Drop results that belong to the batch and the draws of another step."""
        self._last = self._last_value = None

    def _value(self, params: Tree) -> Tensor:
        with torch.no_grad():
            value: Tensor = self.problem.inner_loss(params, self.hparams)
        return value

    def _grad(self, params: Tree) -> Tree:
        if self.problem.optimality is not None:
            with torch.no_grad():
                return self.problem.gradient_graph(params, self.hparams)
        roots = tree.attach(params)
        with torch.enable_grad():
            loss = self.problem.inner_loss(roots, self.hparams)
        self._last_value = (params, loss.detach())
        return tree.rebuild(params, torch.autograd.grad(loss, tree.leaves(roots), materialize_grads=True))


class DifferentiableInner(InnerProblem):
    """An inner problem inside an autograd graph: what an inner solver's `step` sees when it is differentiated.

    Args:
        inner: the bound problem whose oracles are used.
        hparams: hyperparameters that require gradients.
        graph: see `InnerProblem.differentiable`.
    """

    def __init__(self, inner: InnerProblem, hparams: Tree, graph: bool) -> None:
        super().__init__(inner.problem, hparams, inner.counts)
        self.hparams = hparams
        self._inner = inner
        self._graph = graph

    def trainable(self, params: Tree) -> Tree:
        """Return the part of params that inner solvers move."""
        return self._inner.trainable(params)

    def grad(self, params: Tree) -> Tree:
        """Return the gradient with its graph."""
        return super().grad(self.trainable(params))

    def value(self, params: Tree) -> Tensor:
        """Return the inner loss with its graph."""
        self.counts["value"] += 1
        value: Tensor = self.problem.inner_loss(params, self.hparams)
        return value

    def on_step(self, index: int) -> InnerProblem:
        """Return the problem that step `index` sees, differentiable likewise."""
        inner = self._inner.on_step(index)
        return self if inner is self._inner else DifferentiableInner(inner, self.hparams, self._graph)

    def hvp_at(self, params: Tree, v: Tree) -> Tree:
        """Return ``H' v`` at params."""
        return self._inner.hvp_at(params, v)

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
