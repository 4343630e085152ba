"""The end of an outer search: second-order models that foresee no further step, and a probe that agrees with them.

A model that is wrong foresees nothing, too. So before a search says that it has converged, it looks at a point nearby,
where the model says that the outer loss is higher by a known amount, and compares value and slopes.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from bilevel.outer.search import FAILS, Accepted, Answer, OuterSearch, State, Trial, contradicted
from bilevel.outer.trust_region import Vector, box_step

SURE = 3.0
"""What the models foresee at the end is this much below what may be left: they see it to a factor of about two."""
REPEATS = 4
"""Evaluations of one point in a row, each with a smaller inner residual."""
PACE = 0.1
"""Largest move of a variable in a probe."""
PROBE = 10.0
"""A probe at the end is to raise the outer loss by this multiple of what may be left."""
FORESEEN = 0.5
"""Share of its effect by which a probe may differ from what the model foresees."""
MEAN = 0.05
"""The same for the mean of the slopes at both ends of a probe, where there is no model."""
DOUBTS = 4
"""Probes that differ by more, each a tenth as high as the last, after which values and gradients are said to disagree:
what a right model does not foresee shrinks with the probe, and what a wrong gradient adds does not."""


@dataclass(frozen=True)
class EndingSearch(OuterSearch[State], ABC):
    """A search that proves its end by second derivatives, where there are some."""

    def models(self, state: State, accepted: Accepted) -> tuple[Vector, tuple[Vector, ...]]:
        """Return the slopes, and the Gauss-Newton and the exact second derivatives, in the coordinates."""
        answer = accepted.answer
        assert answer.second
        return state.coordinates.models(accepted.u, answer.gradient, answer.second)

    def foreseen(
        self, state: State, accepted: Accepted, radius: float, reach: float, exact: bool
    ) -> tuple[Vector, float, bool, Callable[[Vector], tuple[float, ...]]]:
        """Return the best step of a model, the decrease that it predicts, whether it is the exact one, and both models.

        Where the model that is asked sees no step, the other one has a word, too: Gauss-Newton's sees no saddle.
        """
        slopes, models = self.models(state, accepted)
        lower, upper = state.coordinates.room(accepted.u, reach)
        s, predicted = box_step(slopes, models[exact], radius, lower, upper)
        if predicted <= max(self.bounds(accepted.answer)):
            other, seen = box_step(slopes, models[not exact], radius, lower, upper)
            if seen > predicted:
                s, predicted, exact = other, seen, not exact
        return s, predicted, exact, lambda s: tuple(-float(slopes @ s + 0.5 * (s @ (m @ s))) for m in models)

    def bounds(self, answer: Answer) -> tuple[float, float]:
        """Return the decrease that may be left as the models see it, and how far values may be off."""
        return self.tol * abs(answer.value) / SURE, 3.0 * answer.error

    def disagreed(self, state: State, accepted: Accepted) -> State:
        """Return the last trial where values and gradients disagree: the accepted point once more."""
        if state.failed:
            return replace(state, stopped=FAILS)
        return replace(state, trial=Trial(accepted.u, kind="again"))

    def last(self, state: State, accepted: Accepted, predicted: float) -> State:
        """Return the end where no step is worth it, or what is to be evaluated before."""
        value, (left, noise) = accepted.answer.value, self.bounds(accepted.answer)
        state = replace(state, predicted=predicted)
        if noise > left:
            if accepted.repeated < REPEATS:
                return replace(state, trial=Trial(accepted.u, left, "again"))
            stopped = (
                f"at the accuracy of the inner solver: {predicted:.1e} of {value:.6g} may be left, values are known to "
                f"{noise:.1e}: lower the inner tolerance"
            )
            return replace(state, stopped=stopped)
        if not state.probed:
            slopes, (_, model) = self.models(state, accepted)
            probe = self.probe(state, accepted, slopes, np.diag(model), lambda d: model @ d)
            if probe is not None:
                return replace(state, trial=probe)
        return replace(state, stopped=_converged(predicted, value))

    def probe(
        self, state: State, accepted: Accepted, slopes: Vector, diagonal: Vector, product: Callable[[Vector], Vector]
    ) -> Trial | None:
        """Return a step in all variables at once by which a model rises by what shows; None where none does.

        What has no effect, or the wrong one, on the values shows in such a step: a variable at a limit is moved off it.
        The model has slopes, a diagonal of second derivatives and their product with a vector.
        """
        u, at = accepted.u, state.coordinates
        rise = PROBE * self.tol * abs(accepted.answer.value) / 10**state.doubts
        lower, upper = at.room(u)
        signs = np.random.default_rng(len(u) + state.doubts).choice((-1.0, 1.0), len(u))
        signs = np.where(-lower < PACE, 1.0, np.where(upper < PACE, -1.0, signs))
        share, curved = rise / len(u), np.maximum(diagonal, 0.0)
        # Each variable alone would raise the model by its share: |g| d + B d^2 / 2.
        steep = np.abs(slopes)
        alone = 2.0 * share / (steep + np.sqrt(steep**2 + 2.0 * curved * share) + 1e-300)
        d = np.clip(signs * np.minimum(alone, PACE), lower, upper)
        a, b = 0.5 * float(d @ product(d)), float(slopes @ d)
        root = b * b + 4.0 * a * rise
        if root > 0 and b + math.sqrt(root) > 0:
            d = np.clip(d * min(2.0 * rise / (b + math.sqrt(root)), PACE / np.abs(d).max()), lower, upper)
        if not d.any():
            return None
        return Trial(at.back(at.of(u) + d), -float(slopes @ d + 0.5 * (d @ product(d))), "probe")

    def settled(self, state: State, accepted: Accepted, trial: Trial, answer: Answer | None) -> State:
        """Return the state after a trial that was no step: the accepted point once more, or a probe."""
        if trial.kind == "probe":
            return self._probed(state, accepted, trial, answer)
        if math.isnan(trial.predicted):
            return contradicted(state, accepted, answer, self.tol)
        # What gets no better by one more evaluation is known as well as it will be.
        better = answer is not None and answer.error < 0.7 * accepted.answer.error
        repeated = accepted.repeated + 1 if better else REPEATS
        return replace(state, accepted=replace(accepted, answer=answer or accepted.answer, repeated=repeated))

    def _probed(self, state: State, accepted: Accepted, trial: Trial, answer: Answer | None) -> State:
        """Return the state after a probe: whether it was as the exact model foresaw, its value and its slopes.

        Without a model, the value is compared with the mean of the slopes at both ends, which is right to third order.
        """
        doubted = replace(state, doubts=state.doubts + 1)
        if answer is None:
            return doubted
        at, rise = state.coordinates, answer.value - accepted.answer.value
        if rise < 0:
            return replace(doubted, accepted=Accepted(trial.u, answer), rejected=0)
        d = at.of(trial.u) - at.of(accepted.u)
        before, after = accepted.answer.gradient / at.slope(accepted.u), answer.gradient / at.slope(trial.u)
        noise = 3.0 * (answer.error + accepted.answer.error)
        # One variable whose slope has the wrong sign shows as twice its share of the rise.
        share = min(FORESEEN, 1.5 / len(d))
        if not accepted.answer.second:
            expected = 0.5 * float((before + after) @ d)
            agrees = abs(rise - expected) <= MEAN * abs(expected) + noise
            return replace(state, probed=True) if agrees else doubted
        _, (_, model) = self.models(state, accepted)
        foreseen = model @ d
        agrees = abs(rise + trial.predicted) <= share * abs(trial.predicted) + noise
        parts = np.abs(foreseen * d)
        missed = np.abs((after - before - foreseen) * d)
        agrees &= bool(np.all(missed <= FORESEEN * np.maximum(parts, parts.mean()) + noise))
        # No step was foreseen from here, and nothing has moved since.
        stopped = _converged(state.predicted, accepted.answer.value)
        return replace(state, probed=True, stopped=stopped) if agrees else doubted


def _converged(predicted: float, value: float) -> str:
    return f"converged to a local minimum: about {predicted:.1e} of {value:.6g} may be left"
