"""What K steps of a linear multistep solver do to one coordinate of a quadratic, with the exact derivative.

With the gradient ``lam z + b`` a step maps the p stored numbers s by ``M(lam) = mix + lam write read'``:

    s <- M(lam) s + b write,      ds/dlam <- M(lam) ds/dlam + write read' s,      ds/db <- M(lam) ds/db + write

so the derivative is carried forward beside the state, d numbers each. Steps that share their numbers are one power:

    one stored vector    M = 1 - q,   M^K,   G = sum_{j<K} M^j = (1 - M^K) / q,   both with their derivatives
    more                 the dual matrix [[N, N'], [0, N]] of N = [[M, write], [0, 1]], by repeated squaring

Everything broadcasts over leading dimensions of lam (hyperparameter vectors, seeds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.base import InnerState
from bilevel.core.rows import Weight
from bilevel.inner.coefficients import Coefficients, Numbers, Part, schedule
from bilevel.inner.multistep import LinearMultistep
from bilevel.numerics.eigenbasis import DiagonalProblem, geometric

POWER_FROM = 8
"""Steps with the same numbers from which the matrix power is cheaper than the steps."""


@dataclass(frozen=True)
class Moving:
    """The stored vectors of a run in the eigenbasis, and how they move; each of shape (p, ..., d)."""

    vectors: Tensor  # the first is the iterate
    by_value: Tensor  # their derivatives by the eigenvalues, coordinate by coordinate
    by_linear: Tensor  # their derivatives by the linear term

    @classmethod
    def standing(cls, vectors: Tensor) -> Moving:
        """Return vectors that depend on nothing."""
        return cls(vectors, torch.zeros_like(vectors), torch.zeros_like(vectors))


def unroll(
    solver: LinearMultistep, states: Sequence[InnerState], problem: DiagonalProblem, vectors: Tensor, tail: int
) -> Moving:
    """Return where ``solver.steps`` steps end, with the derivative of the last `tail` of them.

    Args:
        solver: a linear multistep solver with a number of steps.
        states: the first state (what it measured, its step count), one for all problems or one for each.
        problem: the quadratic, of batch shape (...).
        vectors: those of the first state in the eigenbasis, of a shape that broadcasts to (p, ..., d).
        tail: differentiated steps; the state before them counts as a constant.
    """
    steps = solver.steps or 0
    advance = _geometric if len(vectors) == 1 else _dual
    now = Moving.standing(vectors.expand(len(vectors), *problem.values.shape))
    if tail < steps:
        head = advance(now, problem, list(schedule(solver, states, 0, steps - tail)))
        now = Moving.standing(head.vectors)
    return advance(now, problem, list(schedule(solver, states, steps - tail, steps)))


def _geometric(now: Moving, problem: DiagonalProblem, parts: list[Part]) -> Moving:
    """Advance a method with one stored vector, each part in closed form."""
    values = problem.values
    for numbers, count in parts:
        all_of = numbers[0] if len(numbers) == 1 else Coefficients.of_rows(numbers, values)
        mix, read, write = map(_column, (all_of.mix[0][0], all_of.read[0], all_of.write[0]))
        slope, pushed = write * read, write * problem.linear
        power, power_slope, total, total_slope = geometric((1.0 - mix) - slope * values, count)
        moved = slope * torch.addcmul(total_slope * pushed, power_slope, now.vectors)
        now = Moving(
            torch.addcmul(total * pushed, power, now.vectors),
            torch.addcmul(moved, power, now.by_value),
            torch.addcmul(total * write, power, now.by_linear),
        )
    return now


def _column(weight: Weight) -> Weight:
    """Return a weight that differs by element of the batch as a column."""
    return weight[:, None] if isinstance(weight, Tensor) else weight


def _dual(now: Moving, problem: DiagonalProblem, parts: list[Part]) -> Moving:
    """Advance any method by dual matrices ``E + lam F``, of shape (2n, 2n) with n = p + 1."""
    fixed, along = _dual_matrices([numbers for numbers, _ in parts], problem.values)
    columns = _columns(now, problem)
    values = torch.cat([problem.values, problem.values], -1)[..., None, :]
    for (_, count), E, F in zip(parts, fixed, along, strict=True):
        if count < POWER_FROM:
            for _ in range(count):
                columns = torch.addcmul(E @ columns, values, F @ columns)
            continue
        matrix = E[..., None, :, :] + problem.values[..., None, None] * F[..., None, :, :]
        pairs = columns.reshape(*columns.shape[:-1], 2, -1).movedim(-1, -3)
        columns = (torch.linalg.matrix_power(matrix, count) @ pairs).movedim(-3, -1).flatten(-2)
    p = len(now.vectors)
    moving, pushed = columns.reshape(*columns.shape[:-1], 2, -1).movedim((-3, -2), (0, 1)).unbind(1)
    return Moving(moving[p + 1 : -1], moving[:p], pushed[p + 1 : -1])


def _dual_matrices(steps: list[Numbers], like: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return E and F of every step; stacked over the batch where its elements have numbers of their own."""
    if not steps:
        return (), ()
    read, write, mix = (
        torch.tensor([[getattr(each, name) for each in numbers] for numbers in steps], dtype=torch.float64)
        for name in ("read", "write", "mix")
    )
    p = read.shape[-1]
    n = p + 1
    fixed, along = torch.zeros(2, *read.shape[:-1], 2 * n, 2 * n, dtype=torch.float64)
    for start in (0, n):
        vectors = slice(start, start + p)
        fixed[..., vectors, vectors] = mix
        fixed[..., vectors, start + p] = write
        fixed[..., start + p, start + p] = 1.0
        along[..., vectors, vectors] = write[..., :, None] * read[..., None, :]
    fixed[..., :p, n : n + p] = along[..., :p, :p]
    both = (fixed.to(like), along.to(like))
    # One set of numbers for the whole batch needs no batch dimension.
    return tuple((each[:, 0] if each.shape[1] == 1 else each).unbind(0) for each in both)


def _columns(now: Moving, problem: DiagonalProblem) -> Tensor:
    """Return the columns (by_value, 0, vectors, b) and (0, 0, by_linear, 1) side by side, of shape (..., 2n, 2d)."""
    linear = problem.linear.expand(now.vectors.shape[1:])[None]
    none = torch.zeros_like(linear)
    moving = torch.cat([now.by_value, none, now.vectors, linear])
    pushed = torch.cat([torch.zeros_like(now.by_value), none, now.by_linear, torch.ones_like(linear)])
    return torch.cat([moving, pushed], -1).movedim(0, -2)
