"""Truncated unrolling that chooses its own tail, spends a budget, or extrapolates its sweep."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from bilevel.base import InnerSolver, InnerState, Solution
from bilevel.core import tree
from bilevel.core.options import is_bool, is_positive, option, optional, or_auto, require
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.judge import InnerRun
from bilevel.engine.loop import run_inner
from bilevel.hypergrad.adaptive_sweep import SAFEGUARDS, Point, TailPullback
from bilevel.hypergrad.extrapolation import (
    OMEGA,
    SWEEP_ORDERS,
    Budget,
    Crossing,
    Record,
    best,
    discount_doubt,
    reduced_rank,
    with_steps,
)
from bilevel.hypergrad.tail import check_length, is_tail, length_of, refuse_fixed
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem

AT_LEAST = 50
"""Steps that a run with a tolerance takes in any case, so that a good warm start leaves something to differentiate."""
KEPT = SWEEP_ORDERS[-1] + 2


@dataclass(frozen=True)
class AdaptiveUnroll(HypergradEstimator):
    """Differentiate the last inner steps, as many as pay.

    `budget` T, in gradient-equivalents, pays for steps (1 each) and derivative steps (omega = 3 each), so a shorter
    tail buys more steps: with ``K = floor(T / (1 + omega))`` the steps of a full unroll and N of them not
    differentiated, ``K(N) = K + floor(omega N)`` (Mehmood et al. 2026, section 4.3). It takes the place of
    ``solver.steps``; a tolerance still ends the run early. ``tail="auto"`` steps forward until two computable terms of
    the error cross (`bilevel.hypergrad.extrapolation.Crossing`) and sweeps with the rest. Without a budget, it
    differentiates the whole run, of which all states are kept, and returns the tail that is closest to the extrapolated
    derivative; with a tolerance, at least 50 steps are taken.

    `extrapolate` replaces the last derivative of the sweep by ``-C(xh)' lam``, with the iterates and the adjoint sums
    extrapolated (reduced rank). It falls back to the plain tail, and says so in ``certificate.error_note``, where xh
    has no smaller inner gradient than the last iterate (far from convergence) or lam no smaller adjoint residual. Do
    not use it where the inner loss is not locally convex, nor for heavy ball, whose ripples it mistakes for progress.
    With Hessian-vector products at hand, `BalancedImplicit` is better still.

    Args:
        budget: gradient-equivalents for steps, derivative steps and a measured step size; or None.
        tail: "auto", the number of last steps that are differentiated (an int), or their fraction of the steps (a float
            in (0, 1]; with a budget, of K).
        extrapolate: extrapolate the sweep; for linear multistep solvers other than heavy ball.

    >>> AdaptiveUnroll(budget=400)
    AdaptiveUnroll(budget=400, tail='auto', extrapolate=False)
    """

    budget: float | None = option(None, "a positive number or None", optional(is_positive))
    tail: int | float | str = option(
        "auto", "'auto', a positive int (steps) or a float in (0, 1] (fraction)", or_auto(is_tail)
    )
    extrapolate: bool = option(False, "True or False", is_bool)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is None:
            return
        least = 1.0 + OMEGA + self._reserve
        what = f"at least {least:g} gradient-equivalents (one step and one derivative step)"
        require(self, "budget", what, self.budget >= least)
        full = int((self.budget - self._reserve) / (1.0 + OMEGA))
        if isinstance(self.tail, int) and self.tail > full:
            raise ValueError(
                f"`AdaptiveUnroll.tail` is {self.tail}, but the budget {self.budget:g} pays for {full} differentiated "
                "steps at most."
            )

    @property
    def differentiates_steps(self) -> bool:
        """A tail that chooses itself compares with the derivative of the inner solution."""
        return self.tail != "auto" and not self.extrapolate

    @property
    def _reserve(self) -> float:
        """Gradient-equivalents that are put aside for the looks of an extrapolation."""
        return SAFEGUARDS if self.extrapolate else 0.0

    @property
    def requires(self) -> Set[str]:
        return super().requires | {"differentiable_steps", "one_inner_loss", "smooth"}

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Refuse a tail longer than the run, and an extrapolation that is not allowed; ValueError says so."""
        super().check(problem, solver, hparams)
        if self.budget is None:
            check_length(self, solver)
        if not self.extrapolate:
            return
        if solver.traits.oscillates:
            raise ValueError(
                f"`AdaptiveUnroll.extrapolate` is refused for {type(solver).__name__}, whose ripples make "
                "extrapolated sweeps up to 18 times worse than plain ones: "
                "use extrapolate=False, or BalancedImplicit()."
            )
        if not solver.traits.multistep or not problem.symmetric:
            raise ValueError(
                "`AdaptiveUnroll.extrapolate` needs an inner loss and a linear multistep solver (GradientDescent, "
                f"Nesterov, ...), got {type(solver).__name__}: other sweeps have no limit that extrapolation finds."
            )

    def at_tolerance(self, tol: float) -> AdaptiveUnroll:
        """Return itself if the tail grows with the run; ValueError for one of a fixed length, and for a budget."""
        if self.budget is not None:
            raise ValueError("`AdaptiveUnroll.budget` and a `target_error` both say when to stop: give one of them.")
        refuse_fixed(self.tail)
        return self

    def solve(self, run: Run) -> Solution:
        """Run as the budget or the solver's own rule says; an accepted extrapolation gives the solution's params."""
        inner, solver = run.inner(), run.solver
        budget = None if self.budget is None else Budget.of(self.budget, inner)
        state = run.begin()
        record = Record(solver, state.params)
        if budget is not None and self.tail == "auto":
            end, length, choose = self._crossing(inner, solver, state, record, budget)
        else:
            end, length = self._fixed(inner, solver, state, record, budget)
            choose = self.tail == "auto"
        record.close(end.state)
        if budget is not None:
            end = discount_doubt(end, solver)
        run.meter.sample()
        choose = choose and not self.extrapolate
        wanted = (choose or self.extrapolate) and end.verdict.status.usable
        point, note = _extrapolated(inner, record, end) if wanted else (None, "")
        sweep = TailPullback(
            inner=inner,
            solver=solver,
            kept=record.tail(length),
            allowance=float("inf") if budget is None else max(budget.left(end.steps), OMEGA * length),
            choose=choose,
            extrapolate=self.extrapolate,
            point=point,
            note=note if self.extrapolate else "",
        )
        if self.extrapolate and point is not None:
            return Solution(point.params, end.state, sweep, point.residual, end.steps, end.verdict)
        return end.solution(solver.params(end.state), sweep)

    def _crossing(
        self, inner: InnerProblem, solver: InnerSolver, state: InnerState, record: Record, budget: Budget
    ) -> tuple[InnerRun, int, bool]:
        """Run until the two terms cross; returns the run, the tail, and whether another may be chosen."""
        rule = Crossing(record, budget, self._reserve)
        solver = with_steps(solver, int(budget.left()), tree.leaves(state.params)[0].dtype)
        run = run_inner(inner, solver, state, rule.visit, at_least=rule.full_unroll)
        chosen = record.last == run.steps
        record.close(run.state)
        return run, rule.n, not chosen

    def _fixed(
        self, inner: InnerProblem, solver: InnerSolver, state: InnerState, record: Record, budget: Budget | None
    ) -> tuple[InnerRun, int]:
        """Run to the end of the budget, or as the solver's own rule says; returns the run and the longest tail."""
        dtype, reserve = tree.leaves(state.params)[0].dtype, self._reserve
        if budget is not None:
            full = int((budget.left() - reserve) / (1.0 + OMEGA))
            at_least = length = min(length_of(self.tail, full), full)
            if length < 1:
                raise ValueError(
                    f"`AdaptiveUnroll.budget` {budget.total:g} leaves {budget.left():g} gradient-equivalents after the "
                    "measured step size: too few for one derivative step."
                )
            solver = with_steps(solver, int(budget.left() - reserve - OMEGA * length), dtype)
        else:
            limit, _ = solver.limits(dtype)
            length = length_of(self.tail, limit)
            at_least = min(limit, AT_LEAST) if self.tail == "auto" else length if isinstance(self.tail, int) else 1

        def visit(before: InnerState) -> bool:
            record.add(before)
            index = record.last - max(length, KEPT)
            record.drop(index, index + 1)
            # Looks at a tolerance may cost gradients of their own.
            return budget is not None and budget.left(record.last) - reserve <= OMEGA * length

        run = run_inner(inner, solver, state, visit, at_least=at_least)
        # How many steps a fraction means is known only after a run that stops by tolerance.
        return run, length_of(self.tail, run.steps) if budget is None else length


def _extrapolated(inner: InnerProblem, record: Record, run: InnerRun) -> tuple[Point | None, str]:
    """Return the extrapolated iterate where it is better than the last one, else the reason why not."""
    vectors = record.end(KEPT)
    if len(vectors) < 4:
        return None, "no extrapolation: the run is too short"
    params = record.unravel(best(reduced_rank(vectors, SWEEP_ORDERS)).vector)
    residual = float(tree.norm(inner.grad(params)))
    if residual < run.residual:
        return Point(params, residual), ""
    return None, (
        f"no extrapolation: the inner gradient {residual:.2e} at the extrapolated iterate is not below "
        f"{run.residual:.2e} at the last one (far from convergence, or at rounding)"
    )
