"""The constants in the bounds of `bilevel.theory.bounds`: exact for quadratics, estimated along a run otherwise.

For gradient descent, ``A(x, u) = x - h f_x(x, u)`` (Mehmood et al. 2026, section 2):

    rho = max(|1 - h l|, |1 - h L|),   L_x = h Lip(f_xx),   L_u = h Lip(f_xu),   M_u = h sup |f_xu|
    C = L_x |X*| + L_u

all but rho proportional to h. Norms of derivatives are Frobenius norms.
"""

# ruff: noqa: E741 (l and L are the field's names of the ends of the spectrum)

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import InnerSolver, Variables
from bilevel.core import tree
from bilevel.core.options import is_int, is_positive
from bilevel.core.tree import Tree
from bilevel.oracles.problem import BilevelProblem
from bilevel.theory.checks import demand


@dataclass(frozen=True)
class Constants:
    """What the bounds need.

    Attributes:
        rho: contraction modulus of the map in x.
        L_x: Lipschitz constant of D_x A in x.
        L_u: Lipschitz constant of D_u A in x.
        M_u: bound on ``|D_u A|`` over the ball around x* that holds the start.
        C: ``L_x |X*| + L_u``.
        e0: ``|x_0 - x*|``.
        d0: ``|X_0 - X*| = |X*|``, for a start that does not depend on the hyperparameters.
    """

    rho: float
    L_x: float
    L_u: float
    M_u: float
    C: float
    e0: float
    d0: float


def contraction_constants(
    problem: BilevelProblem, hparams: Tensor, step_size: float | None = None, start: Tensor | None = None
) -> Constants:
    """Return the exact constants of gradient descent on a quadratic or ridge problem.

    The Hessian does not depend on x there, so ``L_x = 0``, and f_xu is affine in x with the directions dH/du_j, so
    ``L_u = h |sum_j (dH/du_j)^2|_2^(1/2)``; it is h for a direct scalar penalty.

    Args:
        problem: a `QuadraticProblem` or `RidgeProblem`.
        hparams: where.
        step_size: h; default 2 / (L + l), the fastest.
        start: x_0; default: the problem's.

    Raises:
        ValueError: for other problems, or a map that does not contract.

    >>> from bilevel import QuadraticProblem
    >>> problem = QuadraticProblem(
    ...     hessian=torch.diag(torch.tensor([1.0, 3.0])), linear=torch.ones(2), hessian_directions=torch.eye(2)[None]
    ... )
    >>> constants = contraction_constants(problem, torch.zeros(1))
    >>> constants.rho, constants.C
    (0.5, 0.5)
    """
    if (form := problem.quadratic_form(hparams.detach())) is None:
        raise ValueError(
            "`contraction_constants.problem` must be a QuadraticProblem or RidgeProblem, got "
            f"{type(problem).__name__}: use `estimate_constants` for others."
        )
    hessian, linear, directions, linear_directions = form
    solution = -torch.linalg.solve(hessian, linear)
    spectrum = torch.linalg.eigvalsh(hessian)
    l, L = float(spectrum[0]), float(spectrum[-1])
    first = problem.params if start is None else start
    h = 2.0 / (l + L) if step_size is None else step_size
    demand("contraction_constants", "step_size", f"a number in (0, 2/L) = (0, {2 / L:.6g})", step_size, is_positive(h))
    rho = max(abs(1.0 - h * l), abs(1.0 - h * L))
    if not rho < 1:
        what = f"gradient descent with step_size={h:.3g} does not contract on a spectrum of [{l:.3g}, {L:.3g}]"
        raise ValueError(f"{what}: rho={rho:.3g}.")
    diagonal = directions.dim() == 2
    cross = (directions * solution if diagonal else directions @ solution) + linear_directions
    squares = torch.diag(directions.square().sum(0)) if diagonal else (directions @ directions).sum(0)
    lipschitz = float(torch.linalg.eigvalsh(squares)[-1].clamp(min=0).sqrt())
    e0 = float((first - solution).norm())
    d0 = float(torch.linalg.solve(hessian, cross.mT).norm())
    largest = h * (float(cross.norm()) + lipschitz * e0)
    return Constants(rho, 0.0, h * lipschitz, largest, h * lipschitz, e0, d0)


@dataclass(frozen=True)
class EstimatedConstants:
    """Constants measured along one run: estimates, not bounds; they see the points of that run alone.

    Attributes:
        rho: the largest ratio of two successive steps, ``|x_{k+1} - x_k| / |x_k - x_{k-1}|``; not below one where the
            map does not contract in the Euclidean norm (momentum).
        C: the largest ``|(A_k - A_*) X_* + (B_k - B_*)| / |x_k - x_*|``.
        e0: ``|x_0 - x_*|``.
        d0: ``|X_*|``, as X_0 = 0.
    """

    rho: float
    C: float
    e0: float
    d0: float


def estimate_constants(problem: BilevelProblem, solver: InnerSolver, hparams: Tree, steps: int) -> EstimatedConstants:
    """Return estimates of the constants of any inner solver along a run; its last state stands for the fixed point.

    Vectors are whole states (momentum included). The run must come much closer to the fixed point than the states that
    the bounds are wanted for; the last tenth of it is left out of the ratios, where rounding and the missing rest show.

    Args:
        problem: any problem.
        solver: a solver whose step does not depend on the number of steps taken.
        hparams: where; one `jvp` for each step and scalar hyperparameter.
        steps: length of the run, 10 or more.

    >>> from bilevel import GradientDescent, QuadraticProblem
    >>> problem = QuadraticProblem.random(3, 1, condition=4.0, seed=0)
    >>> u = torch.zeros(1, dtype=torch.float64)
    >>> exact, measured = contraction_constants(problem, u), estimate_constants(problem, GradientDescent(0.3), u, 60)
    >>> measured.C / 0.3 <= 1.000001 * exact.C / (2 / 5), abs(measured.d0 / exact.d0 - 1) < 1e-6
    (True, True)
    """
    demand("estimate_constants", "steps", "an int, 10 or more", steps, is_int(steps, 10))
    inner = problem.bind(hparams)
    directions = tree.Raveler(tree.detach(hparams)).units()
    state = solver.init(inner, problem.params)
    zero: Variables = tree.zeros_like(state.variables)
    states, tangents = [state], [zero for _ in directions]
    for _ in range(steps):
        tangents = solver.step_jvp(inner, state, tangents, directions)
        state = solver.step(inner, state)
        states.append(state)
    flat = torch.stack([_flatten(each.variables) for each in states])
    moves = (flat[1:] - flat[:-1]).norm(dim=1)
    distances = (flat[:-1] - flat[-1]).norm(dim=1)
    kept = max(steps * 9 // 10, 2)
    floor = torch.finfo(flat.dtype).eps ** 0.5 * flat.norm(dim=1).max()
    ratios = torch.where(moves[: kept - 1] > floor, moves[1:kept] / moves[: kept - 1], 0.0)
    at_end = _pushed(solver.step_jvp(inner, state, tangents, directions))
    largest = 0.0
    for each, distance in zip(states[:kept], distances[:kept], strict=True):
        if distance > floor:
            change = _pushed(solver.step_jvp(inner, each, tangents, directions)) - at_end
            largest = max(largest, float(change.norm() / distance))
    return EstimatedConstants(float(ratios.max()), largest, float(distances[0]), float(_pushed(tangents).norm()))


def _flatten(variables: Variables) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree.leaves(variables)])


def _pushed(tangents: list[Variables]) -> Tensor:
    return torch.stack([_flatten(each) for each in tangents], -1)
