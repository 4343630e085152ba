"""Implicit differentiation: the implicit function theorem at the last inner iterate.

At a solution ``g(x, u) = 0`` (g the inner gradient), ``dx/du = -H^-1 C``, so the VJP of the solution map is

    H' w = cotangent,       u' = -C' w

and the only work is one linear solve (Bengio 2000; Pedregosa 2016; Lorraine et al. 2020).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bilevel.base import Carry, InnerSolver, LinearSolver, Pullback, Solution
from bilevel.base.requirements import check_requirements
from bilevel.core import rows, tree
from bilevel.core.declared import deprecated_options
from bilevel.core.options import is_not_negative, option, require
from bilevel.core.status import Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.hypergrad.balanced_implicit import BalancedImplicit
from bilevel.linear import CG
from bilevel.networks.gauss_newton import gauss_newton
from bilevel.oracles.exact import Exact
from bilevel.oracles.inner_problem import Linearization
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class Implicit(HypergradEstimator):
    """Differentiate the optimality condition; the inner solver is never differentiated.

    Memory is independent of the number of inner steps. The formula holds at a solution: the inner residual in the
    certificate says how far away the iterate is, the adjoint residual how exactly the linear system was solved. Running
    statistics of BatchNorm are those of the inner batch at the solution, ``b = s(x, u)``; their cotangent is pulled
    back through s first. Curvature that the inner solver keeps (`QuasiNewton`) preconditions CG.

    For networks, whose inner problem is rarely solved, take a few products and report what they leave:
    ``Implicit(CG(steps=10), damping=0.1, curvature="gauss-newton")``.

    Args:
        linear_solver: CG, GMRES, Neumann, FixedPointIteration, Direct or Nystrom.
        damping: added to the diagonal of the Hessian, for every linear solver; biases the hypergradient, and lifts
            negative curvature. The adjoint residual is that of the damped system.
        curvature: "hessian", or "gauss-newton" for a problem of `ModuleProblem`: the Hessian without the
            model's own curvature, positive semidefinite wherever the loss is convex in the model's outputs and params
            (see `bilevel.networks.gauss_newton`). It biases the hypergradient unless the model is linear or fits the
            data; the adjoint residual is that of the Gauss-Newton system.
        balance: deprecated: `BalancedImplicit`.
        budget: deprecated: `BalancedImplicit`.

    >>> Implicit().linear_solver
    CG(tol=None, max_steps=None, check_every=None, steps=None)
    """

    linear_solver: LinearSolver = field(default_factory=CG)
    damping: float = option(0.0, "a number that is not negative", is_not_negative)
    curvature: str = option("hessian", "'hessian' or 'gauss-newton'", ("hessian", "gauss-newton").__contains__)
    balance: str | None = field(default=None, kw_only=True)
    budget: float | None = field(default=None, kw_only=True)

    resumes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "linear_solver", "a LinearSolver, such as CG()", isinstance(self.linear_solver, LinearSolver))
        require(self, "balance", "'auto' or None", self.balance in (None, "auto"))
        if self.successor is None:
            require(self, "budget", "None: BalancedImplicit takes a budget", self.budget is None)
            return
        plain = type(self.linear_solver) is CG and self.linear_solver.steps is None
        require(self, "linear_solver", "CG, without `steps`, where balance='auto'", plain)
        require(self, "curvature", "'hessian' where balance='auto'", self.curvature == "hessian")
        deprecated_options(self, self.successor)

    @property
    def successor(self) -> BalancedImplicit | None:
        """The estimator that deprecated options stand for."""
        if self.balance is None:
            return None
        return BalancedImplicit(self.budget, self.damping, getattr(self.linear_solver, "max_steps", None))

    @property
    def rowwise(self) -> bool:
        return self.successor is None and self.linear_solver.rowwise

    @property
    def open_tolerance(self) -> bool:
        return self.successor is None and self.linear_solver.tol is None

    @property
    def requires(self) -> Set[str]:
        return super().requires | ({"module_loss"} if self.curvature == "gauss-newton" else set())

    def check(self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree) -> None:
        """Refuse what its linear solver does not cover, too; ValueError says why."""
        if self.successor is not None:
            return self.successor.check(problem, solver, hparams)
        super().check(problem, solver, hparams)
        check_requirements(self.linear_solver, problem, solver)

    def at_tolerance(self, tol: float) -> HypergradEstimator:
        """Set that of the linear solver; ValueError for what biases, and for a linear solver of a number of steps."""
        if self.successor is not None:
            return self.successor.at_tolerance(tol)
        if self.damping:
            raise ValueError(
                f"`Implicit.damping` {self.damping:g} biases the hypergradient, so that no tolerance leads to a "
                "`target_error`: use damping=0."
            )
        if self.curvature == "gauss-newton":
            raise ValueError(
                "`Implicit.curvature` 'gauss-newton' biases the hypergradient, so that no tolerance leads to a "
                "`target_error`: use curvature='hessian'."
            )
        return replace(self, linear_solver=self.linear_solver.at_tolerance(tol))

    def at_once(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry | None
    ) -> Exact | None:
        if self.damping or self.curvature != "hessian" or self.successor is not None:
            return None
        if not solver.dense_newton or not self.linear_solver.dense_factor:
            return None
        state = None if carry is None else carry.state
        start = state.params if state is not None else problem.params if params is None else params
        most, tol = solver.limits(torch.float64)
        return None if tol is None else problem.newton(hparams, start, most, tol, state and state.cache)

    def solve(self, run: Run) -> Solution:
        if self.successor is not None:
            return self.successor.solve(run)
        problem, solver, counts = run.problem, run.solver, run.meter.counts
        inner, end = run.inner(), run.solve()
        solved, size = inner.equilibrium(solver.params(end.state)), problem.batch
        missed = "" if size is not None else solver.misses(inner, end.state, end.residual)
        if missed:
            end = replace(end, verdict=end.verdict.worse(Verdict(Status.INACCURATE, missed)))

        def pullback(cotangent: Tree) -> Pullback:
            # A failed row has no cotangent, and so nothing to solve.
            cotangent = cotangent if size is None else rows.where(end.usable, cotangent, 0.0)
            # The run has looked at it, and counted it, unless a row failed and its params were put back.
            gradient = inner.grad(solved)
            before = Counter() if size is None else Counter(counts)
            point = inner.linearize(solved)
            cotangent, direct = inner.equilibrium_vjp(solved, cotangent)
            loss = problem.module_loss if self.curvature == "gauss-newton" else None
            product = point.hvp if loss is None else gauss_newton(point, loss)
            # Measuring curvature for this solve alone does not pay; what the inner solver has kept is there already.
            cache = end.state.cache
            solution = self.linear_solver.solve(
                _damped(product, self.damping),
                cotangent,
                run.carry.adjoint,
                dense=_damped_matrix(point, self.damping) if loss is None else None,
                precondition=None if cache is None else point.preconditioner(cache).apply,
                damping=self.damping,
                definite=problem.symmetric,
                rows=size is not None,
            )
            run.meter.sample()
            total = tree.scale(-1.0, point.cross(solution.x))
            return Pullback(
                total if direct is None else tree.add(total, direct),
                solution.x,
                solution.residual,
                solution.steps,
                solution.verdict,
                value_error=rows.dot(solution.x, gradient, size),
                counts=() if size is None else _counts(counts, before, solution.steps),
            )

        return end.solution(solved, pullback)


def _damped(product: Callable[[Tree], Tree], damping: float) -> Callable[[Tree], Tree]:
    """Return ``v -> A v + damping v`` for a product ``v -> A v``, such as `Linearization.hvp`; not negative."""
    if not damping:
        return product
    return lambda v: tree.add(product(v), v, damping)


def _damped_matrix(point: Linearization, damping: float) -> Callable[[], Tensor]:
    """Return what makes ``H' + damping I`` as a matrix; of a batch, those of all members."""

    def dense() -> Tensor:
        matrix = point.dense_hessian().mT
        return matrix + damping * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)

    return dense


def _counts(after: Counter[str], before: Counter[str], steps: Sequence[int]) -> list[Counter[str]]:
    """Return the oracle calls of a linear solve that each row took part in: the last products are those of others."""
    return [after - before - Counter(hvp=max(steps) - each) for each in steps]
