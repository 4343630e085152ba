"""Any optimizer of torch as an inner solver, for estimators that do not differentiate its steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Traits
from bilevel.core import tree
from bilevel.core.options import require_arguments, shown_value
from bilevel.core.tree import Tree
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class TorchOptimizer(InnerSolver):
    """Steps of any ``torch.optim.Optimizer``: one of torch, of another package, or of your own.

    In each step the optimizer finds the inner gradient in ``.grad``, and is given a closure that evaluates loss and
    gradient anew, which `torch.optim.LBFGS` and others call several times. Whatever changes has to be in the
    optimizer's ``state_dict``: it is the memory of the inner state, so that warm starts keep moments, outer states can
    be saved, and the same step twice gives the same params. The optimizer is made anew for each step, which takes a
    few tenths of a millisecond; on an accelerator each call of the closure waits for it.

    The steps have no derivative here: use `Implicit`; unrolls differentiate `SGD`, `Adam`, `AdamW` and `RMSprop`, which
    take torch's steps.

    Args:
        optimizer: makes the optimizer from the list of the leaves of params.

    >>> TorchOptimizer(lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe"), steps=20).steps
    20
    """

    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]

    traits = Traits(differentiable=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            name = type(self.optimizer).__name__
            raise ValueError(
                "`TorchOptimizer.optimizer` must be a function of (params), got an optimizer: write "
                f"TorchOptimizer(lambda params: {name}(params, ...))."
            )
        require_arguments("TorchOptimizer.optimizer", self.optimizer, "params")

    def check_unrolls(self) -> None:
        raise ValueError(
            "the steps of TorchOptimizer are not differentiated: use Implicit, or one of the solvers SGD, Adam, AdamW "
            "and RMSprop, which take torch's steps and can be unrolled."
        )

    def bias_reason(self, problem: BilevelProblem) -> str:
        if problem.params is None:
            return ""
        optimizer = self._made([leaf.clone() for leaf in tree.leaves(problem.params)])
        decays = [group["weight_decay"] for group in optimizer.param_groups if group.get("weight_decay")]
        if not decays:
            return ""
        return (
            f"weight_decay={decays[0]:.4g} of {type(optimizer).__name__} leads the steps away from the minimiser of "
            "the inner loss: set it to 0 and put the penalty into the inner loss"
        )

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        if not inner.problem.symmetric:
            raise ValueError(
                "TorchOptimizer needs an inner loss, but this problem is stated by an optimality map: "
                "use FixedPoint(update)."
            )
        optimizer = self._made([leaf.clone() for leaf in tree.leaves(params)])
        return InnerState(params, _saved(optimizer))

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        before = tree.leaves(state.params)
        leaves = [leaf.detach().clone().requires_grad_() for leaf in before]
        optimizer = self._made(leaves)
        _restore(optimizer, state.memory)

        def set_gradients(params: Tree) -> None:
            for leaf, gradient in zip(leaves, tree.leaves(inner.grad(params)), strict=True):
                # A copy: some optimizers scale or clip it in place.
                leaf.grad = gradient.detach().clone()

        def closure() -> Tensor:
            # Most optimizers first ask for the gradient that they have already.
            same = all(torch.equal(leaf, start) for leaf, start in zip(leaves, before, strict=True))
            here = state.params if same else tree.rebuild(state.params, [leaf.detach().clone() for leaf in leaves])
            set_gradients(here)
            return inner.value(here)

        set_gradients(state.params)
        take: Any = optimizer.step
        take(closure) if _takes_closure(type(optimizer).step) else take()
        # The same params say that no further step helps: some optimizers stop at tolerances of their own.
        still = all(torch.equal(leaf, start) for leaf, start in zip(leaves, before, strict=True))
        params = state.params if still else tree.rebuild(state.params, [leaf.detach() for leaf in leaves])
        return state.moved(params, _saved(optimizer))

    def _made(self, leaves: list[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of some leaves; ValueError for anything else."""
        optimizer = self.optimizer(leaves)
        wanted = "`TorchOptimizer.optimizer` must make a torch.optim.Optimizer of the tensors that it is given"
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"{wanted}, got {shown_value(optimizer)}.")
        held = [id(leaf) for group in optimizer.param_groups for leaf in group["params"]]
        if sorted(held) != sorted(map(id, leaves)):
            raise ValueError(f"{wanted}, and of all of them: write lambda params: {type(optimizer).__name__}(params).")
        return optimizer


def _saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {"class": type(optimizer).__name__, "state": dict(state["state"]), "param_groups": state["param_groups"]}


def _restore(optimizer: torch.optim.Optimizer, memory: dict[str, Any]) -> None:
    """Load a state into a new optimizer, which may write into what it is given."""
    if memory["class"] != type(optimizer).__name__:
        raise ValueError(
            f"this carry is of torch's {memory['class']}, whose state {type(optimizer).__name__} cannot go on with: "
            "start with params=estimate.params instead."
        )
    state = tree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, memory["state"])
    optimizer.load_state_dict({"state": state, "param_groups": memory["param_groups"]})


@lru_cache
def _takes_closure(step: Callable[..., Any]) -> bool:
    # Some optimizers, closures being rare, take none.
    return len(inspect.signature(step).parameters) > 1
