"""Errors of every step of one problem, through the oracles that any loss and solver have, and its exact solution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.base import InnerSolver, InnerState, Variables
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.inner.newton import newton_to_rounding
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem

Errors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Suboptimality (B, K+1), and iterate (B, K+1), forward (B, T, K+1) and reverse (B, K+1) errors of B problems."""


def single_errors(
    problem: BilevelProblem, solver: InnerSolver, hparams: Tree, start: Tree, steps: int, begins: Sequence[int]
) -> tuple[Errors, Tensor, Tensor]:
    """Run one problem by the solver's own `step`, `step_jvp`, `step_vjp`; return the errors (B = 1), |x*| and |dx*|."""
    inner = problem.bind(hparams)
    solution, jacobian = reference(problem, hparams, start)
    flat, outside = tree.Raveler(start), tree.Raveler(hparams)
    directions = outside.units()
    state = solver.init(inner, start)
    zero: Variables = tree.zeros_like(state.variables)
    tangents = [[zero] * len(directions) for _ in begins]
    states, excess, errors, derivative_errors = [state], [], [], []
    # An optimality map has no loss.
    value = inner.value if problem.optimality is None else lambda _: solution.new_full((), float("nan"))
    least = value(flat.unravel(solution))

    def look() -> None:
        excess.append(value(solver.params(state)) - least)
        errors.append(torch.linalg.vector_norm(flat.ravel(solver.params(state)) - solution))
        derivatives = torch.stack([torch.stack([flat.ravel(x) for x, _ in each]) for each in tangents])
        derivative_errors.append(torch.linalg.vector_norm(derivatives - jacobian, dim=(-2, -1)))

    look()
    for k in range(steps):
        for index, begin in enumerate(begins):
            if begin <= k:
                tangents[index] = solver.step_jvp(inner, state, tangents[index], directions)
        state = solver.step(inner, state)
        states.append(state)
        look()
    sweep = _single_reverse(inner, solver, states[:-1], jacobian, flat)
    curves = (
        torch.stack(excess)[None],
        torch.stack(errors)[None],
        torch.stack(derivative_errors, -1)[None],
        sweep[None],
    )
    return curves, torch.linalg.vector_norm(solution)[None], torch.linalg.vector_norm(jacobian)[None]


def _single_reverse(
    inner: InnerProblem, solver: InnerSolver, states: Sequence[InnerState], jacobian: Tensor, flat: tree.Raveler
) -> Tensor:
    """Return the error of the reverse sweep after it has reached k, by one cotangent for each inner variable."""
    memory = tree.zeros_like(states[0].memory)
    cotangents: list[Variables] = [(unit, memory) for unit in flat.units()]
    outside = tree.Raveler(inner.hparams)
    difference = -jacobian.mT
    errors = [torch.linalg.vector_norm(difference)]
    for state in reversed(states):
        pairs = [solver.step_vjp(inner, state, cotangent) for cotangent in cotangents]
        cotangents = [before for before, _ in pairs]
        difference = difference + torch.stack([outside.ravel(part) for _, part in pairs])
        errors.append(torch.linalg.vector_norm(difference))
    return torch.stack(errors[::-1])


def reference(problem: BilevelProblem, hparams: Tree, start: Tree) -> tuple[Tensor, Tensor]:
    """Return x* of shape (d,) by Newton's method to the rounding floor, and dx*/du of shape (p, d) by dense algebra."""
    inner = problem.bind(hparams)
    flat, outside = tree.Raveler(start), tree.Raveler(hparams)
    first = max(float(tree.norm(inner.grad(start))), eps := torch.finfo(tree.leaves(start)[0].dtype).eps)
    params, residual = newton_to_rounding(inner, start)
    if not residual <= eps**0.5 * first:
        raise ValueError(
            f"the inner solution was not found: Newton's method stopped at a residual of {residual:.2e}; "
            "error curves need a start from which it converges."
        )
    point, x = inner.linearize(params), flat.ravel(params)
    cross = torch.stack([outside.ravel(point.cross(unit)) for unit in flat.units()])
    return x, -torch.linalg.solve(point.dense_hessian(), cross).mT
