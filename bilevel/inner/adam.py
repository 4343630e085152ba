"""Adam (Kingma & Ba 2015), differentiable everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel import tree
from bilevel.base import InnerSolver, InnerState
from bilevel.members import fit
from bilevel.options import is_number, is_positive, require
from bilevel.oracles import InnerProblem
from bilevel.tree import Tree


@dataclass(frozen=True)
class Adam(InnerSolver):
    """Adam with bias correction, equal to ``torch.optim.Adam`` step for step.

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   x <- x - h m/(1 - b1^k) / (sqrt(v/(1 - b2^k)) + eps)

    The square root has no derivative at v = 0 (a gradient that is exactly zero); there its derivative is taken as zero,
    so that no NaN appears. Adam does not converge to a tight tolerance with a constant step size: for implicit
    differentiation look at the inner residual in the certificate.

    Args:
        step_size: h.
        betas: (b1, b2), both in [0, 1).
        eps: positive.
        steps: number of steps; see `InnerSolver`.
        tol: residual tolerance; see `InnerSolver`.

    >>> Adam(step_size=0.01, steps=200).betas
    (0.9, 0.999)
    """

    step_size: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    check_every_on_cpu = 1
    memberwise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "step_size", "a positive number", is_positive(self.step_size))
        ok = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        ok = ok and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        require(self, "betas", "two numbers in [0, 1)", ok)
        require(self, "eps", "a positive number", is_positive(self.eps))

    def init(self, inner: InnerProblem, params: Tree) -> InnerState:
        """Start with zero moments."""
        return InnerState(params, {"first": tree.zeros_like(params), "second": tree.zeros_like(params)})

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Take one step."""
        b1, b2 = self.betas
        gradient = inner.grad(state.params)
        # One kernel for each line of arithmetic where torch has it: on an accelerator launches are what a step costs.
        first = tree.tree_map(lambda m, g: torch.lerp(m, g, 1 - b1), state.memory["first"], gradient)
        second = tree.tree_map(lambda v, g: torch.addcmul(b2 * v, g, g, value=1 - b2), state.memory["second"], gradient)
        k = state.steps + 1
        rate, correction = self.step_size / (1 - b1**k), (1 - b2**k) ** 0.5

        def moved(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
            below = _safe_sqrt(v) / fit(correction, x) + self.eps
            if isinstance(rate, Tensor):
                return x - fit(rate, x) * m / below
            return torch.addcdiv(x, m, below, value=-rate)

        params = tree.tree_map(moved, state.params, first, second)
        return state.moved(params, {"first": first, "second": second})


def _safe_sqrt(v: Tensor) -> Tensor:
    """Return the square root with derivative zero at zero: the inner `where` keeps 1/sqrt(0) out of the graph."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0)
