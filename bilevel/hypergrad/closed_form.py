"""The exact implicit hypergradient of a quadratic inner problem: no inner solver, no iteration.

    H(u) x* = -b(u),      H w = cotangent,      u' = -C(x*)' w

One Cholesky factor of H serves both systems. Where H is ``A + s(u) I``, the eigenbasis of A takes its place: it is
computed once for each problem, when it is solved for the second time, and each u costs a few products with Q. Where
that loses half of the digits of the adjoint, the factor, whose solutions are refined, has the last word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import Carry, InnerSolver, Pullback, Solution
from bilevel.core import tree
from bilevel.core.status import GOOD, Status, Verdict
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.hypergrad.eigenbasis_sweep import Sweep, outer_at, stacked
from bilevel.numerics.dense import FACTORED, check_factored, factored
from bilevel.numerics.eigenbasis import Eigenbasis
from bilevel.oracles.exact import Exact
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class ClosedForm(HypergradEstimator):
    """Solve a quadratic inner problem and its adjoint exactly; the inner solver is not run.

    It is what the other estimators converge to. It needs a problem that says it is `quadratic` (ridge regression,
    `QuadraticProblem`), of at most 5,000 parameters unless it has a `spectrum`. Matrix factors are not counted.

    >>> from bilevel import GradientDescent, QuadraticProblem, hypergradient
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> u = torch.zeros(2, dtype=torch.float64)
    >>> estimate = hypergradient(problem, GradientDescent(), ClosedForm(), u)
    >>> torch.allclose(estimate.hypergradient, problem.exact_hypergradient(u))
    True
    """

    requires = frozenset({"inner_solution", "quadratic"})
    measures_memory = False
    resumes = True

    def at_tolerance(self, tol: float) -> ClosedForm:
        return self

    def solve(self, run: Run) -> Solution:
        self.check(run.problem, run.solver, run.hparams)
        problem = run.problem
        # One factor costs a fraction of the eigenproblem, which pays from the second solve on.
        once = not problem.recurring and run.carry.state is None
        problem.recurring = True
        inner, params, solver, result = run.inner(), run.params, run.solver, _solved(run, once)
        if isinstance(result, Verdict):
            return Solution(params, solver.cold_state(inner, params), _no_pullback, float("nan"), 0, result)
        residual = float(tree.norm(inner.grad(result.params)))
        verdict = GOOD
        if residual > result.limit:
            detail = f"ClosedForm ends at the inner residual {residual:.2e}: is the inner loss quadratic?"
            verdict = Verdict(Status.INNER_NOT_CONVERGED, detail)
        state = solver.cold_state(inner, result.params)
        return Solution(result.params, state, result.pullback, residual, 0, verdict, form="closed form")

    def at_once(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry | None
    ) -> Exact | None:
        problem.recurring |= carry is not None
        exact = None if params is not None else problem.exact(hparams)
        problem.recurring |= exact is not None
        return exact

    def sweep(self, problem: BilevelProblem, hparams: Tensor) -> Sweep:
        """Return exact outer losses and hypergradients at B hyperparameter vectors, stacked along the first dimension.

        Raises:
            ValueError: without a spectrum; if `hparams` is no stack, or the inner loss is not convex at one of them.
        """
        basis = problem.spectrum()
        if basis is None:
            raise ValueError(
                "ClosedForm.sweep needs a problem with a `spectrum` (a ridge problem with penalty='scalar'), which "
                f"this {type(problem).__name__} does not have: use hypergradient(..., batch=...)."
            )
        _, hparams = stacked(problem, hparams, None)
        diagonal = basis.bind(hparams)
        smallest, largest = float(diagonal.values.amin()), float(diagonal.values.amax())
        if not smallest > torch.finfo(diagonal.values.dtype).eps * largest:
            raise ValueError(str(_unsolvable(smallest, diagonal.values)))
        z = diagonal.solution
        params = basis.back(z)
        values, by_params, by_hparams = outer_at(problem, params, hparams)
        turned = basis.turn(by_params) / diagonal.values
        # In the eigenbasis the gradient of the solution is zero by construction: its residual is what turning rounds.
        residuals = torch.linalg.vector_norm(diagonal.values * basis.turn(params) + diagonal.linear, dim=-1)
        return Sweep(values, by_hparams + diagonal.pull(-turned * z, -turned), params, residuals)


@dataclass(frozen=True)
class _Solved:
    """The minimiser, the VJP at it, and the inner residual above which the loss cannot be quadratic."""

    params: Tree
    pullback: Callable[[Tree], Pullback]
    limit: float = float("inf")


def _solved(run: Run, once: bool) -> _Solved | Verdict:
    """Solve by tensors: by one factor where that is all, else in the eigenbasis where there is one."""
    basis = None if once and tree.size(run.params) <= FACTORED else run.problem.spectrum()
    return _dense(run.inner(), run.params) if basis is None else _diagonal(run.inner(), run.params, basis)


def _no_pullback(cotangent: Tree) -> Pullback:
    raise ValueError("a problem without a solution has no pullback.")


def _diagonal(inner: InnerProblem, start: Tree, basis: Eigenbasis) -> _Solved | Verdict:
    """Solve in the eigenbasis."""
    diagonal = basis.bind(inner.hparams)
    values = diagonal.values
    smallest, largest, small = float(values[0]), float(values[-1]), tree.size(start) <= FACTORED
    if not smallest > torch.finfo(values.dtype).eps * largest:
        return _dense(inner, start) if small else _unsolvable(smallest, values)
    z = diagonal.solution
    params = basis.back(z)

    def pullback(cotangent: Tree) -> Pullback:
        turned = basis.turn(cotangent) / values
        adjoint = basis.back(turned)
        residual = _relative(inner.linearize(params).hvp(adjoint), cotangent)
        verdict = _doubt(residual, values)
        if small and not verdict.status.ok:
            refined = _dense(inner, start)
            return Pullback(None, verdict=refined) if isinstance(refined, Verdict) else refined.pullback(cotangent)
        return Pullback(diagonal.pull(-turned * z, -turned), adjoint, residual, verdict=verdict)

    return _Solved(params, pullback)


def _dense(inner: InnerProblem, start: Tree) -> _Solved | Verdict:
    """Solve by a Cholesky factor, with one step of iterative refinement."""
    raveler = tree.Raveler(start)
    check_factored("ClosedForm", raveler.size, "Implicit()")
    hessian = inner.linearize(start).dense_hessian()
    factor, smallest = factored(hessian)
    if smallest is not None:
        return _unsolvable(smallest, hessian)

    def inverse(right: Tensor) -> Tensor:
        return torch.cholesky_solve(right[:, None], factor)[:, 0]

    x = raveler.ravel(start)
    for _ in range(2):
        x = x - inverse(raveler.ravel(inner.grad(raveler.unravel(x))))
    params = raveler.unravel(x)

    def pullback(cotangent: Tree) -> Pullback:
        right = raveler.ravel(cotangent)
        adjoint = inverse(right)
        adjoint = adjoint + inverse(right - hessian @ adjoint)
        residual = _relative(hessian @ adjoint, right)
        verdict = _doubt(residual, hessian)
        adjoint = raveler.unravel(adjoint)
        cross = inner.linearize(params).cross(adjoint)
        return Pullback(tree.scale(-1.0, cross), adjoint, residual, verdict=verdict)

    size = float(torch.linalg.vector_norm(hessian) * torch.linalg.vector_norm(x))
    return _Solved(params, pullback, size * torch.finfo(x.dtype).eps ** 0.5)


def _relative(product: Tree, right: Tree) -> float:
    """Return ``|right - product| / |right|``; zero for a zero right-hand side."""
    size = float(tree.norm(right))
    return float(tree.norm(tree.add(right, product, -1.0))) / size if size > 0 else 0.0


def _doubt(residual: float, hessian: Tensor) -> Verdict:
    """Return what the residual of an adjoint says of it; in the place of H may be its eigenvalues.

    With less than half of the digits in the adjoint, and in the solution, their product may have none.
    """
    eps = torch.finfo(hessian.dtype).eps
    if not residual > eps**0.5:
        return GOOD
    values = hessian if hessian.dim() == 1 else torch.linalg.eigvalsh(hessian)
    smallest, largest = float(values[0]), float(values[-1])
    if not smallest > eps * largest:
        return _unsolvable(smallest, values)
    detail = (
        f"ClosedForm: the adjoint residual is {residual:.2e}, as the inner Hessian is all but singular: add a penalty"
    )
    return Verdict(Status.INACCURATE, detail)


def _unsolvable(smallest: float, hessian: Tensor) -> Verdict:
    """Return the verdict on H, or its eigenvalues: below zero by rounding alone is no negative curvature."""
    rounding = torch.finfo(hessian.dtype).eps * float(torch.linalg.vector_norm(hessian))
    status = Status.NEGATIVE_CURVATURE if smallest < -rounding else Status.SINGULAR
    return Verdict(status, f"ClosedForm: the inner Hessian has the smallest eigenvalue {smallest:.3g}")
