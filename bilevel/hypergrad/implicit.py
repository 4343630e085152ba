"""Implicit differentiation: the implicit function theorem at the last inner iterate.

At a solution ``g(x, u) = 0`` (g the inner gradient), ``dx/du = -H^-1 C``, so the VJP of the solution map is

    H' w = cotangent,       u' = -C' w

and the only work is one linear solve (Bengio 2000; Pedregosa 2016; Lorraine et al. 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from bilevel import tree
from bilevel.base import BatchSolution, Carry, HypergradEstimator, InnerSolver, LinearSolver, Pullback, Solution
from bilevel.cost import Meter
from bilevel.hypergrad import balanced, batch_implicit
from bilevel.hypergrad.damping import damped
from bilevel.hypergrad.loop import begin, run_inner
from bilevel.linear import CG
from bilevel.options import is_number, is_positive, require
from bilevel.problem import BilevelProblem
from bilevel.tree import Tree


@dataclass(frozen=True)
class Implicit(HypergradEstimator):
    """Differentiate the optimality condition; the inner solver is never differentiated.

    Memory is independent of the number of inner steps. The formula holds at a solution: the inner residual in the
    certificate says how far away the iterate is, the adjoint residual how exactly the linear system was solved.
    Curvature that the inner solver keeps (`QuasiNewton`) preconditions CG.

    Args:
        linear_solver: CG, GMRES, Neumann, FixedPointIteration or Direct.
        damping: added to the diagonal of the Hessian; biases the hypergradient, and lifts negative curvature.
        balance: "auto" lets forward run and CG share the work so that their relative residuals agree, at an
            extrapolated iterate; the certificate then carries an error estimate without `certify`. Negative curvature
            is noticed, and the rest of the budget goes into a truncated unrolled tail instead. It needs CG, of which
            only `max_steps` is used, and an inner loss; where that is not convex, an estimate that has met no negative
            curvature may still be far off. The estimate is short where CG has not yet seen the smallest eigenvalue
            (condition numbers above 1e4 with a few hundred gradient-equivalents).
        budget: gradient-equivalents for everything (measured step size included), which take the place of
            ``solver.steps``; None: the solver's own rule ends the forward run and CG follows it.

    >>> Implicit().linear_solver
    CG(tol=None, max_steps=None, check_every=None)
    """

    linear_solver: LinearSolver = field(default_factory=CG)
    damping: float = 0.0
    balance: str | None = None
    budget: float | None = None

    resumes = True

    def __post_init__(self) -> None:
        require(self, "balance", "'auto' or None", self.balance in (None, "auto"))
        require(self, "budget", "a positive number or None", self.budget is None or is_positive(self.budget))
        if self.budget is not None:
            require(self, "budget", "None without balance='auto'", self.balance == "auto")
            what = f"at least {balanced.LEAST:g} gradient-equivalents (one step, one CG step and the looks at both)"
            require(self, "budget", what, self.budget >= balanced.LEAST)
        if self.balance == "auto":
            require(self, "linear_solver", "CG where balance='auto'", isinstance(self.linear_solver, CG))
        require(self, "linear_solver", "a LinearSolver, such as CG()", isinstance(self.linear_solver, LinearSolver))
        require(self, "damping", "a number that is not negative", is_number(self.damping) and self.damping >= 0)

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Refuse a symmetric linear solver for an optimality map, and a balanced run on batches.

        Raises:
            ValueError: if the solver needs symmetry that the problem does not promise; for a balanced run on batches.
        """
        if self.balance == "auto" and problem.sampler is not None:
            raise ValueError(
                "`Implicit.balance` compares steps of one inner loss, but this problem has a sampler, whose steps see "
                "different batches: use Implicit() without balance."
            )
        if self.linear_solver.needs_symmetry and not problem.symmetric:
            raise ValueError(
                f"{type(self.linear_solver).__name__} needs a symmetric matrix, but this problem is stated by an "
                "optimality map, whose Jacobian need not be symmetric: use Implicit(GMRES())."
            )

    def at_tolerance(self, tol: float) -> Implicit:
        """Return this estimator with the linear solver's tolerance; a balanced run follows the inner one by itself.

        Raises:
            ValueError: for a budget, damping, or a linear solver without a tolerance.
        """
        if self.budget is not None:
            raise ValueError("`Implicit.budget` and a `target_error` both say when to stop: give one of them.")
        if self.damping:
            raise ValueError(
                f"`Implicit.damping` {self.damping:g} biases the hypergradient, so that no tolerance leads to a "
                "`target_error`: use damping=0."
            )
        return self if self.balance else replace(self, linear_solver=self.linear_solver.at_tolerance(tol))

    def solve(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry, meter: Meter
    ) -> Solution:
        """Run the inner solver, keeping nothing but its state; balanced, the adjoint system is solved on the way."""
        if self.balance == "auto" and isinstance(self.linear_solver, CG):
            return balanced.solve(
                problem,
                solver,
                hparams,
                params,
                carry,
                meter,
                budget=self.budget,
                damping=self.damping,
                max_steps=self.linear_solver.max_steps,
            )
        inner = problem.bind(hparams, meter.counts)
        run = run_inner(inner, solver, begin(inner, solver, params, carry))
        solved = solver.params(run.state)

        def pullback(cotangent: Tree) -> Pullback:
            point = inner.linearize(solved)
            matvec, dense = damped(point, self.damping)
            # Measuring curvature for this solve alone does not pay; what the inner solver has kept is there already.
            kept = run.state.kept
            precondition = None if kept is None else point.preconditioner(kept).apply
            solution = self.linear_solver.solve(
                matvec, cotangent, carry.adjoint, dense=dense, precondition=precondition
            )
            meter.sample()
            return Pullback(
                tree.scale(-1.0, point.cross(solution.x)),
                solution.x,
                solution.residual,
                solution.steps,
                solution.verdict,
            )

        return Solution(solved, run.state, pullback, run.residual, run.steps, run.verdict)

    def solve_batch(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry, meter: Meter
    ) -> BatchSolution:
        """Run all members of a batch; their adjoint systems are solved side by side."""
        if self.balance is not None:
            return super().solve_batch(problem, solver, hparams, params, carry, meter)
        return batch_implicit.solve(self.linear_solver, self.damping, problem, solver, hparams, params, carry, meter)
