"""Implicit differentiation that splits one budget between the inner run and conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import Pullback, Solution
from bilevel.core import tree
from bilevel.core.cost import WEIGHTS
from bilevel.core.options import is_int, is_not_negative, is_positive, option, optional, require
from bilevel.core.status import Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import run_inner
from bilevel.hypergrad.adaptive_sweep import TailPullback
from bilevel.hypergrad.balanced_run import FINISH, FLOOR, LEAST, PAUSE, Balance
from bilevel.hypergrad.extrapolation import OMEGA, Budget, Record, discount_doubt, with_steps
from bilevel.numerics.conjugate_gradients import conjugate_gradients

TRUST = 0.5
"""After negative curvature the result is used if its estimated relative error is at most this."""
PROBE = 15
"""CG steps for each division by the Hessian in the estimate after negative curvature."""


@dataclass(frozen=True)
class BalancedImplicit(HypergradEstimator):
    """Implicit differentiation whose inner run and conjugate gradients share the work, so that their residuals agree.

    The adjoint system is solved on the way, at extrapolated iterates, until ``|v - H lam| / |lam|`` is a share of
    ``|grad f| / |x|`` (see `bilevel.hypergrad.balanced_run`); the certificate carries an error estimate without
    `certify`. Where CG meets negative curvature, the rest of the budget goes into a truncated unrolled tail instead.
    It needs an inner loss; where that is not convex, an estimate that has met no negative curvature may still be far
    off. The estimate is short where CG has not yet seen the smallest eigenvalue (condition numbers above 1e4 with a
    few hundred gradient-equivalents).

    Args:
        budget: gradient-equivalents for everything (measured step size included), which take the place of
            ``solver.steps``; None: the solver's own rule ends the forward run and CG follows it.
        damping: added to the diagonal of the Hessian; biases the hypergradient.
        max_steps: most CG steps at one iterate; default 10 times the size, at least 100.

    >>> BalancedImplicit(budget=400)
    BalancedImplicit(budget=400, damping=0.0, max_steps=None)
    """

    budget: float | None = option(None, "a positive number or None", optional(is_positive))
    damping: float = option(0.0, "a number that is not negative", is_not_negative)
    max_steps: int | None = option(None, "a positive int or None", optional(is_int))

    requires = frozenset({"inner_solution", "one_inner_loss", "smooth", "symmetric"})
    resumes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        what = f"at least {LEAST:g} gradient-equivalents (one step, one CG step and the looks at both)"
        require(self, "budget", what, self.budget is None or self.budget >= LEAST)

    def at_tolerance(self, tol: float) -> BalancedImplicit:
        """Return itself, as CG follows the inner run; ValueError for a budget, and for damping."""
        if self.budget is not None:
            raise ValueError("`BalancedImplicit.budget` and a `target_error` both say when to stop: give one of them.")
        if self.damping:
            raise ValueError(
                f"`BalancedImplicit.damping` {self.damping:g} biases the hypergradient, so that no tolerance leads to "
                "a `target_error`: use damping=0."
            )
        return self

    def solve(self, run: Run) -> Solution:
        """Run forward and adjoint in turns; ValueError if a measured step size has used up the budget."""
        inner, solver, carry = run.inner(), run.solver, run.carry
        budget = None if self.budget is None else Budget.of(self.budget, inner)
        state = run.begin()
        raveler = tree.Raveler(state.params)
        limit = max(100, 10 * tree.size(state.params)) if self.max_steps is None else self.max_steps
        lam = None if carry.adjoint is None else raveler.ravel(carry.adjoint)
        record = Record(solver, state.params)
        balance = Balance(run.problem, inner, solver, budget, record, raveler, self.damping, limit, lam)
        used = solver
        if budget is not None:
            left = budget.left()
            if left < LEAST:
                raise ValueError(
                    f"`BalancedImplicit.budget` {budget.total:g} leaves {left:g} gradient-equivalents after the "
                    f"measured step size: at least {LEAST:g} are needed."
                )
            balance.mark = max(1, min(int(left / 2), int(left - PAUSE - FINISH - 4.0)))
            balance.kept = int(left / 2 / OMEGA) + 1
            used = with_steps(solver, int(left), tree.leaves(state.params)[0].dtype)
        end = run_inner(inner, used, state, balance.visit, at_least=1)
        if budget is not None:
            end = discount_doubt(end, solver)
        run.meter.sample()
        if not end.verdict.status.usable:
            return end.solution(solver.params(end.state), _nothing)
        if not balance.done:
            record.close(end.state)
            balance.pause(end.state)
        return _finish(balance, end)


def _nothing(cotangent: Tree) -> Pullback:
    raise RuntimeError("the inner solve has failed: there is nothing to pull back.")


def _finish(balance: Balance, run: InnerRun) -> Solution:
    """Accept the balanced adjoint or fall back to the tail."""
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
        params, pullback = balance.point.params, Adjoint(balance, error)
        return Solution(params, run.state, pullback, balance.residual, run.steps, run.verdict)
    balance.reserve = 0.0
    length = balance.kept if balance.budget is None else max(1, int(balance.left() / OMEGA))
    note = f"no estimate: {reason}, so a truncated tail took the place of the adjoint system"
    sweep = TailPullback(
        balance.inner, balance.solver, balance.record.tail(length), max(balance.left(), OMEGA), note=note
    )
    return run.solution(balance.solver.params(run.state), sweep)


def _estimate(balance: Balance, probe: int) -> tuple[float, float]:
    """Estimate the error of the balanced hypergradient.

    With ``r = v - H lam``, ``dx = -grad f / l`` for l the smallest Ritz value of CG, and dv, df the changes of the
    outer gradients from x to x + dx:

        |C' r| / l + |C' dv| / l + |df| + |(C(x+dx) - C)' lam| + |C' (H(x+dx) - H) lam| / l

    After negative curvature (`probe` > 0) each division by l becomes that many CG steps on H, and dx their Newton step:
    the sharper figure EST2, which sees where the linearisation ends.

    Returns:
        (estimated error, norm of the hypergradient).
    """
    point, lam, inner = balance.point, balance.lam, balance.inner
    assert lam is not None
    ravel, unravel = balance.raveler.ravel, balance.raveler.unravel
    v = ravel(balance.cotangent)
    # A residual at rounding, or an adjoint of zero, has met no curvature; the largest known one is then as good.
    smallest = balance.smallest if balance.smallest < float("inf") else max(balance.largest, 1.0)

    def invert(b: Tensor) -> Tensor:
        if not probe:
            return b / smallest
        return conjugate_gradients(balance.matvec, torch.zeros_like(b), b, lambda run: False, probe).x

    there = inner.linearize(unravel(ravel(point.params) - invert(ravel(balance.gradient))))
    product = balance.matvec(lam)
    inner.counts["outer"] += 1
    _, here_x, here_u = balance.problem.outer_value_and_grads(point.params, inner.hparams)
    _, there_x, there_u = balance.problem.outer_value_and_grads(there.params, inner.hparams)
    moved_h, moved_c = there.vjp(unravel(lam))
    cross = point.cross(unravel(lam))
    curved = ravel(moved_h) + balance.damping * lam - product
    turned = ravel(there_x) - ravel(here_x)
    balance.adjoint_residual = float(torch.linalg.vector_norm(v - product))
    parts = [
        *(tree.norm(point.cross(unravel(invert(b)))) for b in (v - product, turned, curved)),
        tree.norm(tree.add(there_u, here_u, -1.0)),
        tree.norm(tree.add(moved_c, cross, -1.0)),
    ]
    size = float(tree.norm(tree.add(here_u, cross, -1.0)))
    return float(torch.stack(parts).sum()) + FLOOR * torch.finfo(lam.dtype).eps * size, size


@dataclass(frozen=True)
class Adjoint:
    """The pullback of an accepted balanced run.

    The outer gradient at the solution has been solved for already. Any other cotangent (in `bilevel.solution`) is
    solved for anew to the same relative residual, on top of the budget.
    """

    balance: Balance
    error: float | None

    def __call__(self, cotangent: Tree) -> Pullback:
        """Pull back one cotangent."""
        balance = self.balance
        v = balance.raveler.ravel(cotangent)
        if balance.lam is not None and torch.equal(v, balance.raveler.ravel(balance.cotangent)):
            note = "residuals of forward run and adjoint, over the smallest Ritz value of CG"
            return self._pulled(balance.lam, v, balance.adjoint_residual, balance.steps, self.error, note)
        goal, nothing = balance.goal, torch.zeros_like(v)
        result = conjugate_gradients(
            balance.matvec, nothing, v, lambda run: run.residual <= goal * run.size, balance.max_steps
        )
        if result.negative is not None:
            verdict = Verdict(Status.NEGATIVE_CURVATURE, f"CG met the curvature {result.negative:.3g}")
            return Pullback(tree.zeros_like(balance.inner.hparams), steps=result.steps, verdict=verdict)
        note = "the balanced run's estimate is for the gradient of the outer loss alone"
        return self._pulled(result.x, v, result.residual, result.steps, None, note)

    def _pulled(self, x: Tensor, v: Tensor, residual: float, steps: int, error: float | None, note: str) -> Pullback:
        lam, scale = self.balance.raveler.unravel(x), float(torch.linalg.vector_norm(v))
        total = tree.scale(-1.0, self.balance.point.cross(lam))
        return Pullback(total, lam, residual / scale if scale > 0 else 0.0, steps, error=error, error_note=note)
