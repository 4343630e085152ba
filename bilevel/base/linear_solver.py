"""`LinearSolver`: solves the adjoint system from products alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.core import rows as members
from bilevel.core import tree
from bilevel.core.options import default_tolerance, describe
from bilevel.core.status import GOOD, Verdict
from bilevel.core.tree import Tree

MODERATE = 20
"""Binary exponents up to which a right-hand side is taken as it is, without a scaled copy."""
BLOW_UP = 10.0
"""Relative residual above which a solve of a fixed number of products has failed; up to it, it is reported as it is."""


@dataclass(frozen=True)
class LinearSolution:
    """Solution of ``A x = b`` with its evidence.

    Attributes:
        x: the last iterate, shaped as b.
        residual: ``|b - A x| / |b|``, computed from the returned x.
        steps: iterations.
        verdict: status, with the sentence about a failure.
    """

    x: Tree
    residual: float
    steps: int
    verdict: Verdict = GOOD


@dataclass(frozen=True)
class LinearSystem:
    """``A x = b`` on flat vectors of shape (size,), as `LinearSolver.solve_flat` gets it.

    Attributes:
        matvec: v -> A v.
        b: right-hand side, not zero.
        x0: where to start, None for zero.
        tol: relative residual to reach.
        dense: returns A as a matrix, where that is cheaper than `size` products.
        precondition: v -> an approximation of ``A^-1 v``, symmetric positive definite; None for none.
        damping: the multiple of the identity that A is known to hold.
        definite: whether A has to be positive definite, as a Hessian at a minimum is, so that a negative curvature is a
            failure; None where nothing is known.
    """

    matvec: Callable[[Tensor], Tensor]
    b: Tensor
    x0: Tensor | None
    tol: float
    dense: Callable[[], Tensor] | None = None
    precondition: Callable[[Tensor], Tensor] | None = None
    damping: float = 0.0
    definite: bool | None = None

    def start(self) -> tuple[Tensor, Tensor]:
        """Return (x0, b - A x0), not to be written to; a zero start costs no product, and no memory."""
        if self.x0 is None:
            return self.b.new_zeros(()).expand_as(self.b), self.b
        return self.x0, self.b - self.matvec(self.x0)


@dataclass(frozen=True)
class BatchLinearSolution:
    """Solutions of ``A_i x_i = b_i`` with their evidence, an entry for each member.

    Attributes:
        x: the last iterates, stacked.
        residuals: ``|b_i - A_i x_i| / |b_i|``, computed from the returned x.
        steps: iterations.
        verdicts: statuses.
    """

    x: Tree
    residuals: Sequence[float]
    steps: Sequence[int]
    verdicts: Sequence[Verdict]


@dataclass(frozen=True)
class BatchLinearSystem:
    """``A_i x_i = b_i`` on matrices of shape (members, size), as `LinearSolver.solve_rows` gets it.

    Attributes:
        matvec: rows v_i -> rows A_i v_i.
        b: right-hand sides; a row may be zero.
        x0: where to start.
        tol: relative residual to reach.
        dense: returns all matrices, of shape (members, size, size).
        definite: see `LinearSystem`.
    """

    matvec: Callable[[Tensor], Tensor]
    b: Tensor
    x0: Tensor | None
    tol: float
    dense: Callable[[], Tensor]
    definite: bool | None = None

    def start(self) -> tuple[Tensor, Tensor]:
        """Return (x0, b - A x0); a zero start costs no product."""
        if self.x0 is None:
            return torch.zeros_like(self.b), self.b
        return self.x0, self.b - self.matvec(self.x0)

    def residuals(self, x: Tensor) -> Tensor:
        """Return ``|b_i - A_i x_i| / |b_i|``, and 0 where b_i is zero."""
        size = torch.linalg.vector_norm(self.b, dim=1)
        left = torch.linalg.vector_norm(self.b - self.matvec(x), dim=1)
        return torch.where(size > 0, left / size, 0.0)


Matvec: TypeAlias = Callable[[Tree], Tree]


@dataclass(frozen=True)
class LinearSolver(ABC):
    """Solves ``A x = b`` from products with A alone, on trees of any shape (0-d and one-element tensors included).

    A subclass implements `solve_flat` on one flat vector.
    """

    needs_symmetry = False

    def solve(
        self,
        matvec: Matvec,
        b: Tree,
        x0: Tree = None,
        *,
        tol: float | None = None,
        dense: Callable[[], Tensor] | None = None,
        precondition: Callable[[Tensor], Tensor] | None = None,
        damping: float = 0.0,
        definite: bool | None = None,
    ) -> LinearSolution:
        """Solve ``A x = b``.

        Args:
            matvec: v -> A v, on trees shaped as b.
            b: right-hand side.
            x0: where to start; zero by default.
            tol: relative residual to reach, in place of the solver's own.
            dense: returns A as a matrix, where that is cheaper than `size` products (used by `Direct`).
            precondition: an approximate inverse of A on flat vectors, symmetric positive definite (used by `CG`); it
                changes the number of steps, never the residual that is reached.
            damping: the multiple of the identity that `matvec` is known to hold (used by `Nystrom`).
            definite: whether A has to be positive definite (used by `Direct` and `GMRES`); None: not known.

        Returns:
            The last iterate with its true residual and a verdict; failure is never hidden and never raised.
        """
        raveler = tree.Raveler(b)
        flat = raveler.ravel(b)
        peak = float(torch.linalg.vector_norm(flat, torch.inf))
        if peak == 0:
            return LinearSolution(tree.zeros_like(b), 0.0, 0)
        # A power of two, so that nothing is rounded: squares of tiny (or huge) vectors must not leave the range.
        exponent = math.frexp(peak)[1]
        unit = 1.0 if abs(exponent) <= MODERATE else math.ldexp(1.0, exponent)

        def product(v: Tensor) -> Tensor:
            return raveler.ravel(matvec(raveler.unravel(v)))

        start = None if x0 is None else raveler.ravel(x0)
        if unit != 1.0:
            flat, start = flat / unit, None if start is None else start / unit
        tol = tol or getattr(self, "tol", None) or default_tolerance(flat.dtype)
        solution = self.solve_flat(LinearSystem(product, flat, start, tol, dense, precondition, damping, definite))
        return replace(solution, x=raveler.unravel(solution.x if unit == 1.0 else solution.x * unit))

    def solve_batch(
        self,
        matvec: Matvec,
        b: Tree,
        x0: Tree = None,
        *,
        dense: Callable[[], Tensor],
        definite: bool | None = None,
    ) -> BatchLinearSolution:
        """Solve the systems of all members of a batch.

        Args:
            matvec: v -> A v for all members, on trees shaped as b.
            b: right-hand sides, stacked.
            x0: where to start; zero by default.
            dense: returns the matrices, of shape (members, size, size).
            definite: see `solve`.

        Returns:
            The last iterates, with a residual and a verdict for each member.
        """
        raveler = members.Raveler(b)
        flat = raveler.ravel(b)
        # As in `solve`: powers of two, one for each member.
        unit = torch.ldexp(torch.ones_like(flat[:, :1]), torch.frexp(flat.abs().amax(dim=1, keepdim=True)).exponent)

        def product(v: Tensor) -> Tensor:
            return raveler.ravel(matvec(raveler.unravel(v)))

        start = None if x0 is None else raveler.ravel(x0) / unit
        tol = getattr(self, "tol", None) or default_tolerance(flat.dtype)
        solution = self.solve_rows(BatchLinearSystem(product, flat / unit, start, tol, dense, definite))
        return replace(solution, x=raveler.unravel(solution.x * unit))

    def at_tolerance(self, tol: float) -> LinearSolver:
        """Return this solver with the goal `tol`, or its own where that is larger; itself where it has no tolerance.

        Args:
            tol: relative residual to reach.

        Raises:
            ValueError: for a solver of a fixed number of `steps`, which no tolerance makes more exact.
        """
        steps = getattr(self, "steps", None)
        if steps is not None:
            raise ValueError(f"{describe(self)} takes {steps} products, whatever a `target_error` asks for: use CG().")
        own = getattr(self, "tol", None) or 0.0
        return replace(self, tol=max(tol, own)) if hasattr(self, "tol") else self  # type: ignore[call-arg]

    def solve_rows(self, system: BatchLinearSystem) -> BatchLinearSolution:
        """Solve the systems of all members, which are rows.

        Raises:
            ValueError: for a linear solver that does not run batches.
        """
        raise ValueError(f"{type(self).__name__} does not run batches: use CG or Direct, or take rows='loop'.")

    @abstractmethod
    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        """Solve a system of vectors whose right-hand side is not zero."""
