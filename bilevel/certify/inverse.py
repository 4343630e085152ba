"""Solves with the inner Hessian whose error is known in the Euclidean norm, small eigenvalues included.

Where one eigenvalue is far below the others, neither the residual nor the energy norm of a linear solve shows what is
missing along its eigenvector v: a component e of the error there leaves the residual ``lambda e``. Two things show it:

- Up to `REFINED` weights the Hessian itself, from one product for each weight; its factor then preconditions every CG
  run, whose preconditioned residual is close to the error.
- Beyond, the smallest eigenvalue mu, from a CG run whose right-hand side is random (it is the Lanczos process, and a
  random vector has a part along v; Kuczynski & Wozniakowski 1992): ``|e| <= |r| / mu``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.tree import Tree
from bilevel.numerics.conjugate_gradients import Krylov, conjugate_gradients
from bilevel.numerics.dense import REFINED
from bilevel.numerics.lanczos import SEED
from bilevel.oracles.inner_problem import Linearization

ACCURACY = 0.01
"""Relative Euclidean error at which a solve ends."""
MAX_STEPS = 100
SETTLED = 0.3
"""Relative residual of the smallest Ritz pair at which it counts as found."""
LOOK = 8
"""Steps between two looks at it."""
NEAR = 2.0
"""A factored Hessian serves at another point while the curvatures there differ by less than this factor."""


@dataclass(frozen=True)
class Solved:
    """A solution x of ``H x = b``: what is left, its relative error (an estimate), or why there is none to speak of.

    `doubtful`: that reason speaks against the point, not against the work that the solve would take.
    """

    x: Tensor
    left: Tensor
    error: float = 0.0
    reason: str = ""
    doubtful: bool = False

    @classmethod
    def failed(cls, b: Tensor, reason: str, doubtful: bool = True) -> Solved:
        """Return that there is no solution."""
        return cls(torch.zeros_like(b), b, math.inf, reason, doubtful)


class Inverse:
    """Solves with the Hessian at points that are near each other; what is known of one serves at the next."""

    def __init__(self) -> None:
        self._factor: Tensor | None = None
        self._smallest: float | None = None
        self._jacobian: tuple[Linearization, Tensor] | None = None
        self.condition = 1.0
        """Largest over smallest eigenvalue, as far as they are known."""

    def solve(self, point: Linearization, raveler: tree.Raveler, b: Tensor, transposed: bool = False) -> Solved:
        """Return the solution of ``H x = b`` with the Hessian at `point`, or with the Jacobian of an optimality map.

        `transposed` takes the transposed Jacobian, as the adjoint does. There is a reason where the Hessian is not
        positive definite.
        """
        if not bool(torch.linalg.vector_norm(b) > 0):
            return Solved(torch.zeros_like(b), b)
        if not point.inner.problem.symmetric:
            return self._by_elimination(point, raveler.size, b, transposed)
        product = flat_product(point, raveler)
        if raveler.size > REFINED:
            return self._by_smallest(product, b)
        fresh = self._factor is None
        if fresh:
            reason = self._factorise(point)
            if reason:
                return Solved.failed(b, reason)
        solved = self._by_factor(product, b)
        if solved is None and not fresh:
            self._factor = None
            return self.solve(point, raveler, b)
        return solved or Solved.failed(b, "the Hessian's products and its matrix differ")

    def _factorise(self, point: Linearization) -> str:
        """Factor the Hessian; return why that is not possible, or an empty string."""
        matrix = point.dense_hessian()
        matrix = (matrix + matrix.t()) / 2
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not bool(torch.isfinite(matrix).all()):
            return "the inner Hessian at the refined iterate is not finite"
        values = torch.linalg.eigvalsh(matrix)
        smallest, largest = float(values[0]), float(values[-1])
        if bool(info) or smallest <= len(matrix) * torch.finfo(matrix.dtype).eps * largest:
            return _not_definite(smallest, largest, matrix.dtype)
        self._factor, self.condition = factor, largest / smallest
        return ""

    def _by_factor(self, product: Callable[[Tensor], Tensor], b: Tensor) -> Solved | None:
        """Run CG preconditioned by the factor; None where it is that of a Hessian too far from this one."""
        factor = self._factor
        assert factor is not None

        def apply(v: Tensor) -> Tensor:
            return torch.cholesky_solve(v[:, None], factor)[:, 0]

        def enough(run: Krylov) -> bool:
            # The preconditioned residual is the error, as far as the factor is that of H.
            assert run.rz is not None
            return run.steps > 0 and run.rz <= 1e-2 * ACCURACY**2 * sum(run.energies)

        run = conjugate_gradients(product, torch.zeros_like(b), b, enough, MAX_STEPS, precondition=apply)
        if run.negative is not None:
            return None
        smallest, largest = run.spectrum()
        if smallest < 1 / NEAR or largest > NEAR:
            return None
        left = b - product(run.x)
        error = torch.linalg.vector_norm(apply(left)) / torch.linalg.vector_norm(run.x)
        return Solved(run.x, left, float(error))

    def _by_elimination(self, point: Linearization, size: int, b: Tensor, transposed: bool) -> Solved:
        """Solve with the Jacobian of an optimality map as a matrix, made anew at every point."""
        if size > REFINED:
            reason = f"errors of an optimality map are estimated up to {REFINED} unknowns, and here are {size:,}"
            return Solved.failed(b, reason, doubtful=False)
        if self._jacobian is None or self._jacobian[0] is not point:
            self._jacobian = point, point.dense_hessian()
        matrix = self._jacobian[1].mT if transposed else self._jacobian[1]
        if not bool(torch.isfinite(matrix).all()):
            return Solved.failed(b, "the Jacobian of the optimality map is not finite")
        values = torch.linalg.svdvals(matrix)
        smallest, largest = float(values[-1]), float(values[0])
        if smallest <= size * torch.finfo(b.dtype).eps * largest:
            reason = f"the Jacobian of the optimality map is singular: singular values from {smallest:.3g}"
            return Solved.failed(b, f"{reason} to {largest:.3g}")
        self.condition = largest / smallest
        x = torch.linalg.solve(matrix, b)
        return Solved(x, b - matrix @ x)

    def _by_smallest(self, product: Callable[[Tensor], Tensor], b: Tensor) -> Solved:
        """Run CG until its residual over the smallest eigenvalue is small."""
        if self._smallest is None:
            self._smallest, self.condition = smallest_eigenvalue(product, b)
        smallest = self._smallest
        if math.isnan(smallest):
            reason = f"the smallest curvature of the inner Hessian was not found in {MAX_STEPS} products"
            return Solved.failed(b, reason, doubtful=False)
        if not smallest > 0:
            return Solved.failed(b, _not_definite(smallest, math.inf, b.dtype))
        floor = (10 * torch.finfo(b.dtype).eps) ** 2 * float(torch.dot(b, b))

        def enough(run: Krylov) -> bool:
            return run.rr <= floor or (run.steps > 0 and run.residual <= ACCURACY * smallest * run.size)

        run = conjugate_gradients(product, torch.zeros_like(b), b, enough, MAX_STEPS)
        if run.negative is not None:
            return Solved.failed(b, _not_definite(run.negative, math.inf, b.dtype))
        return Solved(run.x, b - product(run.x), run.residual / (smallest * run.size))


def smallest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> tuple[float, float]:
    """Return the smallest eigenvalue of a symmetric operator, with a margin, and the condition number; estimates.

    NaN where it has not shown in `MAX_STEPS` products; a negative curvature where one was met. `like` gives size, dtype
    and device of the vectors.
    """
    generator = torch.Generator().manual_seed(SEED)
    # Drawn on the CPU so that the vector is the same on every device.
    vector = torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like)

    def enough(run: Krylov) -> bool:
        if run.steps == 0 or run.steps % LOOK:
            return False
        smallest, _, left = run.smallest_pair()
        return left <= SETTLED * smallest

    run = conjugate_gradients(product, torch.zeros_like(vector), vector, enough, MAX_STEPS)
    if run.negative is not None:
        return run.negative, math.inf
    smallest, largest, left = run.smallest_pair()
    if not left < smallest:
        return math.nan, math.inf
    # There is an eigenvalue within `left`.
    smallest -= 0.9 * left
    return smallest, largest / smallest


def _not_definite(smallest: float, largest: float, dtype: torch.dtype) -> str:
    if smallest > 0:
        return f"the inner Hessian is singular to {dtype}: curvatures from {smallest:.3g} to {largest:.3g}"
    return f"the inner Hessian has the curvature {smallest:.3g} at the refined iterate"


def flat_product(point: Linearization, raveler: tree.Raveler) -> Callable[[Tensor], Tensor]:
    """Return ``v -> H v`` on flat vectors."""

    def product(v: Tensor) -> Tensor:
        result: Tree = point.hvp(raveler.unravel(v))
        return raveler.ravel(result)

    return product
