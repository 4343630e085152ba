"""Tolerances from a target: solve a little, look at the certificate, continue the same run.

A hypergradient p with ``|p - dF/du| <= T = tau / (1 + tau) |p|`` has the relative error tau or less. The bound of a
pair of inner iterate and adjoint has two parts: one shrinks with the inner gradient, one with the adjoint residual.
Each gets half of T, which is the cheapest split where a digit of either costs the same (Lagrange), so that both
tolerances are multiplied by ``min(1, (T/2) / part)``, and the run goes on from where it stands.

The cheap bound is pessimistic where penalties are small. Where going on would cost more than the two-sided one
(`bilevel.certify.certify_error`), that one is asked first: it may prove the target as things stand.

Where no bound is known the estimate of `bilevel.certify.refine` takes its place; a figure that its own status does not
support asks for ten times smaller tolerances. (Pedregosa 2016 tightens both by a schedule, without a look.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from bilevel.base import Carry, InnerSolver
from bilevel.certify import ErrorBound, ErrorEstimate, Refinement, certify_error, rounding_floor
from bilevel.core import tree
from bilevel.core.options import default_tolerance, is_number, shown_value
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.attempt import Attempt, attempt
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.oracles.problem import BilevelProblem

FIRST = 0.1
"""Of the residual at a cold start, and relative adjoint residual: where the first look is taken."""
SHARE = 0.45
"""Of the target for each part: a little below the half of the rule, so that a pass does not miss it by a hair."""
SMALLER = 0.1
"""Factor of both tolerances where the certificate does not say which one to tighten."""
CAP = 1e-4
"""Smallest factor of a tolerance from one look to the next: far from the solution the parts are not proportional."""
PROBE = 0.5
"""Factor of the first tightened inner tolerance: shows what a digit costs."""
SHARP = 15.0
"""Inner steps that the cheap bound asks for, from which on the two-sided one is asked first: about its price where a
factor of the Hessian is at hand; elsewhere it takes up to four times as much, and saves more."""
LOOKS = 20
ROUNDING = 32.0
"""Rounding units of the residual at a cold start below which no inner tolerance goes."""
ABOVE_FLOOR = 3.0
"""How far above the measured rounding floor a target has to be."""


def check_relative_error(target: Any) -> None:
    """Refuse, by a ValueError, a target that is no relative error below one."""
    if not is_number(target) or not 0 < target < 1:
        raise ValueError(
            "`target_error` must be a number in (0, 1), the relative error of the hypergradient, got "
            f"{shown_value(target)}."
        )


def check_target(
    target: Any, problem: BilevelProblem, solver: InnerSolver, estimator: HypergradEstimator, certify: bool
) -> None:
    """Refuse a target that nothing can reach or judge, before the work starts; ValueError says what to do."""
    check_relative_error(target)
    if certify:
        raise ValueError("`target_error` brings its own certificate: leave out certify=True.")
    if problem.batch is not None:
        raise ValueError("`target_error` is for one problem at a time, but this is a batch: loop over its members.")
    if problem.variation:
        raise ValueError(
            "`target_error` needs an inner residual that falls below any tolerance, but this problem has "
            f"{problem.variation}: leave it out."
        )
    if not problem.symmetric:
        raise ValueError(
            "`target_error` needs a certificate, and an optimality map, whose Jacobian need not be symmetric, has "
            "none: state the problem by an inner loss, or leave it out."
        )
    reason = solver.bias_reason(problem)
    if reason:
        remedy = ": leave it out" if solver.traits.differentiable else ""
        raise ValueError(f"`target_error` asks for the derivative of the inner solution, but {reason}{remedy}.")
    estimator.at_tolerance(FIRST)


@dataclass(frozen=True)
class Tolerances:
    """What one pass stops at: the norm of the inner gradient, and the relative residual of the adjoint system."""

    inner: float
    adjoint: float


class TargetErrorLoop:
    """The passes of one hypergradient towards its target.

    The solver's own `tol`, where it has one, is the smallest that is used, and its `steps` are the most that all passes
    take; the meter of the run counts the work, that of the looks included.
    """

    def __init__(self, estimator: HypergradEstimator, given: Run, target: float) -> None:
        self.estimator, self.given, self.target = estimator, given, target
        self.problem, self.solver, self.hparams = given.problem, given.solver, given.hparams
        self.counts, self.dtype = given.meter.counts, tree.leaves(given.params)[0].dtype
        certifiable = self.problem.certifiable() is not None
        self.bound = ErrorBound(self.problem, self.hparams, "cheap", self.counts) if certifiable else None
        self.refinement = Refinement(self.problem, self.hparams, self.counts)
        self.scale = self._residual(given.params)
        self.near = default_tolerance(self.dtype)
        self.least = ROUNDING * torch.finfo(self.dtype).eps
        self.floor: float | None = None
        self.steps = self.adjoint_steps = 0
        self.rate: float | None = None
        """Inner steps for each factor e of the residual, once some have been taken."""

    def _residual(self, params: Tree) -> float:
        return float(tree.norm(self.given.inner().grad(params)))

    def run(self) -> tuple[Attempt, ErrorEstimate]:
        """Return the first attempt that the certificate supports, or the best one with the reason why none did."""
        carry = self.given.carry
        # A warm start may be good enough already: the first look is taken before any step.
        warm = self.estimator.resumes and carry.state is not None
        residual = self._residual(carry.state.params) if carry.state is not None else self.scale
        tolerances = self._clamped(Tolerances(residual if warm else FIRST * residual, FIRST))
        best: tuple[Attempt, ErrorEstimate] | None = None
        for _ in range(LOOKS):
            result = self._pass(tolerances, carry, residual)
            if not result.verdict.status.usable:
                if best is None:
                    return result, ErrorEstimate(None, "none", "the hypergradient failed")
                return self._refused(best, result.verdict.detail)
            if result.verdict.status is Status.NOT_SMOOTH:
                return result, ErrorEstimate(None, "none", "the run ends at a kink, where no tolerance leads further")
            allowed = self.target / (1.0 + self.target) * float(tree.norm(result.gradient))
            error = self._figure(result, allowed)
            if error.value is not None and error.value <= allowed:
                return (result if result.verdict.status.ok else replace(result, verdict=GOOD)), error
            closer = best is None or _size(error) < _size(best[1])
            stuck = not closer and tolerances.inner <= self.near * self.scale
            best = (result, error) if closer or best is None else best
            following = self._clamped(self._tightened(tolerances, result, error, allowed))
            reason = self._hopeless(result, tolerances, following, allowed)
            if reason or stuck:
                return self._refused(best, reason or "smaller tolerances do not lower the figure any more: rounding")
            tolerances = following
            if self.estimator.resumes:
                carry, residual = result.carry(self.solver, ongoing=True), result.solved.residual
        assert best is not None
        return self._refused(best, f"{LOOKS} looks were not enough")

    def _pass(self, tolerances: Tolerances, carry: Carry, before: float) -> Attempt:
        """Go on to the tolerances, from the inner residual `before`."""
        solver = replace(self.solver, tol=tolerances.inner)
        if self.estimator.resumes and self.solver.steps is not None:
            solver = replace(solver, steps=max(1, self.solver.steps - self.steps))
        estimator = self.estimator.at_tolerance(tolerances.adjoint)
        result = attempt(estimator, replace(self.given, solver=solver, carry=carry))
        if result.solved.steps and 0 < result.solved.residual < before:
            self.rate = result.solved.steps / math.log(before / result.solved.residual)
        self.steps = result.solved.steps + (self.steps if self.estimator.resumes else 0)
        self.adjoint_steps += result.pulled.steps
        pulled = replace(result.pulled, steps=self.adjoint_steps) if self.estimator.resumes else result.pulled
        return replace(result, solved=replace(result.solved, steps=self.steps), pulled=pulled)

    def _figure(self, result: Attempt, allowed: float) -> ErrorEstimate:
        """Return what is proved of an attempt, or else estimated."""
        given = (result.solved.params, result.gradient, result.pulled.adjoint)
        if self.bound is None:
            own = result.pulled.error if result.verdict.status.ok else None
            if own is not None and own > allowed:
                return ErrorEstimate(own, "estimate", result.pulled.error_note)
            # An estimator that judges itself does so with what its own solves have seen: it is not its own witness.
            return self.refinement(*given)
        cheap = None
        if result.pulled.adjoint is not None:
            cheap = self.bound(*given)
            if cheap.value is not None and (cheap.value <= allowed or self._work(cheap, allowed) <= SHARP):
                return cheap
        sharp = certify_error(self.problem, self.hparams, *given, goal=allowed, counts=self.counts)
        if cheap is None or cheap.value is None or sharp.value is None:
            return sharp
        # The sharp figure does not say which half is to blame; the cheap one bounds that of the adjoint.
        return replace(sharp, adjoint_part=min(cheap.adjoint_part or 0.0, 0.5 * sharp.value))

    def _work(self, error: ErrorEstimate, allowed: float) -> float:
        """Return how many inner steps it would take until this bound is as small as allowed; zero if nobody knows."""
        assert error.value is not None
        of_inner = error.value - (error.adjoint_part or 0.0)
        return (self.rate or 0.0) * math.log(max(1.0, of_inner / (SHARE * allowed))) if allowed > 0 else 0.0

    def _tightened(self, tolerances: Tolerances, result: Attempt, error: ErrorEstimate, allowed: float) -> Tolerances:
        """Return smaller tolerances: from the parts of a bound, from an estimate as a whole, or blindly."""
        inner, adjoint = result.solved.residual, result.pulled.residual
        adjoint = tolerances.adjoint if adjoint is None else adjoint
        if error.value is None:
            return Tolerances(SMALLER * min(inner, tolerances.inner), SMALLER * tolerances.adjoint)
        of_adjoint = error.value if error.adjoint_part is None else error.adjoint_part
        of_inner = error.value if error.adjoint_part is None else error.value - of_adjoint
        by_inner, by_adjoint = (
            max(CAP, min(1.0, SHARE * allowed / part)) if part > 0 else 1.0 for part in (of_inner, of_adjoint)
        )
        if by_inner == by_adjoint == 1.0:
            by_inner = by_adjoint = SMALLER
        if by_inner < 1 and self.rate is None and self.bound is not None and not self.bound.sharp:
            by_inner = max(by_inner, PROBE)
        return Tolerances(
            inner * by_inner if by_inner < 1 else tolerances.inner,
            adjoint * by_adjoint if by_adjoint < 1 else tolerances.adjoint,
        )

    def _clamped(self, tolerances: Tolerances) -> Tolerances:
        """Keep tolerances above those that the user gave, and above rounding."""
        inner = max(tolerances.inner, self.solver.tol or 0.0, self.least * self.scale, torch.finfo(torch.float32).tiny)
        return Tolerances(inner, max(tolerances.adjoint, self.least))

    def _hopeless(self, result: Attempt, before: Tolerances, after: Tolerances, allowed: float) -> str:
        """Return why no further pass can help, or an empty string."""
        solver, adjoint = self.solver, result.pulled.adjoint
        if solver.steps is not None and self.steps >= solver.steps and result.solved.residual > before.inner:
            return f"{type(solver).__name__} has used its {solver.steps} steps"
        if after.inner < self.near * self.scale or after.adjoint < self.near:
            if self.floor is None and adjoint is not None:
                inverse = self.refinement.inverse
                self.floor = rounding_floor(self.problem, self.hparams, result.solved.params, adjoint, inverse)
            if self.floor is not None and allowed < ABOVE_FLOOR * self.floor:
                dtype = str(self.dtype).removeprefix("torch.")
                remedy = "use a larger penalty" if dtype == "float64" else "use float64 or a larger penalty"
                return (
                    f"the target is below the rounding floor of {dtype}, an error of about {self.floor:.1e} where "
                    f"{allowed:.1e} is asked for: {remedy}"
                )
        if (after.inner, self.estimator.at_tolerance(after.adjoint)) == (
            before.inner,
            self.estimator.at_tolerance(before.adjoint),
        ):
            given = solver.tol is not None and after.inner == solver.tol
            return "the `tol` that was given stops the run first" if given else "no tolerance can be smaller: rounding"
        return ""

    def _refused(self, best: tuple[Attempt, ErrorEstimate], reason: str) -> tuple[Attempt, ErrorEstimate]:
        """Return the best attempt with the verdict that it is not good enough."""
        result, error = best
        figure = "no reliable figure" if error.value is None else f"the {error.kind} {error.value:.2e}"
        size = float(tree.norm(result.gradient))
        detail = f"target_error={self.target:g} was not reached ({figure} at |hypergradient| {size:.2e}): {reason}"
        if result.verdict.status.ok and result.verdict.detail:
            detail = f"{result.verdict.detail}; {detail}"
        return replace(result, verdict=Verdict(Status.TARGET_NOT_REACHED, detail)), error


def _size(error: ErrorEstimate) -> float:
    return math.inf if error.value is None else error.value
