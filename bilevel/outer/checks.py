"""What `OuterOptimizer` is given, looked at before the work starts: one sentence for each mistake."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bilevel import tree
from bilevel.hypergrad.arguments import check_origin, shapes
from bilevel.options import is_int, shown_value
from bilevel.tree import Tree

KEYS = frozenset({
    *("format", "free", "optimizer", "scheduler", "hparams", "inner_state", "adjoint"),
    *("history", "best_loss", "best_hparams", "rng"),
})
"""What a state holds in every version."""


def check_makers(optimizer: Any, scheduler: Any) -> None:
    """Refuse an optimizer or scheduler that is not a function that makes one.

    Raises:
        ValueError: for a name, an instance, or anything else that cannot be called.
    """
    if optimizer is not None and not callable(optimizer):
        raise ValueError(
            "`optimizer` must make a torch.optim.Optimizer from a list of tensors, "
            f"got {shown_value(optimizer)}: try optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1)."
        )
    if scheduler is not None and not callable(scheduler):
        raise ValueError(
            f"`scheduler` must make a torch scheduler from an optimizer, got {shown_value(scheduler)}: "
            "try scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)."
        )


def check_made(optimizer: Any) -> None:
    """Refuse what a maker returned if it is no torch optimizer, or one that needs several losses in one step.

    Raises:
        ValueError: with the remedy.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            "`optimizer` must make a torch.optim.Optimizer from a list of tensors, "
            f"got {type(optimizer).__name__}: try optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1)."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"`{type(optimizer).__name__}` evaluates the loss several times in one step, but an outer step "
            "takes one hypergradient: use a first-order optimizer, such as torch.optim.Adam or SGD."
        )


def check_callbacks(callbacks: Any) -> tuple[Callable[..., Any], ...]:
    """Return the callbacks as a tuple.

    Raises:
        ValueError: for anything but a sequence of functions.
    """
    wanted = "`callbacks` must be a list of functions (outer, estimate) -> bool or None"
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        name = getattr(callbacks, "__name__", "")
        remedy = f": write callbacks=[{name}]" if callable(callbacks) and name.isidentifier() else ""
        raise ValueError(f"{wanted}, got {shown_value(callbacks)}{remedy}.")
    for callback in callbacks:
        if not callable(callback):
            raise ValueError(f"{wanted}, got {shown_value(callback)} in it.")
    return tuple(callbacks)


def check_steps(steps: Any) -> None:
    """Refuse a number of steps that is not an int, or below zero.

    Raises:
        ValueError: in one sentence.
    """
    if not is_int(steps, 0):
        raise ValueError(f"`steps` must be an int that is not negative, got {steps!r}.")


def check_state(
    state: Any, format_: int, hparams: Tree, start: Tree, trainable: Tree, solver: Any, groups: Any
) -> None:
    """Refuse what is not the state of such a run, before any of it is loaded.

    Args:
        state: should be what `OuterOptimizer.state_dict` returned.
        format_: the format that is read.
        hparams: the hyperparameters of this run.
        start: its params where a cold start begins.
        trainable: the part of them that inner solvers move.
        solver: its inner solver.
        groups: the parameter groups of its optimizer.

    Raises:
        ValueError: for something else, another format, another problem, another solver or another optimizer.
    """
    wanted = "`state` must be what `OuterOptimizer.state_dict` returned"
    if not isinstance(state, Mapping):
        raise ValueError(f"{wanted}, got {shown_value(state)}.")
    if "format" not in state:
        raise ValueError(f"{wanted}, got a dict with the keys {', '.join(map(str, state)) or '(none)'}.")
    if state["format"] != format_:
        raise ValueError(f"this state has the format {state['format']!r}, this version reads {format_}.")
    if not set(state) >= KEYS:
        raise ValueError(f"{wanted}, but it lacks {', '.join(sorted(KEYS - set(state)))}.")
    wanted_shapes = [tuple(leaf.shape) for leaf in tree.leaves(hparams)]
    saved = [tuple(leaf.shape) for leaf in state["hparams"]]
    if wanted_shapes != saved:
        raise ValueError(f"this state has hyperparameters of shapes {saved}, this run has {wanted_shapes}.")
    check_origin("this state", state.get("solver", ""), solver)
    inner = state["inner_state"]
    for part, like in ((None if inner is None else inner["params"], start), (state["adjoint"], trainable)):
        if part is not None and shapes(part) != shapes(like):
            sizes = [[shape for _, shape in shapes(each)] for each in (part, like)]
            raise ValueError(f"this state is of another problem, with params of shapes {sizes[0]}, here {sizes[1]}.")
    options = [sorted(group) for group in state["optimizer"]["param_groups"]]
    if options != [sorted(group) for group in groups]:
        raise ValueError("this state is of another outer optimizer, whose options this one does not have.")
