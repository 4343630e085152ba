"""Solvers whose step treats every leaf of params by itself, as torch's optimizers do."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Traits
from bilevel.core import tree
from bilevel.core.options import is_number, shown_value
from bilevel.core.tree import Tree
from bilevel.inner.tuned import Option, check_function, check_range, takes_step, values_at
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem

Value: TypeAlias = "float | Tensor"
"""An option in one step: a number, or a tensor that broadcasts to the leaf."""
Parts: TypeAlias = Mapping[str, Tensor]
"""The further vectors of one leaf, by name."""

FRACTIONS = ("momentum", "alpha", "betas[0]", "betas[1]")
"""Options that lie in [0, 1)."""


@dataclass(frozen=True)
class ElementwiseSolver(InnerSolver):
    """Base of the optimizers of torch: a subclass gives `move`, what one step does to one leaf.

    Each of its `options` (`step_size` is torch's ``lr``) is a number or a function of the hyperparameters,
    ``(hparams)`` or ``(hparams, step)``, so that it can be tuned itself: see `bilevel.inner.tuned`. ``step`` counts the
    steps of this solve from 0, also after a warm start, which keeps the further vectors and goes on with the bias
    corrections.
    """

    step_size: Option = 1e-3

    traits = Traits(rowwise=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, option in self.options().items():
            what, (allowed, ok) = f"{type(self).__name__}.{name}", _range_of(name)
            if callable(option):
                check_function(what, option)
            elif not (is_number(option) and ok(option)):
                raise ValueError(
                    f"`{what}` must be {allowed} or a function of the hyperparameters, got {shown_value(option)}."
                )

    def options(self) -> dict[str, Option]:
        """Return the options that may be functions of the hyperparameters, by name."""
        return {"step_size": self.step_size}

    def vectors(self) -> tuple[str, ...]:
        """Return the names of the further vectors, which start at zero; none by default."""
        return ()

    @abstractmethod
    def move(
        self, x: Tensor, gradient: Tensor, parts: Parts, options: Mapping[str, Value], index: Any
    ) -> tuple[Tensor, Parts]:
        """Return a leaf and its further vectors (`parts`) after one step; `options` are named as in the method.

        `index` counts the steps before this one, warm starts included: an int, or of a batch a tensor that broadcasts
        to x.
        """

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        self._check_ranges(inner, params)
        return InnerState(params, {name: tree.zeros_like(params) for name in self.vectors()})

    def warm_start(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Keep the further vectors and their bias corrections; the steps of the solve count from zero."""
        # Options may have changed, and with them which vectors there are.
        fresh = self.init(inner, state.params).memory
        memory = {name: state.memory.get(name, zeros) for name, zeros in fresh.items()}
        return replace(state, memory=memory, steps=0, earlier=state.index)

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        leaves, gradients = tree.leaves(state.params), tree.leaves(inner.grad(state.params))
        options = self.options()
        tuned = {
            name: self._values(name, option, inner, state.steps, state.params)
            for name, option in options.items()
            if callable(option)
        }
        names = tuple(state.memory)
        parts = [tree.leaves(state.memory[name]) for name in names]
        moved = []
        for i, (x, gradient) in enumerate(zip(leaves, gradients, strict=True)):
            own: Any = options | {name: values[i] for name, values in tuned.items()} if tuned else options
            each = {name: part[i] for name, part in zip(names, parts, strict=True)}
            moved.append(self.move(x, gradient, each, own, _fit_index(state.index, x)))
        params = tree.rebuild(state.params, [x for x, _ in moved])
        return state.moved(
            params, {name: tree.rebuild(state.params, [part[name] for _, part in moved]) for name in names}
        )

    def bias_reason(self, problem: BilevelProblem) -> str:
        name = type(self).__name__
        for option, value in self.options().items():
            if callable(value):
                return f"`{name}.{option}` is a function of the hyperparameters, on which the solution does not depend"
        if not self.options().get("weight_decay"):
            return ""
        return (
            f"`{name}.weight_decay` leads the steps away from the minimiser of the inner loss (a penalty in the inner "
            "loss does not)"
        )

    def _values(self, name: str, option: Any, inner: InnerProblem, step: int, params: Tree) -> list[Tensor]:
        return values_at(f"{type(self).__name__}.{name}", option, inner, step, params)

    def _check_ranges(self, inner: InnerProblem, params: Tree) -> None:
        """Look at options that are functions at the first step, and at the last where its index is known."""
        last = self.steps - 1 if self.steps is not None and self.tol is None else 0
        for name, option in self.options().items():
            if callable(option):
                for step in sorted({0, last if takes_step(option) else 0}):
                    values = self._values(name, option, inner, step, params)
                    check_range(f"{type(self).__name__}.{name}", values, name in FRACTIONS)


Solver = TypeVar("Solver", bound=type[ElementwiseSolver])


def accepts_lr(solver: Solver) -> Solver:
    """Let the constructor of a solver take ``lr`` in place of ``step_size``; fields, repr and pickles stay."""
    made = solver.__init__

    @functools.wraps(made)
    def __init__(self: Any, *arguments: Any, lr: Any = None, **options: Any) -> None:
        if lr is not None:
            if arguments or "step_size" in options:
                raise ValueError(f"`{type(self).__name__}` takes `step_size` or `lr`, which are the same, not both.")
            options["step_size"] = lr
        made(self, *arguments, **options)

    signature = inspect.signature(made)
    word = inspect.Parameter("lr", inspect.Parameter.KEYWORD_ONLY, default=None)
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), word])  # type: ignore[attr-defined]
    solver.__init__ = __init__  # type: ignore[method-assign]
    return solver


def _range_of(name: str) -> tuple[str, Callable[[float], bool]]:
    """Return the numbers that an option may be, in words and as a function."""
    if name in FRACTIONS:
        return "a number in [0, 1)", lambda value: 0 <= value < 1
    if name == "step_size":
        return "a positive number", lambda value: value > 0
    return "a number that is not negative", lambda value: value >= 0


def plus(x: Tensor, weight: Value, y: Tensor) -> Tensor:
    """Return ``x + weight y``; one kernel, or none for the number 0."""
    if isinstance(weight, Tensor):
        return torch.addcmul(x, weight, y)
    return x if weight == 0 else torch.add(x, y, alpha=weight)


def mean_of_squares(v: Tensor, weight: Value, gradient: Tensor) -> Tensor:
    """Return ``weight v + (1 - weight) gradient^2``."""
    if isinstance(weight, Tensor):
        return torch.lerp(gradient * gradient, v, weight)
    return torch.addcmul(weight * v, gradient, gradient, value=1 - weight)


def minus_quotient(x: Tensor, weight: Value, above: Tensor, below: Tensor) -> Tensor:
    """Return ``x - weight above / below``."""
    if isinstance(weight, Tensor):
        return x - weight * above / below
    return torch.addcdiv(x, above, below, value=-weight)


def safe_sqrt(v: Tensor) -> Tensor:
    """Return the square root with derivative zero at zero: the inner `where` keeps 1/sqrt(0) out of the graph."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)


def _fit_index(index: Any, leaf: Tensor) -> Any:
    # Not in the dtype of the leaf: a bias correction in float32 would lose four of its digits.
    return index.reshape(index.shape + (1,) * (leaf.dim() - 1)) if isinstance(index, Tensor) else index
