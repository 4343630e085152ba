"""`HyperNewton`: a trust region with Gauss-Newton and exact hyper-Hessians in shrinkage coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bilevel.core.options import is_positive, require
from bilevel.outer.coordinates import Coordinates
from bilevel.outer.search import TOP, Accepted, Answer, OuterSearch, SearchState, Trial, ended
from bilevel.outer.trust_region import Vector, box_step

GROWTH, SHRINK = 2.5, 0.3
"""Factors of the trust radius after a step that the model foresaw, and after one that it did not."""
REACH, FARTHEST = 4.0, 30.0
"""How far a log penalty may fall in the first step, and ever."""
TRIALS = 12
"""Rejected trials in a row after which values and gradients are said to disagree."""
KNOWN = 0.3
"""Share of a predicted decrease up to which the accepted value has to be known."""


@dataclass(frozen=True)
class NewtonTrial(Trial):
    """A step of the trust region: its length, and the decrease that the Gauss-Newton and the exact model predict."""

    length: float = 0.0
    decreases: tuple[float, ...] = ()


@dataclass(frozen=True)
class NewtonState(SearchState):
    """The state of `HyperNewton`.

    Attributes:
        radius: of the trust region, in t.
        reach: how far u may fall in one step.
        exact: whether the exact model is in use, not Gauss-Newton's.
    """

    radius: float = 0.3
    reach: float = REACH
    exact: bool = False


@dataclass(frozen=True)
class HyperNewton(OuterSearch):
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

    def init(self, u: Vector, coordinates: Coordinates) -> NewtonState:
        shift = TOP if self.start == "scan" else None
        radius = self.radius * math.sqrt(min(len(u), 4))
        return NewtonState(coordinates, coordinates.clipped(u), shift, radius=radius)

    def step(self, state: NewtonState, accepted: Accepted) -> NewtonState:
        u, answer, at = accepted.u, accepted.answer, state.coordinates
        assert answer.second is not None
        slopes = answer.gradient / at.slope(u)
        models = [at.model(u, answer.gradient, each, exact) for exact, each in enumerate(answer.second)]
        lower, upper = at.room(u, state.reach)
        left, noise = self.tol * abs(answer.value), 3.0 * answer.error
        s, predicted = box_step(slopes, models[state.exact], state.radius, lower, upper)
        if predicted <= max(left, noise):
            # Gauss-Newton's model sees no saddle: the other one has a word, too.
            other, seen = box_step(slopes, models[not state.exact], state.radius, lower, upper)
            if seen <= max(left, noise):
                return ended(state, answer.value, max(predicted, seen), left, noise)
            s, predicted, state = other, seen, replace(state, exact=not state.exact)
        if answer.error > KNOWN * predicted and not accepted.repeated:
            return replace(state, trial=NewtonTrial(u, predicted, repeats=True))
        decreases = tuple(-float(slopes @ s + 0.5 * (s @ (model @ s))) for model in models)
        return replace(state, trial=NewtonTrial(at.back(at.of(u) + s), predicted, False, math.sqrt(s @ s), decreases))

    def judge(self, state: NewtonState, accepted: Accepted, trial: NewtonTrial, answer: Answer | None) -> NewtonState:
        """Accept or reject a step, and set the region and the model for the next."""
        radius, reach, exact, actual = state.radius, state.reach, state.exact, -math.inf
        if answer is None:
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
                radius = min(GROWTH * radius, math.sqrt(len(trial.u))) if trial.length > 0.8 * radius else radius
                reach = min(GROWTH * reach, FARTHEST) if far > 0.8 * reach else reach
            if actual > 0:
                accepted = Accepted(trial.u, answer)
        rejected = 0 if actual > 0 else state.rejected + 1
        stopped = "values contradict the gradient" if radius < 1e-9 or rejected >= TRIALS else ""
        return replace(
            state, accepted=accepted, radius=radius, reach=reach, exact=exact, rejected=rejected, stopped=stopped
        )
