"""The automatic rate of a stochastic single loop: from the largest curvature of the inner loss, as it is along the run.

The curvature moves with u, as a log penalty raises it by up to e^move, and with w where the loss is not quadratic. A
run looks at it after 1, 2, 4, 8, ... steps, as w moves most at first, and before or soon after a hyperparameter has
moved by 0.5. A rate is half of the inverse curvature, so that a rise by less than four in between is no harm.
"""

from __future__ import annotations

import math
from dataclasses import replace

from bilevel.oracles.directions import Array, Directions
from bilevel.outer.single_loop_state import State
from bilevel.outer.stochastic import APART, CAP, SAFE, StochasticMethod

LOOKS, MOVED = 8, 0.4
"""The fewest steps between two looks at how far hyperparameters have moved, and how far makes a new rate."""
RISE = 1.5
"""How much larger a rate may be than the one before, which was for another batch; it falls at once."""
AHEAD, HALVED, EARLY = 4.0, 40, 64
"""Steps at once after which the curvature may be twice that of the rate, how often this halves it at most, and until
which step."""


def measured(method: StochasticMethod, directions: Directions, z: Array, u: Array) -> tuple[float, float]:
    """Return the first rate of z, as given or from the curvature, and the smallest curvature where it was measured."""
    if not isinstance(method.inner_step, str):
        return float(method.inner_step), 0.0
    ends = directions.curvature(z, u)
    curvature = ends.largest
    if not 0.0 < curvature < math.inf:
        name = type(method).__name__
        raise ValueError(f"`{name}.inner_step` is 'auto', but the curvature is {curvature:g}: give a number.")
    return SAFE / curvature, max(ends.smallest, 0.0)


def followed(method: StochasticMethod, directions: Directions, state: State) -> State:
    """Return the state with a rate for the curvature there, where that may be another one, and when to look again."""
    step, far = state.step, float(abs(state.u - state.anchor).max())
    early, recorded = step & (step - 1) == 0, step % method.every == 0
    if early or recorded or far > MOVED:
        ends = directions.curvature(state.z, state.u, None if recorded else step)
        if 0.0 < ends.largest < math.inf:  # else it is for the steps to say
            rate = min(SAFE / ends.largest, RISE * state.rate)
            rate = _foreseen(directions, state, rate) if early and step <= EARLY else rate
            least = max(ends.smallest, 0.0) if recorded else state.least
            state, far = replace(state, rate=rate, least=least, anchor=state.u), 0.0
    most = CAP * state.rate * state.least if method.scaling == "adagrad" else 0.0
    steps = max(LOOKS, int((APART - far) / most)) if most > 0.0 and far < APART else LOOKS
    return replace(state, until=min(steps, (1 << step.bit_length()) - step, method.every - step % method.every))


def _foreseen(directions: Directions, state: State, rate: float) -> float:
    """Return a rate, at most the given one, that still fits the curvature some steps ahead along the gradient."""
    z, u, d, step = state.z, state.u, directions.size, state.step
    batch = step % (directions.parts[0] or step + 1)
    gradient = directions.sampled(batch, 0, z, u)[0][: 2 * d].clone()
    gradient[d:] = 0.0
    for _ in range(HALVED):
        if rate * directions.curvature(z - AHEAD * rate * gradient, u, step).largest <= 2.0 * SAFE:
            break
        rate /= 2.0
    return rate
