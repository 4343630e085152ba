"""The exact implicit hypergradient of a quadratic inner problem: no inner solver, no iteration.

    H(u) x* = -b(u),      H w = cotangent,      u' = -C(x*)' w

One Cholesky factor of H serves both systems. Where H is ``A + s(u) I``, the eigenbasis of A takes its place: it is
computed once for each problem, when it is solved for the second time, and each u costs a few products with Q. Where H
is near singular, the factor, whose solutions are refined, has the last word.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel.base import Carry, InnerSolver, Pullback, Solution
from bilevel.base.estimate import verdict_of
from bilevel.core import tree
from bilevel.core.device import to_floats
from bilevel.core.status import GOOD, Status, Verdict, report
from bilevel.core.tree import Tree
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.hypergrad.eigenbasis_sweep import Sweep, outer_at, precision, stacked
from bilevel.numerics.dense import FACTORED, check_factored
from bilevel.numerics.inverse import FAR, PROBES, UNITS, ByFactor, InBasis, is_right, rounding
from bilevel.oracles.exact import Exact
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.precision import widened
from bilevel.oracles.problem import BilevelProblem


@dataclass(frozen=True)
class ClosedForm(HypergradEstimator):
    """Solve a quadratic inner problem and its adjoint exactly; the inner solver is not run.

    It is what the other estimators converge to. It needs a problem that says it is `quadratic` (ridge regression,
    `QuadraticProblem`), of at most 5,000 parameters unless it has a `spectrum`. Matrix factors are not counted. These
    two problems are computed in float64, on a copy of their data where these are in float32.

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
        problem, solver = run.problem, run.solver
        # One factor costs a fraction of the eigenproblem, which pays from the second solve on.
        once = not problem.recurring and run.carry.state is None
        problem.recurring = True
        solved = _solved(_widened(run), once)
        if isinstance(solved, Verdict):
            state = solver.cold_state(run.inner(), run.params)
            return Solution(run.params, state, _no_pullback, float("nan"), 0, solved)
        params = solved.flat.unravel(solved.x)
        residual = float(tree.norm(solved.run.inner().grad(params)))
        verdict = GOOD
        if residual > solved.limit:
            detail = f"ClosedForm ends at the inner residual {residual:.2e}: is the inner loss quadratic?"
            verdict = Verdict(Status.INNER_NOT_CONVERGED, detail)
        params = tree.tree_map(Tensor.to, params, run.params)
        state = solver.cold_state(run.inner(), params)
        return Solution(params, state, solved.pullback, residual, 0, verdict, form="closed form")

    def at_once(
        self, problem: BilevelProblem, solver: InnerSolver, hparams: Tree, params: Tree, carry: Carry | None
    ) -> Exact | None:
        problem.recurring |= carry is not None
        wide = problem.in_double
        if params is not None:
            return None
        if wide is problem:
            exact = problem.exact(hparams)
        else:
            wide.recurring |= problem.recurring
            exact = wide.exact(tree.tree_map(widened, hparams))
            exact = exact and exact.to(problem.params.dtype)
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
            raise ValueError(str(_unsolvable(diagonal.values.flatten().sort().values)))
        z = diagonal.solution.expand_as(diagonal.values)
        params = basis.back(z)
        values, by_params, by_hparams = outer_at(problem, params, hparams)
        turned = basis.turn(by_params) / diagonal.values
        gradients = by_hparams + diagonal.pull(-turned * z, -turned)
        # In the eigenbasis the gradient of the solution is zero by construction: its residual is what turning rounds.
        residuals = torch.linalg.vector_norm(diagonal.values * basis.turn(params) + diagonal.linear, dim=-1)

        def evidence(hparams: Tensor, z: Tensor, turned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            diagonal = basis.bind(hparams)

            def outer(z: Tensor) -> tuple[Tensor, Tensor]:
                _, by_params, by_hparams = problem.outer_value_and_grads(basis.back(z), hparams)
                return basis.turn(by_params), by_hparams

            inverse, scale = (lambda columns: columns / diagonal.values[:, None]), _mean_root(diagonal.values)
            return rounding(inverse, scale, z, turned, outer, lambda z, t: diagonal.pull(-t * z, -t))

        with precision(z, hparams):
            figures = torch.stack(torch.func.vmap(evidence)(hparams, z, turned), 1)
        verdicts = tuple(_judged(each) for each in figures)
        report(verdict_of(verdicts), "warn")
        values, gradients, params, residuals = (x.to(hparams) for x in (values, gradients, params, residuals))
        return Sweep(values, gradients, params, residuals, verdicts)


@dataclass(frozen=True)
class _Solved:
    """The minimiser, and what its derivative is made of.

    Attributes:
        run: the run that asks.
        flat: between trees and vectors.
        x: the minimiser.
        inverse: ``H^-1`` of a vector, or of several in columns.
        matrix: H, or its eigenvalues.
        scale: roots of the diagonal of H.
        limit: the inner residual above which the loss cannot be quadratic.
    """

    run: Run
    flat: tree.Raveler
    x: Tensor
    inverse: ByFactor | InBasis
    matrix: Tensor
    scale: Tensor
    limit: float = float("inf")

    def pullback(self, cotangent: Tree) -> Pullback:
        """Return the VJP at the minimiser."""
        inner, flat, params = self.run.inner(), self.flat, self.flat.unravel(self.x)
        # Calls beside those that the work stands for are not counted.
        quiet = self.run.problem.bind(self.run.hparams)
        given = flat.ravel(cotangent)
        right = given.to(self.x)
        if self.run.of_outer and right.dtype != given.dtype:
            # At the params before they are rounded, which the factors of a near-singular H enlarge.
            right = flat.ravel(self.run.problem.outer_value_and_grads(params, self.run.hparams)[1])
        a = self.inverse(right)
        if self.matrix.dim() == 2:
            a = a + self.inverse(right - self.matrix @ a)
            product, cross = self.matrix @ a, inner.linearize(params).cross
        else:
            product, cross = flat.ravel(inner.hvp_at(params, flat.unravel(a))), quiet.linearize(params).cross
        left, size = to_floats([torch.linalg.vector_norm(right - product), torch.linalg.vector_norm(right)])
        pulled = tree.scale(-1.0, cross(flat.unravel(a)))
        verdict = self._doubt(quiet, right, a)
        pulled, adjoint = (tree.tree_map(lambda leaf: leaf.to(given.dtype), each) for each in (pulled, flat.unravel(a)))
        return Pullback(pulled, adjoint, left / size if size > 0 else 0.0, verdict=verdict)

    def _doubt(self, quiet: InnerProblem, right: Tensor, a: Tensor) -> Verdict:
        """Return what rounding does to the hypergradient; of a cotangent of another loss, to the VJP alone."""
        run, flat, matrix, scale = self.run, self.flat, self.matrix, self.scale
        along = tree.Raveler(run.hparams)

        def outer(y: Tensor) -> tuple[Tensor, Tensor]:
            if not run.of_outer:
                return right, torch.zeros_like(along.ravel(run.hparams))
            _, by_params, by_hparams = run.problem.outer_value_and_grads(flat.unravel(y), run.hparams)
            return flat.ravel(by_params), along.ravel(by_hparams)

        def pull(y: Tensor, b: Tensor) -> Tensor:
            return -along.ravel(quiet.linearize(flat.unravel(y)).cross(flat.unravel(b)))

        for probes, factor in ((1, FAR), (PROBES, 1.0)):
            error, size, parts = rounding(self.inverse, scale, self.x, a, outer, pull, probes)
            verdict = _judged(torch.stack((factor * error, size, parts)))
            if verdict.status.ok:
                return verdict
        # Whether H is singular does not depend on the units of params.
        values = matrix if matrix.dim() == 1 else torch.linalg.eigvalsh(matrix / torch.outer(scale, scale))
        smallest, largest = to_floats([values[0], values[-1]])
        return verdict if smallest > torch.finfo(values.dtype).eps * largest else _unsolvable(matrix)


def _widened(run: Run) -> Run:
    """Return the run in float64, where its problem is there, too."""
    wide = run.problem.in_double
    if wide is run.problem:
        return run
    hparams, params = (tree.tree_map(widened, each) for each in (run.hparams, run.params))
    return replace(run, problem=wide, hparams=hparams, params=params)


def _solved(run: Run, once: bool) -> _Solved | Verdict:
    """Solve by one factor where that is all, or H is near singular, else in the eigenbasis where there is one."""
    inner, flat = run.inner(), tree.Raveler(run.params)
    small = flat.size <= FACTORED
    basis = None if once and small else run.problem.spectrum()
    if basis is not None:
        basis = basis.to(flat.ravel(run.params).dtype)
        diagonal = basis.bind(inner.hparams)
        values, eps = diagonal.values, torch.finfo(diagonal.values.dtype).eps
        smallest, largest = to_floats([values[0], values[-1]])
        if smallest > (eps**0.5 if small else eps) * largest:
            inverse, scale = InBasis(basis.vectors, values), _mean_root(values)
            return _Solved(run, flat, basis.back(diagonal.solution), inverse, values, scale)
        if not small:
            return _unsolvable(values)
    check_factored("ClosedForm", flat.size, "Implicit()")
    hessian = inner.linearize(run.params).dense_hessian()
    factor = ByFactor(hessian)
    if factor.fails:
        return _unsolvable(hessian)
    x = flat.ravel(run.params)
    for _ in range(2):
        x = x - factor(flat.ravel(inner.grad(flat.unravel(x))))
    size = float(torch.linalg.vector_norm(hessian) * torch.linalg.vector_norm(x))
    return _Solved(run, flat, x, factor, hessian, hessian.diagonal().sqrt(), size * torch.finfo(x.dtype).eps ** 0.5)


def _mean_root(values: Tensor) -> Tensor:
    """Return the root of the mean diagonal of H, for each coordinate of an eigenbasis."""
    return values.mean().sqrt().expand_as(values)


def _judged(figures: Tensor) -> Verdict:
    """Judge a hypergradient by what `rounding` says of it."""
    error, size, parts = to_floats([*figures])
    if is_right(error, size, parts, torch.finfo(figures.dtype).eps):
        return GOOD
    detail = f"ClosedForm: rounding may move the hypergradient by {error:.1e}, and its norm is {size:.1e}"
    return Verdict(Status.INACCURATE, detail, "take a larger penalty, standardised columns, or float64")


def _no_pullback(cotangent: Tree) -> Pullback:
    raise ValueError("a problem without a solution has no pullback.")


def _unsolvable(hessian: Tensor) -> Verdict:
    """Return the verdict on H, or its eigenvalues: below zero by rounding alone is no negative curvature."""
    smallest = float((hessian if hessian.dim() == 1 else torch.linalg.eigvalsh(hessian))[0])
    rounding = UNITS * torch.finfo(hessian.dtype).eps * float(torch.linalg.vector_norm(hessian))
    status = Status.NEGATIVE_CURVATURE if smallest < -rounding else Status.SINGULAR
    return Verdict(status, f"ClosedForm: the inner Hessian has the smallest eigenvalue {smallest:.3g}")
