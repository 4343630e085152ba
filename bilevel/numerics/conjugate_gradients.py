"""Conjugate gradients (Hestenes & Stiefel 1952), written once: for linear solves, error estimates and balanced runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from bilevel.core.device import check_interval, to_floats

Operator: TypeAlias = Callable[[Tensor], Tensor]


@dataclass
class Krylov:
    """A CG run, as far as it has come.

    Attributes:
        x: the iterate.
        rr: squared norm of its recursive residual.
        negative: the curvature that stopped the run, None where all were positive; NaN for a NaN product.
        lengths: step lengths.
        ratios: quotients of successive squared residual norms (in the norm of the preconditioner, if any).
        energies: what each step took off the squared energy norm of the error.
        rz: squared norm of the residual in the norm of the preconditioner; None where there is none: then it is `rr`.
        xx: squared norm of the iterate where it came along with the other numbers, else None.
    """

    x: Tensor
    rr: float
    negative: float | None = None
    lengths: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    rz: float | None = None
    xx: float | None = None

    def advance(self, x: Tensor, energy: float, rr: float, rz: float | None = None, xx: float | None = None) -> None:
        """Take a step to x along a direction p of ``energy = p' A p``, where the residual has the squared norm rr.

        `rz` is that norm in the norm of the preconditioner, if any, and `xx` the squared norm of x, where it is known.
        """
        before, after = (self.rr, rr) if self.rz is None or rz is None else (self.rz, rz)
        length = before / energy
        self.lengths.append(length)
        self.energies.append(length * before)
        self.ratios.append(after / before)
        self.x, self.rr, self.rz, self.xx = x, rr, rz, xx

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.lengths)

    @property
    def residual(self) -> float:
        """Norm of the recursive residual."""
        return self.rr**0.5

    @property
    def size(self) -> float:
        """Norm of the iterate."""
        return float(torch.linalg.vector_norm(self.x)) if self.xx is None else self.xx**0.5

    def spectrum(self) -> tuple[float, float]:
        """Return the ends of the spectrum of CG's Lanczos matrix, inside that of A; (inf, 0) without steps."""
        if not self.lengths:
            return float("inf"), 0.0
        values = torch.linalg.eigvalsh(self._lanczos_matrix())
        return float(values[0]), float(values[-1])

    def smallest_pair(self) -> tuple[float, float, float]:
        """Return (smallest, largest Ritz value, residual of the smallest Ritz pair): an eigenvalue is so near."""
        values, vectors = torch.linalg.eigh(self._lanczos_matrix())
        left = self.ratios[-1] ** 0.5 / self.lengths[-1] * abs(float(vectors[-1, 0]))
        return float(values[0]), float(values[-1]), left

    def _lanczos_matrix(self) -> Tensor:
        a = torch.tensor(self.lengths, dtype=torch.float64)
        b = torch.tensor(self.ratios, dtype=torch.float64)
        diagonal = 1.0 / a
        diagonal[1:] += b[:-1] / a[:-1]
        off = b[:-1].sqrt() / a[:-1]
        return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)


def conjugate_gradients(
    matvec: Operator,
    x: Tensor,
    r: Tensor,
    enough: Callable[[Krylov], bool],
    limit: int | None = None,
    check_every: int | None = None,
    precondition: Operator | None = None,
) -> Krylov:
    """Return the CG run from x, whose residual is r, until `enough`, which looks at the run before each step.

    On the CPU the scalars are Python floats, which is cheaper than keeping them in tensors. An accelerator takes
    `check_every` steps (8) before its numbers are looked at: `enough` then sees the steps one by one, as on the CPU,
    and what was computed after the end is dropped; iterates and directions of so many steps are kept. A direction of
    negative or zero curvature ends the run before the step along it, and so do `limit` steps.

    `matvec` is symmetric. `precondition` is a symmetric positive definite operator near the inverse; then `ratios`, and
    so `spectrum`, are those of the preconditioned operator.

    >>> A, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    >>> run = conjugate_gradients(lambda v: A @ v, torch.zeros(2), b, lambda run: run.steps == 2)
    >>> bool((A @ run.x - b).norm() < 1e-6)
    True
    """
    every = check_every or check_interval(x.device)
    most = sys.maxsize if limit is None else limit
    if every == 1:
        return _step_by_step(matvec, x, r, enough, most, precondition)
    return _in_blocks(matvec, x, r, enough, most, every, precondition)


def _step_by_step(
    matvec: Operator, x: Tensor, r: Tensor, enough: Callable[[Krylov], bool], limit: int, precondition: Operator | None
) -> Krylov:
    p = r if precondition is None else precondition(r)
    run = Krylov(x, float(torch.dot(r, r)))
    run.rz = None if precondition is None else float(torch.dot(r, p))
    most = torch.finfo(p.dtype).max
    while run.steps < limit and not enough(run) and run.rr > 0:
        product = matvec(p)
        energy = float(torch.dot(p, product))
        before = run.rr if run.rz is None else run.rz
        # A step that the dtype cannot hold ends the run as a curvature that is not positive does.
        if not (energy > 0 and before < most * energy):
            run.negative = energy / float(torch.dot(p, p))
            return run
        length = before / energy
        # In place, but for the caller's vectors, and for those that a preconditioner may have handed back.
        owned = run.steps > 0 and precondition is None
        r = torch.sub(r, product, alpha=length, out=r if owned else None)
        del product
        x = torch.add(run.x, p, alpha=length)
        if precondition is None:
            z, rz = r, None
        else:
            z = precondition(r)
            rz = float(torch.dot(r, z))
        run.advance(x, energy, float(torch.dot(r, r)), rz)
        p = torch.add(z, p, alpha=run.ratios[-1], out=p if owned else None)
    return run


def _in_blocks(
    matvec: Operator,
    x: Tensor,
    r: Tensor,
    enough: Callable[[Krylov], bool],
    limit: int,
    every: int,
    precondition: Operator | None,
) -> Krylov:
    p = r if precondition is None else precondition(r)
    rr = torch.dot(r, r)
    rz = rr if precondition is None else torch.dot(r, p)
    run = Krylov(x, float(rr))
    run.rz = None if precondition is None else float(rz)
    while run.steps < limit and not enough(run) and run.rr > 0:
        iterates, directions, scalars = [], [], []
        # Nothing in here waits. A step after the end may divide by zero; nobody reads its numbers.
        for _ in range(min(every, limit - run.steps)):
            product = matvec(p)
            energy = torch.dot(p, product)
            length = rz / energy
            directions.append(p)
            x, r = torch.addcmul(x, length, p), torch.addcmul(r, length, product, value=-1)
            rr, before = torch.dot(r, r), rz
            z, rz = r, rr
            if precondition is not None:
                z = precondition(r)
                rz = torch.dot(r, z)
            p = torch.addcmul(z, rz / before, p)
            iterates.append(x)
            scalars += [energy, rr, rz, torch.dot(x, x)]
        values = to_floats(scalars)
        looked_at = zip(values[::4], values[1::4], values[2::4], values[3::4], strict=True)
        for iterate, direction, (along, squared, measured, size) in zip(iterates, directions, looked_at, strict=True):
            if enough(run) or not run.rr > 0:
                return run
            if not along > 0:
                run.negative = along / float(torch.dot(direction, direction))
                return run
            run.advance(iterate, along, squared, None if precondition is None else measured, size)
    return run


def conjugate_gradients_of_rows(
    matvec: Callable[[Tensor], Tensor], x: Tensor, r: Tensor, goals: Tensor, limit: int, every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the CG runs of independent systems side by side; a row that has reached its goal stands still.

    They are (last iterates, steps, the last curvature, the smallest and the largest one of each row); a last curvature
    that is not positive ended its row. `matvec` is a symmetric operator for each row, on matrices of shape (rows,
    size), x are the starts and r their residuals, and `goals` the squared residual norms at which rows end. Whether any
    row still moves is looked at `every` so many steps.

    >>> A, b = torch.tensor([[[2.0]], [[4.0]]]), torch.tensor([[2.0], [2.0]])
    >>> conjugate_gradients_of_rows(lambda v: (A @ v[..., None])[..., 0], 0 * b, b, torch.zeros(2), 5, 1)[0]
    tensor([[1.0000],
            [0.5000]])
    """
    p, rr = r, torch.linalg.vecdot(r, r)
    curvature, steps = torch.ones_like(rr), torch.zeros_like(rr, dtype=torch.int64)
    smallest, largest = torch.full_like(rr, torch.inf), torch.zeros_like(rr)
    for step in range(limit):
        moving = (rr > goals) & (curvature > 0)
        if step % every == 0 and not bool(moving.any()):
            break
        product = matvec(p)
        energy = torch.linalg.vecdot(p, product)
        curvature = torch.where(moving, energy / torch.linalg.vecdot(p, p), curvature)
        smallest = torch.where(moving, torch.minimum(smallest, curvature), smallest)
        largest = torch.where(moving, torch.maximum(largest, curvature), largest)
        moving = moving & (curvature > 0)
        length = torch.where(moving, rr / energy, 0.0)[:, None]
        still = ~moving[:, None]
        # A row that broke may hold NaN, which a length of zero would not keep out.
        x = torch.where(still, x, torch.addcmul(x, length, p))
        r = torch.where(still, r, torch.addcmul(r, -length, product))
        before, rr = rr, torch.linalg.vecdot(r, r)
        p = torch.where(still, p, torch.addcmul(r, (rr / before)[:, None], p))
        steps = steps + moving
    return x, steps, curvature, smallest, largest
