"""The state of a stochastic single loop: a value that a step makes anew, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bilevel.base import describe
from bilevel.core import tree
from bilevel.core.options import shown_value
from bilevel.oracles.directions import Array
from bilevel.outer.records import Record
from bilevel.outer.stochastic import Memory

FORMAT = 3
"""The format of a state that this version writes and reads."""
ARRAYS = ("z", "u", "root", "anchor")
WANTED = "`state` must be what `SingleLoop.state_dict` returned"


@dataclass(frozen=True)
class State:
    """Where a run is; a step makes a new one, so that an interrupted block of steps leaves nothing behind.

    Attributes:
        step: steps taken.
        z: params and adjoint, flat, (2 d,).
        u: hyperparameters, flat, (k,).
        root: of the sums of the squares of the directions of u, (k,).
        memories: what the method knows of the inner and of the outer part.
        rate: of z.
        least: about the smallest curvature; 0 where it was not measured.
        metric: the preconditioner P of w and v, (d, d); None without one.
        anchor: the hyperparameters at which it was made, (k,).
        until: steps after which it is looked at again.
    """

    step: int
    z: Array
    u: Array
    root: Array
    memories: list[Memory]
    rate: float
    least: float
    metric: Array | None
    anchor: Array
    until: int


def origin(loop: Any) -> dict[str, Any]:
    """Return what a state is of."""
    return {
        "problem": type(loop.problem).__name__,
        "method": describe(loop.method),
        "numbers of params and hyperparameters": [loop.directions.size, len(loop.state.u)],
        "batches": list(loop.directions.parts),
    }


def saved(loop: Any) -> dict[str, Any]:
    """Return the state of a run; see `SingleLoop.state_dict`."""
    state, made = loop.state, loop.directions
    return {
        "format": FORMAT,
        "of": origin(loop),
        "step": state.step,
        **{name: made.tensor(getattr(state, name)).clone() for name in ARRAYS},
        "metric": None if state.metric is None else made.tensor(state.metric),
        "until": state.until,
        "memories": [each.saved(made) for each in state.memories],
        "rate": state.rate,
        "least": state.least,
        "freeze": loop.freeze,
        "history": [asdict(record) for record in loop.history],
        "best_loss": loop.best[0],
        "best_hparams": [leaf.clone() for leaf in tree.leaves(loop.best[1])],
    }


def load(loop: Any, state: Mapping[str, Any]) -> None:
    """Let a run go on from a state, or leave it as it is; see `SingleLoop.load_state_dict`."""
    if not isinstance(state, Mapping) or "memories" not in state:
        raise ValueError(f"{WANTED}, got {shown_value(state)[:60]}.")
    if state.get("format") == 2 and "squares" in state:  # of versions that kept the sums of squares themselves
        state = {**state, "format": FORMAT, "root": state["squares"].sqrt()}
    if state.get("format") != FORMAT:
        raise ValueError(f"this state has the format {state.get('format')!r}, this version reads {FORMAT}.")
    if lacking := set(saved(loop)) - set(state):
        raise ValueError(f"{WANTED}, but it lacks {', '.join(sorted(lacking))}.")
    for what, ours in origin(loop).items():
        if (theirs := state["of"].get(what)) != ours:
            raise ValueError(f"this state is of a run with the {what} {theirs}, this run has {ours}.")
    for name in ARRAYS:
        if state[name].shape != (size := len(getattr(loop.state, name)),):
            raise ValueError(f"{WANTED}, but its {name!r} has the shape {tuple(state[name].shape)}, here ({size},).")
    arrays = {name: loop.directions.array(state[name]) for name in ARRAYS}
    metric = None if state["metric"] is None else loop.directions.array(state["metric"])
    memories = loop.method.restored(loop.directions, state["memories"])
    history = [Record(**record) for record in state["history"]]
    best = tree.rebuild(loop.hparams, [leaf.clone() for leaf in state["best_hparams"]])
    loop.histories, loop.best, loop.freeze = [history], (state["best_loss"], best), state["freeze"]
    numbers = {name: state[name] for name in ("step", "rate", "least", "until")}
    loop.state = State(memories=memories, metric=metric, **arrays, **numbers)
