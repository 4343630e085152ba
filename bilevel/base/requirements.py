"""What estimators and linear solvers require of a problem and of an inner solver: each need, with its sentence.

A class names what it needs, ``requires = frozenset({"symmetric", "quadratic"})``, and `check_requirements` refuses what
does not have it, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from bilevel.base.inner_solver import InnerSolver
from bilevel.core.options import describe, shown_value
from bilevel.oracles.problem import BilevelProblem

Need: TypeAlias = Callable[[Any, BilevelProblem, InnerSolver], None]
"""(who needs it, problem, inner solver) -> None; ValueError says what is missing, and what to do."""


def _name(value: Any) -> str:
    return type(value).__name__


def _inner_solution(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    if reason := solver.bias_reason(problem):
        remedy = ": use FullUnroll or TruncatedUnroll" if solver.traits.differentiable else ""
        raise ValueError(f"{describe(who)} rests on the inner solution, but {reason}{remedy}.")


def _differentiable_steps(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    solver.check_unrolls()


def _one_inner_loss(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    if problem.variation:
        raise ValueError(
            f"{_name(who)} compares steps of one inner loss, but this problem has {problem.variation}: "
            "use TruncatedUnroll or Implicit()."
        )


def _symmetric(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    if not problem.symmetric:
        raise ValueError(
            f"{_name(who)} needs a symmetric matrix, but this problem is stated by an optimality map, whose Jacobian "
            "need not be symmetric: use Implicit(GMRES()) or Implicit(Direct())."
        )


def _quadratic(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    if not problem.structure.quadratic:
        raise ValueError(
            f"{_name(who)} needs a quadratic inner loss, which this {_name(problem)} does not say it has: "
            "use Implicit(), or set `structure = Structure(quadratic=True)` on a problem that has one."
        )


def _eigenbasis(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    if problem.spectrum() is None:
        raise ValueError(
            f"{_name(who)} needs a quadratic inner loss whose Hessian is A + s(u) I (a ridge problem with "
            "penalty='scalar' and at most 5,000 features, or a problem with a `spectrum` method), "
            f"which this {_name(problem)} does not have: use FullUnroll or TruncatedUnroll."
        )


def _module_loss(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    if problem.module_loss is None:
        raise ValueError(
            f"`{_name(who)}.curvature` 'gauss-newton' needs a single problem of `ModuleProblem`, whose loss says what "
            "the model's outputs are: use curvature='hessian', with damping where it is indefinite."
        )


def _multistep(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    if not solver.traits.multistep:
        raise ValueError(
            f"{_name(who)} needs a linear multistep solver (GradientDescent, HeavyBall, Nesterov, Chebyshev, ...), "
            f"got {_name(solver)}: use FullUnroll, Implicit or ClosedForm."
        )


def _fixed_steps(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    if solver.steps is None or solver.tol is not None:
        raise ValueError(f"{_name(who)} needs a fixed number of steps: give {_name(solver)} `steps` and no `tol`.")


NEEDS: Mapping[str, Need] = {
    "inner_solution": _inner_solution,
    "differentiable_steps": _differentiable_steps,
    "one_inner_loss": _one_inner_loss,
    "module_loss": _module_loss,
    "symmetric": _symmetric,
    "quadratic": _quadratic,
    "eigenbasis": _eigenbasis,
    "multistep": _multistep,
    "fixed_steps": _fixed_steps,
}
"""All needs, in the order in which they are looked at."""


def check_requirements(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    """Refuse a problem or an inner solver without what an estimator or a linear solver requires.

    Raises:
        ValueError: the sentence of the first need that is not met, or of a name that is none.
    """
    requires = who.requires
    if not requires <= NEEDS.keys():
        unknown = min(requires - NEEDS.keys())
        raise ValueError(f"`{_name(who)}.requires` names {shown_value(unknown)}: choose from {', '.join(NEEDS)}.")
    for name, need in NEEDS.items():
        if name in requires:
            need(who, problem, solver)
