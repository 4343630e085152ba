"""Proximal gradient methods, for inner problems with a nonsmooth term (L1, group lasso, bounds)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Traits
from bilevel.core import rows, tree
from bilevel.core.options import is_positive, option, or_auto
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.proximal_inner import moved_by, safe_step


@dataclass(frozen=True)
class ProximalGradient(InnerSolver):
    """``x <- prox(x - h grad(x), h)``: a gradient step of the smooth part, then the proximal map of the term.

    The sum falls in every step with ``h <= 1/L``, L the largest curvature of the smooth part (Beck & Teboulle 2009).
    The step identifies the support of the solution after finitely many steps; its derivative by autograd is that of a
    gradient step on the support. Without a nonsmooth term it is gradient descent.

    The residual is ``|x - prox(x - s grad(x), s)| / s``, in the units of a gradient (`bilevel.oracles.proximal_inner`).

    Args:
        step_size: a positive number, or "auto": 1/L with L from the problem, or measured, at the start of each solve.
            It is a constant of the differentiation.

    >>> ProximalGradient(tol=1e-8)
    ProximalGradient(steps=None, tol=1e-08, step_size='auto')
    """

    step_size: float | str = option("auto", "a positive number or 'auto'", or_auto(is_positive))

    traits = Traits(rowwise=True, proximal=True)

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        return InnerState(params, self._memory(inner, params, self._size(inner, params)))

    def cold_state(self, inner: InnerProblem, params: Tree) -> InnerState:
        return InnerState(params, self._memory(inner, params, self._constant(inner, params, 0.0)))

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Go on from the iterate, at rest, with the step size at the present hyperparameters."""
        return replace(state, memory=self._memory(inner, state.params, self._size(inner, state.params)))

    def max_step_size(self, state: InnerState, curvature: float) -> float:
        return 2.0 / curvature

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        (size,) = state.memory
        return state.moved(proximal_step(inner, state.params, size.detach()), state.memory)

    def _memory(self, inner: InnerProblem, params: Tree, size: Tensor) -> Tree:
        return (size,)

    def _size(self, inner: InnerProblem, params: Tree) -> Tensor:
        """Return the step size, 0-d or of shape (rows,)."""
        if self.step_size == "auto":
            return safe_step(inner, params)
        return self._constant(inner, params, float(self.step_size))

    def _constant(self, inner: InnerProblem, params: Tree, value: float) -> Tensor:
        (like, *_) = tree.leaves(params)
        return like.new_full(() if inner.problem.batch is None else like.shape[:1], value)


@dataclass(frozen=True)
class FISTA(ProximalGradient):
    """Accelerated proximal gradient, with restarts (Beck & Teboulle 2009; O'Donoghue & Candes 2015).

        y = x_k + (t_{k-1} - 1) / t_k (x_k - x_{k-1}),    x_{k+1} = prox(y - h grad(y), h)

    with ``t_k = (1 + sqrt(1 + 4 t_{k-1}^2)) / 2``, and t is set back to 1 where ``<y - x_{k+1}, x_{k+1} - x_k> > 0``:
    then the rate is that of the best constant momentum, without knowing it. The t are constants of the differentiation.
    Each look at the residual costs one more gradient (at x, not at y), so it is looked at every 8 steps.

    Args:
        step_size: as that of `ProximalGradient`; at most 1/L.

    >>> FISTA(tol=1e-8).step_size
    'auto'
    """

    traits = Traits(rowwise=True, proximal=True, oscillates=True, check_every=8)

    def max_step_size(self, state: InnerState, curvature: float) -> float:
        return 1.0 / curvature

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        previous, t, size = state.memory
        t, size, x, batch = t.detach(), size.detach(), state.params, inner.problem.batch
        after = 0.5 + torch.sqrt(0.25 + t * t)
        momentum = (t - 1.0) / after
        y = tree.tree_map(lambda a, b: a.addcmul(rows.fit(momentum, a), a - b), x, previous)
        new = proximal_step(inner, y, size)
        with torch.no_grad():
            back = rows.dot(tree.add(y, new, -1.0), tree.add(new, x, -1.0), batch) > 0
            after = torch.where(back, 1.0, after)
        return state.moved(new, (x, after, state.memory[2]))

    def _memory(self, inner: InnerProblem, params: Tree, size: Tensor) -> Tree:
        """Return (previous iterate, t, step size)."""
        return params, self._constant(inner, params, 1.0), size


def proximal_step(inner: InnerProblem, x: Tree, size: Tensor) -> Tree:
    """Return ``prox(x - h grad(x), h)``; h is 0-d, or has one number for each row."""
    return inner.prox(moved_by(x, size, inner.smooth.grad(x)), size)
