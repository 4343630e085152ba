"""Implicit differentiation that shares one budget between the forward run and the adjoint system.

The error of ``p = -C(x)' lam`` comes from the iterate x and from lam, and a unit of work is best spent on the larger
part. Both have a relative residual, and the smallest eigenvalue that would turn either into an error cancels:

    |grad f(x)| / |x|    against    |v - H(x) lam| / |lam|,    v the gradient of the outer loss at x

So the forward run pauses at shares of the budget; at the safeguarded extrapolated iterate CG goes on from the lam of
the last pause until its side is `BALANCE` times the other; the rest is shared again. A direction of negative curvature
stops CG: lam is dropped, half of what is left is put aside for an unrolled tail, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Pullback, Solution
from bilevel.core import tree
from bilevel.core.cost import WEIGHTS
from bilevel.core.device import to_floats
from bilevel.core.status import Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.estimator import Run
from bilevel.engine.extrapolation import (
    ITERATE_ORDERS,
    OMEGA,
    Budget,
    Record,
    discount_doubt,
    reduced_rank,
    with_steps,
)
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import run_inner
from bilevel.hypergrad.adaptive_unroll import Sweep
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
TRUST = 0.5
"""After negative curvature the result is used if its estimated relative error is at most this."""
PROBE = 15
FALLBACK = 100
"""Without a budget, states kept for the tail that takes over at negative curvature."""


@dataclass
class Balance:
    """The state of the balanced run: what the last pause found.

    Attributes:
        problem: the problem.
        inner: the bound problem.
        solver: the inner solver.
        budget: what forward run and adjoint share; None where the solver's own rule ends the run.
        record: receives the states.
        damping: added to the diagonal of the Hessian.
        max_steps: most CG steps of one pause.
        mark: step of the next pause.
        reserve: what is put aside for the unrolled tail.
    """

    problem: BilevelProblem
    inner: InnerProblem
    solver: InnerSolver
    budget: Budget | None
    record: Record
    damping: float
    max_steps: int
    mark: int | None = None
    reserve: float = 0.0
    kept: int = FALLBACK
    lam: Tensor | None = None
    cotangent: Tree = None
    point: Linearization | None = None
    gradient: Tree = None
    residual: float = float("nan")
    adjoint_residual: float = float("nan")
    negative: float | None = None
    ever_negative: bool = False
    smallest: float = float("inf")
    largest: float = 0.0
    steps: int = 0
    done: bool = field(default=False)

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
        self._look(state)
        self._solve_adjoint()
        usable = self.left() - PAUSE - FINISH
        if self.negative is not None and self.budget is not None and not self.ever_negative:
            self.reserve = max(0.0, self.left() / 2)
            usable = self.left() - PAUSE - FINISH
        self.ever_negative = self.ever_negative or self.negative is not None
        self.done = usable <= 1.0 or (self.negative is None and self._at_rounding())
        self.done = self.done or self.budget is None
        if not self.done:
            self.mark = self.record.last + max(1, int(usable if usable < SMALL else SHARE * usable))
        return self.done

    def _look(self, state: InnerState) -> None:
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

    def product(self, point: Linearization) -> Callable[[Tensor], Tensor]:
        """Return the (damped) Hessian at a point as an operator on vectors."""
        raveler = tree.Raveler(point.params)

        def matvec(v: Tensor) -> Tensor:
            return torch.add(raveler.ravel(point.hvp(raveler.unravel(v))), v, alpha=self.damping)

        return matvec

    @property
    def forward_residual(self) -> float:
        """``|grad f(x)| / |x|``."""
        assert self.point is not None
        size = float(tree.norm(self.point.params))
        return self.residual / size if size > 0 else 0.0

    def _rounding(self) -> float:
        assert self.point is not None
        (like, *_) = tree.leaves(self.point.params)
        return float(FLOOR * torch.finfo(like.dtype).eps * self.largest)

    def _at_rounding(self) -> bool:
        size = 0.0 if self.lam is None else float(torch.linalg.vector_norm(self.lam))
        floor = self._rounding()
        return self.forward_residual <= floor and self.adjoint_residual <= floor * size

    def _solve_adjoint(self) -> None:
        """Continue CG at the present point until the adjoint's relative residual is below the forward run's."""
        assert self.point is not None
        v = tree.Raveler(self.point.params).ravel(self.cotangent)
        matvec = self.product(self.point)
        start, r = (torch.zeros_like(v), v) if self.lam is None or self.negative is not None else (self.lam, v)
        if start is self.lam:
            r = v - matvec(start)
            if not bool(torch.linalg.vector_norm(r) < torch.linalg.vector_norm(v)):
                start, r = torch.zeros_like(v), v
        scale = float(torch.linalg.vector_norm(v))
        goal = max(BALANCE * self.forward_residual, self._rounding())
        paid = max(0.0, self.left() - FINISH) / WEIGHTS["hvp"]
        limit = int(min(self.max_steps, paid)) if scale > 0 else 0
        result = conjugate_gradients(matvec, start, r, lambda run: run.residual <= goal * run.size, limit)
        self.steps += result.steps
        self.lam, self.adjoint_residual, self.negative = result.x, result.residual, result.negative
        smallest, largest = result.spectrum()
        self.largest = max(self.largest, largest)
        self.smallest = float("inf") if self.negative is not None else min(self.smallest, smallest)


def solve(run: Run, budget: float | None, damping: float, max_steps: int | None) -> Solution:
    """Run forward and adjoint in turns, then say whether the result is used or a truncated tail takes over.

    Args:
        run: what is asked for; the adjoint of its carry starts CG.
        budget: gradient-equivalents, or None where the solver's own rule ends the forward run.
        damping: added to the diagonal of the Hessian.
        max_steps: most CG steps of one pause.

    Returns:
        A solution at the extrapolated iterate, or at the last one where the tail takes over.

    Raises:
        ValueError: if a measured step size has used up the budget.
    """
    inner, solver, carry = run.inner(), run.solver, run.carry
    shared = None if budget is None else Budget.of(budget, inner)
    state = run.begin()
    dtype = tree.leaves(state.params)[0].dtype
    limit = max(100, 10 * tree.size(state.params)) if max_steps is None else max_steps
    balance = Balance(run.problem, inner, solver, shared, Record(solver, state.params), damping, limit)
    raveler = tree.Raveler(state.params)
    balance.lam = None if carry.adjoint is None else raveler.ravel(carry.adjoint)
    used = solver
    if shared is not None:
        if shared.left() < LEAST:
            raise ValueError(
                f"`Implicit.budget` {shared.total:g} leaves {shared.left():g} gradient-equivalents after the measured "
                f"step size: at least {LEAST:g} are needed."
            )
        balance.mark = max(1, min(int(shared.left() / 2), int(shared.left() - PAUSE - FINISH - 4.0)))
        balance.kept = int(shared.left() / 2 / OMEGA) + 1
        used = with_steps(solver, int(shared.left()), dtype)
    end = run_inner(inner, used, state, balance.visit, at_least=1)
    if shared is not None:
        end = discount_doubt(end, solver)
    run.meter.sample()
    if not end.verdict.status.usable:
        return end.solution(solver.params(end.state), _nothing)
    if not balance.done:
        balance.record.close(end.state)
        balance.pause(end.state)
    return _finish(balance, end)


def _nothing(cotangent: Tree) -> Pullback:
    raise RuntimeError("the inner solve has failed: there is nothing to pull back.")


def _finish(balance: Balance, run: InnerRun) -> Solution:
    """Accept the balanced adjoint or fall back to the tail."""
    solver, point = balance.solver, balance.point
    assert point is not None
    reason = ""
    error: float | None = None
    if balance.negative is not None:
        reason = f"CG met the curvature {balance.negative:.3g}"
    else:
        # From here on the reserve pays: for the probe first, for the tail if the probe refuses.
        probe = PROBE if balance.budget is None else min(PROBE, int(balance.reserve / 2 / (3 * WEIGHTS["hvp"])))
        error, size = _estimate(balance, probe if balance.ever_negative else 0)
        if balance.ever_negative and not error <= TRUST * size:
            reason = f"negative curvature was met on the way, and the estimated error {error:.2e} is large"
    if not reason:
        return Solution(point.params, run.state, Adjoint(balance, error), balance.residual, run.steps, run.verdict)
    balance.reserve = 0.0
    length = balance.kept if balance.budget is None else max(1, int(balance.left() / OMEGA))
    note = f"no estimate: {reason}, so a truncated tail took the place of the adjoint system"
    allowance = float("inf") if balance.budget is None else max(balance.left(), OMEGA)
    sweep = Sweep(balance.inner, solver, balance.record.tail(length), allowance, note=note)
    return run.solution(solver.params(run.state), sweep)


def _estimate(balance: Balance, probe: int) -> tuple[float, float]:
    """Estimate the error of the balanced hypergradient.

    With ``r = v - H lam``, ``dx = -grad f / l`` for l the smallest Ritz value of CG, and dv, df the changes of the
    outer gradients from x to x + dx:

        |C' r| / l + |C' dv| / l + |df| + |(C(x+dx) - C)' lam| + |C' (H(x+dx) - H) lam| / l

    After negative curvature (`probe` > 0) each division by l becomes that many CG steps on H, and dx their Newton step:
    the sharper figure EST2, which sees where the linearisation ends.

    Args:
        balance: the finished run.
        probe: CG steps of EST2, or 0.

    Returns:
        (estimated error, norm of the hypergradient).
    """
    point, lam, inner = balance.point, balance.lam, balance.inner
    assert point is not None
    assert lam is not None
    raveler = tree.Raveler(point.params)
    matvec = balance.product(point)
    v, gradient = raveler.ravel(balance.cotangent), raveler.ravel(balance.gradient)
    # A residual at rounding, or an adjoint of zero, has met no curvature; the largest known one is then as good.
    smallest = balance.smallest if balance.smallest < float("inf") else max(balance.largest, 1.0)

    def invert(b: Tensor) -> Tensor:
        if not probe:
            return b / smallest
        return conjugate_gradients(matvec, torch.zeros_like(b), b, lambda run: False, probe).x

    there = inner.linearize(raveler.unravel(raveler.ravel(point.params) - invert(gradient)))
    product = matvec(lam)
    inner.counts["outer"] += 1
    _, here_x, here_u = balance.problem.outer_value_and_grads(point.params, inner.hparams)
    _, there_x, there_u = balance.problem.outer_value_and_grads(there.params, inner.hparams)
    moved_h, moved_c = there.vjp(raveler.unravel(lam))
    cross = point.cross(raveler.unravel(lam))
    total = tree.add(here_u, cross, -1.0)
    curved = raveler.ravel(moved_h) + balance.damping * lam - product
    turned = raveler.ravel(there_x) - raveler.ravel(here_x)
    balance.adjoint_residual = float(torch.linalg.vector_norm(v - product))
    parts = [
        *(tree.norm(point.cross(raveler.unravel(invert(b)))) for b in (v - product, turned, curved)),
        tree.norm(tree.add(there_u, here_u, -1.0)),
        tree.norm(tree.add(moved_c, cross, -1.0)),
    ]
    size = float(tree.norm(total))
    return float(torch.stack(parts).sum()) + FLOOR * torch.finfo(lam.dtype).eps * size, size


@dataclass(frozen=True)
class Adjoint:
    """The pullback of an accepted balanced run.

    The outer gradient at the solution has been solved for already. Any other cotangent (in `bilevel.solution`) is
    solved for anew to the same relative residual, on top of the budget.

    Attributes:
        balance: the finished run.
        error: estimated error of the hypergradient.
    """

    balance: Balance
    error: float | None

    def __call__(self, cotangent: Tree) -> Pullback:
        """Pull back one cotangent."""
        balance = self.balance
        point = balance.point
        assert point is not None
        raveler = tree.Raveler(point.params)
        v, known = raveler.ravel(cotangent), raveler.ravel(balance.cotangent)
        if balance.lam is not None and torch.equal(v, known):
            steps, note = balance.steps, "residuals of forward run and adjoint, over the smallest Ritz value of CG"
            return self._result(raveler.unravel(balance.lam), v, balance.adjoint_residual, steps, self.error, note)
        goal = max(BALANCE * balance.forward_residual, balance._rounding())
        matvec, limit = balance.product(point), balance.max_steps
        result = conjugate_gradients(matvec, torch.zeros_like(v), v, lambda run: run.residual <= goal * run.size, limit)
        if result.negative is not None:
            verdict = Verdict(Status.NEGATIVE_CURVATURE, f"CG met the curvature {result.negative:.3g}")
            return Pullback(tree.zeros_like(balance.inner.hparams), steps=result.steps, verdict=verdict)
        note = "the balanced run's estimate is for the gradient of the outer loss alone"
        return self._result(raveler.unravel(result.x), v, result.residual, result.steps, None, note)

    def _result(self, lam: Tree, v: Tensor, residual: float, steps: int, error: float | None, note: str) -> Pullback:
        point = self.balance.point
        assert point is not None
        scale = float(torch.linalg.vector_norm(v))
        relative = residual / scale if scale > 0 else 0.0
        return Pullback(tree.scale(-1.0, point.cross(lam)), lam, relative, steps, error=error, error_note=note)
