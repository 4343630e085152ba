"""`HyperNewton`: a trust region with Gauss-Newton and exact hyper-Hessians in shrinkage coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from bilevel.core.options import is_positive, require
from bilevel.outer.coordinates import Coordinates
from bilevel.outer.search import FAILS, Accepted, Answer, OuterSearch, SearchState, Trial, contradicted
from bilevel.outer.trust_region import Vector, box_step

GROWTH, SHRINK = 2.5, 0.3
"""Factors of the trust radius after a step that the model foresaw, and after one that it did not."""
REACH, FARTHEST = 4.0, 30.0
"""How far a log penalty may fall in the first step, and ever."""
SMALLEST, PACE = 1e-9, 0.1
"""Least radius, below which values and gradients are said to disagree; largest move of a variable in a probe."""
TRIALS = 12
"""Rejected trials in a row after which values and gradients are said to disagree."""
KNOWN = 0.3
"""Share of a predicted decrease up to which the accepted value has to be known."""
SURE = 3.0
"""What the models foresee at the end is this much below what may be left: they see it to a factor of about two."""
REPEATS = 4
"""Evaluations of one point in a row, each with a smaller inner residual."""
PROBE = 10.0
"""A probe at the end is to raise the outer loss by this multiple of what may be left."""
FORESEEN = 0.5
"""Share of its effect by which a probe may differ from what the model foresees."""
DOUBTS = 4
"""Probes that differ by more, each a tenth as high as the last, after which values and gradients are said to disagree:
what a right model does not foresee shrinks with the probe, and what a wrong gradient adds does not."""


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
        probed: whether a probe around the accepted point was as foreseen.
    """

    radius: float = 0.3
    reach: float = REACH
    exact: bool = False
    probed: bool = False


@dataclass(frozen=True)
class HyperNewton(OuterSearch[NewtonState]):
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
        if state.rejected >= TRIALS or state.radius < SMALLEST or state.doubts >= DOUBTS:
            if state.failed:
                return replace(state, stopped=FAILS)
            return replace(state, trial=NewtonTrial(u, kind="again"))
        slopes, models = self._models(state, accepted)
        lower, upper = at.room(u, state.reach)
        left, noise = self.tol * abs(answer.value) / SURE, 3.0 * answer.error
        s, predicted = box_step(slopes, models[state.exact], state.radius, lower, upper)
        if predicted <= max(left, noise):
            # Gauss-Newton's model sees no saddle: the other one has a word, too.
            other, seen = box_step(slopes, models[not state.exact], state.radius, lower, upper)
            if seen <= max(left, noise):
                return self._last(state, accepted, max(predicted, seen), left, noise)
            s, predicted, state = other, seen, replace(state, exact=not state.exact)
        if answer.error > KNOWN * predicted and accepted.repeated < REPEATS:
            return replace(state, trial=NewtonTrial(u, predicted, "again"))
        decreases = tuple(-float(slopes @ s + 0.5 * (s @ (model @ s))) for model in models)
        return replace(state, trial=NewtonTrial(at.back(at.of(u) + s), predicted, "step", math.sqrt(s @ s), decreases))

    def _models(self, state: NewtonState, accepted: Accepted) -> tuple[Vector, list[Vector]]:
        """Return the slopes, and the Gauss-Newton and the exact second derivatives, in the coordinates."""
        u, answer, at = accepted.u, accepted.answer, state.coordinates
        assert answer.second is not None
        pairs = zip(answer.second, (False, True), strict=True)
        return answer.gradient / at.slope(u), [at.model(u, answer.gradient, second, exact) for second, exact in pairs]

    def _last(self, state: NewtonState, accepted: Accepted, predicted: float, left: float, noise: float) -> NewtonState:
        """Return the end where no step is worth it, or the probe that the end rests on."""
        value, state = accepted.answer.value, replace(state, predicted=predicted)
        if noise > left:
            if accepted.repeated < REPEATS:
                return replace(state, trial=NewtonTrial(accepted.u, left, "again"))
            stopped = (
                f"at the accuracy of the inner solver: {predicted:.1e} of {value:.6g} may be left, values are known to "
                f"{noise:.1e}: lower the inner tolerance"
            )
            return replace(state, stopped=stopped)
        probe = None if state.probed else self._probe(state, accepted, PROBE * SURE * left / 10**state.doubts)
        if probe is not None:
            return replace(state, trial=probe)
        stopped = f"converged to a local minimum: about {predicted:.1e} of {value:.6g} may be left"
        return replace(state, stopped=stopped)

    def _probe(self, state: NewtonState, accepted: Accepted, rise: float) -> NewtonTrial | None:
        """Return a step in all variables at once by which the exact model rises by `rise`; None where none does.

        What has no effect, or the wrong one, on the values shows in such a step: a variable at a limit is moved off it.
        """
        u, at = accepted.u, state.coordinates
        slopes, (_, model) = self._models(state, accepted)
        lower, upper = at.room(u)
        signs = np.random.default_rng(len(u) + state.doubts).choice((-1.0, 1.0), len(u))
        signs = np.where(-lower < PACE, 1.0, np.where(upper < PACE, -1.0, signs))
        share, curved = rise / len(u), np.maximum(np.diag(model), 0.0)
        # Each variable alone would raise the model by its share: |g| d + B d^2 / 2.
        steep = np.abs(slopes)
        alone = 2.0 * share / (steep + np.sqrt(steep**2 + 2.0 * curved * share) + 1e-300)
        d = np.clip(signs * np.minimum(alone, PACE), lower, upper)
        a, b = 0.5 * float(d @ (model @ d)), float(slopes @ d)
        root = b * b + 4.0 * a * rise
        if root > 0 and b + math.sqrt(root) > 0:
            d = np.clip(d * min(2.0 * rise / (b + math.sqrt(root)), PACE / np.abs(d).max()), lower, upper)
        if not d.any():
            return None
        back = at.back(at.of(u) + d)
        return NewtonTrial(back, -float(slopes @ d + 0.5 * (d @ (model @ d))), "probe", math.sqrt(d @ d))

    def judge(self, state: NewtonState, accepted: Accepted, trial: NewtonTrial, answer: Answer | None) -> NewtonState:
        """Accept or reject a step, and set the region and the model for the next."""
        if trial.kind == "probe":
            return self._probed(state, accepted, trial, answer)
        if trial.kind == "again":
            if math.isnan(trial.predicted):
                return contradicted(state, accepted, answer, self.tol)
            # What gets no better by one more evaluation is known as well as it will be.
            better = answer is not None and answer.error < 0.7 * accepted.answer.error
            repeated = accepted.repeated + 1 if better else REPEATS
            return replace(state, accepted=replace(accepted, answer=answer or accepted.answer, repeated=repeated))
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
                if trial.length > 0.8 * radius:
                    radius = min(GROWTH * radius, state.coordinates.widest * math.sqrt(len(trial.u)))
                reach = min(GROWTH * reach, FARTHEST) if far > 0.8 * reach else reach
            if actual > 0:
                accepted = Accepted(trial.u, answer)
        rejected = 0 if actual > 0 else state.rejected + 1
        return replace(state, accepted=accepted, radius=radius, reach=reach, exact=exact, rejected=rejected)

    def _probed(self, state: NewtonState, accepted: Accepted, trial: NewtonTrial, answer: Answer | None) -> NewtonState:
        """Compare a probe with what the exact model foresaw of the value and of the slopes."""
        doubted = replace(state, doubts=state.doubts + 1)
        if answer is None:
            return doubted
        at, rise = state.coordinates, answer.value - accepted.answer.value
        if rise < 0:
            return replace(doubted, accepted=Accepted(trial.u, answer), rejected=0)
        d = at.of(trial.u) - at.of(accepted.u)
        slopes, (_, model) = self._models(state, accepted)
        change, foreseen = answer.gradient / at.slope(trial.u) - slopes, model @ d
        noise = 3.0 * (answer.error + accepted.answer.error)
        # One variable whose slope has the wrong sign shows as twice its share of the rise.
        agrees = abs(rise + trial.predicted) <= min(FORESEEN, 1.5 / len(d)) * abs(trial.predicted) + noise
        parts = np.abs(foreseen * d)
        agrees &= bool(np.all(np.abs((change - foreseen) * d) <= FORESEEN * np.maximum(parts, parts.mean()) + noise))
        return replace(state, probed=True) if agrees else doubted
