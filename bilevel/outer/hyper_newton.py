"""`HyperNewton`: a trust region with Gauss-Newton and exact hyper-Hessians in shrinkage coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bilevel.core.options import is_positive, require
from bilevel.outer.coordinates import Coordinates
from bilevel.outer.ends import DOUBTS, REPEATS, EndingSearch
from bilevel.outer.search import Accepted, Answer, SearchState, Trial
from bilevel.outer.trust_region import Vector

GROWTH, SHRINK = 2.5, 0.3
"""Factors of the trust radius after a step that the model foresaw, and after one that it did not."""
REACH, FARTHEST = 4.0, 30.0
"""How far a log penalty may fall in the first step, and ever."""
LONG = 0.5
"""A rejected step by which no log penalty falls by more leaves the reach: a short one would hide what is left."""
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
    """The state of `HyperNewton`: the radius of its region in t, how far u may fall in one step, and which model."""

    radius: float = 0.3
    reach: float = REACH
    exact: bool = False


@dataclass(frozen=True)
class HyperNewton(EndingSearch[NewtonState]):
    """Descend the outer loss by a trust region with its second derivatives, in shrinkage coordinates.

    A coarse scan along equal changes of all log penalties finds the valley; then every step minimises a model of the
    outer loss in t = shrinkage (see `Shrinkage`) within a ball and between limits. The model is Gauss-Newton's or the
    exact one, whichever foresaw the last values better. It ends where the decrease that both models still see is at
    most ``tol`` times the outer loss: at a local minimum.

    Args:
        tol: relative decrease of the outer loss that may be left at the end.
        start: "scan" (the default for log penalties) or "given" (for all else).
        limits: least and largest distance of a log penalty to the logarithm of its scale; None: (-28, 10), and
            (-12, 10) in float32.
        radius: the first radius of the trust region for one hyperparameter; None: 0.3 in t, and 2 where they are no
            log penalties.
    """

    radius: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "radius", "a positive number or None", self.radius is None or is_positive(self.radius))

    def init(self, u: Vector, coordinates: Coordinates) -> NewtonState:
        radius = (self.radius or coordinates.radius) * math.sqrt(min(len(u), 4))
        return NewtonState(coordinates, coordinates.clipped(u), self.shift, radius=radius)

    def step(self, state: NewtonState, accepted: Accepted) -> NewtonState:
        u, answer, at = accepted.u, accepted.answer, state.coordinates
        if answer.second is None:
            return state
        if not answer.second:
            stopped = "HyperNewton has no second derivatives here (no adjoint, or no Cholesky factor): use HyperLBFGS"
            return replace(state, stopped=stopped)
        if state.rejected >= TRIALS or state.doubts >= DOUBTS:
            return self.disagreed(state, accepted)
        s, predicted, exact, decreases = self.foreseen(state, accepted, state.radius, state.reach, state.exact)
        if predicted <= max(self.bounds(answer)):
            return self.last(state, accepted, predicted)
        if answer.error > KNOWN * predicted and accepted.repeated < REPEATS:
            return replace(state, exact=exact, trial=Trial(u, predicted, "again"))
        u = at.back(at.of(u) + s)
        return replace(state, exact=exact, trial=NewtonTrial(u, predicted, "step", math.sqrt(s @ s), decreases(s)))

    def judge(self, state: NewtonState, accepted: Accepted, trial: Trial, answer: Answer | None) -> NewtonState:
        """Accept or reject a step, and set the region and the model for the next."""
        if not isinstance(trial, NewtonTrial):
            return self.settled(state, accepted, trial, answer)
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
                radius, reach = SHRINK * trial.length, SHRINK * min(reach, far) if far > LONG else reach
            elif ratio > 0.7:
                if trial.length > 0.8 * radius:
                    radius = min(GROWTH * radius, state.coordinates.widest * math.sqrt(len(trial.u)))
                reach = min(GROWTH * reach, FARTHEST) if far > 0.8 * reach else reach
            if actual > 0:
                accepted = Accepted(trial.u, answer)
        rejected = 0 if actual > 0 else state.rejected + 1
        return replace(state, accepted=accepted, radius=radius, reach=reach, exact=exact, rejected=rejected)
