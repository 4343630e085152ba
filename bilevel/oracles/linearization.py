"""`Linearization`: the inner gradient linearised at one point, with its products by autograd; see `InnerProblem`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.tree import Tree

if TYPE_CHECKING:
    from bilevel.oracles.inner_problem import InnerProblem


@dataclass(frozen=True)
class Preconditioner:
    """An approximation of the inverse Hessian, symmetric positive definite: it changes how fast, never whereto.

    Attributes:
        apply: flat v of shape (size,) -> flat approximation of ``H^-1 v``; None for the identity.
        kept: a tree of tensors from which one for other params and hparams can be made cheaply; None for nothing.
        rough: whether it only helps CG: a step that takes it for the Hessian would be poor.
    """

    apply: Callable[[Tensor], Tensor] | None = None
    kept: Tree = None
    rough: bool = False


Graph: TypeAlias = tuple[Sequence[Tensor | GradientEdge], list[Tensor], list[Tensor]]
"""(gradient, params, hparams): leaves, and the graph between them; of the gradient its edges may be enough."""


class Linearization:
    """The inner gradient linearised at ``(params, hparams)``; what several products share is computed once.

    A structured problem overrides `_hvp` and `_cross` (or `_vjp` alone), and `_cross_jvp` for forward mode. The
    defaults do one backward pass through the graph of the gradient for each product. `hvp` and `cross` build that graph
    once and keep it; `vjp`, which a reverse sweep calls once at each point, frees it unless they hold it already. Where
    there are as many hyperparameters as parameters, the graph that is kept for `hvp` is smaller for being without them,
    and `cross` builds one of its own.

    Args:
        inner: the bound problem.
        params: the point.
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
            rows = members.Raveler(self.params)
            return torch.stack([rows.ravel(self.hvp(unit)) for unit in rows.units()], dim=1)
        raveler = tree.Raveler(self.params)
        # Row i of the stack is H' e_i, so the stack is H itself.
        return torch.stack([raveler.ravel(self.hvp(unit)) for unit in raveler.units()])

    def rebind(self, inner: InnerProblem) -> Linearization:
        """Return the linearization at the same params for other hparams; structured problems keep their data pass."""
        return inner.linearize(self.params)

    def preconditioner(self, kept: Tree = None, lasting: bool = False) -> Preconditioner:
        """Return a preconditioner for H; the default is the identity.

        Args:
            kept: what an earlier preconditioner of this problem kept; None to measure anew.
            lasting: whether it is meant for several solves, so that more work now pays.
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
        gradients = by_params + by_hparams
        used = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g.requires_grad]
        if not used:
            return tree.zeros_like(self.params)
        products = torch.autograd.grad(
            [g for g, _ in used], params, [t for _, t in used], retain_graph=True, materialize_grads=True
        )
        return tree.rebuild(self.params, products)

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
            roots = tree.leaves(params) + tree.leaves(hparams)
            moving = [(p, c) for p, c in zip(product, tree.leaves(w), strict=True) if p.requires_grad]
            if not moving:
                return tree.zeros_like(params), tree.zeros_like(hparams)
            both = vector_jacobian([p for p, _ in moving], roots, [c for _, c in moving])
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


def vector_jacobian(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: list[Tensor],
    cotangents: list[Tensor],
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> list[Tensor]:
    """Return ``sum_i cotangents_i' d outputs_i / d inputs``, zeros where there is no dependence."""
    pairs = zip(outputs, cotangents, strict=True)
    moving: list[tuple[Any, Tensor]] = [(o, c) for o, c in pairs if isinstance(o, GradientEdge) or o.requires_grad]
    if not moving:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(
            [o for o, _ in moving],
            inputs,
            [c for _, c in moving],
            retain_graph=retain_graph,
            create_graph=create_graph,
            materialize_grads=True,
        )
    )


def edges(outputs: Sequence[Tensor]) -> list[Tensor | GradientEdge]:
    """Return what `vector_jacobian` takes in place of outputs whose values are not needed: their graph alone."""
    return [get_gradient_edge(each) if each.requires_grad else each for each in outputs]


def pushforward(outputs: list[Tensor], inputs: list[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return the JVP ``tangents -> d outputs / d inputs @ tangents``, one backward pass for each call.

    The VJP is linear in its cotangent, so differentiating it again gives the JVP. Needs reverse mode alone, so it works
    for every operation that has a double backward.
    """
    with torch.enable_grad():
        cotangents = [torch.zeros_like(tensor, requires_grad=True) for tensor in outputs]
        products = edges(vector_jacobian(outputs, inputs, cotangents, create_graph=True))
    return lambda tangents: vector_jacobian(products, cotangents, tangents)
