"""An error estimate for any hypergradient of any smooth problem: refine, and compare with what was given.

One round corrects the inner solution by a Newton step and the adjoint at the corrected point,

    dx = H(x)^-1 g(x),   x' = x - dx,      w' = w - H(x')^-1 (H(x') w - f_x(x')),      p' = f_u(x') - C(x')' w'

where g is the inner gradient and f the outer loss. A Newton step roughly squares the error, so the distance
``|p - p'|`` is close to the error of p, whichever estimator made p: implicit, unrolled, truncated, one-step. It is an
estimate, not a bound, and it is published only where its own signs are good: both linear solves converged, the step was
in the quadratic regime, and the first correction was small. Otherwise further rounds follow, always compared with the
original p. Where no adjoint is given, p may be better than the first p', so that rounds follow until p' stands still.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import ErrorKind
from bilevel.certify.floor import rounding_floor
from bilevel.certify.inverse import Inverse, Solved, flat_product
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem

ROUNDS = 6
UNSOLVED = 0.1
"""Relative error of the corrections' linear solves from which on no figure is published."""
NONLINEAR = 0.1
FIRST_ROUND = 0.3
NEAR_FLOOR = 1e3
"""Rounding units of p below which the rounding of the refinement itself is measured and added."""
MOVEMENT = 0.3
"""How much of the error the refined hypergradient may still have moved by, where the adjoint started from nothing."""


@dataclass(frozen=True)
class ErrorEstimate:
    """What can be said of the distance to the exact hypergradient.

    Attributes:
        value: the figure, or None where nothing can be said.
        kind: "bound", "estimate" or "none".
        note: how it was obtained, or why there is none.
        lower: a proved lower bound of the distance.
        components: a proved bound for every component, shaped as the hyperparameters.
        corrected: a hypergradient that is more accurate as a rule.
        corrected_error: a proved bound of its distance to the exact one.
        signs: the signs of the exact hypergradient's components where they are certain, 0 elsewhere.
        adjoint_part: for a bound: the part of `value` that shrinks with the adjoint residual; the rest shrinks with the
            inner gradient.
        doubtful: there is no value because of what was seen at the point: a Hessian that is not positive definite, or
            params that are far from where the inner gradient is linear.
    """

    value: float | None
    kind: ErrorKind
    note: str
    lower: float | None = None
    components: Tree = None
    corrected: Tree = None
    corrected_error: float | None = None
    signs: Tree = None
    adjoint_part: float | None = None
    doubtful: bool = False


def refine(
    problem: BilevelProblem,
    hparams: Tree,
    params: Tree,
    hypergradient: Tree,
    adjoint: Tree = None,
    counts: Counter[str] | None = None,
) -> ErrorEstimate:
    """Return an estimate of ``|p - dF/du|`` for a hypergradient p obtained at `params`, or kind "none" with the reason.

    Cost: one product for each weight (up to 150 weights), or a CG run that finds the smallest eigenvalue; per round two
    short CG runs, two gradients, two outer gradients and one cross product. An adjoint, ``H^-1 f_x``, saves CG steps.
    """
    return Refinement(problem, hparams, counts)(params, hypergradient, adjoint)


class Refinement:
    """`refine` for several hypergradients at the same hyperparameters: what is known of the Hessian is kept."""

    def __init__(self, problem: BilevelProblem, hparams: Tree, counts: Counter[str] | None = None) -> None:
        self.problem, self.hparams = problem, hparams
        self.counts = Counter() if counts is None else counts
        self.inverse = Inverse()

    def __call__(self, params: Tree, hypergradient: Tree, adjoint: Tree = None) -> ErrorEstimate:
        """Return the estimate; see `refine`."""
        inner = self.problem.bind(self.hparams, self.counts)
        ravel_x, ravel_u = tree.Raveler(params), tree.Raveler(self.hparams)
        given = ravel_u.ravel(hypergradient)
        x = ravel_x.ravel(params)
        w = torch.zeros_like(x) if adjoint is None else ravel_x.ravel(adjoint)
        unit = torch.finfo(x.dtype).eps
        reason, before = "", None
        for turn in range(1, ROUNDS + 1):
            step = _correct_solution(inner, ravel_x, x, self.inverse)
            if step.failed is not None:
                return ErrorEstimate(None, "none", step.failed.reason, doubtful=step.failed.doubtful)
            x = step.vector
            point = inner.linearize(ravel_x.unravel(x))
            self.counts["outer"] += 1
            _, by_params, by_hparams = self.problem.outer_value_and_grads(point.params, self.hparams)
            right = -ravel_x.ravel(by_params)
            if bool(w.any()):
                right = flat_product(point, ravel_x)(w) + right
            correction = self.inverse.solve(point, ravel_x, right, transposed=True)
            if correction.reason:
                return ErrorEstimate(None, "none", correction.reason, doubtful=correction.doubtful)
            w = w - correction.x
            better = ravel_u.ravel(by_hparams) - ravel_u.ravel(point.cross(ravel_x.unravel(w)))
            error = float(torch.linalg.vector_norm(given - better))
            size = float(torch.linalg.vector_norm(better))
            unsolved = max(step.unsolved, correction.error)
            moved = 0.0 if before is None else float(torch.linalg.vector_norm(better - before))
            # What rounding does to a hypergradient is multiplied by the condition.
            near_floor = NEAR_FLOOR * unit * max(1.0, self.inverse.condition) * size
            # Where both are about as small as rounding, no further round tells them apart: they are added.
            at_floor = before is not None and max(error, moved) < near_floor
            unsettled = adjoint is None and not at_floor and (before is None or moved > MOVEMENT * error)
            before = better
            error *= (1 + unsolved) / (1 - min(step.nonlinearity, 0.5))
            if unsolved > UNSOLVED:
                reason = "the corrections' linear solves did not converge"
            elif step.nonlinearity > NONLINEAR:
                reason = f"the iterate is outside the quadratic regime of Newton's method ({step.nonlinearity:.1e})"
            elif unsettled:
                reason = (
                    "the refined hypergradient moves by more than what it is to judge: is the error that of rounding?"
                )
            elif turn == 1 and error > FIRST_ROUND * size:
                reason = "the first correction was large"
            else:
                note = f"{turn} refinement round{'s' if turn > 1 else ''}"
                if at_floor:
                    error += moved
                if error < near_floor:
                    # The refined hypergradient has the same rounding, which a difference cannot see.
                    floor = rounding_floor(self.problem, self.hparams, point.params, ravel_x.unravel(w), self.inverse)
                    error, note = error + floor, f"{note}, and the measured rounding floor of {floor:.1e}"
                return ErrorEstimate(error, "estimate", note)
        note = f"no reliable figure after {ROUNDS} rounds: {reason}"
        return ErrorEstimate(None, "none", note, doubtful=unsolved <= UNSOLVED and step.nonlinearity > NONLINEAR)


@dataclass(frozen=True)
class _Correction:
    vector: Tensor
    unsolved: float = 0.0
    nonlinearity: float = 0.0
    failed: Solved | None = None


def _correct_solution(inner: InnerProblem, raveler: tree.Raveler, x: Tensor, inverse: Inverse) -> _Correction:
    """Return the iterate after one damped Newton step, and how far the gradient was from its linearisation."""
    here = raveler.ravel(inner.grad(raveler.unravel(x)))
    length = torch.linalg.vector_norm(here)
    if not bool(length > 0):
        return _Correction(x)
    point = inner.linearize(raveler.unravel(x))
    step, product = inverse.solve(point, raveler, here), flat_product(point, raveler)
    if step.reason:
        return _Correction(x, failed=step)
    t = 1.0
    while True:
        moved = x - t * step.x
        there = raveler.ravel(inner.grad(raveler.unravel(moved)))
        if t < 1e-3 or bool(torch.linalg.vector_norm(there) <= length):
            break
        t /= 2
    # At the rounding floor the gradient cannot follow its linearisation; that says nothing about curvature.
    floor = 100 * torch.finfo(x.dtype).eps * (torch.linalg.vector_norm(product(x)) + length)
    away = torch.linalg.vector_norm(there - step.left)
    nonlinearity = 1.0 if t < 1 and bool(length > floor) else float(away / length) if bool(away > floor) else 0.0
    return _Correction(moved, step.error, nonlinearity)
