"""Coordinate descent on the Gram matrix, for penalties that act on each coordinate alone."""

from __future__ import annotations

from dataclasses import dataclass

from bilevel.base import InnerSolver, InnerState, Traits
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.dense import check_factored
from bilevel.numerics.elastic_net import minimise_quadratic
from bilevel.oracles.inner_problem import InnerProblem

HALVINGS = 30
FALLEN = 0.5
"""Share of the residual at which a full step is taken without a look at values."""


@dataclass(frozen=True)
class CoordinateDescent(InnerSolver):
    """Minimise the quadratic model of the smooth part, plus the term, by coordinate descent with active sets.

    The model is that of the Hessian and the gradient at the iterate, so that nothing depends on the number of rows once
    they are made (Friedman, Hastie & Tibshirani 2010; `bilevel.numerics.elastic_net`). For squared loss the first step
    is the solution, by its Gram matrix; another loss takes a few, each halved until the residual or the sum falls.
    Terms are `L1`, `ElasticNet` and `NonNegative`; without one a step is that of `Newton`. The next solve goes on from
    the last iterate: go from strong penalties to weak ones. Its steps are not differentiated: use `Implicit`.

    It factors matrices of the size of the support: for at most 5,000 parameters.

    >>> CoordinateDescent(tol=1e-10)
    CoordinateDescent(steps=None, tol=1e-10)
    """

    traits = Traits(differentiable=False, proximal=True, superlinear=True)

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        check_factored("CoordinateDescent", tree.size(params), "FISTA()")
        if not inner.problem.symmetric:
            raise ValueError(
                "CoordinateDescent minimises an inner loss, but this problem is stated by an optimality map: use "
                "FixedPoint(update)."
            )
        self._term(inner, params)
        return InnerState(params)

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        x, smooth, raveler = state.params, inner.smooth, tree.Raveler(state.params)
        l1, l2, positive = self._term(inner, x)
        residual = tree.norm(inner.grad(x))
        hessian, flat = smooth.linearize(x).dense_hessian(), raveler.ravel(x)
        moment = hessian @ flat - raveler.ravel(smooth.grad(x))
        new = minimise_quadratic(hessian, moment, raveler.ravel(l1), raveler.ravel(l2), flat, positive)
        if inner.problem.structure.quadratic:
            return state.moved(raveler.unravel(new))
        after, t = raveler.unravel(new), 1.0
        # Near the solution the residual still falls where values are rounding; the next step takes this gradient.
        if bool(tree.norm(inner.grad(after)) <= FALLEN * residual):
            return state.moved(after)
        value = inner.value(x)
        for _ in range(HALVINGS):
            if bool(inner.value(after) <= value):
                return state.moved(after)
            t /= 2
            after = raveler.unravel(flat + t * (new - flat))
        return state.moved(x)

    def _term(self, inner: InnerProblem, params: Tree) -> tuple[Tree, Tree, bool]:
        """Return (l1, l2, positive) of the nonsmooth term."""
        if inner.smooth is inner:
            return tree.zeros_like(params), tree.zeros_like(params), False
        term = inner.problem.nonsmooth
        weights: tuple[Tree, Tree, bool] | None = term.separable(params, inner.hparams)
        if weights is None:
            raise ValueError(
                "CoordinateDescent needs a term that acts on each coordinate alone (L1, ElasticNet, NonNegative), but "
                f"this problem has {type(term).__name__}: use ProximalGradient() or FISTA()."
            )
        return weights
