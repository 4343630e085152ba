"""`HyperLBFGS`: projected limited-memory BFGS between limits, for outer losses without second derivatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bilevel.core.options import is_int, require
from bilevel.outer.coordinates import Coordinates, Shrinkage, Softplus
from bilevel.outer.ends import DOUBTS, EndingSearch
from bilevel.outer.search import Accepted, Answer, SearchState, Trial
from bilevel.outer.trust_region import EDGE, Vector

ARMIJO = 1e-4
"""Share of the slope's decrease that a trial has to keep."""
CURVED = 1e-12
"""Pairs with ``s'y`` below this share of ``|s| |y|`` on the free variables are left out."""
REACH = 4.0
"""How far a log penalty may fall by a step of second order."""
SHORTEST = 1e-10
"""A search ends where a trial would move hyperparameters by less than this."""


@dataclass(frozen=True)
class SearchTrial(Trial):
    """A trial of the search along a direction d: v + share d."""

    direction: Vector | None = None
    share: float = 1.0


@dataclass(frozen=True)
class LBFGSState(SearchState):
    """The state of `HyperLBFGS`: `pairs` are the last changes of v and of the slopes by v, each (k,).

    `search` is the last trial of a search that goes on, with its share cut; None where a new one begins. `restarted`:
    the pairs were dropped before the end, of an outer loss with kinks.
    """

    pairs: tuple[tuple[Vector, Vector], ...] = ()
    search: SearchTrial | None = None
    restarted: bool = False


@dataclass(frozen=True)
class HyperLBFGS(EndingSearch[LBFGSState]):
    """Descend the outer loss by projected L-BFGS between limits.

    Log penalties move in shrinkage (`Shrinkage`) where the inner loss is quadratic: so is the outer loss there, about.
    Elsewhere their best values may lie far out at the weak end, and they move in `Softplus`.
    It needs values and hypergradients alone. The free variables are those that are not at a limit with the slope
    pointing out; pairs without curvature on them are left out, so a step takes one evaluation as a rule. First-order
    figures cannot prove that nothing is left: where there are second derivatives, it ends where those foresee nothing
    either, and goes on along their step where they do. Elsewhere the end says what the last pairs foresee.

    Args:
        tol: relative decrease of the outer loss that may be left at the end.
        start: "scan" (the default for log penalties) or "given" (for all else).
        limits: least and largest distance of a log penalty to the logarithm of its scale; None: (-28, 10), and
            (-12, 10) in float32.
        memory: pairs that are held.
    """

    memory: int = 20

    accuracy = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "memory", "a positive int", is_int(self.memory))

    def coordinates(self, quadratic: bool) -> type[Coordinates]:
        return Shrinkage if quadratic else Softplus

    def init(self, u: Vector, coordinates: Coordinates) -> LBFGSState:
        return LBFGSState(coordinates, coordinates.clipped(u), self.shift)

    def step(self, state: LBFGSState, accepted: Accepted) -> LBFGSState:
        u, answer, at = accepted.u, accepted.answer, state.coordinates
        g = answer.gradient / at.slope(u)
        lower, upper = at.room(u)
        if state.doubts >= DOUBTS:
            return self.disagreed(state, accepted)
        if state.search is None:
            near = EDGE * np.minimum(upper - lower, 1.0)
            free = ~(((lower >= -near) & (g > 0)) | ((upper <= near) & (g < 0)))
            d = two_loop(g, free, state.pairs)
            if not state.pairs and (largest := float(np.abs(d).max(initial=0.0))) > 0:
                d = d * (at.radius / largest)
            predicted = 0.0 - 0.5 * float(g @ d)
            if predicted <= max(self.tol * abs(answer.value), 3.0 * answer.error):
                return self._last(state, accepted, g, predicted)
            state = replace(state, search=SearchTrial(u, predicted, "step", d))
        return self._moved(state, accepted)

    def _moved(self, state: LBFGSState, accepted: Accepted) -> LBFGSState:
        """Return the state with the next trial of its search along a direction."""
        u, at = accepted.u, state.coordinates
        lower, upper = at.room(u)
        search = state.search
        assert search is not None
        assert search.direction is not None
        moved = np.clip(search.share * search.direction, lower, upper)
        return replace(state, trial=replace(search, u=at.back(at.of(u) + moved)))

    def judge(self, state: LBFGSState, accepted: Accepted, trial: Trial, answer: Answer | None) -> LBFGSState:
        if not isinstance(trial, SearchTrial):
            return self.settled(state, accepted, trial, answer)
        at, before = state.coordinates, accepted.answer
        moved = at.of(trial.u) - at.of(accepted.u)
        g = before.gradient / at.slope(accepted.u)
        if answer is not None:
            after = answer.gradient / at.slope(trial.u)
            pairs = (*state.pairs, (moved, after - g))[-self.memory :]
            if answer.value <= before.value + ARMIJO * min(0.0, float(g @ moved)):
                return replace(state, accepted=Accepted(trial.u, answer), pairs=pairs, search=None, rejected=0)
            cut = cubic(before.value, float(g @ moved), answer.value, float(after @ moved))
        else:
            cut = 0.3
        share = trial.share * min(max(cut, 0.1), 0.5)
        state = replace(state, rejected=state.rejected + 1, search=replace(trial, share=share))
        assert trial.direction is not None
        if share * float(np.abs(trial.direction / at.slope(accepted.u)).max()) > SHORTEST and state.rejected < 12:
            return state
        if state.pairs:
            return replace(state, pairs=(), search=None, rejected=0)
        return self.disagreed(state, accepted)

    def _last(self, state: LBFGSState, accepted: Accepted, slopes: Vector, predicted: float) -> LBFGSState:
        """Return the end, once second derivatives foresee no step either; where they do, a search along it."""
        answer, at = accepted.answer, state.coordinates
        if answer.second is None:
            return state
        if answer.second:
            radius = at.radius * math.sqrt(min(len(slopes), 4))
            s, predicted, *_ = self.foreseen(state, accepted, radius, REACH, False)
            if predicted <= max(self.bounds(answer)):
                return self.last(state, accepted, predicted)
            return self._moved(replace(state, search=SearchTrial(accepted.u, predicted, "step", s)), accepted)
        state = replace(state, predicted=predicted)
        left, noise = self.bounds(answer)
        if noise <= left and not state.probed:
            s, y = state.pairs[-1] if state.pairs else (slopes, slopes)
            curved = math.sqrt(float(y @ y) / max(float(s @ s), 1e-300))
            probe = self.probe(state, accepted, slopes, np.full_like(slopes, curved), lambda d: curved * d)
            if probe is not None:
                return replace(state, trial=probe)
        if state.kinks:
            if state.pairs and not state.restarted:
                # A pair that spans a kink holds no curvature: the slope has the last word.
                return self.step(replace(state, pairs=(), restarted=True), accepted)
            stopped = "no further step is foreseen; the outer loss has kinks, and no bound of what may be left is known"
            return replace(state, stopped=stopped)
        why = (
            "first-order figures cannot prove that no more is" if noise <= left else f"values are known to {noise:.1e}"
        )
        stopped = f"no further step is foreseen: about {predicted:.1e} of {answer.value:.6g} may be left; {why}"
        return replace(state, stopped=stopped)


def cubic(f0: float, d0: float, f1: float, d1: float) -> float:
    """Return the minimiser in (0, 1) of the cubic with these values and slopes at 0 and 1; NaN-free, 0.5 if none.

    >>> cubic(0.0, -1.0, 1.0, 3.0)
    0.25
    """
    a = d0 + d1 - 3.0 * (f1 - f0)
    root = a * a - d0 * d1
    if not root >= 0:
        return 0.5
    root = math.sqrt(root)
    bottom = d1 - d0 + 2.0 * root
    return 1.0 - (d1 + root - a) / bottom if bottom != 0 else 0.5


def two_loop(g: Vector, free: NDArray[np.bool_], pairs: tuple[tuple[Vector, Vector], ...]) -> Vector:
    """Return L-BFGS's ``-B^-1 g`` on free variables, zero on others; pairs are (of v, of slopes), oldest first."""
    q = np.where(free, g, 0.0)
    used = []
    for s, y in reversed(pairs):
        s, y = np.where(free, s, 0.0), np.where(free, y, 0.0)
        product = float(s @ y)
        if product <= CURVED * math.sqrt(float(s @ s) * float(y @ y)):
            continue
        share = float(s @ q) / product
        q = q - share * y
        used.append((s, y, product, share))
    if used:
        _, y, product, _ = used[0]
        q = q * (product / float(y @ y))
    for s, y, product, share in reversed(used):
        q = q + s * (share - float(y @ q) / product)
    return -q
