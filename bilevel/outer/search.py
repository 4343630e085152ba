"""What outer searches share: ask and tell, the coarse scan, and the point that is accepted.

A search is a frozen rule and a state that is a value: `propose` says where the outer loss is wanted next, `tell` takes
the answer. Nothing else is held, so a state that is saved after any evaluation goes on to the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from bilevel.core.options import is_number, is_positive, require
from bilevel.outer.coordinates import Coordinates, Shrinkage
from bilevel.outer.trust_region import Vector

TOP, STEP, BOTTOM = 3.0, 4.0, -24.0
"""The scan: mean(u - c) of its first point, the distance of two, and the last."""
EXPENSIVE = 4.0
"""A scan ends with a point that costs more than this many times all before it: weaker penalties cost more still."""
FAILS = "not converged: hypergradients around the best point fail, see the status of the last records"
FELL = 1e-3
"""A point of the scan has fallen if it is lower by this share."""


@dataclass(frozen=True)
class Answer:
    """What an evaluation found: the outer loss, corrected to second order where possible, and its gradient, (k,).

    `error` is how far the value may be off. `second` are the Gauss-Newton and the exact second derivatives, matrices of
    k rows; None where nobody asked for them, and empty where there are none.
    """

    value: float
    gradient: Vector
    error: float = 0.0
    second: tuple[Vector, ...] | None = None


@dataclass(frozen=True)
class Accepted:
    """The point with the lowest value so far; `repeated` counts how often it was evaluated again, more exactly."""

    u: Vector
    answer: Answer
    repeated: int = 0


@dataclass(frozen=True)
class Trial:
    """A proposed point u, with what its proposer needs in order to judge it: by how much the outer loss is to fall.

    The kind is "step", "again" for the accepted point evaluated once more, or "probe" for a look around it.
    """

    u: Vector
    predicted: float = math.nan
    kind: str = "step"


@dataclass(frozen=True)
class SearchState:
    """All that a search is between two evaluations.

    Attributes:
        shift: of the next point of the scan; None where there is none any more.
        scanned, flat, spent: values of the scan that succeeded, points in a row that did not fall, and its cost so far.
        trial: the point that is being evaluated; None before it is chosen.
        rejected, failed: trials in a row without a lower value, and evaluations in a row that failed.
        doubts, probed: probes that the model had not foreseen, and whether one at the accepted point was as foreseen.
        predicted: the decrease that was still foreseen at the end.
        stopped: how it ended, in words; empty while it goes on.
        kinks: whether the inner loss has a nonsmooth term, and the outer loss kinks where its support changes.
    """

    coordinates: Coordinates
    u: Vector
    shift: float | None
    scanned: tuple[float, ...] = ()
    flat: int = 0
    spent: float = 0.0
    accepted: Accepted | None = None
    trial: Any = None
    rejected: int = 0
    doubts: int = 0
    probed: bool = False
    failed: int = 0
    predicted: float = math.nan
    stopped: str = ""
    kinks: bool = False


State = TypeVar("State", bound=SearchState)


@dataclass(frozen=True)
class OuterSearch(ABC, Generic[State]):
    """A rule that descends the outer loss by its values and derivatives, one evaluation at a time."""

    tol: float = 1e-6
    start: str | None = None
    limits: tuple[float, float] | None = None

    accuracy: ClassVar[float] = 0.3
    """Share of the decrease that is sought to which values are to be known, where a search chooses accuracies."""

    def __post_init__(self) -> None:
        require(self, "tol", "a positive number", is_positive(self.tol))
        require(self, "start", "'scan', 'given' or None", self.start in ("scan", "given", None))
        pair = isinstance(self.limits, tuple | list) and len(self.limits) == 2 and all(map(is_number, self.limits))
        ordered = self.limits is None or (pair and self.limits[0] < self.limits[1])
        require(self, "limits", "two numbers, the smaller one first, or None", ordered)

    @property
    def shift(self) -> float | None:
        """Where the scan begins; None for none."""
        return TOP if self.start == "scan" else None

    def coordinates(self, quadratic: bool) -> type[Coordinates]:
        """Return the coordinates of log penalties; `quadratic` says whether the inner loss is."""
        return Shrinkage

    def propose(self, state: State) -> State:
        """Return the state with its next trial, or with how it ended.

        With neither of the two, second derivatives of the accepted point are wanted (`Answer.second`).
        """
        if state.stopped or state.trial is not None:
            return state
        if state.shift is not None:
            base = state.u - np.mean(state.u - state.coordinates.centre)
            return replace(state, trial=Trial(state.coordinates.clipped(base + state.shift)))
        if state.accepted is None:
            return replace(state, trial=Trial(state.u))
        return self.step(state, state.accepted)

    def tell(self, state: State, answer: Answer | None, cost: float = 0.0) -> State:
        """Return the state after the evaluation of its trial, None where it failed.

        The cost has any unit: a scan ends where an evaluation costs far more than all before it.
        """
        trial = state.trial
        if answer is not None and not (math.isfinite(answer.value) and np.isfinite(answer.gradient).all()):
            answer = None
        if state.shift is not None:
            return self._scanned(state, trial, answer, state.shift, cost)
        if state.accepted is None:
            if answer is None:
                return replace(state, trial=None, stopped="the first hypergradient failed")
            return replace(state, trial=None, accepted=Accepted(trial.u, answer))
        failed = 0 if answer is not None else state.failed + 1
        return self.judge(replace(state, trial=None, failed=failed), state.accepted, trial, answer)

    def _scanned(self, state: State, trial: Trial, answer: Answer | None, shift: float, cost: float) -> State:
        scanned, accepted, fell = state.scanned, state.accepted, False
        if answer is not None:
            fell = all(answer.value < value * (1 - FELL) for value in scanned)
            scanned = (*scanned, answer.value)
            if accepted is None or answer.value < accepted.answer.value:
                accepted = Accepted(trial.u, answer)
        flat = 0 if fell else state.flat + (len(scanned) > 2)
        expensive = len(scanned) > 2 and cost > EXPENSIVE * state.spent
        ended = flat >= 2 or shift - STEP < BOTTOM or expensive
        stopped = "every point of the scan failed" if ended and accepted is None else ""
        to, spent = None if ended else shift - STEP, state.spent + cost
        return replace(
            state, trial=None, scanned=scanned, accepted=accepted, flat=flat, shift=to, spent=spent, stopped=stopped
        )

    @abstractmethod
    def init(self, u: Vector, coordinates: Coordinates) -> State:
        """Return the state before the first evaluation, which starts at u, (k,)."""

    @abstractmethod
    def step(self, state: State, accepted: Accepted) -> State:
        """Return the state with the trial that follows the accepted point, or with its end, see `propose`."""

    @abstractmethod
    def judge(self, state: State, accepted: Accepted, trial: Any, answer: Answer | None) -> State:
        """Return the state after a trial that `step` proposed."""


def contradicted(state: State, accepted: Accepted, answer: Answer | None, tol: float) -> State:
    """Return the end of a search whose gradients do not explain its values; `answer` is once more at the same point."""
    before = accepted.answer
    noise = 3.0 * max(before.error, 0.0 if answer is None else answer.error) + 0.1 * tol * abs(before.value)
    if answer is not None and abs(answer.value - before.value) > noise:
        return replace(
            state,
            stopped=f"the outer loss is no function of the hyperparameters: {before.value:.6g}, and once more "
            f"{answer.value:.6g}, at the same ones (a warm-started unroll, a mini-batch?): use cold starts, or Adam",
        )
    if state.kinks:
        stopped = (
            "values do not follow the gradient: the outer loss has a kink at the best point, or the hypergradient is "
            "biased; no bound of what may be left is known"
        )
        return replace(state, stopped=stopped)
    return replace(
        state,
        stopped="values contradict the gradient: the hypergradient is biased (a truncated unroll, few terms?), or the "
        "outer loss is rougher than its error says",
    )
