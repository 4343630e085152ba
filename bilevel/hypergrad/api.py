"""The two calls in which problem, inner solver and estimator meet: `hypergradient` and `solution`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.base import Carry, Certificate, Estimate, HypergradEstimator, InnerSolver, Pullback, Solution
from bilevel.certify import ErrorEstimate, refine
from bilevel.cost import Meter
from bilevel.problem import BilevelProblem
from bilevel.status import OnFailure, Status, Verdict, report
from bilevel.tree import Tree


def hypergradient(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    params: Tree = None,
    *,
    carry: Carry | None = None,
    certify: bool = False,
    check: bool = True,
    on_failure: OnFailure = "raise",
) -> Estimate:
    """Return the gradient of ``F(u) = outer_loss(params*(u), u)`` with its evidence.

        dF/du = d outer/du + (d params*/du)' d outer/d params

    Args:
        problem: the two losses.
        solver: the inner solver.
        estimator: how the solution map is differentiated.
        hparams: where the gradient is taken.
        params: where the inner solver starts; default: the problem's start.
        carry: the warm start, from the `carry` of an earlier estimate; it takes the place of `params`.
        certify: estimate the distance to the exact hypergradient (see `bilevel.certify.refine`).
        check: look at the inputs first; a loop that has done so once may leave it out.
        on_failure: what to do with a result that cannot be used: "raise", "warn" or "return".

    Returns:
        An `Estimate` with status, residuals, error estimate and cost.

    Raises:
        ValueError: for inputs that cannot work, in one sentence.

    >>> from bilevel import GradientDescent, Implicit, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> u = torch.zeros(2, dtype=torch.float64)
    >>> estimate = hypergradient(problem, GradientDescent(), Implicit(), u)
    >>> torch.allclose(estimate.hypergradient, problem.exact_hypergradient(u))
    True
    """
    hparams, start = _prepare(problem, solver, estimator, hparams, params, check)
    carry = carry or Carry()
    meter = Meter(tree.leaves(start)[0].device)
    solved = estimator.solve(problem, solver, hparams, start, carry, meter)
    missing = tree.tree_map(lambda leaf: torch.full_like(leaf, float("nan")), hparams)
    value, gradient, pulled, verdict = float("nan"), missing, Pullback(missing), solved.verdict
    if solved.verdict.status.usable:
        meter.counts["outer"] += 1
        outer, by_params, by_hparams = problem.outer_value_and_grads(solved.params, hparams)
        value = float(outer)
        pulled = solved.pullback(by_params)
        verdict = verdict.worse(pulled.verdict)
        if pulled.verdict.status.usable:
            gradient = tree.add(by_hparams, pulled.hparams)
            verdict = verdict.worse(_finite(value, gradient))
    cost = meter.read()
    error = ErrorEstimate(None, "none", "ask with certify=True")
    if certify and verdict.status.usable:
        error = refine(problem, hparams, solved.params, gradient, pulled.adjoint)
    certificate = Certificate(
        inner_residual=solved.residual,
        adjoint_residual=pulled.residual,
        inner_steps=solved.steps,
        adjoint_steps=pulled.steps,
        error=error.value,
        error_kind=error.kind,
        error_note=error.note,
        measured=dict(solved.state.measured),
    )
    following = Carry(solved.state, pulled.adjoint) if verdict.status.usable else carry
    estimate = Estimate(value, gradient, solved.params, certificate, cost, verdict, following)
    report(verdict, on_failure, estimate)
    return estimate


def solution(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    params: Tree = None,
    *,
    check: bool = True,
) -> Tree:
    """Return the inner solution as a differentiable function of `hparams`, for use in any torch graph.

    Its backward is the estimator's pullback, run once for each backward pass; a pullback that fails raises there.

    Args:
        problem: the problem; its outer loss is not used.
        solver: the inner solver.
        estimator: how the solution map is differentiated.
        hparams: hyperparameters; those that require gradients get them.
        params: where the inner solver starts; default: the problem's start.
        check: look at the inputs first.

    Returns:
        A tree shaped as params, with a ``grad_fn``.

    Raises:
        HypergradientError: if the inner solve fails; in the backward pass, if the pullback fails.

    >>> from bilevel import CG, GradientDescent, Implicit, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> x = solution(problem, GradientDescent(), Implicit(CG()), u)
    >>> x.square().sum().backward()
    >>> u.grad.shape
    torch.Size([2])
    """
    _, start = _prepare(problem, solver, estimator, hparams, params, check)
    leaves = _Solution.apply(  # type: ignore[no-untyped-call]
        problem, solver, estimator, start, hparams, *tree.leaves(hparams)
    )
    return tree.rebuild(start, leaves)


class _Solution(torch.autograd.Function):
    """The solution map as one autograd node."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: BilevelProblem,
        solver: InnerSolver,
        estimator: HypergradEstimator,
        start: Tree,
        like: Tree,
        *leaves: Tensor,
    ) -> tuple[Tensor, ...]:
        hparams = tree.rebuild(like, [leaf.detach() for leaf in leaves])
        meter = Meter(leaves[0].device)
        solved: Solution = estimator.solve(problem, solver, hparams, start, Carry(), meter)
        report(solved.verdict, "raise")
        ctx.solved = solved
        return tuple(leaf.clone() for leaf in tree.leaves(solved.params))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        pulled = ctx.solved.pullback(tree.rebuild(ctx.solved.params, cotangents))
        report(pulled.verdict, "raise")
        return (None, None, None, None, None, *tree.leaves(pulled.hparams))


def _prepare(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator,
    hparams: Tree,
    params: Tree,
    check: bool,
) -> tuple[Tree, Tree]:
    """Return detached (hparams, start) that have been looked at."""
    start = problem.start(params)
    if check:
        for value, kind in ((problem, BilevelProblem), (solver, InnerSolver), (estimator, HypergradEstimator)):
            if not isinstance(value, kind):
                raise ValueError(
                    f"expected (problem, solver, estimator, hparams), got {type(value).__name__} where a "
                    f"{kind.__name__} belongs."
                )
        problem.check(start, hparams)
        estimator.check(problem, solver, hparams)
    return tree.detach(hparams), start


def _finite(value: float, gradient: Tree) -> Verdict:
    """Report an outer loss or a hypergradient that is not finite."""
    if not torch.isfinite(torch.tensor(value)):
        return Verdict(Status.NOT_FINITE, f"the outer loss is {value} at the inner solution")
    for name, leaf in zip(tree.names(gradient), tree.leaves(gradient), strict=True):
        if not bool(torch.isfinite(leaf).all()):
            return Verdict(Status.NOT_FINITE, f"the hypergradient of `hparams{name}` is not finite")
    return Verdict()
