"""How exactly a search asks for each evaluation, where a digit of the inner solution costs many steps.

With an adjoint vector a and the inner gradient s, the outer loss is a's away from that at the inner solution, to first
order, and corrected for it the error is of second order. So |a's| says how exactly a value is known, for free. Near an
optimum, where the outer loss is flat along the errors that descent leaves, it says too little: what is left of second
order is b |s|^2, with a number b that two looks at one point show. Where both together are more than the search
can use, the same inner run goes on to a smaller tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bilevel.base import Carry, Estimate, InnerSolver, InnerState
from bilevel.core.options import Relative
from bilevel.core.status import Status
from bilevel.engine.attempt import only_the_value
from bilevel.engine.estimator import HypergradEstimator
from bilevel.oracles.problem import BilevelProblem
from bilevel.outer.search import EXPENSIVE, OuterSearch, SearchState, Trial

FIRST = 1e-2
"""Inner tolerance of the first evaluation, a share of the parts that cancel in the gradient; none is larger later."""
SCAN = 0.03
"""Share of the outer loss to which the values of a scan are to be known."""
ADJOINT, SLOPE = 6e-2, 0.1
"""Relative residual of the adjoint system: the largest, and for each square root of the decrease that is sought, in
outer losses: a slope that is off by a share of what such a decrease takes moves the end by the square of that share."""
GROWTH, CUT = 3.0, 1e-3
"""Largest and least factor of an inner tolerance from one evaluation to the next."""
AIM, STEP = 0.5, 0.3
"""A tolerance aims at this share of what is wanted; one that was not small enough is cut to at most this share."""
LOOKS = 6
"""Evaluations of one point in a row, each more exact than the last."""
SAVED = ("inner", "adjoint", "most", "last", "held", "bend", "sharpening", "looks", "spent", "off")


def chooses_accuracy(problem: BilevelProblem, solver: InnerSolver, estimator: HypergradEstimator) -> bool:
    """Return whether a search chooses the accuracy of its evaluations: where nobody gave one, and digits are not free.

    Rows side by side share their tolerances, and are evaluated to the solver's own.
    """
    return (
        problem.batch is None
        and problem.symmetric
        and not problem.variation
        and not solver.traits.superlinear
        and solver.tol is None
        and solver.steps is None
        and estimator.open_tolerance
    )


class Accuracy:
    """The accuracies that one search asks for.

    Attributes:
        inner: tolerance of the inner run to come; None for that of a first one.
        adjoint: tolerance of the adjoint system to come.
        most: the largest inner tolerance.
        last: the value of the last evaluation, how far it was off to first order, and the inner residual.
        held: the last two of the accepted point, its adjoint tolerance, and the looks at it.
        bend: b.
        sharpening: whether the trial is the accepted point, evaluated once more.
        looks: evaluations of one point in a row that were not exact enough.
        spent: cost of the trial so far.
        off: whether the inner solver did not reach a tolerance: its own ones are used from then on.
        limit: most inner steps of the evaluation to come, None for the solver's own.
        pending: the run that goes on, of a trial that is not known well enough.
    """

    def __init__(self, search: OuterSearch[Any]) -> None:
        self.share, self.tol = search.accuracy, search.tol
        self.inner: float | None = None
        self.adjoint = ADJOINT
        self.most = math.inf
        self.last = (math.nan, math.nan, math.nan)
        self.held = (math.inf, math.nan, math.inf, 0)
        self.bend = 0.0
        self.sharpening, self.off = False, False
        self.looks, self.spent = 0, 0.0
        self.limit: int | None = None
        self.pending: Carry | None = None

    def wanted(self, decrease: float, value: float) -> tuple[float, float]:
        """Return how far a value may be off, and the adjoint tolerance, where a decrease is sought."""
        return self.share * decrease, min(ADJOINT, SLOPE * math.sqrt(decrease / max(abs(value), 1e-300)))

    def sought(self, state: SearchState) -> tuple[float, bool]:
        """Return the decrease that the trial to come is about, and whether it is about the end."""
        assert state.accepted is not None
        trial, left = state.trial, self.tol * abs(state.accepted.answer.value) / 3.0
        if trial is None or trial.kind == "probe" or not trial.predicted > 0:
            return left, True
        return max(trial.predicted * min(1.0, getattr(trial, "share", 1.0)), left), False

    def proposed(self, propose: Callable[[Any], Any], state: Any) -> Any:
        """Return what a search proposes, or its accepted point once more where that is not known well enough."""
        accepted = state.accepted
        if self.off or state.trial is not None or state.stopped:
            return propose(state)
        if accepted is None or state.shift is not None:
            self._begin(SCAN * abs(accepted.answer.value) if accepted is not None else math.nan, ADJOINT)
            return propose(state)
        # What would be next if the value were exact says how exact it has to be.
        following = propose(_with_error(state, 0.0))
        decrease, ends = self.sought(following)
        want, adjoint = self.wanted(decrease, accepted.answer.value)
        error, residual, held, looks = self.held
        short = self.error(error, residual) > want
        self.sharpening = self.looks < LOOKS and (short or (ends and (held > 1.01 * adjoint or looks < 2)))
        if not self.sharpening:
            self._begin(want, adjoint)
            following = _with_error(following, accepted.answer.error)
            return propose(replace(state, accepted=following.accepted)) if following.stopped else following
        self.looks += 1
        self.last = (accepted.answer.value, error, residual)
        self.adjoint = adjoint
        if residual > 0:
            self.inner = residual * min(self.factor(want, error, residual), STEP)
        return replace(state, trial=Trial(accepted.u, decrease, "again"))

    def error(self, first: float, residual: float) -> float:
        """Return how far a value is off, given how far it is to first order."""
        return first + self.bend * residual**2

    def factor(self, want: float, first: float, residual: float) -> float:
        """Return the factor of a residual at which a value would be known to half of what is wanted."""
        linear, second = first / (AIM * want), math.sqrt(self.bend * residual**2 / (AIM * want))
        return min(max(1.0 / max(linear, second, 1e-300), CUT), GROWTH)

    def _begin(self, want: float, adjoint: float) -> None:
        """Set the tolerances of a new trial, from what the last one has shown."""
        self.adjoint, self.pending, self.spent = adjoint, None, 0.0
        _, first, residual = self.last
        if residual > 0 and want > 0:
            self.inner = min(residual * self.factor(want, first, residual), self.most)

    def asked(
        self, solver: InnerSolver, estimator: HypergradEstimator, state: SearchState
    ) -> tuple[InnerSolver, HypergradEstimator]:
        """Return inner solver and estimator at the tolerances of the evaluation to come."""
        if self.off:
            return solver, estimator
        solver = replace(solver, tol=Relative(FIRST) if self.inner is None else self.inner)
        self.limit = None
        if state.shift is not None and len(state.scanned) > 2 and self.inner is not None:
            # A point of the scan that costs more ends it anyway.
            self.limit = max(1, int(EXPENSIVE * state.spent - self.spent) + 1)
            solver = replace(solver, steps=self.limit)
        return solver, estimator.at_tolerance(self.adjoint)

    def goes_on(self, state: SearchState, estimate: Estimate) -> bool:
        """Take an evaluation; returns whether its point is evaluated once more, by the same run."""
        self.spent += estimate.cost.gradient_equivalents
        if self.off:
            return False
        certificate = estimate.certificate
        if estimate.status is Status.INNER_NOT_CONVERGED and certificate.inner_steps != self.limit:
            self.off, self.pending = True, replace(estimate.carry, ongoing=True)
            return True
        if not self.usable(estimate) or certificate.value_error is None:
            return False
        first, residual = abs(certificate.value_error), certificate.inner_residual
        value, (before, _, larger) = estimate.outer_loss - certificate.value_error, self.last
        if (self.pending is not None or self.sharpening) and residual < larger:
            self.bend = abs(value - before) / (larger**2 - residual**2)
        self.last = (value, first, residual)
        self.most = residual if self.most == math.inf and residual > 0 else self.most
        if state.shift is not None or state.accepted is None:
            want = SCAN * abs(value)
        else:
            want, _ = self.wanted(self.sought(state)[0], state.accepted.answer.value)
        if residual == 0 or self.error(first, residual) <= want or self.looks >= LOOKS:
            return False
        self.looks += 1
        self.inner = residual * min(self.factor(want, first, residual), STEP)
        self.pending = replace(estimate.carry, ongoing=True)
        return True

    def usable(self, estimate: Estimate) -> bool:
        """Return whether an estimate is one but for its value, whose error is known."""
        return estimate.status.ok or (not self.off and only_the_value(estimate.verdict))

    def told(self, taken: bool) -> None:
        """Take whether the last evaluation is of the accepted point now."""
        self.pending = None
        if taken:
            self.held = (*self.last[1:], self.adjoint, 1 + self.looks)
        if not self.sharpening:
            self.looks = 0
        self.sharpening = False

    def saved(self) -> dict[str, Any]:
        """Return what changes, in plain containers and tensors."""
        pending = self.pending
        run = None if pending is None or pending.state is None else pending.state.to_dict()
        held = None if pending is None else {"state": run, "adjoint": pending.adjoint, "solver": pending.solver}
        return {name: getattr(self, name) for name in SAVED} | {"pending": held}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take back what `saved` returned."""
        for name in SAVED:
            setattr(self, name, saved[name])
        held = saved["pending"]
        if held is None:
            self.pending = None
            return
        state = None if held["state"] is None else InnerState.from_dict(held["state"])
        self.pending = Carry(state, held["adjoint"], held["solver"], ongoing=True)


def _with_error(state: Any, error: float) -> Any:
    """Return a state whose accepted value is known to `error`."""
    return replace(state, accepted=replace(state.accepted, answer=replace(state.accepted.answer, error=error)))
