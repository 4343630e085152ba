"""The referee: the hypergradient that the estimators of a comparison are measured against."""

from __future__ import annotations

import torch

from bilevel.base import Estimate, LinearSolver
from bilevel.core import tree
from bilevel.core.status import HypergradientError
from bilevel.core.tree import Tree
from bilevel.hypergrad import Implicit, hypergradient
from bilevel.inner import Newton
from bilevel.linear import CG, Direct
from bilevel.numerics.dense import REFEREE
from bilevel.oracles.problem import BilevelProblem

TOL = 1e-12


def error_against_referee(problem: BilevelProblem, hparams: Tree, estimate: Estimate) -> tuple[float | None, str]:
    """Return ``|estimate - exact| / |exact|`` and the name of the referee.

    The referee is the problem's closed form where it exists, else implicit differentiation at a solution to the inner
    gradient norm 1e-12. It starts at the estimate's params, and nothing that it computes reaches the outer loop.
    Without a referee the error is None, and the name says why.
    """
    if not estimate.status.usable:
        return None, "none: the hypergradient is not usable"
    if not problem.structure.unique_solution:
        return None, "none: the inner problem has several solutions"
    if problem.structure.resampled:
        return None, "none: each outer step has an inner problem of its own"
    exact, name = problem.exact_hypergradient(hparams), "closed form"
    if exact is None:
        try:
            exact, name = _tight(problem, hparams, estimate.params)
        except (HypergradientError, ValueError, RuntimeError) as error:
            return None, f"none: {error}"
    raveler = tree.Raveler(hparams)
    truth = raveler.ravel(exact)
    distance = torch.linalg.vector_norm(raveler.ravel(estimate.hypergradient) - truth)
    return float(distance / torch.linalg.vector_norm(truth)), name


def _tight(problem: BilevelProblem, hparams: Tree, params: Tree) -> tuple[Tree, str]:
    """Solve both systems as tightly as the dtype allows."""
    # An inner gradient that is large at the start cannot fall to 1e-12 in absolute terms.
    tol = TOL * max(1.0, float(tree.norm(problem.bind(hparams).grad(problem.start()))))
    if not problem.symmetric:
        raise ValueError("a problem stated by an optimality map has no referee")
    linear_solver: LinearSolver = Direct() if tree.size(params) <= REFEREE else CG(tol=TOL)
    solver = Newton(linear_solver, tol=tol, steps=30)
    estimate = hypergradient(
        problem, solver, Implicit(linear_solver), hparams, params, check=False, on_failure="return"
    )
    if not estimate.status.usable:
        raise HypergradientError(estimate.verdict, estimate)
    reached = estimate.certificate.inner_residual
    short = "" if reached <= tol else f", short of it at {reached:.0e}"
    return estimate.hypergradient, f"Newton and {type(linear_solver).__name__} to {TOL:.0e}{short}"
