"""`solution`: the inner solution as a differentiable function of the hyperparameters, in any torch graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.base import InnerSolver, Pullback, Solution
from bilevel.core import tree
from bilevel.core.device import to_floats
from bilevel.core.status import GOOD, OnFailure, Status, Verdict, check_on_failure, report
from bilevel.core.tree import Tree
from bilevel.engine.attempt import FAR
from bilevel.engine.checks import check_roles
from bilevel.engine.derivatives import check_derivatives
from bilevel.engine.estimator import HypergradEstimator, Run
from bilevel.engine.kinks import ends_at_kink
from bilevel.engine.not_finite import not_finite_pullback
from bilevel.hypergrad.auto import as_estimator
from bilevel.hypergrad.hypergradient import prepare
from bilevel.oracles.autograd_errors import explained
from bilevel.oracles.problem import BilevelProblem
from bilevel.oracles.validation import check_captured

SECOND = (
    "bilevel.solution can be differentiated once: its pullback has no derivative, so there is no hessian and no "
    "gradient through create_graph=True: take differences of its gradient instead."
)
FORWARD_MODE = (
    "bilevel.solution has no derivative in forward mode: use torch.func.jacrev or vjp in place of jacfwd and jvp (a "
    "hessian is not there: it can be differentiated once)."
)
BATCHED = (
    "bilevel.solution takes one cotangent at a time: use torch.func.jacrev in place of is_grads_batched=True, and "
    "vectorize=False."
)


def solution(
    problem: BilevelProblem,
    solver: InnerSolver,
    estimator: HypergradEstimator | str,
    hparams: Tree,
    params: Tree = None,
    *,
    check: bool = True,
    on_failure: OnFailure = "raise",
) -> Tree:
    """Return the inner solution as a differentiable function of `hparams`, for use in any torch graph.

    Its backward is the estimator's pullback. It is differentiable once, in reverse mode; forward mode and a second
    derivative are refused. Under ``torch.func.vmap`` over hparams the members are solved one after the other.

    A status speaks of the pullback of the cotangent that is given, not of that cotangent: an outer loss in float32 of
    residuals near rounding gives one of few digits, and a gradient that is wrong without a word.

    Args:
        problem: the problem; its outer loss is not used.
        solver: the inner solver.
        estimator: how the solution map is differentiated; "auto" for `Auto()`.
        hparams: hyperparameters; those that require gradients get them.
        params: where the inner solver starts; default: the problem's start.
        check: look at the inputs first.
        on_failure: what to do with a solve or a pullback that cannot be used: "raise", or "warn" or "return" a solution
            or gradient of NaN.

    Returns:
        A tree shaped as params, with a ``grad_fn``.

    Raises:
        HypergradientError: if the inner solve fails; in the backward pass, if the pullback fails.
        ValueError: for a batch, and for an inner problem that holds tensors that require gradients: the solution would
            have no derivative by them.

    >>> from bilevel import CG, GradientDescent, Implicit, QuadraticProblem
    >>> problem = QuadraticProblem.random(size=3, hyperparameters=2, condition=10.0, seed=0)
    >>> u = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> x = solution(problem, GradientDescent(), Implicit(CG()), u)
    >>> x.square().sum().backward()
    >>> u.grad.shape
    torch.Size([2])
    """
    rule: HypergradEstimator = as_estimator(estimator)
    check_roles(problem, solver, rule)
    if problem.batch is not None:
        raise ValueError(
            f"`solution` takes one problem, got a batch of {problem.batch}: use torch.func.vmap over hparams."
        )
    check_on_failure(on_failure)
    call = _Call(problem, solver, rule, problem.start(params), hparams, check, on_failure)
    if check and torch.is_grad_enabled():
        with explained("`inner_loss`"):
            check_captured(problem, problem.trainable(call.start), hparams)
        given = () if params is None else params
        if rule.differentiates_steps and any(leaf.requires_grad for leaf in tree.leaves(given)):
            raise ValueError(
                "`params` requires gradients, but `solution` is differentiated by hparams alone: make the start a "
                "hyperparameter, or detach it."
            )
    _, *leaves = _Solution.apply(call, *tree.leaves(hparams))  # type: ignore[no-untyped-call]
    return tree.rebuild(call.start, leaves)


@dataclass(frozen=True)
class _Call:
    """The arguments of `solution` that are no tensors, and the solutions that its forward passes found."""

    problem: BilevelProblem
    solver: InnerSolver
    estimator: HypergradEstimator
    start: Tree
    like: Tree
    check: bool
    on_failure: OnFailure
    result: list[Solution] = field(default_factory=list)


class _Once(torch.autograd.Function):
    """A node that is differentiable once, in reverse mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)


class _Solution(_Once):
    """The solution map as one autograd node.

    Its first output is the index of the solution in ``call.result``: a tensor, so that under vmap, grad and jacrev in
    any order each member finds its own solution on the way back.
    """

    @staticmethod
    @explained()
    def forward(call: _Call, *leaves: Tensor) -> tuple[Tensor, ...]:
        hparams = tree.rebuild(call.like, [leaf.detach() for leaf in leaves])
        solver, hparams, start = prepare(call.problem, call.solver, call.estimator, hparams, call.start, call.check)
        solved = call.estimator.solve(Run(call.problem, solver, hparams, tree.copied(start), of_outer=False))
        if call.estimator.second_derivatives:
            solved = _confirmed(call, hparams, solved)
        report(solved.verdict, call.on_failure)
        call.result.append(solved)
        return torch.tensor(len(call.result) - 1), *_unless_failed(solved.verdict, solved.params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]
        ctx.mark_non_differentiable(output[0])
        # With the hyperparameters, so that torch sees where they are changed in place before the backward pass.
        ctx.save_for_backward(output[0], *inputs[1:])

    @staticmethod
    def backward(ctx: Any, _: Tensor, *cotangents: Tensor) -> tuple[Any, ...]:
        return (None, *_Pullback.apply(ctx.call, *ctx.saved_tensors, *cotangents))  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *leaves: Tensor) -> tuple[Any, Any]:
        return _one_by_one(_Solution, call, info.batch_size, in_dims[1:], leaves)


class _Pullback(_Once):
    """The backward pass of `_Solution`, a node of its own because `torch.func.jacrev` maps it over cotangents.

    It is given the hyperparameters, too, so that its result is no constant of a second derivative.
    """

    @staticmethod
    @explained()
    def forward(call: _Call, index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        solved = call.result[int(index)]
        if not solved.verdict.status.usable:
            return tuple(_unless_failed(solved.verdict, call.like))
        cotangents = tensors[len(tree.leaves(call.like)) :]
        try:
            pulled = solved.pullback(tree.rebuild(solved.params, cotangents))
        except RuntimeError as error:
            if "vmap" not in str(error) and "Batching rule" not in str(error):
                raise
            raise RuntimeError(BATCHED) from error
        report(pulled.verdict, call.on_failure)
        return tuple(_unless_failed(pulled.verdict, pulled.hparams))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing: the pullback has no derivative of its own."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(SECOND)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor) -> tuple[Any, Any]:
        return _one_by_one(_Pullback, call, info.batch_size, in_dims[1:], tensors)


def _confirmed(call: _Call, hparams: Tree, solved: Solution) -> Solution:
    """Return the solution in doubt where it ends at a kink; its pullback fails where a derivative is wrong."""
    verdict = solved.verdict
    if not verdict.status.usable:
        return solved
    kink = ends_at_kink(call.problem, hparams, call.solver, solved, call.start, not verdict.status.ok)

    def pullback(cotangent: Tree) -> Pullback:
        pulled = solved.pullback(cotangent)
        endless = not_finite_pullback(call.problem, solved.params, hparams, pulled)
        if endless is not None or not pulled.verdict.status.usable:
            return replace(pulled, verdict=endless or pulled.verdict)
        wrong = check_derivatives(call.problem, hparams, solved.params, outer=False)
        doubt = _far_from_solution(solved.params, cotangent, pulled)
        return replace(pulled, verdict=pulled.verdict.worse(wrong).worse(doubt))

    return replace(solved, pullback=pullback, verdict=verdict if kink.status.ok else kink)


def _far_from_solution(params: Tree, cotangent: Tree, pulled: Pullback) -> Verdict:
    """Return a doubt where params are far from the inner solution along a cotangent; the outer loss is not known."""
    if pulled.value_error is None:
        return GOOD
    error, size, length = to_floats([pulled.value_error, tree.norm(params), tree.norm(cotangent)])
    error = abs(error)
    if not error > FAR * size * length:
        return GOOD
    detail = (
        f"params are not the inner solution: along the cotangent that differs by about {error:.1e}, with "
        f"|params| |cotangent| = {size * length:.1e}"
    )
    return Verdict(Status.INACCURATE, detail)


def _unless_failed(verdict: Verdict, values: Tree) -> list[Tensor]:
    """Return copies of the leaves, filled with NaN where the verdict says that they cannot be used."""
    if verdict.status.usable:
        return [leaf.clone() for leaf in tree.leaves(values)]
    return [torch.full_like(leaf, float("nan")) for leaf in tree.leaves(values)]


def _one_by_one(
    function: Any, call: _Call, size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Apply an autograd function to the members of a batch in turn; returns (stacked results, batch dimensions)."""
    pairs = list(zip(tensors, dims, strict=True))
    members = [function.apply(call, *(t if dim is None else t.select(dim, i) for t, dim in pairs)) for i in range(size)]
    stacked = tuple(torch.stack(parts) for parts in zip(*members, strict=True))
    return stacked, (0,) * len(stacked)
