"""What an outer step hands to the next, what a saved run holds, and what a run looks at before it loads a state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bilevel.base import Carry, InnerState
from bilevel.core import rows, tree
from bilevel.core.options import first_line, require, shown_value
from bilevel.core.status import Status
from bilevel.core.tree import Tree
from bilevel.engine.checks import check_origin, shapes
from bilevel.outer.records import Record

FORMAT = 1
"""The format of a state that this version writes and reads."""


KEYS = frozenset({
    *("format", "free", "optimizer", "scheduler", "hparams", "inner_state", "adjoint"),
    *("history", "best_loss", "best_hparams", "rng"),
})
"""What a state holds in every version."""
WANTED = "`state` must be what `OuterOptimizer.state_dict` returned"


@dataclass(frozen=True)
class WarmStart:
    """Which parts one outer step hands to the next.

    Args:
        state: the inner state (iterate, momentum, moments).
        adjoint: the adjoint vector, the start of the linear solver.
    """

    state: bool = True
    adjoint: bool = True

    def __post_init__(self) -> None:
        for name in ("state", "adjoint"):
            require(self, name, "True or False", isinstance(getattr(self, name), bool))

    def part_of(self, carry: Carry) -> Carry:
        """Return what the next step gets of what one has left."""
        return Carry(carry.state if self.state else None, carry.adjoint if self.adjoint else None, carry.solver)


def origin(outer: Any) -> dict[str, Any]:
    """Return what a state is of: the classes of the parts of a run, and the names of its hyperparameters."""
    problem = outer.problem if outer.problem.batch is None else outer.problem.member(0)
    return {
        "problem": type(problem).__name__,
        "estimator": type(outer.estimator).__name__,
        "outer optimizer": type(outer.optimizer).__name__,
        "scheduler": "none" if outer.scheduler is None else type(outer.scheduler).__name__,
        "hyperparameters": tree.names(outer.hparams),
    }


def check_state(state: Any, outer: Any) -> None:
    """Refuse what is not the state of such a run, before any of it is loaded."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{WANTED}, got {shown_value(state)}.")
    if "format" not in state:
        raise ValueError(f"{WANTED}, got a dict with the keys {', '.join(map(str, state)) or '(none)'}.")
    if state["format"] != FORMAT:
        raise ValueError(f"this state has the format {state['format']!r}, this version reads {FORMAT}.")
    if not set(state) >= KEYS:
        raise ValueError(f"{WANTED}, but it lacks {', '.join(sorted(KEYS - set(state)))}.")
    _check_leaves(state, outer.hparams)
    check_origin("this state", state.get("solver", ""), outer.solver)
    # States of older versions do not say what they are of.
    saved = state.get("of", {})
    for what, ours in origin(outer).items():
        theirs = saved.get(what, ours)
        if theirs != ours:
            theirs, ours = (", ".join(map(str, each)) if isinstance(each, list) else each for each in (theirs, ours))
            held = f"this state is of a run with the {what} {theirs}"
            raise ValueError(f"{held}, this run has {ours}: load it into a run like that one.")
    _check_inner(state, outer)
    _check_optimizer(state, outer.optimizer)
    if (state["scheduler"] is None) != (outer.scheduler is None):
        one, other = ("no", "a") if state["scheduler"] is None else ("a", "no")
        raise ValueError(f"this state is of a run with {one} scheduler, this one has {other} scheduler.")
    _check_history(state, outer)


def _check_leaves(state: Mapping[str, Any], hparams: Tree) -> None:
    """Refuse hyperparameters of other shapes or dtypes."""
    leaves, what = tree.leaves(hparams), "this state has hyperparameters"
    our_shapes, our_dtypes = [tuple(leaf.shape) for leaf in leaves], [leaf.dtype for leaf in leaves]
    for key in LEAVES:
        values = state[key]
        if not isinstance(values, list | tuple) or not all(isinstance(value, Tensor) for value in values):
            raise ValueError(f"{WANTED}, but its {key!r} is no list of tensors.")
        # Free variables of a constraint such as a simplex have another shape than the hyperparameters.
        theirs, dtypes = [tuple(value.shape) for value in values], [value.dtype for value in values]
        if key != "free" and theirs != our_shapes:
            raise ValueError(f"{what} of shapes {theirs}, this run has {our_shapes}.")
        if dtypes != our_dtypes:
            raise ValueError(f"{what} of dtype {_named(dtypes)}, this run has {_named(our_dtypes)}.")


def _named(dtypes: list[torch.dtype]) -> str:
    return ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _check_inner(state: Mapping[str, Any], outer: Any) -> None:
    """Refuse an inner state or an adjoint of params of other names, shapes or dtypes."""
    start, inner = outer.problem.start(outer.params), state["inner_state"]
    params = None if inner is None else InnerState.from_dict(inner).params
    for part, like in ((params, start), (state["adjoint"], outer.problem.trainable(start))):
        if part is None:
            continue
        theirs, ours = shapes(part), shapes(like)
        if theirs != ours:
            # Names are said where they alone differ.
            if sorted(shape for _, shape in theirs) != sorted(shape for _, shape in ours):
                theirs, ours = [shape for _, shape in theirs], [shape for _, shape in ours]  # type: ignore[misc]
            raise ValueError(f"this state is of another problem, with params of shapes {theirs}, here {ours}.")
        dtypes = [[leaf.dtype for leaf in tree.leaves(each)] for each in (part, like)]
        if dtypes[0] != dtypes[1]:
            raise ValueError(f"this state has params of dtype {_named(dtypes[0])}, this run has {_named(dtypes[1])}.")


def _check_optimizer(state: Mapping[str, Any], optimizer: Any) -> None:
    """Refuse the state of an optimizer with other options, or with moments that do not fit the tensors of this one."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return  # a search: its class is looked at among what the state is of
    wanted = "this state is of another outer optimizer"
    saved = state["optimizer"]
    if not isinstance(saved, Mapping) or set(saved) != {"state", "param_groups"}:
        raise ValueError(f"{WANTED}, but its 'optimizer' is not the state of a torch optimizer.")
    theirs, ours = saved["param_groups"], optimizer.param_groups
    if [sorted(group) for group in theirs] != [sorted(group) for group in ours]:
        raise ValueError(f"{wanted}, whose options this one does not have.")
    if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in ours]:
        raise ValueError(f"{wanted}, which moves other tensors than this one.")
    # An optimizer of the user's own may keep tensors of any shape.
    if not type(optimizer).__module__.startswith(("torch.optim", "bilevel.outer")):
        return
    leaves = dict(_leaves(theirs, optimizer))
    for index, moments in saved["state"].items():
        shape = leaves[index].shape if index in leaves else ()
        for name, value in moments.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            # Adafactor keeps means over rows and columns.
            fits = value.dim() == len(shape) and all(s in (1, n) for s, n in zip(value.shape, shape, strict=True))
            if not fits:
                raise ValueError(f"{wanted}: its {name!r} has the shape {tuple(value.shape)}, here {tuple(shape)}.")


def _leaves(groups: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, Tensor]]:
    """Yield the tensors of an optimizer with the numbers that saved groups of parameters give them."""
    for saved, group in zip(groups, optimizer.param_groups, strict=True):
        yield from zip(saved["params"], group["params"], strict=True)


def _check_history(state: Mapping[str, Any], outer: Any) -> None:
    """Refuse a history that is none, or that of a batch for a single run and the other way round."""
    names = {each.name for each in fields(Record)}
    size, history, best = outer.problem.batch, state["history"], state["best_loss"]
    runs = [history] if size is None else history
    good = isinstance(history, list | tuple) and all(
        isinstance(records, list | tuple) and all(isinstance(r, Mapping) and set(r) == names for r in records)
        for records in runs
    )
    if not good or len(runs) != (size or 1):
        whose = "one run" if size is None else f"{size} members"
        raise ValueError(f"{WANTED}, but its 'history' is not that of {whose}.")
    if not (isinstance(best, float | int) if size is None else isinstance(best, Tensor) and best.shape == (size,)):
        wrong = "no number" if size is None else f"not one of {size} each"
        raise ValueError(f"{WANTED}, but its 'best_loss' is {wrong}.")
    if not isinstance(state["rng"], Tensor):
        raise ValueError(f"{WANTED}, but its 'rng' is no state of a random generator.")


def saved(outer: Any) -> dict[str, Any]:
    """Return the state of a run; see `OuterOptimizer.state_dict`."""
    history = [[asdict(record) for record in records] for records in outer.histories]
    return {
        "format": FORMAT,
        **outer.mover.saved(),
        "hparams": [leaf.clone() for leaf in tree.leaves(outer.current)],
        "inner_state": None if outer.carry.state is None else outer.carry.state.to_dict(),
        "adjoint": outer.carry.adjoint,
        "solver": type(outer.solver).__name__,
        "of": origin(outer),
        "history": history[0] if outer.size is None else history,
        "best_loss": outer.best[0],
        "best_hparams": [leaf.clone() for leaf in tree.leaves(outer.best[1])],
        **generators(),
    }


def load(outer: Any, state: Mapping[str, Any]) -> None:
    """Let a run go on from a state, or leave it as it is; see `OuterOptimizer.load_state_dict`."""
    check_state(state, outer)
    before = {**outer.mover.saved(), **generators()}
    inner = state["inner_state"]
    carry = Carry(None if inner is None else InnerState.from_dict(inner), state["adjoint"], type(outer.solver).__name__)
    hparams, best = (
        tree.rebuild(outer.hparams, [value.clone() for value in state[name]]) for name in ("hparams", "best_hparams")
    )
    histories = [state["history"]] if outer.size is None else state["history"]
    histories = [[Record(**record) for record in records] for records in histories]
    try:
        outer.mover.restore(state)
        restore_generators(state)
    except BaseException as error:
        outer.mover.restore(before)
        restore_generators(before)
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"this state cannot be loaded, and nothing of it was: {first_line(error)}") from error
    outer.current, outer.carry, outer.best, outer.histories = hparams, carry, (state["best_loss"], best), histories
    outer.sure = [any(record.status == Status.OK.name for record in history) for history in histories]
    if outer.search is not None:
        outer.current = outer.search.propose()


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of an optimizer, of which it takes copies: torch goes on with the tensors that it is given."""
    saved = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    for index, leaf in _leaves(saved["param_groups"], optimizer):
        for name, value in saved["state"].get(index, {}).items():
            # torch casts single numbers, such as NAdam's product of momenta, to the dtype of the leaf.
            if isinstance(value, Tensor) and value.dim() == 0:
                optimizer.state[leaf][name] = value


def generators() -> dict[str, Any]:
    """Return the states of the CPU's generator and of all CUDA devices; none where CUDA was not used."""
    # Asking a device for its state would start CUDA.
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda: list[Tensor] = torch.cuda.get_rng_state_all() if used else []
    return {"rng": torch.get_rng_state(), "cuda_rng": cuda}


def restore_generators(state: Mapping[str, Any]) -> None:
    """Set the generators to what `generators` returned; devices that this machine lacks are passed over."""
    # Back on the CPU, where `torch.load(map_location="cuda")` may have taken them from.
    torch.set_rng_state(state["rng"].cpu())
    known = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, value in enumerate(state.get("cuda_rng", ())[:known]):
        torch.cuda.set_rng_state(value.cpu(), index)


LEAVES = ("free", "hparams", "best_hparams")
COUNTERS = ("step", "eta", "mu", "mu_product")
"""Numbers of torch's optimizers that follow from the number of steps alone; scalar hyperparameters have their shape."""


def separated(state: dict[str, Any], index: int) -> dict[str, Any]:
    """Return one row's part of a `state_dict` of rows, as its own outer loop would have written it."""
    size = len(state["history"])

    def part(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size else value

    inner = state["inner_state"]
    optimizer = state["optimizer"]
    moments = {key: {name: part(value) for name, value in each.items()} for key, each in optimizer["state"].items()}
    leaves = {name: [leaf[index].clone() for leaf in state[name]] for name in LEAVES}
    return {
        **(state | leaves),
        "optimizer": optimizer | {"state": moments},
        "inner_state": None if inner is None else InnerState.from_dict(inner).row(index).to_dict(),
        "adjoint": None if state["adjoint"] is None else rows.row(state["adjoint"], index),
        "history": state["history"][index],
        "best_loss": float(state["best_loss"][index]),
    }


def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the `state_dict` of the rows that some outer loops are, which have taken the same number of steps."""
    first = states[0]
    leaves = {name: [torch.stack(each) for each in zip(*(s[name] for s in states), strict=True)] for name in LEAVES}
    moments = {
        key: {
            name: torch.stack([state["optimizer"]["state"][key][name] for state in states])
            if isinstance(value, Tensor) and value.shape == first["free"][key].shape and name not in COUNTERS
            else value
            for name, value in each.items()
        }
        for key, each in first["optimizer"]["state"].items()
    }
    inner = [InnerState.from_dict(state["inner_state"]) for state in states if state["inner_state"] is not None]
    (like, *_) = first["hparams"]
    return {
        **(first | leaves),
        "optimizer": first["optimizer"] | {"state": moments},
        "inner_state": InnerState.stack(inner).to_dict() if inner else None,
        "adjoint": None if first["adjoint"] is None else rows.stack([state["adjoint"] for state in states]),
        "history": [state["history"] for state in states],
        "best_loss": torch.tensor([state["best_loss"] for state in states], dtype=like.dtype, device=like.device),
    }
