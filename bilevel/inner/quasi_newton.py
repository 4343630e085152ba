"""A quasi-Newton method whose metric is the problem's own curvature, kept over many solves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Traits
from bilevel.core import tree
from bilevel.core.options import is_int, is_positive, option
from bilevel.core.status import Status, StepFailure
from bilevel.core.tree import Tree
from bilevel.inner.line_search import Found, Ray, search
from bilevel.numerics.conjugate_gradients import Krylov, conjugate_gradients
from bilevel.oracles.inner_problem import InnerProblem, Linearization

Pair = tuple[Tensor, Tensor, Tensor]
"""A step s, the change y of the gradient along it, both for each unit of the step's length, and 1 / s'y."""
FORCING = 0.3
"""Relative residual to which the first Newton system is solved."""
STALLED = 10.0
"""Steps without a smaller gradient after which it matters whether the loss can still tell iterates apart."""


@dataclass(frozen=True)
class QuasiNewton(InnerSolver):
    """``x <- x - t B^-1 grad(x)``, where B is curvature that the problem measures rarely, corrected by L-BFGS pairs.

    What B is, the problem says (`Linearization.preconditioner`):

    - Logistic, softmax and ridge regression of up to 2,000 weights keep their data Hessian ``X' D X``; the penalties
      of the day are added before it is factored. It is measured anew where the gradient norm falls too slowly. A first
      solve of softmax regression, for which that does not pay yet, takes Newton steps by CG (Dembo & Steihaug 1983),
      preconditioned by the class blocks of the Hessian at zero weights, and so do larger models.
    - With default options, `Implicit` takes dense Newton steps in its place where a problem knows them to be quicker.
    - Any other problem has ``B = (y'y / s'y) I``: this is then L-BFGS (Nocedal 1980), for smooth losses.

    An outer loop hands the curvature on, and Implicit uses it to precondition CG. It is out of date by design: that
    changes how many steps are taken, never where they lead. The step has no derivative here: use Implicit.

    Args:
        pairs: how many pairs correct the curvature.
        refresh: measure the curvature anew after a step that leaves more than this share of the gradient norm.

    >>> QuasiNewton(tol=1e-8).pairs
    12
    """

    pairs: int = option(12, "a positive int", is_int)
    refresh: float = option(0.25, "a positive number", is_positive)

    default_max_steps = 2_000
    # The pairs and the kept curvature are no differentiable function of the state.
    traits = Traits(differentiable=False, superlinear=True)

    @cached_property
    def dense_newton(self) -> bool:
        """Whether all options but the tolerance are the defaults, of no subclass."""
        return self == QuasiNewton(tol=self.tol)

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Return the state at the same iterate with the curvature; problems that can, measure it now to last."""
        known = state.point is not None and state.point.inner.problem is inner.problem
        point = state.point.rebind(inner) if known and state.point is not None else inner.linearize(state.params)
        cache = point.preconditioner(state.cache, lasting=True).cache
        # The pairs correct the curvature at other hyperparameters; without a metric of its own they are all there is.
        return replace(state, memory=state.memory if cache is None else (), measured={}, cache=cache, point=None)

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Take one step; at the rounding floor, where no step helps, stay."""
        if not inner.problem.symmetric:
            raise ValueError(
                "QuasiNewton needs an inner loss, but this problem is stated by an optimality map, "
                "whose Jacobian need not be symmetric: use Newton() or FixedPoint(update)."
            )
        params, raveler = state.params, tree.Raveler(state.params)
        gradient = raveler.ravel(inner.grad(params))
        point = inner.linearize(params)
        metric = point.preconditioner(state.cache)
        pairs: Sequence[Pair] = state.memory
        if point.closed_form and (metric.apply is None or metric.rough):
            direction, length = self._newton_direction(point, raveler, gradient, state, metric.apply), 1.0
        else:
            direction = _corrected(pairs, gradient, metric.apply)
            length = 1.0 if pairs or metric.apply is not None else _first_length(point, raveler, gradient)
        # Whether the loss can no longer tell the next iterate from this one.
        stuck = state.measured.get("stalled", 0.0) >= STALLED and bool(
            torch.dot(gradient, direction) <= torch.finfo(gradient.dtype).eps * point.value.abs()
        )
        result = None if stuck else self._search(Ray(point, raveler, gradient, direction), length)
        if result is None:
            return replace(state, steps=state.steps + 1, cache=metric.cache)
        cache, pairs = (
            metric.cache,
            _with(pairs, result.params, params, result.gradient, gradient, raveler)[-self.pairs :],
        )
        there = inner.linearize(result.params)
        # Curvature as of the last step is not measured again: pairs get their chance first.
        slow = metric.apply is not None and not metric.rough and bool(state.memory) and result.rate > self.refresh
        if slow and not _reached(inner, result.gradient):
            cache, pairs = there.preconditioner(lasting=True).cache, ()
        return replace(
            state,
            params=result.params,
            memory=tuple(pairs),
            steps=state.steps + 1,
            measured=_progress(state.measured, result),
            cache=cache,
            point=there,
        )

    def _search(self, ray: Ray, length: float) -> Found | None:
        """Search along the direction, or down the gradient where rounding has turned it uphill."""
        if not bool(tree.norm(ray.gradient) > 0):
            return None
        if not bool(torch.dot(ray.direction, ray.gradient) > 0):
            ray = replace(ray, direction=ray.gradient)
        try:
            return search(ray, length)
        except ArithmeticError as error:
            raise StepFailure(Status.FAILED_STEP, str(error)) from None

    def _newton_direction(
        self,
        point: Linearization,
        raveler: tree.Raveler,
        gradient: Tensor,
        state: InnerState,
        precondition: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Solve ``H d = gradient`` by CG, as exactly as the last step's rate suggests (Eisenstat & Walker 1996)."""
        norm = float(tree.norm(gradient))
        tol = point.inner.tolerance or 0.0
        goal = max(norm * min(FORCING, state.measured.get("rate", 1.0) ** 1.5), FORCING * tol) / norm

        def enough(run: Krylov) -> bool:
            return run.residual <= goal or run.steps >= raveler.size

        run = conjugate_gradients(
            lambda v: raveler.ravel(point.hvp(raveler.unravel(v))),
            torch.zeros_like(gradient),
            gradient / norm,
            enough,
            precondition=precondition,
        )
        return norm * run.x if run.steps else gradient


def _corrected(pairs: Sequence[Pair], gradient: Tensor, metric: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the direction by the two-loop recursion of L-BFGS."""
    q, weights = gradient, []
    for s, y, inverse in reversed(pairs):
        weight = torch.dot(s, q) * inverse
        q = torch.addcmul(q, weight, y, value=-1)
        weights.append(weight)
    if metric is not None:
        q = metric(q)
    elif pairs:
        _, y, inverse = pairs[-1]
        size = tree.norm(y)
        q = q / (inverse * size * size)
    for (s, y, inverse), weight in zip(pairs, reversed(weights), strict=True):
        q = torch.addcmul(q, weight - torch.dot(y, q) * inverse, s)
    return q


def _first_length(point: Linearization, raveler: tree.Raveler, gradient: Tensor) -> float:
    """Return the first step length to try where nothing is known: the curvature along the gradient has its unit."""
    norm = tree.norm(gradient)
    unit = gradient / norm
    try:
        curvature = abs(float(torch.dot(unit, raveler.ravel(point.hvp(raveler.unravel(unit))))))
    except (ValueError, RuntimeError):
        # Not every loss has second derivatives; a loss that falls to zero along a line is this far from it.
        curvature = float(norm / abs(point.value) * norm)
    return 1.0 / curvature if 0 < curvature < math.inf else 1.0


def _reached(inner: InnerProblem, gradient: Tensor) -> bool:
    """Whether the run ends here: what only later steps would use is then not worth its work."""
    return inner.tolerance is not None and float(tree.norm(gradient)) <= inner.tolerance


def _progress(measured: Mapping[str, float], result: Found) -> Mapping[str, float]:
    """Return the rate of the last step, the smallest gradient norm, and the steps since then."""
    norm = float(tree.norm(result.gradient))
    best = measured.get("smallest_gradient", math.inf)
    stalled = 0.0 if norm < best else measured.get("stalled", 0.0) + 1.0
    return {"rate": result.rate, "smallest_gradient": min(norm, best), "stalled": stalled}


def _with(
    pairs: Sequence[Pair], params: Tree, before: Tree, gradient: Tensor, gradient_before: Tensor, raveler: tree.Raveler
) -> Sequence[Pair]:
    """Return the pairs with one more, unless the curvature along it is not positive."""
    s, y = raveler.ravel(params) - raveler.ravel(before), gradient - gradient_before
    length = tree.norm(s)
    # A pair for a step of length one: squares of long and short steps would leave the range of float32.
    s, y = s / length, y / length
    along = torch.dot(s, y)
    if not bool(along > torch.finfo(s.dtype).eps * tree.norm(y)):
        return pairs
    return (*pairs, (s, y, 1.0 / along))
