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
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bilevel.core import rows, tree
from bilevel.core.autograd import edges, pushforward, vector_jacobian
from bilevel.core.declared import given_after
from bilevel.core.tree import Tree
from bilevel.numerics.lanczos import CURVATURE_MARGIN, Spectrum, lanczos
from bilevel.oracles.kernels import Kernels
from bilevel.oracles.losses import Losses
from bilevel.oracles.preconditioner import Preconditioner as Preconditioner

Graph: TypeAlias = tuple[Sequence[Tensor | GradientEdge], list[Tensor], list[Tensor]]
"""(gradient, params, hparams): leaves, and the graph between them; of the gradient its edges may be enough."""


class Linearization:
    """The inner gradient linearised at ``(params, hparams)``; what several products share is computed once.

    A structured problem overrides `_hvp` and `_cross` (or `_vjp` alone), and `_cross_jvp` for forward mode. The
    defaults do one backward pass through the graph of the gradient for each product. `hvp` and `cross` keep that graph;
    `vjp`, which a reverse sweep calls once at each point, frees it unless they hold it. Where there are as many
    hyperparameters as parameters, the graph of `hvp` is smaller for being without them, and `cross` builds its own.
    """

    closed_form = False
    """Whether a product costs about as much as a gradient; by autograd it costs twice that and its graph is held."""

    def __init__(self, inner: InnerProblem, params: Tree) -> None:
        self.inner = inner
        self.params = params
        self._gradient_graph: Graph | None = None
        self._apart = tree.size(inner.hparams) >= tree.size(params)
        self._loss_graph: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] | None = None

    @property
    def value(self) -> Tensor:
        """The inner loss here, a 0-d tensor."""
        return self.inner.value(self.params)

    def hvp(self, v: Tree) -> Tree:
        """Return ``H' v``, shaped as `params`."""
        self.inner.counts["hvp"] += 1
        return self._hvp(v)

    def cross(self, v: Tree) -> Tree:
        """Return ``C' v``, shaped as `hparams`, for v shaped as `params`."""
        self.inner.counts["cross"] += 1
        return self._cross(v)

    def vjp(self, v: Tree) -> tuple[Tree, Tree]:
        """Return ``(H' v, C' v)``."""
        self.inner.counts["vjp"] += 1
        return self._vjp(v)

    def jvp(self, params_tangent: Tree, hparams_tangent: Tree) -> Tree:
        """Return ``H dx + C du``, shaped as `params`."""
        self.inner.counts["jvp"] += 1
        return self._jvp(params_tangent, hparams_tangent)

    def hvp_vjp(self, v: Tree, w: Tree) -> tuple[Tree, Tree]:
        """Return the gradients of ``w' H v`` with respect to `params` and `hparams` (third derivatives)."""
        self.inner.counts["hvp_vjp"] += 1
        return self._hvp_vjp(v, w)

    def dense_hessian(self) -> Tensor:
        """Return H as a matrix of shape (size, size) in the order of `Raveler`; the default takes `size` HVPs.

        For a batch, the matrices of all members: (batch, size, size).
        """
        if self.inner.problem.batch is not None:
            along = tree.Raveler(self.params, batched=True)
            return torch.stack([along.ravel(self.hvp(unit)) for unit in along.units()], dim=1)
        raveler = tree.Raveler(self.params)
        # Row i of the stack is H' e_i, so the stack is H itself.
        return torch.stack([raveler.ravel(self.hvp(unit)) for unit in raveler.units()])

    def rebind(self, inner: InnerProblem) -> Linearization:
        """Return the linearization at the same params for other hparams; structured problems keep their data pass."""
        return inner.linearize(self.params)

    def preconditioner(self, cache: Tree = None, lasting: bool = False) -> Preconditioner:
        """Return a preconditioner for H, the identity by default; `cache` is what an earlier one of this problem kept.

        `lasting` says that it is meant for several solves, so that more work now pays.
        """
        return Preconditioner()

    # Hooks -----------------------------------------------------------------------------------------------------------

    def _hvp(self, v: Tree) -> Tree:
        gradient, params, _ = self._gradients()
        return tree.rebuild(self.params, vector_jacobian(gradient, params, tree.leaves(v)))

    def _cross(self, v: Tree) -> Tree:
        gradient, _, hparams = self._graph_of_gradient() if self._apart else self._gradients()
        return tree.rebuild(self.inner.hparams, vector_jacobian(gradient, hparams, tree.leaves(v)))

    def _vjp(self, v: Tree) -> tuple[Tree, Tree]:
        if type(self)._hvp is not Linearization._hvp:
            return self._hvp(v), self._cross(v)
        held = None if self._apart else self._gradient_graph
        gradient, params, hparams = held or self._graph_of_gradient()
        both = vector_jacobian(gradient, params + hparams, tree.leaves(v), retain_graph=held is not None)
        cut = len(params)
        return tree.rebuild(self.params, both[:cut]), tree.rebuild(self.inner.hparams, both[cut:])

    def _jvp(self, params_tangent: Tree, hparams_tangent: Tree) -> Tree:
        if type(self)._cross_jvp is not Linearization._cross_jvp:
            return tree.add(self._hvp(params_tangent), self._cross_jvp(hparams_tangent))
        tangents = tree.leaves(params_tangent) + tree.leaves(hparams_tangent)
        if self.inner.problem.optimality is not None:
            gradient, params, hparams = self._graph_of_gradient()
            return tree.rebuild(self.params, pushforward(gradient, params + hparams)(tangents))
        # H dx + C du is the params-gradient of the directional derivative of the loss: one backward pass.
        by_params, by_hparams, params, _ = self._loss_gradients()
        return tree.rebuild(self.params, vector_jacobian(by_params + by_hparams, params, tangents))

    def _cross_jvp(self, hparams_tangent: Tree) -> Tree:
        """Return ``C du``; override it in a structured problem to give forward mode."""
        return self._jvp(tree.zeros_like(self.params), hparams_tangent)

    def _hvp_vjp(self, v: Tree, w: Tree) -> tuple[Tree, Tree]:
        if self.inner.problem.wrong_third is not None:
            raise ValueError(
                "an unrolled Newton step needs third derivatives, which torch has wrong for the normalising layer "
                f"{self.inner.problem.wrong_third!r}: use Implicit, or an inner solver of first order."
            )
        params, hparams = tree.attach(self.params), tree.attach(self.inner.hparams)
        with torch.enable_grad():
            gradient = tree.leaves(self.inner.problem.gradient_graph(params, hparams))
            product = vector_jacobian(gradient, tree.leaves(params), tree.leaves(v), create_graph=True)
            both = vector_jacobian(product, tree.leaves(params) + tree.leaves(hparams), tree.leaves(w))
        cut = len(tree.leaves(params))
        return tree.rebuild(params, both[:cut]), tree.rebuild(hparams, both[cut:])

    def _gradients(self) -> Graph:
        """Return the graph from the gradient back to params and, unless they are kept apart, hparams; built once."""
        if self._gradient_graph is None:
            gradient, params, hparams = self._graph_of_gradient(self._apart)
            self._gradient_graph = edges(gradient), params, hparams
        return self._gradient_graph

    def _graph_of_gradient(self, apart: bool = False) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        params, hparams = tree.attach(self.params), self.inner.hparams if apart else tree.attach(self.inner.hparams)
        with torch.enable_grad():
            gradient = self.inner.problem.gradient_graph(params, hparams)
        return tree.leaves(gradient), tree.leaves(params), tree.leaves(hparams)

    def _loss_gradients(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Return (d loss / d params, d loss / d hparams, params, hparams) leaves with their graph, built once."""
        if self._loss_graph is None:
            params, hparams = tree.attach(self.params), tree.attach(self.inner.hparams)
            x, u = tree.leaves(params), tree.leaves(hparams)
            with torch.enable_grad():
                loss = self.inner.problem.inner_loss(params, hparams)
                both = torch.autograd.grad(loss, x + u, create_graph=True, materialize_grads=True)
            self._loss_graph = (list(both[: len(x)]), list(both[len(x) :]), x, u)
        return self._loss_graph


class InnerProblem:
    """The inner problem at fixed hyperparameters; it lives for one solve.

    Work that depends on `hparams` alone belongs into a subclass's constructor.

    Args:
        problem: the bilevel problem.
        hparams: hyperparameters; they are detached.
        counts: where calls are counted.
    """

    linearization: type[Linearization] = Linearization
    form = "step by step"  # what a certificate calls steps by its oracles
    refused = ""
    """Why the loss as it is written is not recorded, where that was tried."""
    augmented = False
    """Whether params hold running statistics besides what inner solvers move."""
    convex = False
    """Whether the loss is known to be convex: then a step that lowers the gradient norm is progress by itself."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Kernels that are inherited know nothing of a gradient that is not.
        own = ("_grad", "grad", "product", "_cross_sum", "linearization", "linearize", "on_step")
        if given_after(cls, own, "kernels"):
            cls.kernels = InnerProblem.kernels  # type: ignore[method-assign]

    def __init__(self, problem: Losses, hparams: Tree, counts: Counter[str] | None = None) -> None:
        self.problem: Any = problem
        self.hparams = tree.detach(hparams)
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.alone: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.tolerance: Any = None
        """The residual at which the run of steps ends that goes on, where it is known: what a step may stop at, too."""
        self._last: tuple[Tree, Tree] | None = None
        self._last_value: tuple[Tree, Tensor] | None = None

    @property
    def smooth(self) -> InnerProblem:
        """The problem without its nonsmooth term, where it has one."""
        return self

    def prox(self, v: Tree, step: Tensor, hparams: Tree = None) -> Tree:
        """Return the proximal point of v for the nonsmooth term; v itself where there is none."""
        return v

    def value(self, params: Tree) -> Tensor:
        """Return the inner loss, a 0-d tensor; where the last gradient came with it, nothing is computed or counted."""
        if self._last_value is not None and self._last_value[0] is params:
            return self._last_value[1]
        self.counts["value"] += 1
        return self._value(params)

    def grad(self, params: Tree) -> Tree:
        """Return the gradient of the inner loss (or the optimality map), shaped as `params`.

        The last result is kept: a residual and then a step at one iterate cost one gradient. Treat both as read-only.
        """
        if self._last is None or self._last[0] is not params:
            self.counts["gradient"] += 1
            self._last = None  # two at once would be one too many
            self._last = (params, self._grad(params))
        return self._last[1]

    def knows(self, params: Tree) -> bool:
        """Whether the last gradient was that at these very params."""
        return self._last is not None and self._last[0] is params

    def residual(self, params: Tree) -> Tree:
        """Return the gradient at `params` for its norm alone: nothing is differentiated through it."""
        return self.grad(params)

    def confirm(self, params: Tree) -> None:
        """Look again at what oracles have taken on trust, where a run ends: nothing, by default."""

    def linearize(self, params: Tree) -> Linearization:
        """Return the gradient linearised at `params`."""
        return self.linearization(self, params)

    def hvp_at(self, params: Tree, v: Tree) -> Tree:
        """Return ``H' v`` at params; nothing of it is recorded by autograd."""
        with torch.no_grad():
            return self.linearize(tree.detach(params)).hvp(tree.detach(v))

    def kernels(self) -> Kernels | None:
        """Return the oracles of params that are one vector, for long runs of equal steps; None, the default, for none.

        A problem whose steps see different batches has none.
        """
        return None

    def on_step(self, index: int) -> InnerProblem:
        """Return the problem that step `index` sees: this one, or a view of it with the step's own batch and draws.

        All else (residuals, curvature, linear solves) is evaluated here, on the sampler's full batch.
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
        return self.problem.trainable(params)

    def unmoved(self, before: Tree, after: Tree) -> bool:
        """Whether a step has handed back what it was given: it says that no step helps."""
        return before is after

    def equilibrium(self, params: Tree) -> Tree:
        """Return params at a solution: running statistics are then a function of the trainable part."""
        return params

    def equilibrium_vjp(self, params: Tree, cotangent: Tree) -> tuple[Tree, Tree]:
        """Return the VJP of that function: cotangents of the trainable part and of hparams (None: no dependence)."""
        return cotangent, None

    def curvature(self, params: Tree) -> Spectrum:
        """Return the ends of the spectrum of the Hessian at `params`; the default is Lanczos on the HVP."""
        point = self.linearize(params)
        raveler = tree.Raveler(params)
        return lanczos(lambda v: raveler.ravel(point.hvp(raveler.unravel(v))), raveler.ravel(params))

    def majorizer(self, params: Tree, largest: float | None = None) -> Tree:
        """Return a diagonal D above the Hessian, shaped as `params`; by default the largest curvature, at `params`.

        A problem that knows one overrides it: with it, `PreconditionedGradientDescent` has a step for each variable.
        `largest` is the largest curvature but for diagonal parts that are known; None: measured.
        """
        largest = largest or CURVATURE_MARGIN * self.curvature(params).largest
        return tree.tree_map(lambda leaf: torch.full_like(leaf, largest), params)

    def member(self, index: int) -> InnerProblem:
        """Return one member of a batch as an inner problem of its own, whose calls go to ``alone[index]``."""
        return self.problem.member(index).bind(rows.row(self.hparams, index), self.alone[index])

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
