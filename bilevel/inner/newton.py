"""Newton's method with backtracking, and the exact derivative of its step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from bilevel.base import InnerSolver, InnerState, LinearSolver, Traits, Variables
from bilevel.core import tree
from bilevel.core.device import to_floats
from bilevel.core.options import is_not_negative, option, optional
from bilevel.core.status import Status, StepFailure
from bilevel.core.tree import Tree
from bilevel.numerics.dense import FACTORED, check_factored, factored
from bilevel.oracles.inner_problem import InnerProblem, Linearization

HALVINGS = 30


@dataclass(frozen=True)
class Newton(InnerSolver):
    """``x <- x - t (H + damping I)^-1 grad(x)``; t is halved until the gradient norm falls.

    For an inner loss with positive definite Hessian the direction decreases the gradient norm, so it converges from
    everywhere, and quadratically near the solution. One step is one dense Hessian and its Cholesky factor, or, with a
    linear solver, a solve to the relative residual ``min(0.1, rate^1.5)``, where rate is the share of the gradient norm
    that the last step left (Newton-CG; Dembo & Steihaug 1983, Eisenstat & Walker 1996).
    The derivative of a step is exact (third derivatives by autograd), with the factor t constant; it exists in reverse
    mode with stored iterates alone, not in forward mode and not in a recorded graph. On an optimality map, whose
    Jacobian need not be symmetric, a step is an LU solve without a derivative, for Implicit.

    Args:
        linear_solver: for the Newton systems, such as ``CG()``; default: Cholesky, for at most 5,000 parameters.
        damping: added to the Hessian's diagonal.

    >>> Newton(tol=1e-10).damping
    0.0
    """

    linear_solver: LinearSolver | None = option(
        None, "a LinearSolver or None", optional(lambda solver: isinstance(solver, LinearSolver))
    )
    damping: float = option(0.0, "a number that is not negative", is_not_negative)

    default_max_steps = 100
    traits = Traits(superlinear=True)

    @cached_property
    def dense_newton(self) -> bool:
        """Whether all options but the tolerance are the defaults, of no subclass."""
        return self == Newton(tol=self.tol)

    def step(self, inner: InnerProblem, state: InnerState) -> InnerState:
        """Take one step; at the rounding floor, where no step helps, stay."""
        # Looking at a Newton step costs a transfer; it is small beside the factorisation.
        length = float(tree.norm(inner.grad(state.params)))
        params, _ = self._step(inner, state, length)
        return replace(state.moved(params), measured={"gradient_norm": length})

    def _step(self, inner: InnerProblem, state: InnerState, length: float) -> tuple[Tree, float]:
        params = state.params
        gradient = inner.grad(params)
        if not length > 0:
            return params, 0.0
        rate = length / state.measured.get("gradient_norm", length)
        direction = self._solve(inner.linearize(params), gradient, min(0.1, rate**1.5))
        (like, *_) = tree.leaves(params)
        eps = torch.finfo(like.dtype).eps
        both = (direction, params, tree.add(params, direction, -1.0))
        moved, *sizes = to_floats([tree.norm(each) for each in both])
        relative = moved / max(*sizes, torch.finfo(like.dtype).tiny)
        # So close to the solution only the full step makes sense: a shorter one would follow rounding noise, and its
        # derivative would be scaled by the noise.
        close = relative <= eps**0.5
        t = 1.0
        for _ in range(1 if close else HALVINGS):
            trial = tree.add(params, direction, -t)
            if float(tree.norm(inner.grad(trial))) <= (1.0 if close else 1.0 - 1e-4 * t) * length:
                return trial, t
            t /= 2
        # At the rounding floor no step helps and none is needed; anywhere else the step has failed.
        seen = eps * abs(float(inner.value(params)))
        if not (relative <= eps**0.25 or float(tree.dot(gradient, direction)) <= seen):
            raise StepFailure(
                Status.FAILED_STEP, f"no step along the Newton direction lowers the gradient norm {length:.3g}"
            )
        return params, 0.0

    def _solve(self, point: Linearization, right: Tree, tol: float | None = None) -> Tree:
        if not point.inner.problem.symmetric:
            return self._solve_jacobian(point, right)
        if self.linear_solver is not None:
            solution = self.linear_solver.solve(
                lambda v: tree.add(point.hvp(v), v, self.damping),
                right,
                tol=tol,
                dense=lambda: self._dense(point),
                damping=self.damping,
            )
            if solution.verdict.status in (Status.NEGATIVE_CURVATURE, Status.SINGULAR):
                raise StepFailure(solution.verdict.status, solution.verdict.detail)
            return solution.x
        raveler = tree.Raveler(right)
        check_factored("Newton", raveler.size, "Newton(linear_solver=CG())")
        factor, smallest = factored(self._dense(point))
        if smallest is not None:
            raise StepFailure(
                Status.NEGATIVE_CURVATURE,
                f"the inner Hessian has the eigenvalue {smallest:.3g}; "
                f"Newton(damping={max(-2 * smallest, 1e-8):.1g}) would lift it",
            )
        return raveler.unravel(torch.cholesky_solve(raveler.ravel(right)[:, None], factor)[:, 0])

    def _solve_jacobian(self, point: Linearization, right: Tree) -> Tree:
        """Solve with the Jacobian of an optimality map, which need not be symmetric, by LU."""
        raveler = tree.Raveler(right)
        if self.linear_solver is not None or raveler.size > FACTORED:
            raise ValueError(
                "the linear solvers of Newton need an inner loss, but this problem is stated by an optimality map, "
                f"whose Jacobian need not be symmetric: use Newton() without one (at most {FACTORED:,} parameters) or "
                "FixedPoint(update)."
            )
        direction, info = torch.linalg.solve_ex(self._dense(point), raveler.ravel(right))
        if bool(info):
            raise StepFailure(Status.SINGULAR, "the Jacobian of the optimality map is singular")
        return raveler.unravel(direction)

    def _dense(self, point: Linearization) -> torch.Tensor:
        hessian = point.dense_hessian()
        return hessian + self.damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)

    def step_vjp(self, inner: InnerProblem, state: InnerState, cotangent: Variables) -> tuple[Variables, Tree]:
        """Return a cotangent a pulled back through one step.

        With ``d = H^-1 g`` and ``w = H^-1 a``: ``x' = a - t H0 w + t grad_x(w' H d)``,
        ``u' = -t C' w + t grad_u(w' H d)``, where H includes the damping and H0 does not.

        Raises:
            ValueError: for an optimality map.
        """
        if not inner.problem.symmetric:
            raise ValueError("the steps of Newton on an optimality map are not differentiated: use Implicit(GMRES()).")
        params = state.params
        after, t = self._step(inner, state, float(tree.norm(inner.grad(params))))
        point = inner.linearize(params)
        direction = tree.scale(1.0 / (t or 1.0), tree.add(params, after, -1.0))
        # A step that stays where it is, at the solution, still moves with the hyperparameters as a full step does.
        t = t or 1.0
        adjoint = self._solve(point, cotangent[0])
        by_params, by_hparams = point.vjp(adjoint)
        third_params, third_hparams = point.hvp_vjp(direction, adjoint)
        new_params = tree.combine((1.0, -t, t), (cotangent[0], by_params, third_params))
        return (new_params, ()), tree.combine((-t, t), (by_hparams, third_hparams))

    def step_jvp(
        self, inner: InnerProblem, state: InnerState, tangents: Sequence[Variables], hparams_tangents: Sequence[Tree]
    ) -> list[Variables]:
        raise ValueError("forward mode does not cover Newton: use FullUnroll(mode='reverse') or Implicit.")


def newton_to_rounding(inner: InnerProblem, params: Tree, steps: int = 100) -> tuple[Tree, float]:
    """Return the zero of the inner gradient that dense Newton steps find, down to rounding, and the norm there.

    For referees of small problems: unlike `Newton` it has no tolerance. A step is halved while the norm of the gradient
    does not fall; the systems are solved by LU, so that an optimality map may have any regular Jacobian.
    """
    raveler = tree.Raveler(params)
    x, gradient = raveler.ravel(params), raveler.ravel(inner.grad(params))
    least = torch.linalg.vector_norm(gradient)
    for _ in range(steps):
        # Row i of `dense_hessian` is J' e_i, so that it is the Jacobian itself.
        step, info = torch.linalg.solve_ex(inner.linearize(raveler.unravel(x)).dense_hessian(), gradient)
        t = 1.0
        while not bool(info) and t > 1e-8:
            trial = x - t * step
            there = raveler.ravel(inner.grad(raveler.unravel(trial)))
            if bool((length := torch.linalg.vector_norm(there)) < least):
                break
            t /= 2
        else:
            break
        x, gradient, least = trial, there, length
    return raveler.unravel(x), float(least)
