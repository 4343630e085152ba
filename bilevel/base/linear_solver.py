"""`LinearSolver`: solves the adjoint system from products alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor

from bilevel.core import tree
from bilevel.core.options import check_fields, default_tolerance, describe
from bilevel.core.status import GOOD, warn
from bilevel.core.tree import Tree

MODERATE = 20
"""Binary exponents up to which a right-hand side is taken as it is, without a scaled copy."""
BLOW_UP = 10.0
"""Relative residual above which a solve of a fixed number of products has failed; up to it, it is reported as it is."""


@dataclass(frozen=True)
class LinearSolution:
    """Solution of ``A x = b`` with its evidence; of rows, ``A_i x_i = b_i``, with a sequence of each figure.

    Attributes:
        x: the last iterate, shaped as b.
        residual: ``|b - A x| / |b|``, computed from the returned x.
        steps: iterations.
        verdict: status, with the sentence about a failure.
    """

    x: Tree
    residual: Any
    steps: Any
    verdict: Any = GOOD


@dataclass(frozen=True)
class LinearSystem:
    """``A x = b`` on vectors of shape (size,), or on rows of shape (rows, size), as `LinearSolver.solve_flat` gets it.

    Attributes:
        matvec: v -> A v.
        b: right-hand side; not zero, though a row may be.
        x0: where to start, None for zero.
        tol: relative residual to reach.
        dense: returns A as a matrix, where that is cheaper than `size` products; of rows, all matrices.
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

    def residual(self, x: Tensor) -> Tensor:
        """Return ``|b - A x| / |b|``, and 0 where b is zero."""
        size = torch.linalg.vector_norm(self.b, dim=-1)
        left = torch.linalg.vector_norm(self.b - self.matvec(x), dim=-1)
        return torch.where(size > 0, left / size, 0.0)


Matvec: TypeAlias = Callable[[Tree], Tree]


@dataclass(frozen=True)
class LinearSolver(ABC):
    """Solves ``A x = b`` from products with A alone, on trees of any shape (0-d and one-element tensors included).

    A subclass implements `solve_flat`.
    """

    # Without annotations, which would make them options of every linear solver.
    requires = cast(Set[str], frozenset())
    """What a system must have, by the names of `bilevel.base.requirements`."""
    tol = cast("float | None", None)
    """Relative residual to reach, of a solver that has this option."""
    steps = cast("int | None", None)
    """The number of products, where it is fixed."""
    rowwise: ClassVar[bool] = False
    """Whether `solve_flat` takes systems whose right-hand side has the shape (rows, size), each row a system."""

    @property
    def dense_factor(self) -> bool:
        """Whether a dense factor may stand for it, where there is one, since the residual is all; default: no."""
        return False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if vars(cls).get("needs_symmetry"):  # for one release
            now = '`requires = frozenset({"symmetric"})`'
            warn(f"{cls.__name__}.needs_symmetry is now {now}.", DeprecationWarning)
            cls.requires = frozenset({"symmetric"})

    def __post_init__(self) -> None:
        check_fields(self)

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
        rows: bool = False,
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
            rows: whether leaves have a leading dimension, each row a system of its own.

        Returns:
            The last iterate with its true residual and a verdict, of rows a sequence of these; failure is never hidden
            and never raised.

        Raises:
            ValueError: for rows, by a solver that takes one system at a time.
        """
        if rows and not self.rowwise:
            raise ValueError(f"{describe(self)} takes one system at a time: use CG() or Direct() for rows.")
        raveler = tree.Raveler(b, batched=rows)
        flat = raveler.ravel(b)
        unit: float | Tensor = _scales(flat) if rows else _scale(flat)
        if not rows and unit == 0.0:
            return LinearSolution(tree.zeros_like(b), 0.0, 0)

        def product(v: Tensor) -> Tensor:
            return raveler.ravel(matvec(raveler.unravel(v)))

        start = None if x0 is None else raveler.ravel(x0)
        if scaled := rows or unit != 1.0:
            flat, start = flat / unit, None if start is None else start / unit
        tol = tol or self.tol or default_tolerance(flat.dtype)
        solution = self.solve_flat(LinearSystem(product, flat, start, tol, dense, precondition, damping, definite))
        return replace(solution, x=raveler.unravel(solution.x * unit if scaled else solution.x))

    def at_tolerance(self, tol: float) -> LinearSolver:
        """Return this solver with the goal `tol`, or its own where that is larger; itself where it has no tolerance.

        Raises:
            ValueError: for a solver of a fixed number of `steps`, which no tolerance makes more exact.
        """
        if self.steps is not None:
            asked = "whatever a `target_error` asks for"
            raise ValueError(f"{describe(self)} takes {self.steps} products, {asked}: use CG().")
        has_tol = any(each.name == "tol" for each in fields(self))
        return replace(self, tol=max(tol, self.tol or 0.0)) if has_tol else self  # type: ignore[call-arg]

    @abstractmethod
    def solve_flat(self, system: LinearSystem) -> LinearSolution:
        """Solve a system of vectors whose right-hand side is not zero, or of rows where `rowwise` says so."""


def _scale(flat: Tensor) -> float:
    """Return a power of two of the size of a vector, so that nothing is rounded; 1 for a moderate one, 0 for zero.

    Squares of tiny (or huge) vectors must not leave the range.
    """
    peak = float(torch.linalg.vector_norm(flat, torch.inf))
    if peak == 0:
        return 0.0
    exponent = math.frexp(peak)[1]
    return 1.0 if abs(exponent) <= MODERATE else math.ldexp(1.0, exponent)


def _scales(flat: Tensor) -> Tensor:
    """Return the same for every row, of shape (rows, 1), without a wait for the result."""
    return torch.ldexp(torch.ones_like(flat[:, :1]), torch.frexp(flat.abs().amax(dim=1, keepdim=True)).exponent)
