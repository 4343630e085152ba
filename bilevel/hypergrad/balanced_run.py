"""The run of `BalancedImplicit`: one budget, shared between the forward run and the adjoint system.

The error of ``p = -C(x)' lam`` comes from the iterate x and from lam, and a unit of work is best spent on the larger
part. Both have a relative residual, and the smallest eigenvalue that would turn either into an error cancels:

    |grad f(x)| / |x|    against    |v - H(x) lam| / |lam|,    v the gradient of the outer loss at x

So the forward run pauses at shares of the budget; at the safeguarded extrapolated iterate CG goes on from the lam of
the last pause until its side is `BALANCE` times the other; the rest is shared again. A direction of negative curvature
stops CG: lam is dropped, half of what is left is put aside for an unrolled tail, and the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState
from bilevel.core import tree
from bilevel.core.cost import WEIGHTS
from bilevel.core.device import to_floats
from bilevel.core.tree import Tree
from bilevel.hypergrad.extrapolation import ITERATE_ORDERS, Budget, Record, reduced_rank
from bilevel.numerics.conjugate_gradients import conjugate_gradients
from bilevel.oracles.inner_problem import InnerProblem, Linearization
from bilevel.oracles.problem import BilevelProblem

BALANCE = 0.3
"""CG stops at this multiple of the forward run's relative residual."""
SHARE = 0.6
"""Share of the rest that the forward run takes after a pause; all of it once it is below `SMALL`."""
SMALL = 20.0
PAUSE = 7.0
"""Gradient-equivalents of a pause before its CG: four gradients, an outer loss, an HVP."""
FINISH = 10.0
"""Gradient-equivalents of the result and its estimate: five cross products or outer losses, one VJP, two to spare."""
LEAST = PAUSE + FINISH + 2 * WEIGHTS["hvp"] + 4.0
FLOOR = 8.0
"""Multiple of the rounding unit (times the largest curvature) at which a relative residual says nothing more."""
FALLBACK = 100
"""Without a budget, states kept for the tail that takes over at negative curvature."""


@dataclass
class Balance:
    """The state of the balanced run: what the last pause found.

    Attributes:
        budget: what forward run and adjoint share; None where the solver's own rule ends the run.
        record: receives the states.
        max_steps: most CG steps of one pause.
        lam: the adjoint vector.
        mark: step of the next pause.
        reserve: what is put aside for the unrolled tail.
        kept: states that are kept for it.
    """

    problem: BilevelProblem
    inner: InnerProblem
    solver: InnerSolver
    budget: Budget | None
    record: Record
    raveler: tree.Raveler
    damping: float
    max_steps: int
    lam: Tensor | None = None
    mark: int | None = None
    reserve: float = 0.0
    kept: int = FALLBACK
    cotangent: Tree = None
    point: Linearization = field(init=False)
    gradient: Tree = None
    residual: float = float("nan")
    adjoint_residual: float = float("nan")
    negative: float | None = None
    ever_negative: bool = False
    smallest: float = float("inf")
    largest: float = 0.0
    steps: int = 0
    done: bool = False

    def left(self) -> float:
        """Return what the budget still has for the balanced run."""
        if self.budget is None:
            return float("inf")
        return self.budget.left(self.record.last) - self.reserve

    def visit(self, state: InnerState) -> bool:
        """Take the next state; pause where the share of the forward run is used up."""
        self.record.add(state)
        index = self.record.last - max(self.kept, ITERATE_ORDERS[-1] + 2)
        self.record.drop(index, index + 1)
        if self.mark is None or self.record.last < self.mark:
            return False
        return self.pause(state)

    def pause(self, state: InnerState) -> bool:
        """Extrapolate, run CG, and share what is left; True ends the forward run."""
        self._linearize(state)
        self._solve_adjoint()
        usable = self.left() - PAUSE - FINISH
        if self.negative is not None and self.budget is not None and not self.ever_negative:
            self.reserve = max(0.0, self.left() / 2)
            usable = self.left() - PAUSE - FINISH
        self.ever_negative = self.ever_negative or self.negative is not None
        self.done = self.budget is None or usable <= 1.0 or (self.negative is None and self._at_rounding())
        if not self.done:
            self.mark = self.record.last + max(1, int(usable if usable < SMALL else SHARE * usable))
        return self.done

    def _linearize(self, state: InnerState) -> None:
        """Linearise where the gradient is smallest: at the last iterate or one of its extrapolations."""
        vectors = self.record.end(ITERATE_ORDERS[-1] + 2)
        result = reduced_rank(vectors, ITERATE_ORDERS) if len(vectors) > 2 else []
        candidates = [self.record.unravel(candidate.vector) for candidate in result]
        # The last iterate comes last: its gradient is then at hand for the next step.
        candidates.append(self.solver.params(state))
        gradients = [self.inner.grad(params) for params in candidates]
        norms = to_floats([tree.norm(gradient) for gradient in gradients])
        index = min(range(len(norms)), key=lambda i: norms[i] if norms[i] == norms[i] else float("inf"))
        self.residual, self.gradient = norms[index], gradients[index]
        self.point = self.inner.linearize(tree.detach(candidates[index]))
        self.inner.counts["outer"] += 1
        _, self.cotangent, _ = self.problem.outer_value_and_grads(self.point.params, self.inner.hparams)

    def matvec(self, v: Tensor) -> Tensor:
        """Return the (damped) Hessian at the point times a flat vector."""
        return torch.add(self.raveler.ravel(self.point.hvp(self.raveler.unravel(v))), v, alpha=self.damping)

    @property
    def forward_residual(self) -> float:
        """``|grad f(x)| / |x|``."""
        size = float(tree.norm(self.point.params))
        return self.residual / size if size > 0 else 0.0

    @property
    def rounding(self) -> float:
        """The relative residual at rounding."""
        (like, *_) = tree.leaves(self.point.params)
        return float(FLOOR * torch.finfo(like.dtype).eps * self.largest)

    @property
    def goal(self) -> float:
        """The relative residual ``|v - H lam| / |lam|`` at which CG stops."""
        return max(BALANCE * self.forward_residual, self.rounding)

    def _at_rounding(self) -> bool:
        size = 0.0 if self.lam is None else float(torch.linalg.vector_norm(self.lam))
        return self.forward_residual <= self.rounding and self.adjoint_residual <= self.rounding * size

    def _solve_adjoint(self) -> None:
        """Continue CG at the present point until the adjoint's relative residual is below the forward run's."""
        v = self.raveler.ravel(self.cotangent)
        start, r = torch.zeros_like(v), v
        if self.lam is not None and self.negative is None:
            continued = v - self.matvec(self.lam)
            if bool(torch.linalg.vector_norm(continued) < torch.linalg.vector_norm(v)):
                start, r = self.lam, continued
        goal, paid = self.goal, max(0.0, self.left() - FINISH) / WEIGHTS["hvp"]
        limit = int(min(self.max_steps, paid)) if float(torch.linalg.vector_norm(v)) > 0 else 0
        result = conjugate_gradients(self.matvec, start, r, lambda run: run.residual <= goal * run.size, limit)
        self.steps += result.steps
        self.lam, self.adjoint_residual, self.negative = result.x, result.residual, result.negative
        smallest, largest = result.spectrum()
        self.largest = max(self.largest, largest)
        self.smallest = float("inf") if self.negative is not None else min(self.smallest, smallest)
