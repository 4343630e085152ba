"""What `OuterOptimizer` is given, looked at before the work starts: one sentence for each mistake."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerSolver
from bilevel.core import tree
from bilevel.core.options import describe, first_line, is_int, shown_value
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator
from bilevel.oracles.hyper_hessian import MAX_PARAMS
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.validation import check_tensors
from bilevel.outer.hyper_newton import HyperNewton
from bilevel.outer.search import OuterSearch
from bilevel.outer.state import WarmStart

OPTIMIZER = "`optimizer` must make a torch.optim.Optimizer from a list of tensors"
SEARCHES = ("HyperNewton", "HyperLBFGS")
TRY_ADAM = "try optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1)"
SCHEDULER = "`scheduler` must make a torch scheduler from an optimizer"
STEP_LR = "scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)"


def check_makers(optimizer: Any, scheduler: Any) -> None:
    """Refuse an optimizer or scheduler that is not a function that makes one, such as a name or an instance."""
    known = optimizer is None or isinstance(optimizer, OuterSearch) or optimizer == "auto"
    search = optimizer.__name__ if isinstance(optimizer, type) and issubclass(optimizer, OuterSearch) else optimizer
    if isinstance(search, str) and search in SEARCHES:
        raise ValueError(f"`optimizer` takes a search as an object: write optimizer={search}().")
    if not known and not callable(optimizer):
        raise ValueError(f"{OPTIMIZER}, got {shown_value(optimizer)}: {TRY_ADAM}.")
    if scheduler is not None and not callable(scheduler):
        raise ValueError(f"{SCHEDULER}, got {shown_value(scheduler)}: try {STEP_LR}.")


def start_of(problem: BilevelProblem) -> Tree:
    """Return the problem's own hyperparameters to start from; ValueError where there are none."""
    if not hasattr(problem, "initial_hparams"):
        raise ValueError(f"{type(problem).__name__} has no hyperparameters to start from: give `hparams`.")
    return problem.initial_hparams()


def check_start(hparams: Tree) -> None:
    """Refuse hyperparameters that are no tensors, or not of floating numbers."""
    check_tensors("hparams", hparams)
    for name, leaf in zip(tree.names(hparams), tree.leaves(hparams), strict=True):
        if not leaf.is_floating_point():
            raise ValueError(
                f"`hparams{name}` must hold floating-point numbers, got {leaf.dtype}: hparams.double() does."
            )


def check_made(optimizer: Any, free: Sequence[Tensor]) -> None:
    """Refuse what a maker returned if it is no torch optimizer, moves other tensors, or needs several losses a step."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"{OPTIMIZER}, got {type(optimizer).__name__}: {TRY_ADAM}.")
    moved = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    if not moved <= {id(tensor) for tensor in free}:
        name = type(optimizer).__name__
        raise ValueError(
            f"`optimizer` made {name} over other tensors than it was given, so the hyperparameters would not move: "
            f"write optimizer=lambda tensors: torch.optim.{name}(tensors, ...)."
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"`{type(optimizer).__name__}` evaluates the loss several times in one step, but an outer step "
            "takes one hypergradient: use a first-order optimizer, such as torch.optim.Adam or SGD."
        )


def check_scheduler(scheduler: Any, optimizer: Any) -> None:
    """Refuse what a maker returned if it is no scheduler, or one of another optimizer."""
    if scheduler is None:
        return
    if not callable(getattr(scheduler, "step", None)) or not callable(getattr(scheduler, "state_dict", None)):
        raise ValueError(f"{SCHEDULER}, got {shown_value(scheduler)}: write {STEP_LR}.")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(f"`scheduler` made one of another optimizer than it was given: write {STEP_LR}.")


MIXING = ("Adafactor", "Muon")
"""Optimizers of torch that take norms over a whole tensor, and so over all rows."""


def check_rowwise(optimizer: Any, scheduler: Any) -> None:
    """Refuse an optimizer or scheduler that does not treat each row as if it were alone."""
    if type(optimizer).__name__ in MIXING:
        raise ValueError(
            f"`{type(optimizer).__name__}` takes norms over all members of a batch: "
            "use an element-wise optimizer, such as torch.optim.Adam or SGD."
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau follows one loss, but a batch has one for each member.")


def check_callbacks(callbacks: Any) -> tuple[Callable[..., Any], ...]:
    """Return the callbacks as a tuple; refuse anything but a sequence of functions."""
    wanted = "`callbacks` must be a list of functions (outer, estimate) -> bool or None"
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        name = getattr(callbacks, "__name__", "")
        remedy = f": write callbacks=[{name}]" if callable(callbacks) and name.isidentifier() else ""
        raise ValueError(f"{wanted}, got {shown_value(callbacks)}{remedy}.")
    for callback in callbacks:
        if not callable(callback):
            raise ValueError(f"{wanted}, got {shown_value(callback)} in it.")
    return tuple(callbacks)


def check_switches(certify: Any, warm_start: Any) -> None:
    """Refuse what does not say whether errors are estimated, or what one step hands to the next."""
    if not isinstance(certify, bool):
        raise ValueError(f"`certify` must be True or False, got {shown_value(certify)}.")
    if not isinstance(warm_start, bool | WarmStart):
        raise ValueError(f"`warm_start` must be True, False or a WarmStart, got {shown_value(warm_start)}.")


def check_steps(steps: Any) -> None:
    """Refuse a number of steps that is not an int, or below zero."""
    if not is_int(steps, 0):
        raise ValueError(f"`steps` must be an int that is not negative, got {steps!r}.")


def check_search(
    search: OuterSearch[Any],
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    size: int,
    scheduler: Any,
    warm_start: WarmStart,
    schedule: Any = None,
) -> None:
    """Refuse a run whose outer losses are no function of the hyperparameters, or whose hypergradients are biased."""
    name = type(search).__name__
    if scheduler is not None or schedule is not None:
        which = "schedule" if scheduler is None else "scheduler"
        raise ValueError(f"{name} chooses its own steps and accuracies: leave out `{which}`.")
    if problem.structure.resampled or problem.sources():
        raise ValueError(
            f"{name} compares outer losses, but those of mini-batches or new data do not compare: use Adam."
        )
    if estimator.differentiates_steps and warm_start.state:
        raise ValueError(
            f"{name} compares outer losses, but those of {describe(estimator)} depend on where the inner solver "
            "starts: use warm_start=False, or Implicit()."
        )
    try:
        estimator.at_tolerance(1e-6)
    except ValueError as error:
        raise ValueError(f"{name} needs hypergradients without bias: {first_line(error)}") from error
    if getattr(problem, "dropout_rng", None) is not None and not estimator.differentiates_steps:
        raise ValueError(
            f"{name} compares outer losses at inner solutions, but with random layers each inner step has another one: "
            "use FullUnroll() with warm_start=False, or Adam."
        )
    if isinstance(search, HyperNewton):
        if estimator.differentiates_steps:
            raise ValueError(
                f"HyperNewton needs an adjoint vector, but {describe(estimator)} has none: use HyperLBFGS."
            )
        if problem.optimality is not None:
            raise ValueError("HyperNewton needs an inner loss, but this problem is stated by a map: use HyperLBFGS.")
        if problem.nonsmooth is not None:
            raise ValueError(
                f"HyperNewton needs a smooth inner loss, but this problem has the nonsmooth term "
                f"{type(problem.nonsmooth).__name__}: use HyperLBFGS."
            )
        if problem.variation:
            raise ValueError(
                f"HyperNewton needs one inner loss, but this problem has {problem.variation}: use HyperLBFGS."
            )
        if size > MAX_PARAMS:
            raise ValueError(
                f"HyperNewton factors the inner Hessian of up to {MAX_PARAMS:,} variables, but here are {size:,}: "
                "use HyperLBFGS."
            )


def check_stochastic(problem: BilevelProblem) -> None:
    """Refuse problems that have no steps of a stochastic single loop."""
    for wrong, what in (
        (problem.batch is not None, "one problem at a time, but this is a batch"),
        (problem.optimality is not None, "an inner loss, but this problem is stated by a map"),
        (problem.nonsmooth is not None, "a smooth inner loss, but this one has a nonsmooth term"),
        (problem.structure.resampled, "one inner problem, but this one is another in each outer step"),
        (getattr(problem, "dropout_rng", None) is not None, "losses without random layers"),
    ):
        if wrong:
            raise ValueError(f"SingleLoop takes {what}: use OuterOptimizer.")
