"""The oracles of an inner problem with a nonsmooth term: its residual, and its curvature on the support.

With the smooth gradient g, the term r and ``z = prox(x - s g, s)``, the residual is ``(x - z) / s``, in the units of a
gradient; where both x and z are inside the support it is the gradient of the sum, ``g + dr/dx``, of which the former is
a multiple there. It is zero at a solution alone. Near one the support S no longer changes, and the solution moves as
that of a smooth problem of the variables in S:

    H_SS dx_S = -C_S du,     H = d(g + dr/dx)/dx,     C = d(g + dr/dx)/du,     dx = 0 outside S

H is symmetric, so that CG solves the adjoint system; outside S it is taken for the identity, and cotangents for zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.core import rows, tree
from bilevel.core.autograd import pushforward, vector_jacobian
from bilevel.core.tree import Tree
from bilevel.numerics.lanczos import Spectrum
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.nonsmooth import Nonsmooth


class ProximalPoint(Linearization):
    """The gradient of the sum on the support, linearised."""

    inner: ProximalInner

    def __init__(self, inner: InnerProblem, params: Tree) -> None:
        super().__init__(inner, params)
        self.smooth = self.inner.smooth.linearize(params)
        self.closed_form = self.smooth.closed_form
        self.support = self.inner.support(params)

    def on_support(self, v: Tree) -> Tree:
        """Return v with zeros outside the support."""
        return tree.tree_map(torch.mul, v, self.support)

    def dense_hessian(self) -> Tensor:
        if self.inner.term.curved:
            return super().dense_hessian()
        support = rows.raveler(self.params, self.inner.problem.batch).ravel(self.support)
        both = support[..., :, None] * support[..., None, :]
        return self.smooth.dense_hessian() * both + torch.diag_embed(1.0 - support)

    def _hvp(self, v: Tree) -> Tree:
        inside = self.on_support(v)
        product = self.smooth._hvp(inside)
        if self.inner.term.curved:
            slope, x, _ = self._slope()
            product = tree.add(product, tree.rebuild(v, vector_jacobian(slope, x, tree.leaves(inside))))
        return tree.add(self.on_support(product), tree.add(v, inside, -1.0))

    def _cross(self, v: Tree) -> Tree:
        inside = self.on_support(v)
        slope, _, u = self._slope()
        by_term = tree.rebuild(self.inner.hparams, vector_jacobian(slope, u, tree.leaves(inside)))
        return tree.add(self.smooth._cross(inside), by_term)

    def _cross_jvp(self, hparams_tangent: Tree) -> Tree:
        slope, x, u = self._slope()
        tangents = [*map(torch.zeros_like, x), *tree.leaves(hparams_tangent)]
        by_term = tree.rebuild(self.params, pushforward(slope, x + u)(tangents))
        return self.on_support(tree.add(self.smooth._cross_jvp(hparams_tangent), by_term))

    def _slope(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the gradient of the term with its graph back to params and hparams, and their leaves; built once."""
        if self._gradient_graph is None:
            self._gradient_graph = self.inner.slope(self.params)
        slope, x, u = self._gradient_graph
        return list(slope), x, u  # type: ignore[arg-type]

    def _hvp_vjp(self, v: Tree, w: Tree) -> tuple[Tree, Tree]:
        raise ValueError("third derivatives of a problem with a nonsmooth term are not taken: use Implicit.")


class ProximalInner(InnerProblem):
    """An inner problem with a nonsmooth term; the smooth part counts the calls. Made by `BilevelProblem.bind`."""

    linearization = ProximalPoint

    def __init__(self, smooth: InnerProblem, term: Nonsmooth) -> None:
        super().__init__(smooth.problem, smooth.hparams, smooth.counts)
        self._smooth, self.term, self.alone = smooth, term, smooth.alone
        self._step: Tensor | None = None

    @property
    def smooth(self) -> InnerProblem:
        return self._smooth

    def prox(self, v: Tree, step: Tensor, hparams: Tree = None) -> Tree:
        hparams = self.hparams if hparams is None else hparams
        return self._by_row(self.term.prox, v, step, hparams)

    def support(self, params: Tree) -> Tree:
        """Return the support as ones and zeros, shaped as params."""
        inside = self._by_row(self.term.support, tree.detach(params))
        return tree.tree_map(lambda leaf, mask: mask.to(leaf.dtype), params, inside)

    def slope(self, params: Tree) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the gradient of the term by params, with its graph, and the roots of that."""
        x, u = tree.attach(params), tree.attach(self.hparams)
        with torch.enable_grad():
            total = self._by_row(self.term.value, x, u).sum()
            roots = tree.leaves(x)
            if not total.requires_grad:
                return [torch.zeros_like(leaf) for leaf in roots], roots, tree.leaves(u)
            slope = torch.autograd.grad(total, roots, create_graph=True, materialize_grads=True)
        return list(slope), roots, tree.leaves(u)

    def grad(self, params: Tree) -> Tree:
        """Return the residual; the gradient that it takes is counted, and kept, by the smooth part."""
        if self._last is None or self._last[0] is not params:
            self._last = (params, self._residual(params, self._smooth.grad(params)))
        return self._last[1]

    def confirm(self, params: Tree) -> None:
        self._smooth.confirm(params)

    def step_size(self, params: Tree) -> Tensor:
        """Return ``1 / L``, with L above the curvature of the smooth part, 0-d or of shape (rows,); found once."""
        if self._step is None:
            self._step = safe_step(self, params)
        return self._step

    def curvature(self, params: Tree) -> Spectrum:
        """Return the ends of the spectrum of the smooth part."""
        return self._smooth.curvature(params)

    def majorizer(self, params: Tree, largest: float | None = None) -> Tree:
        """Return a diagonal above the Hessian of the smooth part."""
        return self._smooth.majorizer(params, largest)

    def on_step(self, index: int) -> InnerProblem:
        smooth = self._smooth.on_step(index)
        if smooth is self._smooth:
            return self
        view = copy.copy(self)
        view._smooth, view.problem = smooth, smooth.problem
        view._forget()
        return view

    def equilibrium_vjp(self, params: Tree, cotangent: Tree) -> tuple[Tree, Tree]:
        """Return the cotangent with zeros outside the support, where the solution does not move."""
        return tree.tree_map(torch.mul, cotangent, self.support(params)), None

    def _value(self, params: Tree) -> Tensor:
        with torch.no_grad():
            return self._smooth._value(params) + self._by_row(self.term.value, params, self.hparams).sum()

    def _residual(self, params: Tree, gradient: Tree) -> Tree:
        with torch.no_grad():
            step = self.step_size(params)
            moved = moved_by(params, step, gradient)
            after = self.prox(moved, step)
            inverse = step.reciprocal()
            residual = tree.tree_map(lambda a, b: (a - b) * rows.fit(inverse, a), params, after)
            if not self.term.curved:
                return residual
            inside = tree.tree_map(torch.mul, self.support(params), self.support(after))
        total = tree.add(gradient, tree.rebuild(params, [each.detach() for each in self.slope(params)[0]]))
        return tree.tree_map(lambda mask, a, b: torch.where(mask > 0, a, b), inside, total, residual)

    def _by_row(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of one problem; of rows, for each of them (a step is 0-d or has one number for each)."""
        if self.problem.batch is None:
            return function(*arguments)
        size = self.problem.batch
        spread = [a.expand(size) if isinstance(a, Tensor) and a.dim() == 0 else a for a in arguments]
        return torch.func.vmap(function)(*spread)


def moved_by(params: Tree, step: Tensor, gradient: Tree) -> Tree:
    """Return ``params - step gradient``, for a step that is 0-d or has one number for each row."""
    return tree.tree_map(lambda x, g: x.addcmul(rows.fit(step, x), g, value=-1.0), params, gradient)


def safe_step(inner: InnerProblem, params: Tree) -> Tensor:
    """Return ``1 / L``, with L above the curvature of the smooth part; of rows, NaN for one that has none."""
    size = inner.problem.batch
    singles = [(inner, params)] if size is None else [(inner.member(i), rows.row(params, i)) for i in range(size)]
    steps = []
    for single, x in singles:
        if single.problem.nonsmooth is not None:
            single.problem.nonsmooth.check(x, single.hparams)
        largest = torch.stack([leaf.amax() for leaf in tree.leaves(single.smooth.majorizer(x))]).amax()
        good = (largest > 0) & torch.isfinite(largest)
        steps.append(torch.where(good, largest.reciprocal(), torch.nan))
    step = torch.stack(steps)
    if not bool(torch.isfinite(step).any()):
        raise ValueError(
            "the largest curvature of the inner loss is not positive and finite, so no step size follows: give "
            "`step_size` a number, or add a penalty to the inner loss."
        )
    return step[0] if size is None else step
