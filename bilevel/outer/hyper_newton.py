"""`HyperNewton`: a trust region with Gauss-Newton and exact hyper-Hessians in shrinkage coordinates, as ask and tell.

The state is a value: `propose` says where the outer loss is wanted next, `tell` takes the answer. Nothing else is held,
so a state that is saved after any evaluation goes on to the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bilevel.core.options import is_positive, require
from bilevel.outer.shrinkage import Shrinkage
from bilevel.outer.trust_region import Vector, box_step

TOP, STEP, BOTTOM = 3.0, 4.0, -24.0
"""The scan: mean(u - c) of its first point, the distance of two, and the last."""
FELL = 1e-3
"""A point of the scan has fallen if it is lower by this share."""
GROWTH, SHRINK = 2.5, 0.3
"""Factors of the trust radius after a step that the model foresaw, and after one that it did not."""
TRIALS = 12
"""Rejected trials in a row after which values and gradients are said to disagree."""
GAUSS_NEWTON, EXACT = "Gauss-Newton", "exact"


@dataclass(frozen=True)
class Answer:
    """What an evaluation of the outer loss at proposed hyperparameters found.

    Attributes:
        value: the outer loss, corrected to second order where that is possible.
        gradient: by the hyperparameters, (k,).
        error: how far `value` may be off.
        second: the Gauss-Newton and the exact second derivatives, each (k, k).
    """

    value: float
    gradient: Vector
    error: float
    second: tuple[Vector, Vector]


@dataclass(frozen=True)
class Accepted:
    """The accepted point."""

    u: Vector
    answer: Answer
    repeated: bool = False


@dataclass(frozen=True)
class Trial:
    """A proposed point, with what the models predict of it."""

    u: Vector
    predicted: float
    length: float = 0.0
    decreases: tuple[float, float] = (0.0, 0.0)
    repeats: bool = False


@dataclass(frozen=True)
class NewtonState:
    """All that a run is between two evaluations.

    Attributes:
        phase: "scan", "first" or "step".
        base: relative log penalties, whose mean distance to the centre is zero.
        shift: of the next point of the scan.
        scanned: (value, shift) of the points of the scan that succeeded.
        flat: points of the scan in a row that did not fall.
        accepted: the point with the lowest value so far that derivatives are known of.
        trial: the point that is being evaluated; None before it is chosen.
        radius: of the trust region, in t.
        reach: how far u may fall in one step.
        exact: whether the exact model is in use, not Gauss-Newton.
        rejected: trials in a row without a lower value.
        predicted: decrease that the model saw at the end.
        evaluations: answers so far.
        stopped: how it ended, in words; empty while it goes on.
    """

    coordinates: Shrinkage
    phase: str
    base: Vector
    shift: float
    scanned: tuple[tuple[float, float], ...]
    flat: int
    u: Vector
    accepted: Accepted | None
    trial: Trial | None
    radius: float
    reach: float
    exact: bool
    rejected: int
    evaluations: int
    stopped: str = ""
    predicted: float = math.nan


@dataclass(frozen=True)
class HyperNewton:
    """Descend the outer loss by a trust region with its second derivatives, in shrinkage coordinates.

    A coarse scan along equal changes of all log penalties finds the valley; then every step minimises a model of the
    outer loss in t = shrinkage (see `Shrinkage`) within a ball and between limits. The model is Gauss-Newton's or the
    exact one, whichever foresaw the last values better. It ends where the decrease that both models still see is at
    most ``tol`` times the outer loss: at a local minimum.

    Args:
        tol: relative decrease of the outer loss that may be left at the end.
        start: "scan" or "given".
        limits: least and largest distance of a log penalty to the logarithm of its scale.
        radius: the first radius of the trust region, in t, for one hyperparameter.
    """

    tol: float = 1e-6
    start: str = "scan"
    limits: tuple[float, float] = (-28.0, 10.0)
    radius: float = 0.3

    def __post_init__(self) -> None:
        require(self, "tol", "a positive number", is_positive(self.tol))
        require(self, "start", "'scan' or 'given'", self.start in ("scan", "given"))
        require(self, "radius", "a positive number", is_positive(self.radius))

    def init(self, u: Vector, centre: Vector) -> NewtonState:
        """Return the state before the first evaluation.

        Args:
            u: log penalties to start from, (k,).
            centre: the logarithms of their scales, (k,).
        """
        coordinates = Shrinkage(centre, *self.limits)
        u = coordinates.clipped(u)
        return NewtonState(
            coordinates,
            phase="scan" if self.start == "scan" else "first",
            base=u - float(np.mean(u - centre)),
            shift=TOP,
            scanned=(),
            flat=0,
            u=u,
            accepted=None,
            trial=None,
            radius=self.radius * math.sqrt(min(len(u), 4)),
            reach=4.0,
            exact=False,
            rejected=0,
            evaluations=0,
        )

    def propose(self, state: NewtonState) -> NewtonState:
        """Return the state with its next trial, or with how it ended."""
        if state.stopped or state.trial is not None:
            return state
        if state.phase == "scan":
            return replace(state, trial=Trial(state.coordinates.clipped(state.base + state.shift), math.nan))
        if state.phase == "first":
            return replace(state, trial=Trial(state.u, math.nan))
        return self._stepped(state)

    def _stepped(self, state: NewtonState) -> NewtonState:
        """Return the state with the step that its model asks for, or with its end."""
        assert state.accepted is not None
        u, answer = state.accepted.u, state.accepted.answer
        at = state.coordinates
        slopes = at.slopes(u, answer.gradient)
        models = [at.model(u, answer.gradient, each, exact) for each, exact in zip(answer.second, (False, True))]
        lower, upper = at.room(u, state.reach)
        left, noise = self.tol * abs(answer.value), 3.0 * answer.error
        step, predicted = box_step(slopes, models[state.exact], state.radius, lower, upper)
        if predicted <= max(left, noise):
            # Gauss-Newton sees no saddle, and the exact model no valley that bends: the other one has a word, too.
            other, seen = box_step(slopes, models[not state.exact], state.radius, lower, upper)
            if seen > max(left, noise):
                step, predicted, state = other, seen, replace(state, exact=not state.exact)
        if predicted <= max(left, noise):
            return self._ended(state, predicted, left, noise)
        if answer.error > 0.3 * predicted and not state.accepted.repeated:
            return replace(state, trial=Trial(u, predicted, repeats=True))
        decreases = tuple(-float(slopes @ step + 0.5 * (step @ (model @ step))) for model in models)
        length = math.sqrt(step @ step)
        return replace(state, trial=Trial(at.u(at.t(u) + step), predicted, length, decreases))  # type: ignore[arg-type]

    def _ended(self, state: NewtonState, predicted: float, left: float, noise: float) -> NewtonState:
        assert state.accepted is not None
        value = state.accepted.answer.value
        if noise <= left:
            stopped = f"converged to a local minimum: about {predicted:.1e} of {value:.6g} may be left"
        else:
            stopped = (
                f"at the accuracy of the inner solver: {predicted:.1e} predicted, values known to {noise / 3:.1e}: "
                "lower the inner tolerance"
            )
        return replace(state, stopped=stopped, predicted=predicted)

    def tell(self, state: NewtonState, answer: Answer | None) -> NewtonState:
        """Return the state after the evaluation of its trial; None for one that failed."""
        assert state.trial is not None
        trial = state.trial
        state = replace(state, evaluations=state.evaluations + 1, trial=None)
        if answer is not None and not math.isfinite(answer.value):
            answer = None
        if state.phase == "scan":
            return self._scanned(state, trial, answer)
        if state.phase == "first":
            return self._begun(state, trial, answer)
        assert state.accepted is not None
        if trial.repeats:
            again = state.accepted.answer if answer is None else answer
            return replace(state, accepted=Accepted(trial.u, again, repeated=True))
        return self._judged(state, trial, answer)

    def _scanned(self, state: NewtonState, trial: Trial, answer: Answer | None) -> NewtonState:
        fell = answer is not None and all(answer.value < value * (1 - FELL) for value, _ in state.scanned)
        scanned, accepted = state.scanned, state.accepted
        if answer is not None:
            scanned = (*scanned, (answer.value, state.shift))
            if accepted is None or answer.value < accepted.answer.value:
                accepted = Accepted(trial.u, answer)
        flat = 0 if fell else state.flat + (len(scanned) > 2)
        state = replace(state, scanned=scanned, accepted=accepted, flat=flat, shift=state.shift - STEP)
        if flat < 2 and state.shift >= BOTTOM:
            return state
        if accepted is None:
            return replace(state, stopped="every point of the scan failed")
        return replace(state, phase="step", u=accepted.u)

    def _begun(self, state: NewtonState, trial: Trial, answer: Answer | None) -> NewtonState:
        if answer is None:
            return replace(state, stopped="the first hypergradient failed")
        return replace(state, phase="step", accepted=Accepted(trial.u, answer))

    def _judged(self, state: NewtonState, trial: Trial, answer: Answer | None) -> NewtonState:
        """Accept or reject a step, and set the region and the model for the next."""
        accepted = state.accepted
        assert accepted is not None
        radius, reach, exact = state.radius, state.reach, state.exact
        if answer is None:
            actual = -math.inf
            radius, reach = SHRINK * trial.length, SHRINK * reach
        else:
            actual = accepted.answer.value - answer.value
            missed = [abs(actual - each) / max(abs(actual), trial.predicted) for each in trial.decreases]
            if missed[exact] > 0.1 and missed[not exact] < 0.7 * missed[exact]:
                exact = not exact
            ratio, far = actual / trial.predicted, float(np.max(accepted.u - trial.u, initial=0.0))
            if ratio < 0.1:
                radius, reach = SHRINK * trial.length, SHRINK * min(reach, max(far, 1e-3))
            elif ratio > 0.7:
                if trial.length > 0.8 * radius:
                    radius = min(GROWTH * radius, math.sqrt(len(trial.u)))
                if far > 0.8 * reach:
                    reach = min(GROWTH * reach, 30.0)
        if actual > 0:
            assert answer is not None
            accepted = Accepted(trial.u, answer)
        rejected = 0 if actual > 0 else state.rejected + 1
        stopped = "values contradict the gradient" if radius < 1e-9 or rejected >= TRIALS else ""
        return replace(
            state, accepted=accepted, radius=radius, reach=reach, exact=exact, rejected=rejected, stopped=stopped
        )
