"""What estimators and linear solvers require of a problem and of an inner solver: each need, with its sentence.

A class names what it needs, ``requires = frozenset({"symmetric", "quadratic"})``, and `check_requirements` refuses what
does not have it, before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from bilevel.base.inner_solver import InnerSolver
from bilevel.core.options import describe, shown_value
from bilevel.oracles.problem import BilevelProblem


class Need(NamedTuple):
    """Whether a problem and an inner solver have something, and what to say where they do not.

    The sentence may name {who} needs it, {described} with its options, the {problem}, the {solver}, the {variation} of
    inner steps, and the {reason} of a bias.
    """

    met: Callable[[BilevelProblem, InnerSolver], bool]
    sentence: str


def _differentiable(problem: BilevelProblem, solver: InnerSolver) -> bool:
    solver.check_unrolls()  # a solver says by itself what to use instead
    return True


NEEDS: Mapping[str, Need] = {
    "inner_solution": Need(
        lambda problem, solver: not solver.bias_reason(problem),
        "{described} rests on the inner solution, but {reason}.",
    ),
    "differentiable_steps": Need(_differentiable, ""),
    "one_inner_loss": Need(
        lambda problem, solver: not problem.variation,
        "{who} compares steps of one inner loss, but this problem has {variation}: use TruncatedUnroll or Implicit().",
    ),
    "module_loss": Need(
        lambda problem, solver: problem.module_loss is not None,
        "`{who}.curvature` 'gauss-newton' needs a single problem of `ModuleProblem`, whose loss says what the model's "
        "outputs are: use curvature='hessian', with damping where it is indefinite.",
    ),
    "symmetric": Need(
        lambda problem, solver: problem.symmetric,
        "{who} needs a symmetric matrix, but this problem is stated by an optimality map, whose Jacobian need not be "
        "symmetric: use Implicit(GMRES()) or Implicit(Direct()).",
    ),
    "quadratic": Need(
        lambda problem, solver: problem.structure.quadratic and problem.nonsmooth is None,
        "{who} needs a quadratic inner loss, which this {problem} does not say it has: use Implicit(), or set "
        "`structure = Structure(quadratic=True)` on a problem that has one.",
    ),
    "eigenbasis": Need(
        lambda problem, solver: problem.has_spectrum,
        "{who} needs a quadratic inner loss whose Hessian is A + s(u) I (a ridge problem with penalty='scalar' and at "
        "most 5,000 features, or a problem with a `spectrum` method), which this {problem} does not have: use "
        "FullUnroll or TruncatedUnroll.",
    ),
    "smooth": Need(
        lambda problem, solver: problem.nonsmooth is None,
        "{who} needs a smooth inner loss, but this problem has the nonsmooth term {term}: use Implicit(), FullUnroll() "
        "or TruncatedUnroll.",
    ),
    "proximal_solver": Need(
        lambda problem, solver: problem.nonsmooth is None or solver.traits.proximal,
        "{solver} needs a smooth inner loss, but this problem has the nonsmooth term {term}: use ProximalGradient() or "
        "FISTA().",
    ),
    "multistep": Need(
        lambda problem, solver: solver.traits.multistep,
        "{who} needs a linear multistep solver (GradientDescent, HeavyBall, Nesterov, Chebyshev, ...), got {solver}: "
        "use FullUnroll, Implicit or ClosedForm.",
    ),
    "fixed_steps": Need(
        lambda problem, solver: solver.steps is not None and solver.tol is None,
        "{who} needs a fixed number of steps: give {solver} `steps` and no `tol`.",
    ),
}
"""All needs, in the order in which they are looked at."""


@cache
def _needs(requires: frozenset[str], name: str) -> tuple[Need, ...]:
    """Return the needs of what is called `name`, in their order; ValueError for one that is none."""
    if not requires <= NEEDS.keys():
        unknown = min(requires - NEEDS.keys())
        raise ValueError(f"`{name}.requires` names {shown_value(unknown)}: choose from {', '.join(NEEDS)}.")
    return tuple(need for key, need in NEEDS.items() if key in requires or key == "proximal_solver")


def check_requirements(who: Any, problem: BilevelProblem, solver: InnerSolver) -> None:
    """Refuse a problem or an inner solver without what an estimator or a linear solver `requires`.

    Raises:
        ValueError: the sentence of the first need that is not met, or of a name that is none.
    """
    name = type(who).__name__
    for need in _needs(frozenset(who.requires), name):
        if not need.met(problem, solver):
            remedy = ": use FullUnroll or TruncatedUnroll" if solver.traits.differentiable else ""
            said = {"problem": type(problem).__name__, "solver": type(solver).__name__, "variation": problem.variation}
            said["term"] = type(problem.nonsmooth).__name__
            reason = f"{solver.bias_reason(problem)}{remedy}"
            raise ValueError(need.sentence.format(who=name, described=describe(who), reason=reason, **said))
