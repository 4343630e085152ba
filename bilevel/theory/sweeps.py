"""Forward and reverse sweeps of many problems at once that look at the error of every step; see `error_curves`.

    forward    X_{k+1} = A_k X_k + B_k                          for the full unroll and for every late start
    reverse    E_k = U_k,  U_k = U_{k+1} + W_{k+1} B_k,  W_k = W_{k+1} A_k,   W_K = I   (Mehmood et al. 2026, (9), (12))

Shapes: B problems, d inner variables, p hyperparameters, T starts of the derivative. Derivatives are kept as (B, p, d).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from bilevel.base import InnerSolver, InnerState, Variables
from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.inner import Coefficients, LinearMultistep
from bilevel.inner.coefficients import Pairs
from bilevel.inner.newton import newton_to_rounding
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.problem import BilevelProblem
from bilevel.theory.quadratic_batch import QuadraticBatch


def weighted(terms: Pairs, tensors: Sequence[Tensor], lead: int, dims: int) -> Tensor:
    """Return ``sum_i weight_i tensors_i``; the batch is the axis `lead` of tensors with `dims` axes."""
    total: Tensor | None = None
    for index, weight in terms:
        if isinstance(weight, Tensor):
            term = tensors[index] * weight.view(-1, *[1] * (dims - lead - 1))
            total = term if total is None else total + term
        elif total is None:
            total = tensors[index] if weight == 1 else tensors[index] * weight
        else:
            total = torch.add(total, tensors[index], alpha=weight)
    return torch.zeros_like(tensors[0]) if total is None else total


def recurrence(
    solvers: Sequence[LinearMultistep], states: Sequence[InnerState], steps: int, like: Tensor
) -> Iterator[Coefficients]:
    """Yield the numbers of every step of B solvers, or of one for all: the same object while nothing changes."""
    held: tuple[Coefficients, ...] = ()
    numbers: Coefficients | None = None
    for k in range(steps):
        each = tuple(
            solver.coefficients(InnerState((), (), k, state.measured))
            for solver, state in zip(solvers, states, strict=True)
        )
        if numbers is None or any(a is not b for a, b in zip(each, held, strict=True)):
            numbers, held = Coefficients.of_rows(each, like), each
        yield numbers


class QuadraticOracle:
    """B quadratics in their eigenbases: Hessians and cotangents are diagonals (B, d)."""

    def __init__(self, batch: QuadraticBatch) -> None:
        self.batch = batch
        self.values = batch.eigen[0]
        self.linear, _, _, self.start = batch.turned
        self.solution, self.jacobian = batch.turned_solution

    def gradient(self, points: Tensor) -> Tensor:
        """Return the gradients (B, d) at points (B, d): ``lam y + b``."""
        return torch.addcmul(self.linear, self.values, points)

    def excess(self, points: Tensor) -> Tensor:
        """Return the losses above their minima, (B,): exact where the difference of two losses is rounding."""
        return 0.5 * (self.values * (points - self.solution).square()).sum(-1)

    def linearize(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Hessians in the oracle's own form, and the cross derivatives ``dH y + db``, (B, p, d)."""
        return self.values, self.batch.cross(points)

    def identity(self) -> Tensor:
        """Return the cotangent I of B problems."""
        return torch.ones_like(self.values)

    def hessian_times(self, hessian: Tensor, tangents: Tensor) -> Tensor:
        """Return ``H X`` for tangents (T, B, p, d)."""
        return hessian[:, None] * tangents

    def times_hessian(self, cotangent: Tensor, hessian: Tensor) -> Tensor:
        """Return ``W H``."""
        return cotangent * hessian

    def times_cross(self, cotangent: Tensor, cross: Tensor) -> Tensor:
        """Return ``W C``, of shape (B, p, d)."""
        return cotangent[:, None] * cross


class VmapOracle:
    """One loss at B pairs of start and hyperparameters, by ``torch.func.vmap``; Hessians are dense (B, d, d)."""

    def __init__(self, problem: BilevelProblem, hparams: Sequence[Tree], starts: Sequence[Tree]) -> None:
        inside, outside = tree.Raveler(starts[0]), tree.Raveler(hparams[0])

        def loss(x: Tensor, u: Tensor) -> Tensor:
            return problem.inner_loss(inside.unravel(x), outside.unravel(u))

        self.start = torch.stack([inside.ravel(each).detach() for each in starts])
        self.hparams = torch.stack([outside.ravel(each).detach() for each in hparams])
        self._loss = vmap(loss)
        self._gradient = vmap(grad(loss))
        self._second = vmap(jacrev(grad(loss), argnums=(0, 1)))
        known = [reference(problem, u, x) for u, x in zip(hparams, starts, strict=True)]
        self.solution = torch.stack([x for x, _ in known])
        self.jacobian = torch.stack([derivative for _, derivative in known])

    def gradient(self, points: Tensor) -> Tensor:
        """Return the gradients (B, d)."""
        return self._gradient(points, self.hparams)

    def excess(self, points: Tensor) -> Tensor:
        """Return the losses above their minima, (B,)."""
        return self._loss(points, self.hparams) - self._loss(self.solution, self.hparams)

    def linearize(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """By reverse over reverse mode: forward mode would import parts of torch that warn."""
        hessian, cross = self._second(points, self.hparams)
        return hessian, cross.mT

    def identity(self) -> Tensor:
        """Return the cotangent I of B problems."""
        count, size = self.start.shape
        return torch.eye(size, dtype=self.start.dtype, device=self.start.device).expand(count, size, size)

    def hessian_times(self, hessian: Tensor, tangents: Tensor) -> Tensor:
        """Return ``H X`` for tangents (T, B, p, d)."""
        return tangents @ hessian

    def times_hessian(self, cotangent: Tensor, hessian: Tensor) -> Tensor:
        """Return ``W H``."""
        return cotangent @ hessian

    def times_cross(self, cotangent: Tensor, cross: Tensor) -> Tensor:
        """Return ``W C``, of shape (B, p, d)."""
        return cross @ cotangent.mT


Oracle: TypeAlias = QuadraticOracle | VmapOracle


def batched_errors(
    oracle: Oracle, numbers: Sequence[Coefficients], vectors: int, begins: Sequence[int]
) -> tuple[Errors, Tensor, Tensor]:
    """Return errors of B problems, |x*| and |dx*|; solvers store `vectors`, x_0 each; derivatives start at `begins`."""
    stored = [oracle.start] * vectors
    first = oracle.jacobian.new_zeros(len(begins), *oracle.jacobian.shape)
    tangents = [first] * vectors
    index = torch.tensor(list(begins), device=first.device)[:, None, None, None]
    points, excess, errors, derivative_errors = [], [], [], []

    def look() -> None:
        excess.append(oracle.excess(stored[0]))
        errors.append(torch.linalg.vector_norm(stored[0] - oracle.solution, dim=-1))
        derivative_errors.append(torch.linalg.vector_norm(tangents[0] - oracle.jacobian, dim=(-2, -1)))

    look()
    for k, step in enumerate(numbers):
        point = weighted(step.reads, stored, 0, 2)
        hessian, cross = oracle.linearize(point)
        points.append((hessian, cross))
        moved = oracle.hessian_times(hessian, weighted(step.reads, tangents, 1, 4))
        # A derivative that starts late is zero until its start: it sees no cross derivative before.
        moved = moved + (cross if max(begins) <= k else cross * (index <= k))
        terms, tangent_terms = [*stored, oracle.gradient(point)], [*tangents, moved]
        stored = [weighted(row, terms, 0, 2) for row in step.rows]
        tangents = [weighted(row, tangent_terms, 1, 4) for row in step.rows]
        look()
    backwards = _reverse(oracle, numbers, vectors, points)
    forwards = torch.stack(derivative_errors, -1).movedim(0, 1)
    curves = torch.stack(excess, -1), torch.stack(errors, -1), forwards, backwards
    norm = torch.linalg.vector_norm
    return curves, norm(oracle.solution, dim=-1), norm(oracle.jacobian, dim=(-2, -1))


def _reverse(
    oracle: Oracle, numbers: Sequence[Coefficients], vectors: int, points: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Return the error of the reverse sweep after it has reached k, of shape (B, K+1)."""
    identity = oracle.identity()
    dims = identity.dim()
    cotangents = [identity, *[torch.zeros_like(identity)] * (vectors - 1)]
    # The sum is held as its difference from dx*, which is what is looked at.
    difference = -oracle.jacobian
    errors = [torch.linalg.vector_norm(difference, dim=(-2, -1))]
    for step, (hessian, cross) in zip(reversed(numbers), reversed(points), strict=True):
        by_gradient = weighted(step.writes, cotangents, 0, dims)
        difference = difference + oracle.times_cross(by_gradient, cross)
        terms = [*cotangents, oracle.times_hessian(by_gradient, hessian)]
        cotangents = [weighted(column, terms, 0, dims) for column in step.columns]
        errors.append(torch.linalg.vector_norm(difference, dim=(-2, -1)))
    return torch.stack(errors[::-1], -1)


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
    derivatives = torch.stack(derivative_errors, -1)[None]
    curves = torch.stack(excess)[None], torch.stack(errors)[None], derivatives, sweep[None]
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
        what = f"the inner solution was not found: Newton's method stopped at a residual of {residual:.2e}"
        raise ValueError(f"{what}; error curves need a start from which it converges.")
    point, x = inner.linearize(params), flat.ravel(params)
    cross = torch.stack([outside.ravel(point.cross(unit)) for unit in flat.units()])
    return x, -torch.linalg.solve(point.dense_hessian(), cross).mT
